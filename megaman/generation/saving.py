"""What happens beside the drawing: pictures are saved while the next ones are drawn, and a page that grows is
not written too often.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

TIMES_AS_LONG = 20  # as it took, that it is not done again: a twentieth of the time is spent on it

Work = Callable[[], object]


class Seldom:
    """A piece of work that takes the longer the oftener it was done, kept to a twentieth of the time."""

    def __init__(self, work: Work, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self.work = work
        self.clock = clock
        self.due_s = float("-inf")

    def do(self) -> None:
        """Does it, unless it was done a short while ago."""
        started_s = self.clock()
        if started_s < self.due_s:
            return
        self.work()
        ended_s = self.clock()
        self.due_s = ended_s + TIMES_AS_LONG * (ended_s - started_s)


class Laps:
    """How long one piece of work after the other took, each of which may begin before the last has ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self.clock = clock
        self.ended_s = float("-inf")

    def end(self, started_s: float) -> float:
        """Seconds of the piece that ends now: since it began, or since the last one ended."""
        began_s = max(started_s, self.ended_s)
        self.ended_s = self.clock()
        return self.ended_s - began_s


@contextmanager
def beside(at_the_end: Work) -> Iterator[Callable[[Work], None]]:
    """Gives a function that has a piece of work done in one other thread, in the order of the calls, and
    waits only for the piece before it. What a piece fails with is raised by the next call, or at the end of
    the block.

    However the block ends (a signal, a full disk), what was given is done first, and then at_the_end, in that
    thread too: no two pieces ever run at once.
    """
    given: list[Future[object]] = []

    def do(work: Work) -> None:
        given.append(thread.submit(work))  # first: what waits below may be interrupted
        if len(given) > 1:
            given.pop(0).result()

    with ThreadPoolExecutor(1, "saving") as thread:
        try:
            yield do
            for piece in given:
                piece.result()
        finally:
            thread.submit(at_the_end).result()
