"""Files that are complete or absent, and the output folder."""

import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from megaman.common.console import RESOURCES, STATE, USAGE, UserError


class TensorOnCpu(Protocol):
    """What is written of a tensor: torch's own has it, and this module needs no torch."""

    def numpy(self) -> np.ndarray:
        """The numbers, not copied."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well and vanishes when it
    does not.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # nobody else has such a name
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())  # safetensors writes 0600, whatever the umask says
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say where
        raise
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it, if need be. A link is followed, also one that leads nowhere."""
    Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """The text under `path`, UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def is_page(path: Path) -> bool:
    """Whether a page of ours lies there: all of them name their maker, and earlier ones bear our policy."""
    try:
        with path.open("rb") as file:
            head = file.read(PAGE_HEAD_BYTES)
    except OSError:
        return False
    return any(mark in head for mark in PAGE_MARKS)


def check_page(path: Path) -> None:
    """UserError (exit 7) if something else than a page of ours lies where one is to be written."""
    if os.path.lexists(path) and not is_page(path):
        raise UserError(f"{path}: is no page of ours. Move it, or name another --output_dir.", STATE)


def sha256_of(path: Path) -> str:
    """The file's sha256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(
    tensors: Mapping[str, TensorOnCpu],
    path: Path,
    metadata: Mapping[str, str],
    finish: Callable[[Path], None] = lambda partial: None,
) -> None:
    """A safetensors file, whole or not at all. A full disk is an OSError, as for any other file.

    finish: called with the temporary file; if it raises, there is no file.
    """
    with replacing(path) as partial:
        try:
            save_file({name: tensor.numpy() for name, tensor in tensors.items()}, partial, dict(metadata))
        except SafetensorError as error:  # its words for a failed write; the numbers were checked before
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        partial.write_bytes(_with_sorted_metadata(partial.read_bytes()))
        finish(partial)


def _with_sorted_metadata(file: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library's own order changes from run to
    run.
    """
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


PAGE_HEAD_BYTES = 1024
PAGE_MARKS = (
    b'<meta name="generator" content="megaman_lora">',
    b"default-src &#39;none&#39;; img-src &#39;self&#39; file: data:; style-src &#39;unsafe-inline&#39;;",
)
LOCK = ".lock"  # holds the number of the process that works in the folder
RECORD = "training_config.json"  # the settings of the run in the folder
RECORDED = frozenset({"pretrained_model_name", "data_dir", "lora_rank", "lora_alpha"})  # in every record
SHOWN = frozenset({"dataset.html", "captions", LOCK})  # what a dry run leaves; a run goes on beside it
OF_A_RUN = re.compile(
    r"lora_weights|checkpoints(\.\d{3,})?|samples|logs|dry_run|captions|dataset\.html|metrics\.jsonl|"
    + re.escape(RECORD)
)  # what lies in a run's folder
SIGNATURE_LETTERS = 64  # read of a lock: a number is shorter
PROBE_BYTES = 1 << 20  # a disk without room for so much is full


def holds_files(folder: Path) -> bool:
    """Whether anything lies there but what a dry run leaves."""
    return folder.is_dir() and any(path.name not in SHOWN for path in folder.iterdir())


def holds_run(folder: Path) -> bool:
    """Whether a run of ours lies in the folder: its record says so, not that record's name alone."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.keys() >= RECORDED


def check_output(folder: Path, data_dir: Path) -> None:
    """Raises UserError unless a run may begin in `folder`: it holds nothing, or an earlier run, which will be
    moved aside. Makes nothing. Asked before anything slow begins.
    """
    if data_dir.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: holds the pictures ({data_dir}). Name another --output_dir.", USAGE)
    if holds_files(folder) and not holds_run(folder):
        raise UserError(f"{folder}: holds files that no run of ours made. Name another --output_dir.", STATE)
    check_page(folder / "dataset.html")
    check_unused(folder)
    check_writable(folder)


def check_unused(folder: Path) -> None:
    """Raises UserError (exit 7) if another process works in `folder`; makes nothing."""
    if (folder / LOCK).exists():
        OutputLock(folder).close()


def check_apart(flag: str, folder: str | None, data_dir: str | None) -> None:
    """Raises UserError where a flag would have something written among the user's pictures."""
    real = os.path.realpath  # unlike Path.resolve it has an answer for a link that leads back to itself
    if folder is not None and data_dir is not None and Path(real(folder)).is_relative_to(real(data_dir)):
        reason = f"--{flag} {folder}: lies in the folder that holds the pictures, which is never written to"
        raise UserError(f"{reason}. Name another.", USAGE)


def check_writable(folder: Path) -> None:
    """Raises UserError (exit 6) unless `folder` can be made and written to; makes nothing."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"\0" * PROBE_BYTES)
    except OSError as error:
        reason = (
            f"{folder}: can't write there ({error.strerror}). Free some space, or name another --output_dir."
        )
        raise UserError(reason, RESOURCES) from error


def free_name(path: Path) -> Path:
    """The first of NAME.001, NAME.002, … that is not there."""
    number = 1
    while (free := path.with_name(f"{path.name}.{number:03}")).exists():
        number += 1
    return free


def is_link(folder: Path) -> bool:
    """Whether the path itself, not a folder above it, leads elsewhere: a symbolic link, Windows' junction."""
    parent, name = os.path.split(os.path.abspath(folder))
    return os.path.realpath(folder) != os.path.join(os.path.realpath(parent), name)


def moved_aside(folder: Path) -> Path | None:
    """Renames a folder that holds anything to the first free NAME.001, NAME.002, …; None if it holds nothing.
    A link stays, and so does the folder that it leads to: only the run in it moves, to a folder beside that.
    """
    real = Path(os.path.realpath(folder))
    if not holds_files(real):
        return None
    aside = free_name(real)
    try:
        if is_link(folder):
            _move_run(real, aside)
        else:
            real.rename(aside)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be moved aside ({error.strerror}). Name another --output_dir.", STATE
        ) from error
    (aside / LOCK).unlink(missing_ok=True)
    return aside


def _move_run(folder: Path, aside: Path) -> None:
    aside.mkdir()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RECORD):  # it goes last: until then
        if OF_A_RUN.fullmatch(path.name):  # the folder is known for a run's, if this is interrupted
            path.rename(aside / path.name)


# ---------------------------------------------------------------- one process a folder


class OutputLock:
    """The right to write in a folder: one process has it until it ends, however it ends.

    The system keeps the lock, not the file, so what a killed process leaves behind locks nobody out.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder. UserError (exit 7) with the other's number if it is in use."""
        make_folder(folder)
        self.path = folder / LOCK
        if self.path.is_symlink():  # writing would change a file elsewhere
            raise UserError(f"{self.path}: is a link, and ours never is. Remove it.", STATE)
        self.file = self.path.open("a+", encoding="ascii", errors="replace")
        is_free = _locked(self.file.fileno())
        self.file.seek(0)
        signature = self.file.read(SIGNATURE_LETTERS).strip()
        if is_free and re.fullmatch(r"[0-9]*", signature):
            return
        self.file.close()
        if is_free:
            raise UserError(f"{self.path}: is no lock of ours. Name another --output_dir.", STATE)
        raise UserError(
            f"{folder}: in use by process {signature}. Wait for it, or name another --output_dir.", STATE
        )

    def sign(self) -> "OutputLock":
        """Leaves this process's number there, for those who are refused."""
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()
        return self

    def close(self) -> None:
        """Lets others in. The file stays: deleting it could delete the next one's. Safe to call twice."""
        self.file.close()


def claim(folder: Path, *, fresh: bool) -> tuple[OutputLock, Path | None]:
    """The lock on an output folder, which is emptied first if `fresh`: an earlier run's is moved aside, and
    its new name is returned too.
    """
    lock = OutputLock(folder).sign()
    if not fresh or not holds_files(folder):
        return lock, None
    if is_link(folder):
        return lock, moved_aside(folder)  # the folder stays, and its lock with it
    if os.name == "nt":  # Windows moves no folder with an open file in it
        lock.close()
    aside = moved_aside(folder)
    try:
        return OutputLock(folder).sign(), aside
    finally:
        lock.close()


def _locked(handle: int) -> bool:
    """Whether this process now has the lock; the system gives it back when the process ends."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, PROBE_BYTES, os.SEEK_SET)  # beyond the number, which others may read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
