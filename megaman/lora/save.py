"""The door to adapters: writing them for every tool, each file read back and compared before it gets its
name. Layers, layouts, reading, metadata and the self-test have rooms of their own.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from megaman.common.files import replacing, save_tensors, write_text
from megaman.lora.adapter import ADAPTER_NAME, Adapter, LoraLayer, adapter_of, lora_modules, underscored
from megaman.lora.formats import (
    diffusers_metadata,
    diffusers_tensors,
    kohya_tensors,
    peft_config,
    peft_tensors,
)
from megaman.lora.load import (
    CHECKPOINT_FILE,
    DIFFUSERS_FILE,
    KOHYA_FILE,
    OURS,
    PEFT_CONFIG,
    PEFT_FILE,
    read_adapter,
)
from megaman.lora.metadata import HASHES, kohya_metadata, our_metadata, with_hashes, write_companions
from megaman.lora.selftest import FLOAT16, FLOAT32, check_written, updates_in, updates_of

__all__ = [
    "ADAPTER_NAME",
    "CHECKPOINT_FILE",
    "Adapter",
    "LoraLayer",
    "adapter_of",
    "kohya_tensors",
    "lora_modules",
    "peft_tensors",
    "read_adapter",
    "underscored",
    "write_adapter",
    "write_kohya",
]


def write_adapter(
    adapter: Adapter, folder: Path, *, live: nn.Module | None = None, preview: Path | None = None
) -> list[Path]:
    """Writes lora_weights/: the PEFT pair in float32; kohya's layout in float16 under both of its names (of a
    DoRA, the second one in diffusers' layout, since diffusers drops kohya's magnitudes); model card, sidecar
    and preview picture.

    live: the model that the adapter was taken from; every file is compared with it (else with the adapter).
    UserError (exit 4) if a file reads back as anything else, (exit 5) if a number isn't finite.
    """
    pair, kohya, diffusers = (folder / name for name in (PEFT_FILE, KOHYA_FILE, DIFFUSERS_FILE))
    expected = updates_in(adapter) if live is None else updates_of(live)

    def checked(tolerance: float) -> Callable[[Path, Path], None]:
        return lambda file, shown: check_written(file, shown, expected, tolerance)

    ours = our_metadata(adapter, OURS)
    write_text(folder / PEFT_CONFIG, json.dumps(peft_config(adapter), indent=2, sort_keys=True) + "\n")
    _save(peft_tensors(adapter), pair, ours, checked(FLOAT32))
    write_kohya(adapter, kohya, preview=preview, check=checked(FLOAT16))
    if adapter.is_dora:
        _save(diffusers_tensors(adapter), diffusers, ours | diffusers_metadata(adapter), checked(FLOAT32))
    else:
        with replacing(diffusers) as partial:
            partial.write_bytes(kohya.read_bytes())
            checked(FLOAT16)(partial, diffusers)
    companions = write_companions(adapter, folder, preview)
    return [pair, folder / PEFT_CONFIG, kohya, diffusers, *companions]


def write_kohya(
    adapter: Adapter,
    path: Path,
    *,
    preview: Path | None = None,
    check: Callable[[Path, Path], None] | None = None,
) -> None:
    """One file in kohya's layout, float16. check: called with the finished file and the name it is to get."""
    metadata = our_metadata(adapter, OURS) | kohya_metadata(adapter, preview) | HASHES
    _save(kohya_tensors(adapter), path, metadata, check)


def _save(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    check: Callable[[Path, Path], None] | None = None,
) -> None:
    def finish(partial: Path) -> None:
        partial.write_bytes(with_hashes(partial.read_bytes()))
        if check is not None:
            check(partial, path)

    save_tensors(tensors, path, metadata, finish)
