"""How much an adapter in training changes the weights that it touches, block by block: the size of the change
over the size of the weights, both Frobenius norms. No change is ever built as a whole.
"""

import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from megaman.common.kinds import UNET
from megaman.lora.injection import ADAPTER_NAME, lora_modules

_BLOCK = re.compile(r"\w+_blocks\.\d+|\w+")  # of a UNet's module: down_blocks.0, mid_block
_SIZES: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # of frozen weights: looked at once


@torch.no_grad()
def strengths_of(parts: Mapping[str, nn.Module]) -> tuple[float, dict[str, float]]:
    """||change|| / ||weight|| of all that the adapter in the parts of a base touches, and of each block of
    the UNet (`unet.down_blocks.0`) and each text encoder, by name.
    """
    names: list[str] = []
    squares: list[Tensor] = []
    for part, model in parts.items():
        for name, module in lora_modules(model).items():
            found = _BLOCK.match(name) if part == UNET else None
            names.append(f"{part}.{found[0]}" if found else part)
            squares.append(torch.stack([_change(module), _size(module.get_base_layer())]))
    sums = dict.fromkeys(names, (0.0, 0.0))
    told = torch.stack([each.to(squares[0].device) for each in squares]).tolist() if squares else []
    for name, (change, size) in zip(names, told, strict=True):  # above: the one device wait
        sums[name] = (sums[name][0] + change, sums[name][1] + size)
    whole = [sum(column) for column in zip(*sums.values(), strict=True)] or [0.0, 0.0]
    return _ratio(*whole), {name: _ratio(*pair) for name, pair in sorted(sums.items())}


def _ratio(change: float, size: float) -> float:
    return (change / size) ** 0.5 if size > 0 else 0.0


def _weight(layer: Any) -> Tensor:
    """A frozen layer's weight (out,…); of int8's layers what their bytes stand for."""
    weight = layer.weight.detach()
    return weight.float() * layer.factors if hasattr(layer, "factors") else weight


def _size(layer: nn.Module) -> Tensor:
    """The squared norm of a frozen layer's weight."""
    if layer not in _SIZES:
        _SIZES[layer] = torch.linalg.vector_norm(_weight(layer), dtype=torch.float32).square()
    return _SIZES[layer]


def _change(module: Any) -> Tensor:
    """The squared norm of what a module's LoRA adds to its weight: of s B A, from B^T B and A A^T alone."""
    down, up = (getattr(module, half)[ADAPTER_NAME].weight.flatten(1) for half in ("lora_A", "lora_B"))
    scale = module.scaling[ADAPTER_NAME]
    if ADAPTER_NAME not in module.lora_magnitude_vector:
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0) * scale**2
    magnitude = module.lora_magnitude_vector[ADAPTER_NAME].weight.flatten()
    weight = _weight(module.get_base_layer()).flatten(1).float()
    return _change_of_dora(weight, down, up * scale, magnitude).to(weight.device)


def _change_of_dora(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's: each row of weight + B A is given the length that its magnitude says. weight (out,in), down
    (r,in), up (out,r), magnitude (out,), all float32.

    A row changes by (c - 1) w + c d: d is its update, c its magnitude over the length of w + d.
    """
    rows = (
        torch.linalg.vector_norm(weight, dim=1).square(),
        ((weight @ down.T) * up).sum(1),
        ((up @ (down @ down.T)) * up).sum(1),
        magnitude,
    )
    size, beside, update, wanted = (each.cpu().double() for each in rows)  # c - 1 loses digits in float32
    factor = wanted / (size + 2 * beside + update).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    rest = factor - 1
    changes = rest.square() * size + 2 * factor * rest * beside + factor.square() * update
    return changes.sum().clamp(min=0).float()
