"""What numbers say of the pictures of one adapter at one strength, against the base's and the training's:
pure arithmetic on features and pixels, without a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COPY_SHARE = 0.5  # of the usual distance of a training picture from its nearest other: nearer is a copy
NEIGHBOURS = 3  # of one training picture alone chance decides
TINY = 1e-9  # below, a spread is none
EXTREME = 8  # of 255: so near to an end a channel counts as burnt out
RANGE_SLACK = 0.15  # of a range's width, by which pictures may leave it and be sound
RANGE_LEAST = 0.02  # of full scale: the slack where all training pictures are alike


# ---------------------------------------------------------------- distances
def distances(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """How far each of N rows lies from each of M, (N,M): the root mean square over their features, (N,D) and
    (M,D).
    """
    one, other = these.astype(np.float64), those.astype(np.float64)
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None] - 2 * one @ other.T
    return np.sqrt(np.maximum(squares, 0) / max(1, one.shape[1]))


def spread(rows: np.ndarray) -> float:
    """The mean distance between two of the rows; 0 of fewer than two."""
    found = distances(rows, rows)[np.triu_indices(len(rows), 1)]
    return float(found.mean()) if found.size else 0.0


def away(these: np.ndarray, those: np.ndarray, *, is_itself: bool = False) -> float:
    """How far rows lie from their NEIGHBOURS nearest among others, on average. is_itself: those are these,
    and none is its own neighbour.
    """
    found = distances(these, those)
    if is_itself:
        np.fill_diagonal(found, np.inf)
    most = min(NEIGHBOURS, len(those) - is_itself)
    return float(np.sort(found, axis=1)[:, :most].mean()) if most else 0.0


# ---------------------------------------------------------------- of one cell
def likeness(drawn: np.ndarray, base: np.ndarray, training: np.ndarray) -> float | None:
    """How much nearer to the training pictures these lie than the base's, by their looks (N,D): 0 as far as
    the base's, 1 as near as training pictures lie to each other. None where the base's lie as near already.
    """
    far = away(base, training)
    whole = far - away(training, training, is_itself=True)
    return None if whole < TINY else (far - away(drawn, training)) / whole


def usual_distance(training: np.ndarray) -> float | None:
    """The median distance of a training picture from its nearest other one, by their latents (M,D); None of
    fewer than three.
    """
    if len(training) < 3:
        return None
    found = distances(training, training)
    np.fill_diagonal(found, np.inf)
    return float(np.median(found.min(axis=1)))


def obedience(drawn: np.ndarray, base: np.ndarray) -> float | None:
    """How much of the base's answer to the prompts is left, by looks (P,S,D) of P prompts with the same S
    seeds: 1 as with the base, 0 where prompts no longer decide. None with fewer than two of either.

    Of every seed the mean over the prompts is taken off; what two seeds then have in common is the prompts'.
    """
    if min(base.shape[:2]) < 2:
        return None
    whole = _in_common(base, base)
    return None if whole < TINY else _in_common(drawn, base) / whole


def _in_common(these: np.ndarray, those: np.ndarray) -> float:
    """The mean product of what prompts make of the features, between different seeds."""
    seeds = these.shape[1]
    own, other = (each - each.mean(axis=0, keepdims=True) for each in (these, those))
    products = np.einsum("psd,ptd->st", own, other)
    return float((products.sum() - np.trace(products)) / (seeds * (seeds - 1)))


def leakage(drawn: np.ndarray, base: np.ndarray) -> float | None:
    """How far pictures of prompts without the trigger have moved from the base's of the same prompts and
    seeds, by looks (P,S,D): 0 not at all, 1 as far as another seed would. None without such prompts, or of
    one seed.
    """
    prompts, seeds = base.shape[:2]
    if prompts < 1 or seeds < 2:
        return None
    usual = float(np.mean([spread(each) for each in base]))
    moved = np.sqrt(((drawn - base) ** 2).mean(axis=2)).mean()
    return None if usual < TINY else float(moved) / usual


# ---------------------------------------------------------------- damage
@dataclass(frozen=True)
class Tone:
    """What is measured of a picture's pixels, each from 0 to 1."""

    burnt: float  # the share of its channels that is at an end
    contrast: float  # of its grey
    colour: float  # how strong its colours are


def tone_of(pixels: np.ndarray) -> Tone:
    """The tone of a picture (H,W,3) uint8."""
    numbers = pixels.astype(np.float32) / 255
    ends = (pixels < EXTREME) | (pixels > 255 - EXTREME)
    grey = numbers.mean(axis=2)
    return Tone(
        float(ends.mean()),
        float(grey.std()),
        float((numbers.max(axis=2) - numbers.min(axis=2)).mean()),
    )


def is_outside(tone: Tone, known: Sequence[Tone]) -> bool:
    """Whether a picture's tone lies clearly outside of those that are known to be sound."""
    for name in ("burnt", "contrast", "colour"):
        values = [getattr(each, name) for each in known]
        slack = max(RANGE_LEAST, RANGE_SLACK * (max(values) - min(values)))
        if not min(values) - slack <= getattr(tone, name) <= max(values) + slack:
            return True
    return False
