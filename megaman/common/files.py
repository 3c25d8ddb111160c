"""Writing files so that they are complete or absent: text, safetensors, their hashes."""

import errno
import hashlib
import json
import os
import secrets
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from megaman.common.console import is_text, say


class TensorOnCpu(Protocol):
    """A CPU tensor, of which only its numbers are asked: torch's has this, and this module needs no torch."""

    def numpy(self) -> np.ndarray:
        """The numbers, not copied."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which replaces it when the block ends well and vanishes when it
    does not.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # nobody else has such a name
    try:
        yield partial
        with courtesy("permissions", "files get those that it gives them"):
            partial.chmod(0o666 & ~_umask())  # safetensors writes 0600, whatever the umask says
        with partial.open("rb+") as file:
            sync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say where
        raise
    finally:
        partial.unlink(missing_ok=True)


UNKNOWN_HERE = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EPERM}
)
_told: set[str] = set()  # what some disk lacks, and the user knows


@contextmanager
def courtesy(what: str, lost: str) -> Iterator[None]:
    """Goes on where the file system has no such thing (a cloud drive, a stick, Windows' disk under WSL), and
    says once what is lost by it. Every other failure is an OSError as ever.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNKNOWN_HERE:
            raise
        if what not in _told:
            _told.add(what)
            say(f"note: the disk has no {what} ({error.strerror}): {lost}")


def sync(handle: int) -> None:
    """Waits until an open file, or a folder's list of files, has reached the disk."""
    with courtesy("fsync", "a power cut may cost what was saved last"):
        os.fsync(handle)


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it, if need be. A link is followed, also one that leads nowhere."""
    Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)


def is_within(place: str, folder: str) -> bool:
    """Whether a path lies in a folder, or is it, however links lead there."""
    real = os.path.realpath  # unlike Path.resolve it has an answer for a link that leads back to itself
    return Path(real(place)).is_relative_to(real(folder))


def followed(path: Path) -> Path:
    """Where a link leads, for writing; the path itself, if it is none."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


LEGACY_AT, LEGACY_SIZE = 0x100000, 0x10000  # the stretch of a file that the oldest web UIs hashed


def path_from(folder: Path, place: Path) -> str:
    """The way from a folder to a place, with slashes; "" if there is none that can be written down, as
    between two drives, or through a folder whose name is no text.
    """
    try:
        way = Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return ""
    return way if is_text(way) else ""


def autov3(path: Path) -> str:
    """The 12 digits by which web UIs and Civitai know a LoRA: a hash of all behind its file's header."""
    with path.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def legacy_hash(path: Path) -> str:
    """The eight hexadecimal digits by which the oldest web UIs knew a model file."""
    with path.open("rb") as file:
        file.seek(LEGACY_AT)
        return hashlib.sha256(file.read(LEGACY_SIZE)).hexdigest()[:8]


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
    """Writes a safetensors file, whole or not at all. A full disk is an OSError, as for any other file.

    finish: called with the temporary file; if it raises, there is no file.
    """
    with replacing(path) as partial:
        try:
            arrays = {name: np.asarray(tensor.numpy(), order="C") for name, tensor in tensors.items()}
            save_file(arrays, partial, dict(metadata))  # which would scramble other orders without a word
        except SafetensorError as error:  # its words for a failed write; the numbers were checked before
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        partial.write_bytes(with_metadata(partial.read_bytes(), {}))
        finish(partial)


def with_metadata(file: bytes, entries: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file with these metadata added or replaced, sorted: the library's own order
    changes from run to run.
    """
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted((header.get("__metadata__", {}) | entries).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def folded(name: str) -> str:
    """A file's name as it is compared where letter case does not matter: macOS takes letters apart, e and its
    accent.
    """
    return unicodedata.normalize("NFC", name).lower()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
