"""An earlier adapter to go on from (--init_lora): its form, and its weights in the model."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaman.common.console import Exit, UserError
from megaman.common.kinds import KINDS, UNET, Kind
from megaman.common.output_folder import adapter_in
from megaman.config.train import FACTS, Targets, TrainConfig
from megaman.lora.adapter import Adapter, Component, Key, LoraLayer, check_kind, underscored
from megaman.lora.injection import ADAPTER_NAME, TARGETS, TEXT_TARGETS, lora_modules
from megaman.lora.load import read_adapter
from megaman.lora.names import canonical


@dataclass(frozen=True)
class InitLora:
    """An adapter to go on from, brought to one rank and one scale (alpha / rank)."""

    path: str
    layers: Mapping[Key, LoraLayer]  # by underscored module path
    rank: int
    alpha: float
    is_dora: bool
    kind: Kind | None = None  # of the bases that it is for

    @property
    def targets(self) -> Targets:
        """The smallest --lora_targets that holds its modules."""
        return next((name for name in TARGETS if _all_within(self.layers, name)), "conv")

    def settings(self, is_rslora: bool) -> dict[str, Any]:
        """The flags that make a LoRA of its form."""
        alpha = self.alpha / math.sqrt(self.rank) if is_rslora else self.alpha
        form = {"lora_rank": self.rank, "lora_alpha": alpha, "lora_targets": self.targets}
        return form | {"use_dora": self.is_dora}

    def check(self, parts: Collection[str], kind: Kind | None) -> None:
        """UserError (exit 4) unless it is for this kind of base and changes none but these parts of it."""
        what = f"--init_lora {self.path}: the adapter"
        check_kind(self.kind, kind, what, "Name a base of its kind with --pretrained_model_name.")
        lost = sum(part not in parts for part, _ in self.layers)
        if lost:
            reason = f"changes {lost} modules of text encoders too, which this training would lose"
            remedy = "take one of the UNet alone, or train them too (--text_encoder_lr)"
            raise UserError(f"--init_lora {self.path}: {reason}; {remedy}.", Exit.MODEL)

    def module_names(self, part: Component, model: nn.Module) -> list[str] | None:
        """The paths of just the modules of a part that the adapter changes; None if it leaves the part as it
        is. UserError (exit 4) if the part lacks one.
        """
        paths = {underscored(canonical(part, name)): name for name, _ in model.named_modules()}
        paths |= {path.removesuffix("_0"): name for path, name in paths.items() if path.endswith("_to_out_0")}
        names = [name for home, name in self.layers if home == part]
        strange = sorted(set(names) - paths.keys())
        if strange:
            others = f" and {len(strange) - 1} others" if len(strange) > 1 else ""
            reason = f"changes the module {strange[0]!r}{others}, which this base model does not have"
            raise UserError(f"--init_lora {self.path}: {reason}; it was made for another base.", Exit.MODEL)
        return [paths[name] for name in names] or None

    @torch.no_grad()
    def copy_weights(self, part: Component, model: nn.Module) -> None:
        """Puts the adapter's weights into PEFT's layers of a part. Where its rank is smaller, the rows of A
        that it lacks stay as drawn and their columns of B are zero: the update is the file's.
        """
        for name, module in lora_modules(model).items():
            short = underscored(canonical(part, name))
            layer = self.layers.get((part, short)) or self.layers[part, short.removesuffix("_0")]
            down, up = (getattr(module, half)[ADAPTER_NAME].weight for half in ("lora_A", "lora_B"))
            if layer.down.numel() * down.shape[0] != down.numel() * layer.rank or len(up) != len(layer.up):
                shapes = f"{tuple(layer.up.shape)} x {tuple(layer.down.shape)}"
                reason = f"{name} is {shapes} there and {tuple(up.shape)} x {tuple(down.shape)} here"
                raise UserError(f"--init_lora {self.path}: made for another base: {reason}.", Exit.MODEL)
            down[: layer.rank] = layer.down.reshape(layer.rank, *down.shape[1:]).to(down.device)
            up[:, : layer.rank] = layer.up.reshape(len(up), layer.rank, *up.shape[2:]).to(up.device)
            if layer.magnitude is not None:
                magnitude = module.lora_magnitude_vector[ADAPTER_NAME].weight
                magnitude.copy_(layer.magnitude.reshape(magnitude.shape))


def _all_within(keys: Iterable[Key], targets: Targets) -> bool:
    of_unet, of_text = (
        tuple(f"_{underscored(end)}" for end in ends)
        for ends in ((*TARGETS[targets], "to_out"), TEXT_TARGETS[targets])  # to_out: an old to_out.0
    )
    return all(f"_{name}".endswith(of_unet if part == UNET else of_text) for part, name in keys)


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


def parts_of(cfg: TrainConfig) -> frozenset[str]:
    """The parts of any base that a run with these settings may train."""
    return frozenset(part for kind in KINDS for part in kind.parts if part == UNET or cfg.text_encoder_lr)


def init_of(cfg: TrainConfig) -> InitLora | None:
    """The adapter named by --init_lora. UserError if the settings are not of its form, or if it changes more
    than what they train.
    """
    if cfg.init_lora is None:
        return None
    init = read_init_lora(cfg.init_lora, parts_of(cfg))
    check_form(init, cfg, FACTS)
    return init


def read_init_lora(path: str, parts: Collection[str] = (UNET,)) -> InitLora:
    """The adapter of a file or folder of any tool. UserError (exit 4) if no training of these parts can go on
    from it.
    """
    adapter = read_adapter(adapter_in(Path(path)), "--init_lora")
    largest = max(adapter.layers.values(), key=lambda layer: (layer.rank, layer.alpha))
    scale = largest.alpha / largest.rank
    layers = {(part, underscored(name)): layer for (part, name), layer in adapter.layers.items()}
    init = InitLora(path, layers, largest.rank, largest.alpha, adapter.is_dora, adapter.kind)
    init.check(parts, None)
    _check_trainable(path, adapter, largest)
    return replace(init, layers={key: _rescaled(layer, scale) for key, layer in layers.items()})


def _check_trainable(path: str, adapter: Adapter, largest: LoraLayer) -> None:
    """UserError (exit 4) if it holds what PEFT can't train."""
    layers = list(adapter.layers.values())
    vectors = sum(layer.is_vector for layer in layers)
    lengths = [(layer.magnitude, layer) for layer in layers if layer.magnitude is not None]
    reason = None
    if vectors:
        reason = (
            f"changes {vectors} biases and norms too, which this training would lose; it can be drawn with, "
            "not continued."
        )
    elif not largest.alpha / largest.rank > 0:
        reason = f"its alpha is {largest.alpha:g}; nothing to go on from."
    elif lengths and len(lengths) < len(layers):
        reason = "DoRA in some of its modules only; PEFT can't do that."
    elif any(magnitude.shape[0] != layer.up.shape[0] for magnitude, layer in lengths):
        reason = "its DoRA measures columns, PEFT's measures rows; it can be drawn with, not continued."
    if reason is not None:
        raise UserError(f"--init_lora {path}: {reason}", Exit.MODEL)


def _rescaled(layer: LoraLayer, scale: float) -> LoraLayer:
    """The same update with this alpha / rank: the difference goes into `up`."""
    own = layer.alpha / layer.rank
    return layer if own == scale else replace(layer, up=layer.up * (own / scale), alpha=scale * layer.rank)
