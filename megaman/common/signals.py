"""What Ctrl-C (SIGINT) and SIGTERM do: stop at once, or after the current step."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

BY_SIGNAL = 128  # exit code, plus the signal's number: 130 for SIGINT, 143 for SIGTERM
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Somebody asked the program to stop. No Exception, so that nobody who handles errors swallows it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = BY_SIGNAL + number


class StopRequest:
    """Whether somebody asked the program to stop, and by which signal."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    def obey(self, message: str) -> NoReturn:
        """Leaves the program as the signal demands, with these words."""
        raise Stopped(self.number or signal.SIGTERM, message)


def end_quietly() -> None:
    """From here on a signal ends the program with its code and no traceback: while the libraries are loading,
    and wherever nobody else answers it.
    """

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(BY_SIGNAL + number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


@contextmanager
def at_once() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: by an exception, so that what is half written is removed."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise Stopped(number, "stopped; finished files are kept")

    with _handling(leave):
        yield


@contextmanager
def after_this_step() -> Iterator[StopRequest]:
    """The first signal is only noted, for whoever looks; the second ends the process there and then."""
    request = StopRequest()

    def note(number: int, _: FrameType | None) -> None:
        request.number = number
        signal.signal(number, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping after this step (once more: at once, without saving)\n")

    with _handling(note):
        yield request


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may
        yield
        return
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    for number, before in earlier.items():
        if before is not signal.SIG_IGN:  # nohup and the like asked to be left alone
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)
