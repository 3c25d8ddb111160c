"""Which checkpoint at which strength: measures in, order and reasons out. Knows no picture and no model; the
weighting is the one table RULES.
"""

from collections.abc import Sequence
from dataclasses import dataclass

NEAR = 0.04  # of a score: what the same cell's other seeds differ by; cells so near to the best are equals
USUAL_STRENGTH = 1.0  # what every tool takes where nobody says another


@dataclass(frozen=True)
class Measures:
    """What was measured of one adapter at one strength; None where a thing can't be measured."""

    likeness: float | None = None  # 0 as the base draws, 1 as alike as training pictures are
    copies: float | None = None  # the share of drawings that repeat a training picture
    obedience: float | None = None  # 1 as the base obeys, 0 not at all
    leakage: float | None = None  # 0 as the base draws without the trigger, 1 as far off as another seed
    damage: float | None = None  # the share of drawings with wild pixels, or none
    loss_rise: float | None = None  # of the held-out loss over the smallest until then, as a share of that


@dataclass(frozen=True)
class Cell:
    """An adapter at a strength."""

    name: str  # of the adapter
    step: int  # of its run; 0 where nobody knows
    strength: float
    measures: Measures


@dataclass(frozen=True)
class Rule:
    """What one measure counts: `weight` for each whole unit beyond `bound`."""

    name: str  # of the measure
    weight: float
    bound: float  # of what is good, more than this gains nothing; of what is bad, so much costs nothing
    is_good: bool  # whether more is better
    why: str
    is_of_drawings: bool = True  # where it is unknown, drawings are missing
    is_lasting: bool = False  # a stronger or later adapter has no less of it, however it is hidden

    def points(self, value: float) -> float:
        """What a value of the measure adds to the score: 0 at best."""
        missing = self.bound - value if self.is_good else value - self.bound
        return -self.weight * max(0.0, missing)


RULES = (
    Rule(
        "likeness",
        1.5,
        1.0,
        is_good=True,
        why="It is what the LoRA was trained for, and half a character is hardly one: it counts half as much "
        "again. More than the training pictures' own gains nothing.",
    ),
    Rule(
        "copies",
        3.0,
        0.05,
        is_good=False,
        why="A drawing that repeats a training picture shows nothing new. It counts threefold, since what is "
        "learnt by heart also looks most like the pictures; one in twenty may be chance. A stronger or later "
        "adapter pays no less than a weaker or earlier one: more training on the same pictures only hides "
        "it.",
        is_lasting=True,
    ),
    Rule(
        "obedience",
        1.0,
        0.9,
        is_good=True,
        why="A LoRA that no longer does what the prompt says is of little use. A tenth may go to the "
        "character, who looks the same under every prompt.",
    ),
    Rule(
        "leakage",
        0.5,
        0.7,
        is_good=False,
        why="Prompts without the trigger should stay the base's. It counts half: many never draw anything "
        "else with the LoRA, and 0.7 of what another seed changes is hardly noticed.",
    ),
    Rule(
        "damage",
        1.5,
        0.1,
        is_good=False,
        why="Burnt, pale, noisy or missing pictures can't be repaired by a prompt. One in ten may be the "
        "prompt's.",
    ),
    Rule(
        "loss_rise",
        1.0,
        0.02,
        is_good=False,
        why="Where the loss on pictures that were never trained on rises again, the others are learnt by "
        "heart. Two per cent are noise.",
        is_of_drawings=False,
    ),
)
BY_NAME = {rule.name: rule for rule in RULES}


@dataclass(frozen=True)
class Ranked:
    """A cell in its place."""

    cell: Cell
    points: dict[str, float]  # by the measure's name, 0 at best

    @property
    def score(self) -> float:
        """The sum of its points; 0 is perfect."""
        return sum(self.points.values())


def ranked(cells: Sequence[Cell]) -> list[Ranked]:
    """The cells, the recommended one first, the others by their scores. What is known of none costs nobody
    anything; what drawings tell of others but not of one (its numbers overflowed) costs it as much as the
    worst.

    Of those whose score equals the best to NEAR, those nearest to the usual strength are taken, and of these
    the best, of equal ones the earliest.
    """
    columns = {rule.name: _points_of(rule, cells) for rule in RULES}
    found = [
        Ranked(cell, {name: column[i] for name, column in columns.items()}) for i, cell in enumerate(cells)
    ]
    found.sort(key=lambda each: -each.score)
    equals = [each for each in found if found[0].score - each.score <= NEAR]
    first = min(equals, key=_plainness) if equals else None
    return found if first is None else [first, *(each for each in found if each is not first)]


def _plainness(each: Ranked) -> tuple[float, float, float, int]:
    off = abs(each.cell.strength - USUAL_STRENGTH)
    return (off, each.cell.strength, -each.score, each.cell.step)


def _points_of(rule: Rule, cells: Sequence[Cell]) -> list[float]:
    values: list[float | None] = [getattr(cell.measures, rule.name) for cell in cells]
    known = [rule.points(value) for value in values if value is not None]
    worst = min(known, default=0.0) if rule.is_of_drawings else 0.0
    points = [worst if value is None else rule.points(value) for value in values]
    return [_lasting(cell, cells, points) for cell in cells] if rule.is_lasting else points


def _lasting(cell: Cell, cells: Sequence[Cell], points: Sequence[float]) -> float:
    """The lowest points of the same adapter, or of an earlier one of its run, at this strength or less."""
    return min(
        own
        for other, own in zip(cells, points, strict=True)
        if (other.name == cell.name or 0 < other.step < cell.step) and other.strength <= cell.strength
    )


# ---------------------------------------------------------------- reasons
Reason = tuple[str, str]  # a text with {n} in it, and what stands there
SAID = {
    "likeness": "likeness: {n} of the way from the base's drawings to your pictures",
    "copies": "drawings that repeat a training picture: {n}",
    "obedience": "obedience to prompts: {n} of the base's",
    "leakage": "without the trigger it changes {n} of what another seed would",
    "damage": "drawings with wild colours or noise: {n}",
    "loss_rise": "held-out loss above its smallest by {n}",
}
REJECTED = {
    "copies": "more likeness than this is bought with copies: up to {n} of the drawings elsewhere",
    "obedience": "more likeness than this is bought with obedience: down to {n} of the base's elsewhere",
    "leakage": "more likeness than this leaks into other prompts: up to {n} of a seed's change elsewhere",
    "damage": "more likeness than this is bought with wild colours or noise: up to {n} of drawings elsewhere",
    "loss_rise": "more likeness than this is learnt by heart: a held-out loss up to {n} above its smallest",
}
UNSURPASSED = ("no other cell looks clearly more like your pictures", "")
COSTS = 0.02  # points that are worth a word


def percent(value: float) -> str:
    """A share in whole per cent."""
    return f"{round(100 * value)} %"


def facts_of(measures: Measures) -> list[Reason]:
    """What was measured, in words."""
    values = [(name, getattr(measures, name)) for name in SAID]
    return [(SAID[name], percent(value)) for name, value in values if value is not None]


def reasons_for(order: Sequence[Ranked]) -> list[Reason]:
    """Why the first of `ranked` is recommended: what is measured of it, and what those pay that look more
    like the training pictures.
    """
    first, *others = order
    own = first.cell.measures
    reasons = facts_of(own)
    if own.likeness is None or not others:
        return reasons
    nearer = [each for each in others if (each.cell.measures.likeness or 0) > own.likeness + NEAR]
    if not nearer:
        return [*reasons, UNSURPASSED]
    for name, text in REJECTED.items():
        worst = min(nearer, key=lambda each: each.points[name])
        value = getattr(worst.cell.measures, name)
        if value is not None and worst.points[name] < first.points[name] - COSTS:
            reasons.append((text, percent(value)))
    return reasons


def told(reason: Reason) -> str:
    """A reason in plain English."""
    return reason[0].replace("{n}", reason[1])
