"""What numbers say of the pictures of one adapter at one strength, against the base's and the training's:
pure arithmetic on features and pixels, without a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product

import numpy as np

COPY_SHARE = 0.5  # of the usual distance of a training picture from its nearest other: nearer is a copy
NEIGHBOURS = 3  # of one training picture alone chance decides
TINY = 1e-9  # below, a spread is none
EXTREME = 8  # of 255: so near to an end a channel counts as burnt out
RANGE_SLACK = 0.15  # of a range's width, by which pictures may leave it and be sound
RANGE_LEAST = 0.02  # of full scale: the slack where all training pictures are alike
COLOUR_STEPS = 6  # of each channel, in which colours are counted
CENTRE = (1 / 8, 1 / 4)  # of height and width: so much of either side is background rather than subject
GRAIN_SPOTS = 64  # along the shorter side: the latents of 512 px, in which a broken adapter's noise lies
GRAIN_FACTOR = 2  # of the grain of what is sound: noise has thrice and more, a sharper style less


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


def colours_of(pixels: np.ndarray) -> np.ndarray:
    """How much of each colour the middle of a picture (H,W,3) uint8 shows, (COLOUR_STEPS³,) float32: square
    roots of shares, each colour counted a little with its neighbours.
    """
    rows, columns = (round(part * length) for part, length in zip(CENTRE, pixels.shape, strict=False))
    middle = pixels[rows : pixels.shape[0] - rows, columns : pixels.shape[1] - columns].reshape(-1, 3)
    steps = middle.astype(np.int64) * COLOUR_STEPS // 256
    places = np.ravel_multi_index(tuple(steps.T), (COLOUR_STEPS,) * 3)
    shares = np.bincount(places, minlength=COLOUR_STEPS**3).reshape((COLOUR_STEPS,) * 3) / len(middle)
    for axis in range(3):
        padded = np.pad(shares, [(1, 1) if each == axis else (0, 0) for each in range(3)], mode="edge")
        below, above = (np.delete(padded, ends, axis) for ends in ((-1, -2), (0, 1)))
        shares = (below + 2 * shares + above) / 4
    return np.sqrt(shares / shares.sum()).ravel().astype(np.float32)


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


Rows = Sequence[np.ndarray]  # of each prompt the features (S,D) of its S drawings, a seed each


def obedience(drawn: Rows, base: Rows, seeds: Sequence[Sequence[int]]) -> float | None:
    """How much of the base's answer to the prompts is left, by their drawings' features: 1 as with the base,
    0 where prompts no longer decide. None unless two prompts have two seeds each. seeds: of each prompt's
    drawings.
    """
    whole, left = _in_common(base, base, seeds), _in_common(drawn, base, seeds)
    return None if whole is None or left is None or whole < TINY else left / whole


def _in_common(these: Rows, those: Rows, seeds: Sequence[Sequence[int]]) -> float | None:
    """The mean product of what a change of the prompt changes in these and in those: between drawings that
    share no seed, so what they have in common is the prompts'. None where no drawings are such ones.
    """
    products = []
    for one, other in combinations(range(len(seeds)), 2):
        for (a, b), (c, d) in permutations(_compared(seeds[one], seeds[other]), 2):
            if {seeds[one][a], seeds[other][b]}.isdisjoint({seeds[one][c], seeds[other][d]}):
                products.append((these[one][a] - these[other][b]) @ (those[one][c] - those[other][d]))
    return float(np.mean(products)) if products else None


def _compared(one: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """Which drawings of two prompts are compared: those of the same seed, where there are two such seeds,
    since then nothing but the prompt differs; else all.
    """
    every = list(product(range(len(one)), range(len(other))))
    alike = [(a, b) for a, b in every if one[a] == other[b]]
    return alike if len(alike) > 1 else every


def leakage(drawn: Rows, base: Rows) -> float | None:
    """How far pictures of prompts without the trigger have moved from the base's of the same prompts and
    seeds, by their looks: 0 not at all, 1 as far as another seed would. None without such prompts, or of one
    seed.
    """
    spreads = [spread(each) for each in base if len(each) > 1]
    if not spreads:
        return None
    usual = float(np.mean(spreads))
    moved = np.sqrt(((np.concatenate(drawn) - np.concatenate(base)) ** 2).mean(axis=1)).mean()
    return None if usual < TINY else float(moved) / usual


# ---------------------------------------------------------------- damage
@dataclass(frozen=True)
class Tone:
    """What is measured of a picture's pixels, each from 0 to 1."""

    burnt: float  # the share of its channels that is at an end
    contrast: float  # of its grey
    colour: float  # how strong its colours are
    grain: float  # by how much neighbouring spots differ, the median


def tone_of(pixels: np.ndarray) -> Tone:
    """The tone of a picture (H,W,3) uint8."""
    numbers = pixels.astype(np.float32) / 255
    ends = (pixels < EXTREME) | (pixels > 255 - EXTREME)
    grey = numbers.mean(axis=2)
    return Tone(
        float(ends.mean()),
        float(grey.std()),
        float((numbers.max(axis=2) - numbers.min(axis=2)).mean()),
        _grain_of(numbers),
    )


def _grain_of(numbers: np.ndarray) -> float:
    """The median difference of neighbouring spots of a picture (H,W,3) in [0, 1]: edges, however hard, are
    few, and noise is everywhere.
    """
    side = max(1, round(min(numbers.shape[:2]) / GRAIN_SPOTS))
    height, width = (length // side for length in numbers.shape[:2])
    cut = numbers[: height * side, : width * side].reshape(height, side, width, side, 3)
    spots = cut.mean(axis=(1, 3))
    steps = [np.abs(np.diff(spots, axis=axis)).max(axis=2).ravel() for axis in (0, 1)]
    return float(np.median(np.concatenate(steps)))


def is_outside(tone: Tone, known: Sequence[Tone]) -> bool:
    """Whether a picture's tone lies clearly outside of those that are known to be sound, or its grain far
    above theirs.
    """
    for name in ("burnt", "contrast", "colour"):
        values = [getattr(each, name) for each in known]
        slack = max(RANGE_LEAST, RANGE_SLACK * (max(values) - min(values)))
        if not min(values) - slack <= getattr(tone, name) <= max(values) + slack:
            return True
    return tone.grain > GRAIN_FACTOR * max(each.grain for each in known) + RANGE_LEAST
