"""Captions of pictures: sidecar files in any encoding, metadata.jsonl, kohya's repeats, the trigger, the
order of tags.
"""

import json
import os
import random
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megaman.common.console import Exit, UserError, control_in, is_text, one_line
from megaman.common.files import folded
from megaman.config.train import DataFlags
from megaman.data.folder import CAPTION_SUFFIXES, LIST, Listing
from megaman.data.name_captions import beside, caption_from_name
from megaman.data.scan import Skipped

BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
MAX_CAPTION_BYTES = 100_000  # 75 tokens are about 400; such a file is something else under a caption's name
MAX_LIST_BYTES = 1 << 26  # of metadata.jsonl: captions of 100,000 pictures and more
LONGEST_TAG = 5  # words; a longer line is a sentence
SENTENCE_ENDS = tuple(".!?。！？")
SIDES = (  # words that name one: lefthanded, bottomright; not copyright, 左右對稱, 左輪 (a revolver), 座右銘
    r"(?<![a-z])(?:top|bottom|upper|lower)?(?:left|right)(?=(?:most|wards?|hand(?:ed)?|side)?(?![a-z]))"
    r"|(?<![左座])[左右](?![右輪轮])"
)
OTHER_SIDE = {"left": "right", "right": "left", "左": "右", "右": "左"}
MAX_REPEATS = 1000  # kohya's users write 1-200; a larger number before a folder's name is a year or a date


# ---------------------------------------------------------------- captions from files
@dataclass(frozen=True)
class Caption:
    """A caption and where it came from: the user's own file, or the picture's name."""

    text: str
    source: Literal["file", "name"]
    file: Path | None = field(default=None, compare=False)  # the sidecar; equal words are equal captions
    others: tuple[str, ...] = ()  # further wordings: each draw takes one of all

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every way in which the file words it."""
        return (self.text, *self.others)

    @property
    def whole(self) -> str:
        """All wordings, a line each."""
        return "\n".join(self.wordings)


def read_captions(
    pictures: Sequence[Path], folder: Path, settings: DataFlags, skipped: Sequence[Skipped] = ()
) -> list[Caption]:
    """One caption per picture: the text of its sidecar file, else what metadata.jsonl says of it, else words
    from its name behind the trigger.

    Sidecars, the first with any text counts: a.png.txt, a.txt, a.png.caption, a.caption. UserError (exit 3)
    that names every unreadable file, and the pictures that were skipped; --strict makes these an error too.
    """
    trigger = settings.trigger
    sidecars = _sidecars_of(pictures)
    listed, problems = _listed_texts(pictures, folder)
    captions: list[Caption] = []
    for picture in pictures:
        try:
            own = _own_caption(sidecars[picture], trigger) or _worded(listed.get(picture, ""), trigger, None)
            captions.append(own or Caption(caption_from_name(picture, folder, trigger), "name"))
        except UserError as error:
            problems.append(one_line(str(error)))
    remedy = " (--strict: fix it or remove it)" if settings.strict else ""
    if problems or (settings.strict and skipped):
        named = [*(f"{file}{remedy}" for file in skipped), *problems]
        raise UserError(list(dict.fromkeys(named)), Exit.DATA)  # two pictures may share a file
    return captions


def captions_of_nobody(listing: Listing, pictures: Sequence[Path], captions: Sequence[Caption]) -> list[str]:
    """What people mean to be a caption and gives no picture its words: text files, by their names below the
    data folder, and lines of metadata.jsonl.
    """
    used = {caption.file for caption in captions}
    sidecars = _sidecars_of(listing.pictures)
    own = dict(zip(pictures, captions, strict=True))
    for picture in listing.pictures:  # a skipped one's caption waits for it; an empty file says there is none
        if picture not in own or own[picture].file is None:
            used.update(sidecars[picture])
    picture_at = _finder(listing.pictures)
    lost = []
    for file in listing.texts:
        name = file.relative_to(listing.folder).as_posix()
        found = _read_list(file) if file.name == LIST and _is_above(file.parent, pictures) else CaptionList()
        lost += [f"{each} in {name}" for each in found.texts if picture_at(file.parent / each) is None]
        lost += [f"{reason} in {name}" for reason in found.unusable]
        lost += [name] if file not in used and not (found.texts or found.unusable) else []
    return lost


def shared_captions(pictures: Sequence[Path], captions: Sequence[Caption]) -> dict[Path, list[Path]]:
    """The caption files that speak for several pictures (a.txt for a.png and a.jpg), and these pictures."""
    users: dict[Path, list[Path]] = {}
    for picture, caption in zip(pictures, captions, strict=True):
        if caption.file is not None:
            users.setdefault(caption.file, []).append(picture)
    return {file: pictures for file, pictures in users.items() if len(pictures) > 1}


def _sidecars_of(pictures: Sequence[Path]) -> dict[Path, list[Path]]:
    """Each picture's caption files, the most telling first. Every folder is listed once."""
    named: dict[tuple[Path, str], list[Path]] = {}
    for parent in {picture.parent for picture in pictures}:
        try:
            files = sorted(path for path in parent.iterdir() if path.suffix.lower() in CAPTION_SUFFIXES)
        except OSError as error:
            raise UserError(
                f"{parent}: can't be listed ({error.strerror}); fix its permissions", Exit.DATA
            ) from error
        for path in reversed(files):  # ".txt" before ".TXT"
            named.setdefault((parent, folded(path.name)), []).append(path)
    found: dict[Path, list[Path]] = {}
    for picture in pictures:
        wanted = [stem + suffix for suffix in CAPTION_SUFFIXES for stem in (picture.name, picture.stem)]
        found[picture] = [path for name in wanted for path in _nearest(named, picture.parent, name)]
    return found


def _nearest(named: dict[tuple[Path, str], list[Path]], parent: Path, name: str) -> list[Path]:
    """The files of that name in any letter case of the suffix; another case of the stem only if there is no
    such file, as in folders that come from Windows.
    """
    files = named.get((parent, folded(name)), [])
    return [path for path in files if path.stem == Path(name).stem] or files


def _own_caption(sidecars: list[Path], trigger: str) -> Caption | None:
    return next(filter(None, (_worded(_text_of(file), trigger, file) for file in sidecars)), None)


def _worded(text: str, trigger: str, file: Path | None) -> Caption | None:
    """The caption that a text of one line or several is; None of a text without words."""
    lines = [line for each in text.splitlines() if (line := " ".join(each.split()))]
    if not lines:
        return None
    filled = [re.sub(r"\[trigger\]", lambda _: trigger, line, flags=re.I) for line in lines]
    first, *others = _wordings(filled, trigger)
    return Caption(first, "file", file, tuple(others))


def _wordings(lines: list[str], trigger: str) -> list[str]:
    """What several lines mean: a caption each, where all hold the trigger or all are whole sentences; the
    tags of one caption, where none is a sentence and all are short or any holds a comma; else one text that
    was wrapped. A single line stays as it is.
    """
    if len(lines) == 1 or all(has_trigger(line, trigger) for line in lines) or all(map(_is_sentence, lines)):
        return lines
    are_short = all(len(line.split()) <= LONGEST_TAG for line in lines)
    if not any(map(_is_sentence, lines)) and (are_short or any("," in line for line in lines)):
        return [", ".join(tag for line in lines for tag in _tags_of(line))]
    return [" ".join(lines)]


def _is_sentence(line: str) -> bool:
    return line.endswith(SENTENCE_ENDS)


def _listed_texts(pictures: Sequence[Path], folder: Path) -> tuple[dict[Path, str], list[str]]:
    """What the metadata.jsonl of their folders say of the pictures, of several the nearest; and what in these
    files can't be read.
    """
    picture_at = _finder(pictures)
    places = {parent for picture in pictures for parent in picture.parents if parent.is_relative_to(folder)}
    texts: dict[Path, str] = {}
    problems: list[str] = []
    for place in sorted(places, key=lambda place: len(place.parts)):
        found = _read_list(place / LIST)
        problems += found.problems
        meant = [(picture_at(place / name), name, text) for name, text in found.texts.items()]
        meant.sort(
            key=lambda each: each[0] is not None and each[0].name == Path(each[1]).name
        )  # the last wins
        texts |= {picture: text for picture, _, text in meant if picture is not None}
    return texts, problems


def _finder(pictures: Sequence[Path]) -> Callable[[Path], Path | None]:
    """Finds the picture that a list means by a path: of its very name, else the only one of another letter
    case, as in lists that come from Windows.
    """
    exact = {os.path.abspath(picture): picture for picture in pictures}
    alike: dict[str, list[Path]] = {}
    for plain, picture in exact.items():
        alike.setdefault(folded(plain), []).append(picture)

    def picture_at(path: Path) -> Path | None:
        plain = os.path.abspath(path)
        near = alike.get(folded(plain), [])
        if plain in exact or len(near) == 1:
            return exact.get(plain, near[0])
        return picture_at(Path(str(path).replace("\\", "/"))) if "\\" in str(path) else None

    return picture_at


def _is_above(place: Path, pictures: Sequence[Path]) -> bool:
    return any(picture.is_relative_to(place) for picture in pictures)


@dataclass(frozen=True)
class CaptionList:
    """What a metadata.jsonl holds; nothing, if it is none of a data set's."""

    texts: dict[str, str] = field(default_factory=dict)  # a picture's name -> its caption
    problems: list[str] = field(default_factory=list)  # lines that can't be read, as errors
    unusable: list[str] = field(default_factory=list)  # lines that give no caption


def _read_list(file: Path) -> CaptionList:
    """Reads a metadata.jsonl, if it is there."""
    found = CaptionList()
    if not file.is_file():
        return found
    try:
        lines = _text_of(file, MAX_LIST_BYTES).split("\n")
    except UserError as error:
        found.problems.append(one_line(str(error)))
        return found
    strange = [
        number
        for number, line in enumerate(lines, 1)
        if line.strip() and not _read_entry(line, f"{file}: line {number}", found)
    ]
    if found.texts:  # a data set's list, so they are meant to be entries
        found.unusable.extend(f"line {number} without a file_name" for number in strange)
    return found


def _read_entry(line: str, where: str, found: CaptionList) -> bool:
    """Puts a line where it belongs; False if it is no entry of a data set's list."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"is no JSON ({str(error)[:60]}); mend it, or rename the file"
        found.problems.append(one_line(f"{where} {reason}"))
        return True
    if not isinstance(entry, Mapping) or not isinstance(entry.get("file_name"), str):
        return False
    name = entry["file_name"]
    text = entry.get("text")
    if not isinstance(text, str):
        found.unusable.append(f"{name!r} without a text")
    elif control_in(name + text) or not is_text(name + text):
        found.problems.append(one_line(f"{where} holds a control character or half of one; save it as text"))
    elif name in found.texts:
        found.unusable.append(f"{name!r} once more")
    else:
        found.texts[name] = text
    return True


def _text_of(sidecar: Path, most: int = MAX_CAPTION_BYTES) -> str:
    data = _bytes_of(sidecar, most)
    mark, encoding = next(
        ((mark, name) for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), (b"", "utf-8")
    )
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        reason = f"not {encoding.upper()} at byte {at} (0x{data[at]:02x})"
        raise UserError(f"{sidecar}: {reason}; save it as UTF-8", Exit.DATA) from error
    if control := control_in(text):
        at = len(mark) + len(text[: control.start()].encode(encoding))
        kind = f"control character U+{ord(control[0]):04X}" if control[0] != "\0" else "NUL"
        reason = f"holds {kind} at byte {at}" + (", as UTF-16 without a mark does" if kind == "NUL" else "")
        raise UserError(f"{sidecar}: {reason}; save it as UTF-8 text", Exit.DATA)
    return text.replace("\ufeff", "")  # a second mark in the middle, where files were joined, is no word


def _bytes_of(sidecar: Path, most: int) -> bytes:
    try:
        mode = sidecar.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{sidecar}: is a folder, not a caption; rename it", Exit.DATA)
        if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
            raise UserError(f"{sidecar}: is no ordinary file; remove it", Exit.DATA)
        with sidecar.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError as error:
        raise UserError(
            f"{sidecar}: a link to a file that is gone; remove it or fix it", Exit.DATA
        ) from error
    except OSError as error:
        reason = f"caption can't be read ({error.strerror})"
        raise UserError(f"{sidecar}: {reason}; fix its permissions or remove it", Exit.DATA) from error
    if len(data) > most:
        reason = f"over {most // 1000} kB, which is no caption"
        raise UserError(f"{sidecar}: {reason}; shorten it or rename it", Exit.DATA)
    return data


# ---------------------------------------------------------------- kohya's folders
def repeats_of(picture: Path, folder: Path) -> int:
    """How often an epoch shows the picture: the number of its nearest `10_name` folder below the data folder,
    1 without one.

    As in kohya, the data folder's own name doesn't count. Numbers outside 1-MAX_REPEATS are passed over; see
    `odd_repeats`.
    """
    numbers = (number for _, number in _numbered(picture, folder))
    return next((number for number in numbers if 1 <= number <= MAX_REPEATS), 1)


def odd_repeats(pictures: Sequence[Path], folder: Path) -> list[str]:
    """The folders, relative to the data folder, whose number can't be meant as repeats: 0_name, 2023_name."""
    numbered = {pair: None for picture in pictures for pair in _numbered(picture, folder)}
    return [name for name, number in numbered if not 1 <= number <= MAX_REPEATS]


def concepts_of(pictures: Sequence[Path], folder: Path) -> list[str]:
    """The names behind the numbers of kohya's folders: what their pictures show."""
    nearest = [numbered[0][0] for picture in pictures if (numbered := _numbered(picture, folder))]
    names = (Path(name).name.partition("_")[2].strip() for name in nearest)
    return list(dict.fromkeys(name for name in names if name))


def _numbered(picture: Path, folder: Path) -> list[tuple[str, int]]:
    """The folders above the picture that are named like `10_name`, the nearest first."""
    found = ((parent, re.match(r"([0-9]+)_", parent.name)) for parent in picture.relative_to(folder).parents)
    return [(parent.as_posix(), int(match[1])) for parent, match in found if match]


# ---------------------------------------------------------------- what is made of captions
def has_trigger(caption: str, trigger: str) -> bool:
    """Whether the trigger stands in the caption, in any case, and not as a part of other words."""
    return _pattern_in_captions(trigger).search(caption) is not None


def with_trigger_replaced(captions: Sequence[str], trigger: str, name: str) -> list[str]:
    """The captions with another name in the trigger's place; the bare name where the trigger is missing;
    empty ones where the name is.
    """
    if not name.strip():
        return [""] * len(captions)
    pattern = _pattern_in_captions(trigger)
    return [pattern.sub(lambda _: name, caption) if pattern.search(caption) else name for caption in captions]


def mirrored(caption: str, trigger: str) -> str:
    """What a caption says of its picture mirrored: left and right change places, except in the trigger."""

    def other(side: re.Match[str]) -> str:
        word, found = side[0], OTHER_SIDE[side[0].lower()]
        return found.upper() if word.isupper() else found.capitalize() if word[0].isupper() else found

    def exchanged(found: re.Match[str]) -> str:
        is_trigger = found["trigger"] is not None
        return found[0] if is_trigger else re.sub("left|right|左|右", other, found[0], flags=re.IGNORECASE)

    trigger_or_side = f"(?P<trigger>{_pattern_in_captions(trigger).pattern})|{SIDES}"
    return re.sub(trigger_or_side, exchanged, caption, flags=re.IGNORECASE)


def _pattern_in_captions(trigger: str) -> re.Pattern[str]:
    words = trigger.split()
    if not words:
        return re.compile("(?!)")  # nothing holds it
    spelled = r"\s+".join(re.escape(word) for word in words)
    return re.compile(f"(?<!{beside(words[0][0])}){spelled}(?!{beside(words[-1][-1])})", re.IGNORECASE)


def variants(texts: Sequence[str], count: int, *, keep_tags: int, rng: random.Random) -> list[str]:
    """`count` orders of each text's comma-separated tags, of which the first `keep_tags` (>= 0) stay; some
    may be equal.
    """
    found = []
    for text in texts:
        tags = _tags_of(text)
        kept, rest = tags[:keep_tags], tags[keep_tags:]
        found += [", ".join(kept + rng.sample(rest, len(rest))) for _ in range(count)]
    return found


def tag_frequencies(captions: Sequence[str]) -> dict[str, int]:
    """How often each comma-separated tag occurs, in lower case as kohya counts; the most frequent first, then
    by the alphabet.
    """
    counts = Counter(tag.lower() for caption in captions for tag in _tags_of(caption))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _tags_of(text: str) -> list[str]:
    tags = (" ".join(tag.split()) for tag in text.split(","))
    return [tag for tag in tags if tag]
