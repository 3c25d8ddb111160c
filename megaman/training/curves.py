"""Curves of a run as a page draws them: thinned, scaled, with ticks. Knows numbers, and no run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 600, 200  # of a drawing, in its own units; the page stretches it
MOST_DOTS = 60  # of a curve
BUCKETS = 200  # across; of the points in each the least and the largest are drawn, and one gap
LARGEST, SMALLEST = 1e100, 1e-100  # sizes that are drawn
LOG_FROM = 30  # times as large as the least: from there on the scale is logarithmic
ZERO_BELOW = 0.4  # of the largest: where the least lies below, the scale begins at 0
TICKS = 4  # about so many steps of a scale
NEIGHBOURS = 15  # a smoothed point is the mean of about so large a part of all

Series = Mapping[int, float | None]  # by step, ascending; None where there is no number: a gap


@dataclass(frozen=True)
class Line:
    """A curve to draw."""

    name: str  # in the page's words
    look: str  # its class in the page's style
    points: Series
    has_dots: bool = False  # of few and far points


@dataclass(frozen=True)
class Curve:
    """A curve as it is drawn."""

    name: str
    look: str
    path: str  # of an SVG
    last: str
    dots: Sequence[tuple[float, float]]  # from the left and from the top, percent


@dataclass(frozen=True)
class Tick:
    """A number beside a scale."""

    at: float  # from the left or from the top, percent
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its scales."""

    title: str
    curves: Sequence[Curve]
    across: Sequence[Tick]
    up: Sequence[Tick]
    marks: str  # path of the checkpoints' lines
    is_log: bool


def number_of(value: object) -> float | None:
    """What a file says, as a number that can be drawn; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) < LARGEST:  # NaN neither
        return None
    return 0.0 if abs(value) < SMALLEST else float(value)


def shown(value: float) -> str:
    """A number in few letters: 0.1234, 1.2e-5, 1500."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    mantissa, e, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}{e}{int(exponent)}" if e else mantissa


def thinned(points: Series) -> list[tuple[int, float | None]]:
    """At most 3 points of each bucket, in order: the first and the last of all, extremes and gaps stay."""
    items = list(points.items())
    if len(items) <= 3 * BUCKETS:
        return items
    kept = {0, len(items) - 1}
    edges = [len(items) * i // BUCKETS for i in range(BUCKETS + 1)]
    for start, end in pairwise(edges):
        values = {i: value for i in range(start, end) if (value := items[i][1]) is not None}
        kept.update(
            {min(values, key=values.__getitem__), max(values, key=values.__getitem__)} if values else ()
        )
        kept.update([i for i in range(start, end) if items[i][1] is None][:1])
    return [items[i] for i in sorted(kept)]


def smoothed(points: Series) -> dict[int, float | None]:
    """The mean of each point and its neighbours on both sides; gaps count for nothing."""
    values = list(points.values())
    reach = max(1, len(values) // NEIGHBOURS // 2)
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    found: dict[int, float | None] = {}
    for i, step in enumerate(points):
        first = max(0, i - reach)
        end = min(len(values), i + reach + 1)
        count = counts[end] - counts[first]
        found[step] = (sums[end] - sums[first]) / count if count else None
    return found


# ---------------------------------------------------------------- scales


@dataclass(frozen=True)
class Scale:
    """From numbers to places between 0 and 1."""

    least: float
    most: float
    ticks: Sequence[float]
    is_log: bool = False

    def place(self, value: float) -> float:
        """0 at the least, 1 at the most."""
        if self.is_log:
            return math.log(value / self.least) / math.log(self.most / self.least)
        return (value - self.least) / (self.most - self.least)


def _round_step(span: float) -> float:
    """The largest of 1, 2, 5, 10, … that a span holds about TICKS times."""
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    return next(power * times for times in (1, 2, 2.5, 5, 10) if power * times * TICKS >= span * 0.999)


def even_scale(least: float, most: float) -> Scale:
    """A scale of even steps around the numbers, from 0 where they begin near it."""
    if 0 < least < ZERO_BELOW * most:
        least = 0.0
    if most - least <= 1e-9 * max(abs(least), abs(most)):
        least = min(0.0, 2 * least)
        most = max(0.0, 2 * most)
        most += least == most  # both are 0
    step = _round_step(most - least)
    first = math.floor(least / step + 1e-9)  # a tick may lie on the least, but for its rounding
    last = math.ceil(most / step - 1e-9)
    return Scale(first * step, last * step, [i * step for i in range(first, last + 1)])


def log_scale(least: float, most: float) -> Scale:
    """A scale of even ratios around positive numbers."""
    first = math.floor(math.log10(least) + 1e-9)
    last = math.ceil(math.log10(most) - 1e-9)
    every = max(1, math.ceil((last - first) / TICKS))
    last += (first - last) % every
    return Scale(10.0**first, 10.0**last, [10.0**i for i in range(first, last + 1, every)], is_log=True)


def scale_of(values: Sequence[float], *, is_even: bool) -> Scale:
    """The scale that suits the numbers, of which there are some; is_even: one of even steps in any case."""
    least = min(values)
    most = max(values)
    is_log = not is_even and least > 0 and most / least >= LOG_FROM
    return log_scale(least, most) if is_log else even_scale(least, most)


# ---------------------------------------------------------------- the drawing


def chart_of(
    title: str, lines: Iterable[Line], last_step: int, checkpoints: Iterable[int], *, is_even: bool = False
) -> Chart | None:
    """The lines that hold numbers, from step 0 to the last, on one scale, even or as suits the numbers; None
    if there are none.
    """
    drawn = [line for line in lines if any(value is not None for value in line.points.values())]
    values = [value for line in drawn for value in line.points.values() if value is not None]
    if not values:
        return None
    up = scale_of(values, is_even=is_even)
    across = even_scale(0, max(1, last_step))
    across = Scale(
        0, max(1, last_step), [tick for tick in across.ticks if tick <= last_step and tick % 1 == 0]
    )
    places = dict.fromkeys(round(WIDTH * across.place(step)) for step in checkpoints if step <= last_step)
    return Chart(
        title,
        [_curve(line, across, up) for line in drawn],
        [Tick(round(100 * across.place(tick), 2), shown(tick)) for tick in across.ticks],
        [Tick(round(100 * (1 - up.place(tick)), 2), shown(tick)) for tick in up.ticks],
        "".join(f"M{x} 0V{HEIGHT}" for x in places),
        up.is_log,
    )


def _curve(line: Line, across: Scale, up: Scale) -> Curve:
    words: list[str] = []
    dots: list[tuple[float, float]] = []
    is_begun = False
    for step, value in thinned(line.points):
        if value is None:
            is_begun = False
            continue
        x = across.place(step)
        y = 1 - up.place(value)
        place = f"{round(WIDTH * x, 1):g} {round(HEIGHT * y, 1):g}"
        words.append(f"L{place}" if is_begun else f"M{place}h0")  # h0: a point between gaps is a dot
        dots.append((round(100 * x, 2), round(100 * y, 2)))
        is_begun = True
    last = next(value for value in reversed([*line.points.values()]) if value is not None)
    return Curve(
        line.name,
        line.look,
        "".join(words),
        shown(last),
        dots if line.has_dots and len(dots) <= MOST_DOTS else (),
    )
