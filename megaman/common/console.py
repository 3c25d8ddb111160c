"""The terminal: lines for the user, errors and exit codes, characters that must not be there, quiet
libraries.
"""

import codecs
import errno
import io
import logging
import os
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from itertools import islice
from types import TracebackType
from typing import NoReturn

from megaman.common.signals import Stopped, at_once


class Exit(IntEnum):
    """The exit codes of both scripts."""

    OK = 0
    BUG = 1  # of ours: the only one with a traceback
    USAGE = 2
    DATA = 3
    MODEL = 4  # or adapter
    NUMBERS = 5  # NaN or infinite
    RESOURCES = 6  # disk, memory, permission
    STATE = 7  # of a checkpoint or an output folder


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
    errno.ELOOP,
}
_LOOP = "Symlink loop from "  # what pathlib raises a RuntimeError with, before Python 3.13
_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)  # controls, writing directions
_MEMORY_WORDS = re.compile(
    r"out of memory|can't allocate memory|not enough memory"
    r"|could not (create|execute) a primitive(?! desc)"  # oneDNN's, without room for what it needs beside
)


REQUIREMENTS = "requirements_megaman_lora.txt"
REQUIRED = frozenset(
    {
        "PIL",
        "accelerate",
        "diffusers",
        "huggingface_hub",
        "jinja2",
        "numpy",
        "peft",
        "psutil",
        "safetensors",
        "tensorboard",
        "torch",
        "tqdm",
        "transformers",
        "yaml",
    }
)  # what it installs, by the names that are imported

_SPELLED_IN_SHELL = re.compile(rb"[^ -&(-\[\]-~]")  # in $'…': quote, backslash, all but printable ASCII
_BREAKS_A_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # all but the characters that end a line
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")  # NUL and half characters: no file, no tokenizer takes them


class UserError(Exception):
    """Something the user can fix.

    The message says what, where and what to do, in one line; of several problems each has a line.
    is_of_all: every one of several processes raises it, so that one need tell it.
    """

    def __init__(self, message: str | Sequence[str], exit_code: int, *, is_of_all: bool = False) -> None:
        self.problems = (message,) if isinstance(message, str) else tuple(message)
        super().__init__("\n".join(self.problems))
        self.exit_code = exit_code
        self.is_of_all = is_of_all


# ---------------------------------------------------------------- characters that must not be there
def one_line(text: str) -> str:
    """The text without what breaks a line or steers a terminal: names of files are anyone's."""
    return _BREAKS_A_LINE.sub(lambda found: repr(found[0])[1:-1], text)


def control_in(text: str) -> re.Match[str] | None:
    """The first control character, the ends of lines aside."""
    return _CONTROLS.search(text)


def is_text(text: str) -> bool:
    """Whether the text can be written to a file and named on a command line."""
    return _NO_TEXT.search(text) is None


def check_text(text: str, where: str, exit_code: int) -> None:
    """UserError on a control character: no model reads it, and it breaks the files that hold the prompt."""
    if control := control_in(text):
        reason = f"holds a control character (U+{ord(control[0]):04X}); type it as plain text"
        raise UserError(f"{where}: {reason}", exit_code)


# ---------------------------------------------------------------- terminals that are not UTF-8
LOOK_ALIKES = (
    {"…": "...", "×": "x"}
    | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("‘’", "'")
    | dict.fromkeys("·–—−", "-")
)
SCRIPTS = ("megaman_lora.py", "generate_megaman.py")
SPELLED_OUT = "megaman_spelled_out"  # our error handler's name among Python's


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    """What is printed in place of characters that an encoding lacks, and where to go on: plain look-alikes of
    typographic ones, backslash escapes of all others.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (LOOK_ALIKES.get(each) or each.encode("ascii", "backslashreplace").decode() for each in lacking)
    return "".join(spelled), error.end


def spell_out_what_terminals_lack() -> None:
    """From here on stdout and stderr print every text, whatever their encoding. UTF-8 has all characters and
    stays as it is.
    """
    codecs.register_error(SPELLED_OUT, _spelled_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors=SPELLED_OUT)


def _is_in_terminals_encoding(text: str) -> bool:
    """Whether stderr can print the text as it is."""
    try:
        text.encode(getattr(sys.stderr, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------- how both scripts begin and end
def name_missing_library(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """An excepthook: one line (exit 2) where a library that the scripts need is not installed. All else keeps
    its traceback.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in REQUIRED:
        leave(f"{error.name} is not installed; run: pip install -r {REQUIREMENTS}", Exit.USAGE)
    sys.__excepthook__(kind, error, trace)


def quiet_libraries() -> None:
    """Silences warnings of libraries that the user can do nothing about. Called before they are imported."""
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # its errors are raised too, and told by us
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # tensorboard looks for TensorFlow
    for name in (
        "xformers",
        "torch.distributed",
        "torch.distributed.elastic.multiprocessing.redirects",
        "accelerate",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|diffusers|transformers|peft|accelerate|xformers)\b.*"
    )
    threading.excepthook = _tell_of_a_thread


def _tell_of_a_thread(ended: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread hands its error on, and whoever gets it tells it."""
    if not type(ended.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(ended)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its accelerator has no memory left."""
    is_said = _MEMORY_WORDS.search(str(error).lower()) is not None
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_said)


@contextmanager
def reported() -> Iterator[None]:
    """Ends the program with one line and its exit code where the block fails by a mistake of the user's, for
    want of disk or memory, or by a signal. Only a bug of ours shows a traceback.
    """
    spell_out_what_terminals_lack()
    try:
        with at_once():
            yield
    except UserError as error:
        leave(error.problems, error.exit_code, is_of_all=error.is_of_all)
    except Stopped as stop:
        say(str(stop))
        sys.exit(stop.exit_code)
    except OSError as error:
        if error.errno not in _DISK | _PATHS:
            raise
        remedy = "free some space" if error.errno in _DISK else "name a file or folder that can be used"
        leave(f"{error.filename or 'disk'}: {error.strerror}; {remedy}", Exit.RESOURCES)
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith(_LOOP):
            path = str(error).removeprefix(_LOOP)
            leave(f"{path}: a link that leads to itself; name a file or folder", Exit.RESOURCES)
        if not is_out_of_memory(error):
            raise
        leave(
            "out of memory; take smaller pictures (--resolution, or --height and --width), a smaller "
            "--batch_size or --train_batch_size, or half precision (--mixed_precision fp16)",
            Exit.RESOURCES,
        )


def _tell(line: str) -> None:
    """Prints a line on stderr. Where nobody reads it any more (a pipe into head), the work goes on."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def leave(message: str | Sequence[str], exit_code: int, *, is_of_all: bool = False) -> NoReturn:
    """Ends the program with one line on stderr, or one of each problem, and an exit code.

    Of several processes only the first speaks, unless it may be the only one that is well: a full memory or
    disk and a NaN are one process's own, if not is_of_all.
    """
    first, *others = [message] if isinstance(message, str) else message
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        for line in (f"error: {first}", *others):
            say(line)
    elif exit_code in (Exit.RESOURCES, Exit.NUMBERS) and not is_of_all:
        _tell(_printable(f"error: process {rank}: {first}"))
    sys.exit(exit_code)


def say(message: str) -> None:
    """Prints one line for the user on stderr; of several processes, only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        _tell(_printable(message))


def shell_quoted(word: str) -> str:
    """A word quoted for this machine's shell, so that a told command can be pasted as it stands."""
    if word.startswith(("-", "~")):
        word = os.path.join(".", word)  # a path, and no flag; a name, and no user's home
    if os.name == "nt":  # cmd and PowerShell; no name of a file holds their quote
        return word if re.fullmatch(r"[\w.:\\/-]+", word, re.ASCII) else f'"{word}"'
    if _STEERING.search(word) or "\n" in word or "\t" in word or not _is_in_terminals_encoding(word):
        spelled = _SPELLED_IN_SHELL.sub(lambda found: b"\\x%02x" % found[0][0], os.fsencode(word)).decode()
        return f"$'{spelled}'"
    return shlex.quote(word)


def command_of(script: str) -> str:
    """How a script of ours is run from where the user stands: beside the one that is running now."""
    running = sys.argv[0]
    place = os.path.dirname(running) if os.path.basename(running) in SCRIPTS else ""
    return f"python {shell_quoted(os.path.join(place, script))}"


NAMED = 5  # things that a line names; there may be hundreds


def count(number: int, noun: str) -> str:
    """A number and its noun: "1 picture", "2 pictures"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """The first few names, comma-separated, with "…" where there are more."""
    first = list(islice(names, most + 1))
    return ", ".join(first[:most]) + (", …" if len(first) > most else "")


def _printable(message: str) -> str:
    """The message in one line, with its control characters spelled out: a file's name must neither end the
    line nor steer the terminal.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), one_line(message))
