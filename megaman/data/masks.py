"""Masks: how much each pixel of a picture counts, by a file beside it or by its own transparency."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from megaman.common.cache import Store, key_of
from megaman.data.pictures import BadPicture, open_picture

RECIPE = 1  # raised whenever masks are read in another way: what was encoded under them is no longer found
HIDDEN = "white"  # painted where nothing counts, as it is where a picture is transparent
FAINT = 8  # of 255: a mask without a lighter pixel is black to the eye
THUMBNAIL_PX = 128
SHADE = (214, 40, 57, 168)  # red, see-through: laid over what does not count


@dataclass(frozen=True)
class MaskSource:
    """Where a picture's mask comes from.

    size: the picture's width and height as the eye sees it; file: the mask beside it, if there is one.
    """

    picture: Path
    size: tuple[int, int]
    file: Path | None
    reads_alpha: bool  # also where the picture is transparent nothing counts

    def levels(self) -> Image.Image | None:
        """How much each pixel counts, of 255: greyscale, as large as the picture. None if there is no file,
        and no transparency. Raises BadPicture, of the picture, when its mask can't be read or does not fit.
        """
        alpha = open_picture(self.picture).alpha if self.reads_alpha else None
        drawn = None if self.file is None else self._drawn(self.file)
        if drawn is None or alpha is None:
            return alpha if drawn is None else drawn
        return ImageChops.multiply(drawn, alpha)

    def _drawn(self, file: Path) -> Image.Image:
        """The mask in the file, at the picture's size. Where it is transparent itself it is black."""
        try:
            found = open_picture(file)
        except BadPicture as error:
            raise BadPicture(self.picture, f"its mask {file.name}: {error.reason}") from error
        levels = found.image.convert("L")
        if found.alpha is not None:
            levels = ImageChops.multiply(levels, found.alpha)
        if not have_one_shape(levels.size, self.size):
            raise BadPicture(self.picture, self._misfit(file, levels.size))
        same = levels.size == self.size
        return levels if same else levels.resize(self.size, Image.Resampling.BILINEAR)

    def _misfit(self, file: Path, size: tuple[int, int]) -> str:
        (width, height), (own_width, own_height) = self.size, size
        shapes = f"{own_width} x {own_height} px, where the picture has {width} x {height}"
        turned = have_one_shape(size[::-1], self.size)
        remedy = "turn it as the picture is seen" if turned else "make it of the picture's shape"
        return f"its mask {file.name}: {shapes}; {remedy}"

    def hide(self, image: Image.Image) -> None:
        """Paints over what does not count at all, so that nothing of it is ever seen. Where the picture is
        transparent that is done as it is opened.
        """
        if self.file is not None:
            image.paste(HIDDEN, mask=self._drawn(self.file).point([255, *[0] * 255]))


def have_one_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether both have the same width by height, up to a pixel of the smaller one."""
    (width, height), (whole_width, whole_height) = sorted((size, other))
    across = abs(width - height * whole_width / whole_height)
    return across <= 1 or abs(height - width * whole_height / whole_width) <= 1


@dataclass(frozen=True)
class Mask:
    """A picture's mask, and what is known of it.

    digest: of all that decides it; share: of the picture that counts; box: all that counts lies within
    (left, top, right, bottom), in the picture's pixels; shade: what to lay over the picture's thumbnail to
    show what does not count, a WebP, base64.
    """

    source: MaskSource
    digest: str
    share: float
    box: tuple[int, int, int, int]
    shade: str

    def cells(self, window: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
        """How much counts in each cell of a window (left, top, right, bottom) that is cut into so many cells
        (width, height): (height,width) float32 in [0, 1]. Raises BadPicture when the files can't be read any
        more.
        """
        levels = self.source.levels()
        if levels is None:
            raise BadPicture(self.source.picture, "its transparency is gone: it changes while it is read")
        small = levels.resize(size, Image.Resampling.BOX, box=window)
        return np.asarray(small, dtype=np.float32) / 255


def mask_of(source: MaskSource, digests: tuple[str, str], store: Store) -> Mask | None:
    """The mask of a picture, None if it has none; what is known of it is kept in the store.

    digests: of the picture's content and of the mask's file ("" without one). Raises BadPicture where nothing
    would count, and as `levels` does.
    """
    if source.file is None and not source.reads_alpha:
        return None
    picture, file = digests
    digest = key_of("mask", RECIPE, file, source.size, picture if source.reads_alpha else "")
    known = store.facts(digest, lambda: _facts(source))
    if known["share"] is None:
        return None
    left, top, right, bottom = known["box"]
    return Mask(source, digest, known["share"], (left, top, right, bottom), known["shade"])


def _facts(source: MaskSource) -> dict[str, object]:
    levels = source.levels()
    if levels is None:
        return {"share": None}
    lightest = int(np.asarray(levels).max())
    if lightest < FAINT:
        black = "transparent all over" if source.file is None else f"black all over in {source.file.name}"
        raise BadPicture(source.picture, f"{black}, its lightest value is {lightest} of 255: nothing counts")
    share = float(np.asarray(levels).mean()) / 255
    box = levels.getbbox()
    levels.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    shade = Image.new("RGB", levels.size, SHADE[:3])
    shade.putalpha(levels.point([SHADE[3] * (255 - level) // 255 for level in range(256)]))
    data = io.BytesIO()
    shade.save(data, "WEBP", lossless=True)
    return {"share": share, "box": box, "shade": base64.b64encode(data.getvalue()).decode("ascii")}
