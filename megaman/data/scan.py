"""Scans the pictures: size, hash, thumbnail, remarks of each picture, kept by content; look-alikes."""

import base64
import io
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from megaman.common.cache import Store, key_of
from megaman.common.console import one_line
from megaman.common.files import sha256_of
from megaman.data.folder import Listing
from megaman.data.masks import Mask, MaskSource, mask_of
from megaman.data.pictures import MAX_FILE_BYTES, BadPicture, open_picture

RECIPE = 2  # raised whenever decoding changes: older facts and latents are then no longer found
THREADS = 4  # at most: each holds a whole picture, up to 256 MB
THUMBNAIL_PX = 128
GRID = 12  # rows and columns of the fingerprint
JPEG_NOISE = 4  # of 255: what JPEG leaves on a flat area is no edge
COLOUR_STEP = 2  # of 255, a bit of the fingerprint
FINGERPRINT_WORDS = -(-(GRID * GRID + 3 * 256 // COLOUR_STEP) // 64)
SAME_SHAPE = 1.05  # a copy that is scaled to whole pixels keeps its width by height to a few per cent
SAME_BITS = 6  # compressed or scaled copies differ in 5 at most, two poses of a sprite in 16 and more


@dataclass(frozen=True)
class ScannedPicture:
    """A usable picture file, and what is known of it."""

    path: Path
    digest: str  # of the file's bytes and of how they are decoded
    size: tuple[int, int]  # width and height as the eye sees it
    remarks: tuple[str, ...]  # what was done to it
    fingerprint: int
    thumbnail: str  # a small WebP, base64
    mask: Mask | None = None  # None: all of it counts alike

    @property
    def seen(self) -> str:
        """Changes with its pixels, and with how much of them counts."""
        return self.digest if self.mask is None else f"{self.digest} {self.mask.digest}"


@dataclass(frozen=True)
class Skipped:
    """A file that cannot be used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.reason}")


def scan(
    listing: Listing, store: Store, *, reads_alpha: bool = False
) -> tuple[list[ScannedPicture], list[Skipped]]:
    """Looks at every picture file of a folder: those that can be used, and those that can't. Each is decoded
    once, several at a time; later runs find it in the store. reads_alpha: transparency is a mask.
    """
    scanned: list[ScannedPicture] = []
    skipped: list[Skipped] = []
    digests = {path: _digest(path) for path in listing.pictures}
    new = [path for path, digest in digests.items() if digest and not store.holds_facts(digest)]
    decoded = _decoded_at_once(new)
    for path, digest in digests.items():
        try:
            picture = _scanned(path, digest, store, decoded.get(path))
            source = MaskSource(path, picture.size, listing.masks.get(path), reads_alpha)
            scanned.append(replace(picture, mask=_mask_of(source, digest, store)))
        except BadPicture as error:
            skipped.append(Skipped(path, error.reason))
    return scanned, skipped


def _digest(path: Path) -> str:
    """Of the file's bytes and of how they are decoded; "" of what can't be a picture."""
    try:
        if path.is_file() and 0 < path.stat().st_size <= MAX_FILE_BYTES:
            return key_of("picture", RECIPE, path.suffix.lower(), sha256_of(path))
    except OSError:
        pass
    return ""


def _mask_of(source: MaskSource, digest: str, store: Store) -> Mask | None:
    """digest: of the picture's content."""
    drawn = "" if source.file is None else _digest(source.file)
    if source.file is not None and not drawn:  # opening says why
        source.levels()
        raise BadPicture(source.picture, f"its mask {source.file.name} changes while it is read")
    return mask_of(source, (digest, drawn), store)


def _decoded_at_once(paths: Sequence[Path]) -> dict[Path, dict[str, object]]:
    """What is known of pictures, those left out that can't be read. Pillow decodes on several cores."""
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        with warnings.catch_warnings(action="ignore"):  # each picture sets and resets the same, out of step
            facts = list(pool.map(_scan_or_none, paths))
    finally:
        pool.shutdown(cancel_futures=True)  # who is asked to stop finishes no folder
    return {path: known for path, known in zip(paths, facts, strict=True) if known is not None}


def _scan_or_none(path: Path) -> dict[str, object] | None:
    try:
        return _scan(path)
    except BadPicture:  # which may have lacked the memory that its neighbours took: it is read again alone
        return None


def _scanned(path: Path, digest: str, store: Store, decoded: dict[str, object] | None) -> ScannedPicture:
    """decoded: what is known of the picture already."""
    if not digest:  # opening says why; a folder, a pipe or a missing right is no fact about a content
        open_picture(path)
        raise BadPicture(path, "it changes while it is read")
    known = store.facts(digest, lambda: decoded or _scan(path))
    return ScannedPicture(
        path,
        digest,
        (known["size"][0], known["size"][1]),
        tuple(known["remarks"]),
        int(known["fingerprint"], 16),
        known["thumbnail"],
    )


def _scan(path: Path) -> dict[str, object]:
    picture = open_picture(path)
    size = picture.image.size
    bits = fingerprint(picture.image)
    data = io.BytesIO()
    small = picture.image  # no copy: a large scan takes 256 MB
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC)
    small.save(data, "WEBP", quality=70, lossless=max(size) <= THUMBNAIL_PX)  # sprites
    return {
        "size": size,
        "remarks": picture.remarks,
        "fingerprint": f"{bits:x}",
        "thumbnail": base64.b64encode(data.getvalue()).decode("ascii"),
    }


def fingerprint(image: Image.Image) -> int:
    """A number whose bits hardly change when a picture is scaled or compressed again.

    144 say where a 12 x 12 view brightens to the right (dHash, Krawetz 2013); 3 x 128 count up the mean red,
    green and blue, so that flat pictures and recoloured sprites differ.
    """
    view = image.convert("RGB").resize((GRID + 1, GRID), Image.Resampling.HAMMING)
    grey = np.asarray(view.convert("L"), dtype=np.int16)
    brighter = grey[:, 1:] - grey[:, :-1] > JPEG_NOISE
    means = np.asarray(view).mean(axis=(0, 1))
    colour = means[:, None] > np.arange(COLOUR_STEP // 2, 256, COLOUR_STEP)
    return int.from_bytes(np.packbits(np.concatenate([brighter.ravel(), colour.ravel()])).tobytes(), "big")


def duplicates(fingerprints: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, later) for each picture that repeats an earlier one: the positions of both.

    Pictures of different shapes are different, however alike they are when they are squeezed to one.
    """
    packed = b"".join(number.to_bytes(FINGERPRINT_WORDS * 8, "big") for number in fingerprints)
    words = np.frombuffer(packed, np.uint64).reshape(-1, FINGERPRINT_WORDS)
    shapes = np.log([width / height for width, height in sizes])
    pairs = []
    for later in range(1, len(words)):
        differing = np.bitwise_count(words[:later] ^ words[later]).sum(axis=1)
        alike = np.abs(shapes[:later] - shapes[later]) < math.log(SAME_SHAPE)
        same = np.flatnonzero(alike & (differing <= SAME_BITS))
        pairs += [(int(same[0]), later)] if same.size else []
    return pairs


def content_of(digests: Iterable[str]) -> str:
    """A sum over the content of pictures, whatever their names and order."""
    return key_of(*sorted(digests))[:12]
