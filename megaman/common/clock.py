"""When the command began: before its imports, which take seconds."""

import time

_began: list[float] = []


def start() -> None:
    """Notes the moment, for `began`."""
    _began[:] = [time.monotonic()]


def began() -> float:
    """The moment that `start` has noted, told once; now, where a program calls us. Seconds, monotonic."""
    return _began.pop() if _began else time.monotonic()
