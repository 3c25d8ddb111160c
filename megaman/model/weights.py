"""Which weights a model holds: a digest of every bit, and of which files it is known already."""

import hashlib
import json
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from megaman.common.cache import Store, key_of

RECIPE = 1  # raised whenever the way changes in which files become weights
UNSURE_NS = 2 * 10**9  # before loading: the coarsest clock of a file system (FAT) tells no two times apart
SAMPLE = 16  # numbers at a tensor's beginning and at its end


@dataclass(frozen=True)
class Origin:
    """Where a base's weights come from. Made before they are loaded: what changes later is not them."""

    source: Path  # a diffusers folder, or a single file
    began_ns: int = field(default_factory=time.time_ns)  # when loading began, in ns since 1970

    def identity(self, part: str) -> str | None:
        """The files that hold a part's weights, by all that the system knows of them: path, size, times,
        inode. None where they may have changed since loading began, or just before, or are gone.
        """
        is_one = self.source.is_file()
        files = [self.source] if is_one else sorted((self.source / part).glob("*.safetensors"))
        facts: list[tuple[str, int, int, int, int]] = []
        for file in files:
            try:
                real = file.resolve(strict=True)  # the hub's cache holds links
                stat = real.stat()
            except (OSError, RuntimeError):  # a loop of links
                return None
            if max(stat.st_mtime_ns, stat.st_ctime_ns) > self.began_ns - UNSURE_NS:
                return None
            facts.append((str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
        return repr(facts) if facts else None


def digest_of(module: Any) -> str:
    """Of every bit that decides what a model of diffusers or transformers computes: weights, precision,
    config.
    """
    total = hashlib.sha256(_config_of(module))
    for name, tensor in sorted(module.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(_described(name, tensor))
        total.update(raw.numpy())
    return total.hexdigest()


def remembered_digest(module: Any, part: str, origin: Origin | None, store: Store) -> str:
    """As `digest_of`, from the store where the module was loaded from the same files before. part: its name
    in the base. Files whose times and inode tell nothing are still told apart by a sample of each tensor.
    """
    identity = None if origin is None else origin.identity(part)
    if identity is None:
        return digest_of(module)
    libraries = (torch.__version__, diffusers.__version__, transformers.__version__)
    key = key_of("digest of weights", RECIPE, *libraries, part, identity, _outline(module))
    return store.facts(key, partial(digest_of, module), is_counted=False)


def _config_of(module: Any) -> bytes:
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    fixed = {name: value for name, value in config.items() if name[0] != "_" and "version" not in name}
    return json.dumps(fixed, sort_keys=True, default=str).encode()


def _described(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()


def _outline(module: Any) -> str:
    """A digest of config, names and shapes, and of a few numbers of each tensor."""
    total = hashlib.sha256(_config_of(module))
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # as they lie: no order is made anew
        total.update(_described(name, tensor))
        for sample in (flat[:SAMPLE], flat[-SAMPLE:]):
            total.update(sample.cpu().view(torch.uint8).numpy())
    return total.hexdigest()
