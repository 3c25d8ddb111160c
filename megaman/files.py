"""Files that are complete or absent, and the output folder."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.errors import RESOURCES, STATE, USAGE, UserError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well and vanishes when it
    does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
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


def write_text(path: Path, text: str) -> None:
    """The text under `path`, UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def sha256_of(path: Path) -> str:
    """The file's sha256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(
    tensors: Mapping[str, "Tensor"],
    path: Path,
    metadata: Mapping[str, str],
    finish: Callable[[Path], None] = lambda partial: None,
) -> None:
    """A safetensors file, whole or not at all. A full disk is an OSError, as for any other file.

    finish: called with the temporary file; if it raises, there is no file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as partial:
        try:
            save_file(dict(tensors), partial, dict(metadata))
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


LOCK = ".lock"  # holds the number of the process that works in the folder
SHOWN = frozenset({"dataset.html", "captions", LOCK})  # what a dry run leaves; a run goes on beside it
PROBE_BYTES = 1 << 20  # a disk without room for so much is full


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.name not in SHOWN for path in folder.iterdir())


def check_output(folder: Path, mark: str, data_dir: Path) -> None:
    """Raises UserError unless a run may begin in `folder`; makes nothing. Asked before anything slow begins.

    mark: the file that tells an earlier run's folder, which may be moved aside, from a folder of the user's.
    """
    if data_dir.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: holds the pictures ({data_dir}). Name another --output_dir.", USAGE)
    if _holds_files(folder) and not (folder / mark).is_file():
        raise UserError(f"{folder}: holds files that no run of ours made. Name another --output_dir.", STATE)
    check_unused(folder)
    check_writable(folder)


def check_unused(folder: Path) -> None:
    """Raises UserError (exit 7) if another process works in `folder`; makes nothing."""
    if (folder / LOCK).exists():
        OutputLock(folder).close()


def check_apart(flag: str, folder: str | None, data_dir: str) -> None:
    """Raises UserError where a flag would have something written among the user's pictures."""
    real = os.path.realpath  # unlike Path.resolve it has an answer for a link that leads back to itself
    if folder is not None and Path(real(folder)).is_relative_to(real(data_dir)):
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


def moved_aside(folder: Path) -> Path | None:
    """Renames a folder that holds anything to the first free NAME.001, NAME.002, …; None if it holds
    nothing.
    """
    folder = folder.resolve()
    if not _holds_files(folder):
        return None
    aside = free_name(folder)
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be moved aside ({error.strerror}). Name another --output_dir.", STATE
        ) from error
    (aside / LOCK).unlink(missing_ok=True)
    return aside


# ---------------------------------------------------------------- one process a folder


class OutputLock:
    """The right to write in a folder: one process has it until it ends, however it ends.

    The system keeps the lock, not the file, so what a killed process leaves behind locks nobody out.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder. UserError (exit 7) with the other's number if it is in use."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK
        if self.path.is_symlink():  # writing would change a file elsewhere
            raise UserError(f"{self.path}: is a link, and ours never is. Remove it.", STATE)
        self.file = self.path.open("a+", encoding="ascii")
        if not _locked(self.file.fileno()):
            self.file.seek(0)
            other = self.file.read().strip()
            self.file.close()
            raise UserError(
                f"{folder}: in use by process {other}. Wait for it, or name another --output_dir.", STATE
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
    if not fresh or not _holds_files(folder):
        return lock, None
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
