"""Captions of pictures: sidecar files in any encoding, kohya's repeats, the trigger, the order of tags."""

import os
import random
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megaman.common.console import Exit, UserError, control_in, one_line
from megaman.common.files import write_text
from megaman.data.name_captions import beside, caption_from_name

CAPTION_SUFFIXES = (".txt", ".caption")
BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
MAX_CAPTION_BYTES = 100_000  # 75 tokens are about 400; such a file is something else under a caption's name
MAX_REPEATS = 1000  # kohya's users write 1-200; a larger number before a folder's name is a year or a date


# ---------------------------------------------------------------- captions from files
@dataclass(frozen=True)
class Caption:
    """A caption and where it came from: the user's own sidecar file, or the picture's name."""

    text: str
    source: Literal["file", "name"]
    file: Path | None = field(default=None, compare=False)  # the sidecar; equal words are equal captions


def read_captions(
    pictures: Sequence[Path], folder: Path, trigger: str, errors: Sequence[str] = ()
) -> list[Caption]:
    """One caption per picture: the text of its sidecar file, else words from its name behind the trigger.

    Sidecars, the first with any text counts: a.png.txt, a.txt, a.png.caption, a.caption. All unreadable files
    are named in one error, behind the folder's other errors.
    """
    sidecars = _sidecars_of(pictures)
    captions: list[Caption] = []
    problems = list(errors)
    for picture in pictures:
        try:
            own = _own_caption(sidecars[picture], trigger)
            captions.append(own or Caption(caption_from_name(picture, folder, trigger), "name"))
        except UserError as error:
            problems.append(one_line(str(error)))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)), Exit.DATA)  # two pictures may share a bad file
    return captions


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
            named.setdefault((parent, _alike(path.name)), []).append(path)
    found: dict[Path, list[Path]] = {}
    for picture in pictures:
        wanted = [stem + suffix for suffix in CAPTION_SUFFIXES for stem in (picture.name, picture.stem)]
        found[picture] = [path for name in wanted for path in _nearest(named, picture.parent, name)]
    return found


def _nearest(named: dict[tuple[Path, str], list[Path]], parent: Path, name: str) -> list[Path]:
    """The files of that name in any letter case of the suffix; another case of the stem only if there is no
    such file, as in folders that come from Windows.
    """
    files = named.get((parent, _alike(name)), [])
    return [path for path in files if path.stem == Path(name).stem] or files


def _alike(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()  # macOS takes names apart: e and its accent


def _own_caption(sidecars: list[Path], trigger: str) -> Caption | None:
    for sidecar in sidecars:
        text = " ".join(_text_of(sidecar).split())
        if text:
            return Caption(re.sub(r"\[trigger\]", lambda _: trigger, text, flags=re.I), "file", sidecar)
    return None


def _text_of(sidecar: Path) -> str:
    data = _bytes_of(sidecar)
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


def _bytes_of(sidecar: Path) -> bytes:
    try:
        mode = sidecar.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{sidecar}: is a folder, not a caption; rename it", Exit.DATA)
        if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
            raise UserError(f"{sidecar}: is no ordinary file; remove it", Exit.DATA)
        with sidecar.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(
            f"{sidecar}: a link to a file that is gone; remove it or fix it", Exit.DATA
        ) from error
    except OSError as error:
        reason = f"caption can't be read ({error.strerror})"
        raise UserError(f"{sidecar}: {reason}; fix its permissions or remove it", Exit.DATA) from error
    if len(data) > MAX_CAPTION_BYTES:
        reason = f"over {MAX_CAPTION_BYTES // 1000} kB, which is no caption"
        raise UserError(f"{sidecar}: {reason}; shorten it or rename it", Exit.DATA)
    return data


# ---------------------------------------------------------------- captions from names


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


def _numbered(picture: Path, folder: Path) -> list[tuple[str, int]]:
    """The folders above the picture that are named like `10_name`, the nearest first."""
    found = ((parent, re.match(r"([0-9]+)_.", parent.name)) for parent in picture.relative_to(folder).parents)
    return [(parent.as_posix(), int(match[1])) for parent, match in found if match]


# ---------------------------------------------------------------- what is made of captions
def has_trigger(caption: str, trigger: str) -> bool:
    """Whether the trigger stands in the caption, in any case, and not as a part of other words."""
    return _pattern_in_captions(trigger).search(caption) is not None


def with_trigger_replaced(captions: Sequence[str], trigger: str, name: str) -> list[str]:
    """The captions with another name in the trigger's place; the bare name where the trigger is missing."""
    pattern = _pattern_in_captions(trigger)
    return [pattern.sub(lambda _: name, caption) if pattern.search(caption) else name for caption in captions]


def _pattern_in_captions(trigger: str) -> re.Pattern[str]:
    words = trigger.split()
    if not words:
        return re.compile("(?!)")  # nothing holds it
    spelled = r"\s+".join(re.escape(word) for word in words)
    return re.compile(f"(?<!{beside(words[0][0])}){spelled}(?!{beside(words[-1][-1])})", re.IGNORECASE)


def variants(text: str, count: int, *, keep_tags: int, rng: random.Random) -> list[str]:
    """`count` orders of the caption's comma-separated tags, of which the first `keep_tags` (>= 0) stay; some
    may be equal.
    """
    tags = _tags_of(text)
    kept, rest = tags[:keep_tags], tags[keep_tags:]
    return [", ".join(kept + rng.sample(rest, len(rest))) for _ in range(count)]


def tag_frequencies(captions: Sequence[str]) -> dict[str, int]:
    """How often each comma-separated tag occurs, in lower case as kohya counts; the most frequent first, then
    by the alphabet.
    """
    counts = Counter(tag.lower() for caption in captions for tag in _tags_of(caption))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _tags_of(text: str) -> list[str]:
    tags = (" ".join(tag.split()) for tag in text.split(","))
    return [tag for tag in tags if tag]


def write_caption_set(folder: Path, captions: Sequence[tuple[Path, str]]) -> tuple[list[Path], ...]:
    """Writes a .txt a picture under `folder`, to be edited: the new files; those that were there, and stay.

    captions: paths below the data folder, and the words. a.png and a.jpg share a.txt, unless theirs differ:
    then the second one's is a.jpg.txt.
    """
    texts: dict[Path, str] = {}
    for picture, text in captions:
        file = folder / picture.with_suffix(".txt")
        if texts.get(file, text) != text:
            file = folder / picture.with_name(f"{picture.name}.txt")
        texts[file] = text
    for file in texts:
        if not file.parent.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{file}: would lie outside {folder}. Name another --output_dir.", Exit.USAGE)
    new = [file for file in texts if not os.path.lexists(file)]
    for file in new:
        write_text(file, f"{texts[file]}\n")
    return new, [file for file in texts if file not in new]
