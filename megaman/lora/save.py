"""An adapter written for every tool. Each file is read back and compared, module by module, with what was
trained, before it gets its name.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megaman.common.console import Exit, UserError
from megaman.common.files import make_folder, replacing, save_tensors, write_text
from megaman.common.kinds import UNET
from megaman.lora.adapter import Adapter, Key, underscored
from megaman.lora.formats import (
    diffusers_metadata,
    diffusers_tensors,
    kohya_tensors,
    peft_config,
    peft_tensors,
)
from megaman.lora.injection import ADAPTER_NAME, lora_modules
from megaman.lora.load import (
    DIFFUSERS_FILE,
    KIND,
    KOHYA_FILE,
    OURS,
    PEFT_CONFIG,
    PEFT_FILE,
    read_file,
)
from megaman.lora.metadata import HASHES, kohya_metadata, our_metadata, with_hashes, write_companions
from megaman.lora.names import canonical

# ---------------------------------------------------------------- does a file hold what was trained?
FLOAT32, FLOAT16 = 1e-5, 2e-3  # of the update's size; float16 rounds each factor by 5e-4 at most
NEGLIGIBLE = 1e-7  # an update below this, a weight on average, changes no tool's weights


@dataclass(frozen=True)
class Delta:
    """What is added to a module's weight before DoRA: scale * up @ down; and DoRA's magnitude."""

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None


Deltas = Mapping[Key, Delta]  # by part and underscored path


def deltas_of(parts: Mapping[str, nn.Module]) -> dict[Key, Delta]:
    """The updates of the parts in training, straight from PEFT's modules."""
    found = {}
    for part, model in parts.items():
        for name, module in lora_modules(model).items():
            down, up = (getattr(module, half)[ADAPTER_NAME].weight.detach() for half in ("lora_A", "lora_B"))
            magnitude = module.lora_magnitude_vector
            found[part, underscored(canonical(part, name))] = Delta(
                down.cpu(),
                up.cpu(),
                float(module.scaling[ADAPTER_NAME]),
                magnitude[ADAPTER_NAME].weight.detach().cpu() if ADAPTER_NAME in magnitude else None,
            )
    return found


def deltas_in(adapter: Adapter) -> dict[Key, Delta]:
    """The updates of an adapter."""
    return {
        (part, underscored(name)): Delta(layer.down, layer.up, layer.alpha / layer.rank, layer.magnitude)
        for (part, name), layer in adapter.layers.items()
    }


def check_written(file: Path, shown: Path, expected: Deltas, tolerance: float) -> None:
    """UserError (exit 4) unless the file reads back as the updates that were trained.

    shown: the name that the file is to have; beside it lies adapter_config.json for PEFT's layout.
    """
    read = deltas_in(read_file(file, shown.with_name(PEFT_CONFIG)))
    if read.keys() != expected.keys():
        lost = sorted(read.keys() ^ expected.keys())
        raise _mismatch(shown, f"{len(lost)} modules differ, such as {' '.join(lost[0])}")
    for key, delta in expected.items():
        _check_module(shown, " ".join(key), delta, read[key], tolerance)


def _check_module(shown: Path, name: str, wanted: Delta, found: Delta, tolerance: float) -> None:
    if wanted.down.shape != found.down.shape or wanted.up.shape != found.up.shape:
        raise _mismatch(shown, f"{name} has another shape")
    size = norm(wanted)
    allowed = tolerance * size + NEGLIGIBLE * (wanted.up.shape[0] * wanted.down[0].numel()) ** 0.5
    if distance(wanted, found) > allowed:
        raise _mismatch(shown, f"the update of {name} differs by {distance(wanted, found) / size:.1%}")
    if (wanted.magnitude is None) != (found.magnitude is None):
        raise _mismatch(shown, f"{name} lost DoRA's magnitude")
    if wanted.magnitude is not None and found.magnitude is not None:
        magnitude = (wanted.magnitude.flatten().double(), found.magnitude.flatten().double())
        if not torch.allclose(*magnitude, rtol=FLOAT32, atol=0):
            raise _mismatch(shown, f"DoRA's magnitude of {name} differs")


def norm(delta: Delta) -> float:
    """The Frobenius norm of one update."""
    return _norm_of_sum([(delta, 1.0)])


def distance(one: Delta, other: Delta) -> float:
    """The Frobenius norm of the difference of two updates."""
    return _norm_of_sum([(one, 1.0), (other, -1.0)])


def _norm_of_sum(terms: Sequence[tuple[Delta, float]]) -> float:
    """From the products of the factors among themselves, in float64: the full matrices are never built."""
    ups = torch.cat([sign * delta.scale * delta.up.flatten(1).double() for delta, sign in terms], dim=1)
    downs = torch.cat([delta.down.flatten(1).double() for delta, _ in terms])
    return ((ups.T @ ups) * (downs @ downs.T)).sum().clamp(min=0).sqrt().item()


def _mismatch(shown: Path, what: str) -> UserError:
    reason = f"{what} from what was trained, so the file was not written. The weights are in checkpoints/"
    return UserError(f"{shown}: {reason}; please report this.", Exit.MODEL)


# ---------------------------------------------------------------- writing
def write_adapter(
    adapter: Adapter,
    folder: Path,
    *,
    live: Mapping[str, nn.Module] | None = None,
    preview: Path | None = None,
) -> list[Path]:
    """Writes lora_weights/: PEFT's pairs in float32, those of text encoders in folders of their own; kohya's
    layout in float16 under both of its names (of a DoRA, the second one in diffusers' layout, since diffusers
    drops kohya's magnitudes); model card, sidecar and preview picture.

    live: the parts that the adapter was taken from; every file is compared with them (else with the adapter).
    UserError (exit 4) if a file reads back as anything else, (exit 5) if a number isn't finite.
    """
    kohya, diffusers = (folder / name for name in (KOHYA_FILE, DIFFUSERS_FILE))
    expected = deltas_in(adapter) if live is None else deltas_of(live)

    def check(file: Path, shown: Path) -> None:
        check_written(file, shown, expected, FLOAT16)

    pairs = _write_pairs(adapter, folder, expected)
    write_kohya(adapter, kohya, preview=preview, check=check)
    if adapter.is_dora:
        metadata = our_metadata(adapter, OURS, KIND) | diffusers_metadata(adapter)
        _save_exact(diffusers_tensors(adapter), diffusers, metadata, expected)
    else:
        with replacing(diffusers) as partial:
            partial.write_bytes(kohya.read_bytes())
            check(partial, diffusers)
    companions = write_companions(adapter, folder, preview)
    return [*pairs, kohya, diffusers, *companions]


def _write_pairs(adapter: Adapter, folder: Path, expected: Deltas) -> list[Path]:
    """PEFT's file and configuration of each part: the UNet's in the folder itself, a text encoder's in one
    below it that has its name.
    """
    found = []
    parts = dict.fromkeys((*adapter.components, *(part for part, _ in expected)))  # the live model's too
    for part in parts:
        home = folder if part == UNET else folder / part
        make_folder(home)
        mine = adapter.only(part)
        if not mine.layers:
            raise _mismatch(home / PEFT_FILE, "every module is gone")
        wanted = {key: delta for key, delta in expected.items() if key[0] == part}
        write_text(home / PEFT_CONFIG, json.dumps(peft_config(mine), indent=2, sort_keys=True) + "\n")
        _save_exact(peft_tensors(mine), home / PEFT_FILE, our_metadata(adapter, OURS, KIND), wanted)
        found += [home / PEFT_FILE, home / PEFT_CONFIG]
    return found


def _save_exact(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], expected: Deltas
) -> None:
    """A float32 file, compared before it gets its name."""
    save_tensors(tensors, path, metadata, lambda partial: check_written(partial, path, expected, FLOAT32))


def write_kohya(
    adapter: Adapter,
    path: Path,
    *,
    preview: Path | None = None,
    check: Callable[[Path, Path], None] | None = None,
) -> None:
    """One file in kohya's layout, float16. check: called with the finished file and the name it is to get."""
    metadata = our_metadata(adapter, OURS, KIND) | kohya_metadata(adapter, preview) | HASHES

    def finish(partial: Path) -> None:
        partial.write_bytes(with_hashes(partial.read_bytes()))
        if check is not None:
            check(partial, path)

    save_tensors(kohya_tensors(adapter), path, metadata, finish)
