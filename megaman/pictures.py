"""Pictures as they lie in people's folders. Knows PIL, EXIF and colour."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

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
MAX_PICTURE_PX = 64_000_000  # a larger one is a decompression bomb or a scan that needs shrinking first


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
