"""Captions as people write them, or as their files' names tell them. Knows sidecar files and encodings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaman.errors import DATA, UserError

CAPTION_SUFFIXES = (".txt", ".caption")
BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))

CaptionSource = Literal["file", "name"]


@dataclass(frozen=True)
class Caption:
    """A caption and where it came from: the user's own sidecar file, or the picture's name."""

    text: str
    source: CaptionSource


def read_captions(pictures: Sequence[Path], folder: Path, trigger: str) -> list[Caption]:
    """A caption a picture: its sidecar's text, else words from its name behind the trigger.

    All unreadable files are named in one error.
    """
    captions: list[Caption] = []
    problems: list[str] = []
    for picture in pictures:
        try:
            captions.append(_read_caption(picture, folder, trigger))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems), DATA)
    return captions


def _read_caption(picture: Path, folder: Path, trigger: str) -> Caption:
    for suffix in CAPTION_SUFFIXES:
        sidecar = picture.with_suffix(suffix)
        if sidecar.is_file():
            text = " ".join(_decoded(sidecar).split()).replace("[trigger]", trigger)
            if text:
                return Caption(text, "file")
    return Caption(caption_from_name(picture, folder, trigger), "name")


def _decoded(sidecar: Path) -> str:
    try:
        data = sidecar.read_bytes()
    except OSError as error:
        raise UserError(f"{sidecar}: caption can't be read ({error.strerror})", DATA) from error
    mark, encoding = next(
        ((mark, name) for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), (b"", "utf-8")
    )
    try:
        text = data[len(mark) :].decode(encoding)
        if "\0" in text:
            raise UserError(
                f"{sidecar}: holds NUL at byte {data.index(0)}, as UTF-16 without a mark "
                "does; save it as UTF-8",
                DATA,
            )
        return text
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        raise UserError(
            f"{sidecar}: not {encoding.upper()} at byte {at} (0x{data[at]:02x}); save it as UTF-8", DATA
        ) from error


def caption_from_name(picture: Path, folder: Path, trigger: str) -> str:
    """A caption from the file's and its folder's name, always the same: `megaman_x_02.jpg` -> "mega man X".

    It begins with the trigger.
    """
    parts = [*picture.relative_to(folder).parts[:-1], picture.stem]
    words = [word for part in parts for word in _words(part)]
    squeezed, own = "".join(trigger.lower().split()), trigger.lower().split()
    rest: list[str] = []
    at = 0
    while at < len(words):  # the name may say the trigger in one word ("megaman") or in several
        if words[at].lower() == squeezed:
            at += 1
        elif [word.lower() for word in words[at : at + len(own)]] == own:
            at += len(own)
        else:
            rest.append(words[at].upper() if len(words[at]) == 1 else words[at].lower())
            at += 1
    return " ".join([trigger, *dict.fromkeys(rest)])


def _words(name: str) -> list[str]:
    """The words of a file name, without counters, hashes and a camera's prefix."""
    name = re.sub(r"^\d+_(?=\D)", "", name)  # kohya's repeats: 10_megaman
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [word.rstrip("0123456789") for word in re.split(r"[\W_]+", name)]
    camera = {
        "img",
        "dsc",
        "dscn",
        "dcim",
        "pxl",
        "screenshot",
        "image",
        "photo",
        "picture",
        "untitled",
        "copy",
    }
    return [
        word for word in words if word and not any(c.isdigit() for c in word) and word.lower() not in camera
    ]


def renamed(captions: Sequence[str], trigger: str, name: str) -> list[str]:
    """The captions with another name in the trigger's place; the bare name where the trigger is missing."""
    pattern = re.compile(re.escape(trigger), re.IGNORECASE)
    return [pattern.sub(lambda _: name, caption) if pattern.search(caption) else name for caption in captions]
