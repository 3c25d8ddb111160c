"""What a user can do wrong, and how both scripts end."""

import errno
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

from megaman.stopping import Stopped, at_once

OK, BUG, USAGE, DATA, MODEL, NUMBERS, RESOURCES, STATE = range(8)  # exit codes

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PATHS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EBUSY,
}
_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)  # controls, writing directions
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


class UserError(Exception):
    """Something the user can mend.

    The message says what, where and what to do, in one line (or a line a problem).
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its accelerator has no memory left."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in words for word in _MEMORY_WORDS)
    )


def run(main: Callable[[], None]) -> NoReturn:
    """Runs main and leaves with its exit code; only a bug of ours shows a traceback."""
    try:
        with at_once():
            main()
    except UserError as error:
        leave(str(error), error.exit_code)
    except Stopped as stop:
        say(str(stop))
        sys.exit(stop.exit_code)
    except OSError as error:
        if error.errno not in _DISK | _PATHS:
            raise
        remedy = "free some space" if error.errno in _DISK else "name a file or folder that can be used"
        leave(f"{error.filename or 'disk'}: {error.strerror}; {remedy}", RESOURCES)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        leave(
            "out of memory; take smaller pictures (--resolution, or --height and --width), a smaller "
            "--batch_size or --train_batch_size, or half precision (--mixed_precision fp16)",
            RESOURCES,
        )
    sys.exit(OK)


def leave(message: str, exit_code: int) -> NoReturn:
    """One line on stderr, then the exit code.

    Of several processes only the first speaks, unless it may be the only one that is well: a full memory or
    disk and a NaN are one process's own.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        say(f"error: {message}")
    elif exit_code in (RESOURCES, NUMBERS):
        print(_printable(f"error: process {rank}: {message}"), file=sys.stderr, flush=True)
    sys.exit(exit_code)


def say(message: str) -> None:
    """One line for the user on stderr; of several processes, only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(_printable(message), file=sys.stderr, flush=True)


def shell_quoted(word: str) -> str:
    """The word as this machine's shells take it for one argument, whatever letters it holds."""
    if word.startswith("-"):
        word = os.path.join(".", word)  # a path, and no flag
    if os.name == "nt":  # cmd and PowerShell; no name of a file holds their quote
        return word if re.fullmatch(r"[\w.:\\/-]+", word, re.ASCII) else f'"{word}"'
    if _STEERING.search(word) or "\n" in word or "\t" in word:
        spelled = "".join(f"\\x{byte:02x}" for byte in os.fsencode(word))
        return f"$'{spelled}'"
    return shlex.quote(word)


def _printable(message: str) -> str:
    """The message with its control characters spelled out: a file's name must not steer the terminal."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), message)
