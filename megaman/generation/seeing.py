"""Looks at the drawings of a recommendation beside the training pictures, and measures each cell."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL.Image import open as open_image
from torch import Tensor

from megaman.generation import features, measures
from megaman.generation.features import Features, Picture
from megaman.generation.measures import Rows
from megaman.generation.ranking import Measures
from megaman.generation.trained_on import TrainingPictures


@dataclass(frozen=True)
class Nearest:
    """The training picture that a drawing is nearest to."""

    picture: int  # its place among them
    distance: float  # 1 as far as two training pictures usually lie apart

    @property
    def is_copy(self) -> bool:
        """Whether the drawing repeats it."""
        return self.distance < measures.COPY_SHARE


FileGrid = list[list[str | None]]  # a row a prompt, a column a seed; None where a drawing is missing


@dataclass(frozen=True)
class CellFiles:
    """The drawings of a cell."""

    named: FileGrid  # of prompts with the trigger
    plain: FileGrid  # of those without
    seeds: Sequence[Sequence[int]]  # of `named`

    @property
    def there(self) -> list[str]:
        """Those that are not missing."""
        return [file for row in (*self.named, *self.plain) for file in row if file is not None]

    @property
    def wanted(self) -> int:
        """How many there should be."""
        return sum(map(len, (*self.named, *self.plain)))


@dataclass(frozen=True)
class Seen:
    """What all drawings that are there look like, and the training pictures."""

    rows: Mapping[str, int]  # of a drawing's file, among the features
    features: Features  # the drawings', then the training pictures'
    looks: np.ndarray  # as features.looks, each number in units of what it varies by
    nearest: Sequence[Nearest]  # of each drawing; of none without training pictures
    mirrored: int = 0  # of the features, the last so many are training pictures again, mirrored

    def rows_of(self, files: Iterable[str | None]) -> list[int]:
        """Those of the drawings that are there."""
        return [self.rows[file] for file in files if file is not None]

    @property
    def trained(self) -> slice:
        """The training pictures' rows."""
        return slice(len(self.rows), len(self.features.tones) - self.mirrored)

    @property
    def has_training(self) -> bool:
        """Whether there are training pictures."""
        return len(self.features.tones) > len(self.rows)


def pictures_of(
    drawn: Mapping[str, tuple[int, int]], folder: Path, training: TrainingPictures
) -> list[Picture]:
    """The drawings in a folder, by file with height and width, and behind them the training pictures, as they
    are looked at, and the mirrored ones.
    """
    found = [Picture(size, partial(_pixels, folder / file)) for file, size in drawn.items()]
    crops = [*(each.crop for each in training.pictures), *training.mirrored]
    return found + [Picture((crop.bucket.height, crop.bucket.width), crop.pixels) for crop in crops]


def see(drawn: Sequence[str], base: CellFiles, found: Features, mirrored: int = 0) -> Seen:
    """What was found of the drawings and, behind them, of the training pictures, the last so many of them
    mirrored. base: the base's drawings.
    """
    rows = {file: row for row, file in enumerate(drawn)}
    of_base = [rows[file] for file in base.there]
    known = [*of_base, *range(len(rows), len(found.tones))]
    varies = found.looks[known].std(axis=0) if len(known) > 1 else np.ones(found.looks.shape[1])
    looks = found.looks / np.where(varies < measures.TINY, 1, varies)
    nearest = _nearest(found.latents, len(rows), of_base, mirrored)
    return Seen(rows, found, looks, nearest, mirrored)


def size_of(path: Path) -> tuple[int, int] | None:
    """A picture's width and height; None where it can't be read."""
    try:
        with open_image(path) as image:
            return image.size
    except OSError:
        return None


def _pixels(path: Path) -> Tensor:
    with open_image(path) as image:
        return features.pixels_of(image)


def _nearest(latents: np.ndarray, drawn: int, of_base: Sequence[int], mirrored: int) -> list[Nearest]:
    """The training picture nearest to each of the first rows, among the other rows, as it is or mirrored.
    Where those are too few to tell how far two of them usually lie apart, the base's drawings say it.
    """
    known = latents[drawn : len(latents) - mirrored]
    if not len(known) or not drawn:
        return []
    away = measures.distances(latents[:drawn], known)
    if mirrored:
        away = np.minimum(away, measures.distances(latents[:drawn], latents[-mirrored:]))
    usual = measures.usual_distance(known)
    if not usual:
        usual = float(np.median(away[of_base].min(axis=1))) if of_base else 0.0
    places = away.argmin(axis=1)
    return [
        Nearest(int(place), float(away[row, place]) / max(usual, measures.TINY))
        for row, place in enumerate(places)
    ]


def measured(cell: CellFiles, base: CellFiles, seen: Seen, rise: float | None) -> Measures:
    """What is measured of a cell. rise: of its checkpoint's held-out loss."""
    drawn, of_base = (seen.rows_of(file for row in each.named for file in row) for each in (cell, base))
    likeness = copies = None
    if seen.has_training and drawn:
        copies = float(np.mean([seen.nearest[row].is_copy for row in drawn]))
        likeness = _likeness(drawn, of_base, seen) if of_base else None
    named = _beside_each_other(seen.features.latents, seen, cell.named, base.named)
    plain = _beside_each_other(seen.looks, seen, cell.plain, base.plain)
    return Measures(
        likeness=likeness,
        copies=copies,
        obedience=None if named is None else measures.obedience(*named, base.seeds),
        leakage=None if plain is None else measures.leakage(*plain),
        damage=_damage(cell, base, seen),
        loss_rise=rise,
    )


def _likeness(drawn: Sequence[int], of_base: Sequence[int], seen: Seen) -> float | None:
    """The mean of the likeness in what is shown and of that in its colours; None where neither can tell."""
    found = [
        measures.likeness(rows[drawn], rows[of_base], rows[seen.trained])
        for rows in (seen.looks, seen.features.colours)
    ]
    known = [each for each in found if each is not None]
    return sum(known) / len(known) if known else None


def _beside_each_other(
    numbers: np.ndarray, seen: Seen, drawn: FileGrid, of_base: FileGrid
) -> tuple[Rows, Rows] | None:
    """The features of drawings, prompt by prompt, and of the base's; None where one is missing."""
    if any(None in row for row in (*drawn, *of_base)):
        return None
    found = ([numbers[seen.rows_of(row)] for row in grid] for grid in (drawn, of_base))
    return next(found), next(found)


def _damage(cell: CellFiles, base: CellFiles, seen: Seen) -> float | None:
    """The share of drawings that are missing or of a tone that neither base nor training shows."""
    tones = seen.features.tones
    known = [*(tones[row] for row in seen.rows_of(base.there)), *tones[seen.trained]]
    if not known:
        return None
    rows = seen.rows_of(cell.there)
    wild = sum(measures.is_outside(tones[row], known) for row in rows)
    return (wild + cell.wanted - len(rows)) / cell.wanted
