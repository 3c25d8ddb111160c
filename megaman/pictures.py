"""Pictures and captions as they lie in people's folders.

Knows PIL, EXIF, colour, sidecar files and what names tell.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

from megaman.errors import DATA, UserError

if TYPE_CHECKING:
    from torch import Tensor

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
PILLOW_FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "WEBP",
)  # what the content may be, whatever the suffix says; no other decoder is opened
CAPTION_SUFFIXES = (".txt", ".caption")
MAX_PICTURE_PX = 64_000_000  # a larger one is a decompression bomb or a scan that needs shrinking first
BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))

CaptionSource = Literal["file", "name"]


@dataclass(frozen=True)
class Caption:
    """A caption and where it came from: the user's own sidecar file, or the picture's name."""

    text: str
    source: CaptionSource


def find_pictures(folder: Path) -> list[Path]:
    """Every picture below the folder, by suffix in any case, in a stable order; hidden files and folders
    are left out.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures. Check --data_dir.", DATA)
    visible = (
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(path for path in visible if path.suffix.lower() in PICTURE_SUFFIXES)


def load_image(path: Path) -> Image.Image:
    """The picture as the eye sees it, RGB: turned by its EXIF mark, transparency on white, 16 bits scaled to
    8, first frame.

    Raises UserError (data) with the reason when it can't be read.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=PILLOW_FORMATS) as file:
            warnings.simplefilter("ignore")  # Pillow's bomb warning; the limit is ours
            if file.width * file.height > MAX_PICTURE_PX:
                raise UserError(
                    f"{path}: {file.width} x {file.height} px is over the limit of "
                    f"{MAX_PICTURE_PX // 1_000_000} megapixels; shrink it first",
                    DATA,
                )
            return _as_rgb(ImageOps.exif_transpose(file))
    except UserError:
        raise
    except (
        Exception
    ) as error:  # a decoder may raise anything on a damaged file; it is that one picture's problem
        reason = (
            "empty file"
            if path.is_file() and path.stat().st_size == 0
            else " ".join(str(error).replace(str(path), "it").split())[:120]
        )
        raise UserError(f"{path}: not a readable picture ({reason or type(error).__name__})", DATA) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)
        peak = values.max(initial=0)
        narrow = (
            255.0 if peak > 1 or image.mode == "I" else 1.0
        )  # floats may mean 0-1 or 0-255; 16 bits are 16 bits
        top = narrow if peak <= 255 and not image.mode.startswith("I;16") else 65535.0
        return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image.convert("RGBA"))
        return on_white.convert("RGB")
    return image.convert("RGB")


def fit_center(image: Image.Image, side_px: int) -> "Tensor":
    """The picture scaled to cover a square and cropped to its centre, (3,side,side) float32 in [-1, 1]."""
    import torch

    square = ImageOps.fit(image, (side_px, side_px), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div_(127.5).sub_(1)


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
