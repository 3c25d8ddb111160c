"""The disk cache: what was worked out once about pictures, latents, text embeddings.

Everything is found by its content (the picture's bytes, the recipe, the model's weights), so nothing can be
stale; a file that is torn or damaged is made anew; any number of processes may share the folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open

from megaman.common import files
from megaman.common.console import say
from megaman.common.files import TensorOnCpu

T = TypeVar("T", bound=TensorOnCpu)
ENTRIES = "encodings"  # the part of the cache folder that is ours alone; it carries the mark
MARK = "CACHEDIR.TAG"  # backup programs leave such folders out (bford.info/cachedir)
MARK_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# Kept by megaman_lora.py, which also deletes here.\n"
)
ENTRY = re.compile(r"\.?[0-9a-f]{64}\.(json|safetensors)(\.\w+\.partial)?")  # the last: of a killed process
LIMIT_BYTES = 4 * 2**30  # the least recently used entries go when the folder is larger
CHECKSUM = "sha256"


def default_folder() -> Path:
    """`megaman_lora` in the user's cache folder, by the platform's convention."""
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "megaman_lora" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "megaman_lora"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "megaman_lora"


def key_of(*parts: object) -> str:
    """A cache key: the sha256 of all that decides a value (numbers, texts, bytes, digests)."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


# ---------------------------------------------------------------- how entries are written


@dataclass(frozen=True)
class Codec:
    """How a kind of entries is read and written. Reading raises anything where the file is not whole."""

    suffix: str
    read: Callable[[Path], Any]
    write: Callable[[Path, Any], None]


def _read_json(path: Path) -> Any:
    entry = json.loads(path.read_bytes())
    if entry[CHECKSUM] != key_of(json.dumps(entry["facts"])):
        raise ValueError("damaged")
    return entry["facts"]


def _write_json(path: Path, facts: Any) -> None:
    files.write_text(path, json.dumps({"facts": facts, CHECKSUM: key_of(json.dumps(facts))}))


def _read_tensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (file.metadata() or {}).get(CHECKSUM) != _checksum(tensors):
            raise ValueError("damaged")
    return tensors


def _write_tensors(path: Path, tensors: Mapping[str, TensorOnCpu]) -> None:
    files.save_tensors(tensors, path, {CHECKSUM: _checksum(tensors)})


def _checksum(tensors: Mapping[str, TensorOnCpu]) -> str:
    parts = [part for name in sorted(tensors) for part in (name, tensors[name].numpy().tobytes())]
    return key_of(*parts)


JSON = Codec(".json", _read_json, _write_json)
TENSORS = Codec(".safetensors", _read_tensors, _write_tensors)


# ---------------------------------------------------------------- the store


def _path_of(entries: Path, key: str, codec: Codec) -> Path:
    return entries / key[:2] / f"{key}{codec.suffix}"


_told: set[Path | None] = set()  # folders that can't be written to, as the user knows


class Store:
    """The cache on disk. Without a folder, nothing is remembered.

    Only its folder ENTRIES is written to, once that bears our mark: the rest may be the user's.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.entries = None if folder is None else folder / ENTRIES
        self.is_writable = True
        self.hits = self.misses = 0

    def facts(self, key: str, make: Callable[[], Any], *, is_counted: bool = True) -> Any:
        """What `make` returns (JSON's types), made only if it is not there yet. Nothing (None, empty) is not
        kept.
        """
        return self._remembered(key, make, JSON, is_counted)

    def tensors(self, key: str, make: Callable[[], dict[str, T]], *, is_counted: bool = True) -> dict[str, T]:
        """What `make` returns, made only if it is not there yet. On the CPU. No tensors are not kept."""
        return self._remembered(key, make, TENSORS, is_counted)

    def holds_facts(self, key: str) -> bool:
        """Whether there is such an entry; it may still be damaged."""
        return self.entries is not None and os.path.isfile(_path_of(self.entries, key, JSON))

    def _remembered(self, key: str, make: Callable[[], Any], codec: Codec, is_counted: bool) -> Any:
        if self.entries is None:
            return make()
        path = _path_of(self.entries, key, codec)
        try:
            found = codec.read(path)
        except Exception:  # missing, torn, damaged, no permission: a cache may always be asked in vain
            self.misses += is_counted
        else:
            with contextlib.suppress(OSError):  # another user's
                os.utime(path)  # what is used stays longest
            self.hits += is_counted
            return found
        made = make()
        if made and self.is_writable:
            self._keep(path, made, codec)
        return made

    def _keep(self, path: Path, made: Any, codec: Codec) -> None:
        try:
            if not self._is_ours():
                files.write_text(path.parents[1] / MARK, MARK_TEXT)
            codec.write(path, made)
        except OSError as error:  # a full or read-only cache folder costs time, never the run
            if path.exists():  # another process was quicker; Windows does not replace what is being read
                return
            self.is_writable = False
            if self.folder not in _told:
                _told.add(self.folder)
                say(f"cache: {self.folder} can't be written to ({error.strerror}); nothing new is kept")

    def _is_ours(self) -> bool:
        """Whether the entries' folder bears our mark. FileExistsError if it holds anything without."""
        if self.entries is None:
            return False
        holds_others = False
        if not self._is_marked():
            with contextlib.suppress(FileNotFoundError):
                holds_others = any(not path.name.startswith(f".{MARK}.") for path in self.entries.iterdir())
        is_ours = self._is_marked()  # asked again: another process may have begun the folder just now
        if holds_others and not is_ours:
            raise FileExistsError(errno.EEXIST, f"its {ENTRIES} holds files that are not ours")
        return is_ours

    def _is_marked(self) -> bool:
        try:
            return self.entries is not None and (self.entries / MARK).read_text(encoding="utf-8") == MARK_TEXT
        except (OSError, ValueError):
            return False

    def prune(self, limit_bytes: int = LIMIT_BYTES) -> int:
        """Deletes the least recently used entries beyond the limit where it may; returns how many."""
        try:
            if self.entries is None or not self._is_ours():
                return 0
        except OSError:  # the user's, or out of reach
            return 0
        entries = []
        for path in self.entries.glob("??/*"):
            try:
                if path.is_symlink() or not path.is_file() or not ENTRY.fullmatch(path.name):
                    continue
                entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except OSError:  # another process was quicker
                continue
        kept = deleted = 0
        for _, size, path in sorted(entries, reverse=True):
            kept += size
            if kept > limit_bytes:
                with contextlib.suppress(OSError):  # another user's, or read just now on Windows
                    path.unlink()
                    deleted += 1
        return deleted
