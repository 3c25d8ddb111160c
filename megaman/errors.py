"""What a user can do wrong, and how both scripts end."""

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

OK, BUG, USAGE, DATA, MODEL, NUMBERS, RESOURCES, STATE = range(8)  # exit codes
INTERRUPTED = 130  # 128 + SIGINT

_RESOURCE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}


class UserError(Exception):
    """Something the user can mend.

    The message says what, where and what to do, in one line (or a line a problem).
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(main: Callable[[], None]) -> NoReturn:
    """Runs main and leaves with its exit code; only a bug of ours shows a traceback."""
    try:
        main()
    except UserError as error:
        leave(str(error), error.exit_code)
    except KeyboardInterrupt:
        leave("stopped by the keyboard; finished files are kept", INTERRUPTED)
    except MemoryError:
        leave(
            "out of memory; a smaller --resolution, --train_batch_size 1 or --gradient_checkpointing "
            "needs less",
            RESOURCES,
        )
    except OSError as error:
        if error.errno not in _RESOURCE_ERRNOS:
            raise
        leave(
            f"{error.filename or 'disk'}: {error.strerror}; free some space, or name a folder that can "
            "be written",
            RESOURCES,
        )
    except RuntimeError as error:
        if (
            type(error).__name__ != "OutOfMemoryError"
        ):  # torch's, named so that torch need not be imported to fail
            raise
        leave(
            "out of GPU memory; try --train_batch_size 1, --gradient_checkpointing or a smaller --resolution",
            RESOURCES,
        )
    sys.exit(OK)


def leave(message: str, exit_code: int) -> NoReturn:
    """One line on stderr (from the first process only), then the exit code."""
    say(f"error: {message}")
    sys.exit(exit_code)


def say(message: str) -> None:
    """One line for the user on stderr; of several processes, only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
