"""An earlier adapter to go on from (--init_lora): its form, and its weights in the model."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaman.common.console import Exit, UserError
from megaman.common.output_folder import adapter_in
from megaman.config.train import FACTS, Targets, TrainConfig
from megaman.lora.adapter import LoraLayer, underscored
from megaman.lora.injection import ADAPTER_NAME, TARGETS, lora_modules
from megaman.lora.load import read_adapter


@dataclass(frozen=True)
class InitLora:
    """An adapter to go on from, brought to one rank and one scale (alpha / rank)."""

    path: str
    layers: Mapping[str, LoraLayer]  # by underscored module path
    rank: int
    alpha: float
    is_dora: bool

    @property
    def targets(self) -> Targets:
        """The smallest --lora_targets that holds its modules."""
        return next((name for name in TARGETS if _all_within(self.layers, TARGETS[name])), "conv")

    def settings(self, is_rslora: bool) -> dict[str, Any]:
        """The flags that make a LoRA of its form."""
        alpha = self.alpha / math.sqrt(self.rank) if is_rslora else self.alpha
        form = {"lora_rank": self.rank, "lora_alpha": alpha, "lora_targets": self.targets}
        return form | {"use_dora": self.is_dora}


def _all_within(names: Iterable[str], targets: Collection[str]) -> bool:
    ends = tuple(f"_{underscored(target)}" for target in (*targets, "to_out"))  # to_out: an old to_out.0
    return all(f"_{name}".endswith(ends) for name in names)


def check_form(init: InitLora, cfg: TrainConfig, names: Collection[str]) -> None:
    """UserError (exit 2) that names both, if one of these settings is another than the adapter's own."""
    for name, found in init.settings(cfg.use_rslora).items():
        wanted = getattr(cfg, name)
        is_same = math.isclose(wanted, found, rel_tol=1e-5) if name == "lora_alpha" else wanted == found
        if name in names and not is_same:
            shown = f"{found:g}" if isinstance(found, float) else found
            raise UserError(
                f"--{name} {wanted}: --init_lora {init.path} is of {name} {shown}; leave the flag out",
                Exit.USAGE,
            )


def init_of(cfg: TrainConfig) -> InitLora | None:
    """The adapter named by --init_lora. UserError if the settings are not of its form."""
    if cfg.init_lora is None:
        return None
    init = read_init_lora(cfg.init_lora)
    check_form(init, cfg, FACTS)
    return init


def read_init_lora(path: str) -> InitLora:
    """The adapter of a file or folder of any tool. UserError (exit 4) if no training can go on from it."""
    adapter = read_adapter(adapter_in(Path(path)), "--init_lora")
    layers = {underscored(name): layer for (part, name), layer in adapter.layers.items() if part == "unet"}
    others = len(adapter.layers) - len(layers)
    if others:
        reason = f"changes {others} modules of the text encoder too, which this training would lose"
        raise UserError(f"--init_lora {path}: {reason}; take one of the UNet alone.", Exit.MODEL)
    vectors = sum(layer.is_vector for layer in layers.values())
    if vectors:
        reason = f"changes {vectors} biases and norms too, which this training would lose"
        raise UserError(f"--init_lora {path}: {reason}; it can be drawn with, not continued.", Exit.MODEL)
    largest = max(layers.values(), key=lambda layer: (layer.rank, layer.alpha))
    scale = largest.alpha / largest.rank
    magnitudes = {name: layer.magnitude for name, layer in layers.items() if layer.magnitude is not None}
    if not scale > 0:
        raise UserError(
            f"--init_lora {path}: its alpha is {largest.alpha:g}; nothing to go on from.", Exit.MODEL
        )
    if magnitudes and len(magnitudes) < len(layers):
        raise UserError(
            f"--init_lora {path}: DoRA in some of its modules only; PEFT can't do that.", Exit.MODEL
        )
    if any(magnitude.shape[0] != layers[name].up.shape[0] for name, magnitude in magnitudes.items()):
        reason = "its DoRA measures columns, PEFT's measures rows"
        raise UserError(f"--init_lora {path}: {reason}; it can be drawn with, not continued.", Exit.MODEL)
    alike = {name: _rescaled(layer, scale) for name, layer in layers.items()}
    return InitLora(path, alike, largest.rank, largest.alpha, bool(magnitudes))


def _rescaled(layer: LoraLayer, scale: float) -> LoraLayer:
    """The same update with this alpha / rank: the difference goes into `up`."""
    own = layer.alpha / layer.rank
    return layer if own == scale else replace(layer, up=layer.up * (own / scale), alpha=scale * layer.rank)


def module_names(init: InitLora, unet: nn.Module) -> list[str]:
    """The paths of just the modules that the adapter changes. UserError (exit 4) if the base lacks one."""
    paths = {underscored(name): name for name, _ in unet.named_modules()}
    paths |= {path.removesuffix("_0"): name for path, name in paths.items() if path.endswith("_to_out_0")}
    strange = sorted(init.layers.keys() - paths.keys())
    if strange:
        reason = f"changes the module {strange[0]!r}, which this base model does not have"
        raise UserError(f"--init_lora {init.path}: {reason}; it was made for another base.", Exit.MODEL)
    return [paths[name] for name in init.layers]


@torch.no_grad()
def copy_weights(init: InitLora, unet: nn.Module) -> None:
    """Puts the adapter's weights into PEFT's layers. Where its rank is smaller, the rows of A that it lacks
    stay as drawn and their columns of B are zero: the update is the file's.
    """
    for name, module in lora_modules(unet).items():
        short = underscored(name)
        layer = init.layers.get(short) or init.layers[short.removesuffix("_0")]
        down, up = (getattr(module, part)[ADAPTER_NAME].weight for part in ("lora_A", "lora_B"))
        if layer.down.numel() * down.shape[0] != down.numel() * layer.rank or len(up) != len(layer.up):
            shapes = f"{tuple(layer.up.shape)} x {tuple(layer.down.shape)}"
            reason = f"{name} is {shapes} there and {tuple(up.shape)} x {tuple(down.shape)} here"
            raise UserError(f"--init_lora {init.path}: made for another base: {reason}.", Exit.MODEL)
        down[: layer.rank] = layer.down.reshape(layer.rank, *down.shape[1:]).to(down.device)
        up[:, : layer.rank] = layer.up.reshape(len(up), layer.rank, *up.shape[2:]).to(up.device)
        if layer.magnitude is not None:
            magnitude = module.lora_magnitude_vector[ADAPTER_NAME].weight
            magnitude.copy_(layer.magnitude.reshape(magnitude.shape))
