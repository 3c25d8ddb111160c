"""What is known of each picture file before anything is trained; remembered by content."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megaman.common.cache import Store, key_of
from megaman.common.console import one_line
from megaman.common.files import sha256_of
from megaman.data.pictures import MAX_FILE_BYTES, BadPicture, find_pictures, fingerprint, open_picture

RECIPE = 2  # raised whenever decoding changes: older facts and latents are then no longer found
THUMBNAIL_PX = 128


@dataclass(frozen=True)
class Fact:
    """A usable picture."""

    path: Path
    digest: str  # of the file's bytes and of how they are decoded
    size: tuple[int, int]  # width and height as the eye sees it
    remarks: tuple[str, ...]  # what was done to it
    fingerprint: int
    thumbnail: str  # a small WebP, base64


@dataclass(frozen=True)
class Skipped:
    """A file that cannot be used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.reason}")


def survey(folder: Path, store: Store) -> tuple[list[Fact], list[Skipped]]:
    """Every picture below the folder, decoded once in its life. UserError (exit 3) if there is no folder."""
    facts, skipped = [], []
    for path in find_pictures(folder):
        try:
            facts.append(_fact(path, store))
        except BadPicture as error:
            skipped.append(Skipped(path, error.reason))
    return facts, skipped


def _fact(path: Path, store: Store) -> Fact:
    try:
        usable = path.is_file() and 0 < path.stat().st_size <= MAX_FILE_BYTES
        digest = key_of("picture", RECIPE, path.suffix.lower(), sha256_of(path)) if usable else ""
    except OSError:
        usable = False
    if not usable:  # opening says why; a folder, a pipe or a missing right is no fact about a content
        open_picture(path)
        raise BadPicture(path, "it changes while it is read")
    known = store.facts(digest, lambda: _looked_at(path))
    return Fact(
        path,
        digest,
        (known["size"][0], known["size"][1]),
        tuple(known["remarks"]),
        int(known["fingerprint"], 16),
        known["thumbnail"],
    )


def _looked_at(path: Path) -> dict[str, object]:
    picture, data = open_picture(path), io.BytesIO()
    size, bits = picture.image.size, fingerprint(picture.image)
    small = picture.image  # no copy: a large scan takes 256 MB
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC)
    small.save(data, "WEBP", quality=70, lossless=max(size) <= THUMBNAIL_PX)  # sprites
    return {
        "size": size,
        "remarks": picture.remarks,
        "fingerprint": f"{bits:x}",
        "thumbnail": base64.b64encode(data.getvalue()).decode("ascii"),
    }
