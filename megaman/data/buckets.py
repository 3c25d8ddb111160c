"""Which size a picture is trained at, and which part of it is seen.

Pictures of many shapes share a few sizes (buckets): multiples of the model's cell, of no more area than
the training square. A picture goes to the bucket of the nearest shape, is scaled to cover it, and what
sticks out is cut off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megaman.common.cache import key_of
from megaman.common.console import Exit, UserError
from megaman.config.train import CropMode
from megaman.data.masks import Mask
from megaman.data.pictures import load_image

CENTRE = (0.5, 0.5)


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Fit:
    """The part of a picture that is seen, in its own pixels; scale: above 1 it is enlarged."""

    left: float
    top: float
    right: float
    bottom: float
    scale: float


def buckets_of(resolution: int, cell: int, crop: CropMode) -> list[Bucket]:
    """The sizes on offer: the square alone, or every shape from 1:4 to 4:1 of at most its area."""
    if crop != "bucket":
        return [Bucket(resolution, resolution)]
    cell = min(cell, resolution)
    sides = range(max(cell, resolution // 2 // cell * cell), 2 * resolution + 1, cell)
    shapes = {Bucket(side, min(2 * resolution, resolution**2 // side // cell * cell)) for side in sides}
    shapes |= {Bucket(shape.height, shape.width) for shape in shapes}
    return sorted(shape for shape in shapes if min(shape.width, shape.height) >= cell)


def bucket_for(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose shape is nearest to (width, height); of two equally near ones the larger."""
    shape = math.log(size[0] / size[1])

    def distance(bucket: Bucket) -> tuple[float, int]:
        off = abs(math.log(bucket.width / bucket.height) - shape)
        return round(off, 9), -bucket.width * bucket.height

    return min(buckets, key=distance)


def fit_of(size: tuple[int, int], bucket: Bucket, at: tuple[float, float] = CENTRE) -> Fit:
    """The largest window of the bucket's shape. at: where it lies along each axis, 0 = left or top, 1 =
    right or bottom.
    """
    scale = max(bucket.width / size[0], bucket.height / size[1])
    width, height = bucket.width / scale, bucket.height / scale
    left, top = max(0.0, size[0] - width) * at[0], max(0.0, size[1] - height) * at[1]  # never -1e-14
    return Fit(left, top, min(left + width, size[0]), min(top + height, size[1]), scale)


def cut_out(
    image: Image.Image, bucket: Bucket, at: tuple[float, float] = CENTRE, *, mirrored: bool = False
) -> Tensor:
    """The window of an RGB picture at the bucket's size, (3,height,width) float32 in [-1, 1]."""
    fit = fit_of(image.size, bucket, at)
    box = (fit.left, fit.top, fit.right, fit.bottom)
    small = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    array = np.array(small)[:, ::-1].copy() if mirrored else np.array(small)
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class Crop:
    """One way in which a picture is trained on: the window that is seen, its size, mirrored or not."""

    path: Path
    digest: str  # of the picture's content
    bucket: Bucket
    at: tuple[float, float] = CENTRE
    is_mirrored: bool = False
    whole: tuple[int, int] | None = None  # the picture's own width and height; None: as large as the bucket
    mask: Mask | None = None  # how much of it counts; None: all of it alike

    @property
    def key(self) -> str:
        """Decides the pixels, and how much each of them counts."""
        masked = () if self.mask is None else (self.mask.digest,)
        return key_of(self.digest, self.bucket, self.at, self.is_mirrored, *masked)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """What Stable Diffusion XL is told of a picture, heights before widths: its own size, how much is cut
        off above and to the left of it as it is scaled (and mirrored), the size it is trained at.
        """
        width, height = self.whole or (self.bucket.width, self.bucket.height)
        fit = fit_of((width, height), self.bucket, self.at)
        left = width - fit.right if self.is_mirrored else fit.left
        cut = (round(fit.top * fit.scale), round(left * fit.scale))
        return (height, width, *cut, self.bucket.height, self.bucket.width)

    def pixels(self) -> Tensor:
        """(3,height,width) float32 in [-1, 1]. Raises BadPicture when the file can't be read any more."""
        image = load_image(self.path)
        if self.mask is not None:
            self.mask.source.hide(image)
        return cut_out(image, self.bucket, self.at, mirrored=self.is_mirrored)

    def counting(self, cells: tuple[int, int]) -> Tensor | None:
        """How much each of (height, width) cells counts, (1,height,width) float32 in [0, 1]; None without a
        mask. Raises BadPicture when the file can't be read any more.
        """
        if self.mask is None:
            return None
        fit = fit_of(self.mask.source.size, self.bucket, self.at)
        found = self.mask.cells((fit.left, fit.top, fit.right, fit.bottom), cells[::-1])
        return torch.from_numpy(found[:, ::-1].copy() if self.is_mirrored else found.copy())[None]


def check_sizes(buckets: Sequence[Bucket], resolution: int, cell_px: int, base: str) -> None:
    """UserError (exit 2) unless the base can halve all sizes as often as it must."""
    sides = {resolution, *(side for bucket in buckets for side in (bucket.width, bucket.height))}
    if any(side % cell_px for side in sides):
        nearest = max(1, round(resolution / cell_px)) * cell_px
        reason = f"{base} trains at multiples of {cell_px}; {nearest} is the nearest"
        raise UserError(f"--resolution {resolution}: {reason}", Exit.USAGE)
