"""Whether a file that was just written holds what was trained: it is read back, and its update compared with
the live model's, module by module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megaman.common.console import MODEL, UserError
from megaman.lora.adapter import ADAPTER_NAME, Adapter, lora_modules, underscored
from megaman.lora.load import PEFT_CONFIG, read_file

FLOAT32, FLOAT16 = 1e-5, 2e-3  # of the update's size; float16 rounds each factor by 5e-4 at most
UNFELT = 1e-7  # an update below this, a weight on average, changes no tool's weights


@dataclass(frozen=True)
class Update:
    """What is added to a module's weight before DoRA: scale * up @ down; and DoRA's lengths."""

    down: Tensor
    up: Tensor
    scale: float
    lengths: Tensor | None


def updates_of(model: nn.Module) -> dict[str, Update]:
    """The live model's, straight from PEFT's modules, by underscored path."""
    found = {}
    for name, module in lora_modules(model).items():
        down, up = (getattr(module, part)[ADAPTER_NAME].weight.detach() for part in ("lora_A", "lora_B"))
        lengths = module.lora_magnitude_vector
        found[underscored(name)] = Update(
            down.cpu(),
            up.cpu(),
            float(module.scaling[ADAPTER_NAME]),
            lengths[ADAPTER_NAME].weight.detach().cpu() if ADAPTER_NAME in lengths else None,
        )
    return found


def updates_in(adapter: Adapter) -> dict[str, Update]:
    """An adapter's, by underscored path."""
    return {
        underscored(name): Update(layer.down, layer.up, layer.alpha / layer.rank, layer.magnitude)
        for (_, name), layer in adapter.layers.items()
    }


def check_written(file: Path, shown: Path, expected: Mapping[str, Update], tolerance: float) -> None:
    """UserError (exit 4) unless the file reads back as the updates that were trained.

    shown: the name that the file is to have; beside it lies adapter_config.json for PEFT's layout.
    """
    read = updates_in(read_file(file, shown.with_name(PEFT_CONFIG)))
    if read.keys() != expected.keys():
        lost = sorted(read.keys() ^ expected.keys())
        raise _mismatch(shown, f"{len(lost)} modules differ, such as {lost[0]}")
    for name, update in expected.items():
        _check_module(shown, name, update, read[name], tolerance)


def _check_module(shown: Path, name: str, wanted: Update, found: Update, tolerance: float) -> None:
    if wanted.down.shape != found.down.shape or wanted.up.shape != found.up.shape:
        raise _mismatch(shown, f"{name} has another shape")
    size = gap(wanted, None)
    allowed = tolerance * size + UNFELT * (wanted.up.shape[0] * wanted.down[0].numel()) ** 0.5
    if gap(wanted, found) > allowed:
        raise _mismatch(shown, f"the update of {name} differs by {gap(wanted, found) / size:.1%}")
    if (wanted.lengths is None) != (found.lengths is None):
        raise _mismatch(shown, f"{name} lost DoRA's lengths")
    if wanted.lengths is not None:
        lengths = (wanted.lengths.flatten().double(), found.lengths.flatten().double())
        if not torch.allclose(*lengths, rtol=FLOAT32, atol=0):
            raise _mismatch(shown, f"DoRA's lengths of {name} differ")


def gap(one: Update, other: Update | None) -> float:
    """The Frobenius norm of the difference of two updates (of the first alone where there is no other),
    without making the matrices: from the products of the factors among themselves, in float64.
    """
    pairs = [(one, one.scale)] + ([(other, -other.scale)] if other is not None else [])
    ups = torch.cat([scale * update.up.flatten(1).double() for update, scale in pairs], dim=1)
    downs = torch.cat([update.down.flatten(1).double() for update, _ in pairs])
    return ((ups.T @ ups) * (downs @ downs.T)).sum().clamp(min=0).sqrt().item()


def _mismatch(shown: Path, what: str) -> UserError:
    reason = f"{what} from what was trained, so the file was not written. The weights are in checkpoints/"
    return UserError(f"{shown}: {reason}; please report this.", MODEL)
