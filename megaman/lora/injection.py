"""Forms of the adapter: which modules it changes, and an earlier adapter to go on from."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from megaman.common.console import MODEL, USAGE, UserError, say
from megaman.config.train import FACTS, TrainConfig
from megaman.lora.adapter import ADAPTER_NAME, LoraLayer, lora_modules, underscored
from megaman.lora.load import read_adapter

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_PROJECTIONS = ("proj_in", "proj_out")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")  # of the resnets; conv_in and conv_out kohya can't read
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION + _FEED_FORWARD,
    "linear": _ATTENTION + _FEED_FORWARD + _PROJECTIONS,
    "conv": _ATTENTION + _FEED_FORWARD + _PROJECTIONS + _CONVOLUTIONS,
}  # each holds the one before


@dataclass(frozen=True)
class Start:
    """An adapter to go on from, brought to one rank and one scale (alpha / rank)."""

    path: str
    layers: Mapping[str, LoraLayer]  # by underscored module path
    rank: int
    alpha: float
    is_dora: bool

    @property
    def targets(self) -> str:
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


def fitted(cfg: TrainConfig, chosen: Collection[str]) -> dict[str, Any]:
    """The settings that --init_lora decides: rank, alpha, targets and DoRA are the file's.

    UserError (exit 2) that names both, if the user chose another; (exit 4) if the file can't be continued.
    """
    start = read_start(cfg.init_lora)
    decided = start.settings(cfg.use_rslora)
    for name, found in decided.items():
        wanted = getattr(cfg, name)
        is_same = math.isclose(wanted, found, rel_tol=1e-5) if name == "lora_alpha" else wanted == found
        if name in chosen and not is_same:
            shown = f"{found:g}" if isinstance(found, float) else found
            raise UserError(
                f"--{name} {wanted}: --init_lora {start.path} is of {name} {shown}; leave the flag out", USAGE
            )
    return decided


def start_of(cfg: TrainConfig) -> Start | None:
    """The adapter that --init_lora names, if the settings are those of its form (as `fitted` makes them)."""
    if cfg.init_lora is None:
        return None
    fitted(cfg, FACTS)
    return read_start(cfg.init_lora)


def read_start(path: str) -> Start:
    """The adapter of a file or folder of any tool. UserError (exit 4) if no training can go on from it."""
    adapter = read_adapter(Path(path).expanduser())
    layers = {underscored(name): layer for (part, name), layer in adapter.layers.items() if part == "unet"}
    others = len(adapter.layers) - len(layers)
    if others:
        reason = f"changes {others} modules of the text encoder too, which this training would lose"
        raise UserError(f"--init_lora {path}: {reason}; take one of the UNet alone.", MODEL)
    largest = max(layers.values(), key=lambda layer: (layer.rank, layer.alpha))
    scale = largest.alpha / largest.rank
    lengths = {name for name, layer in layers.items() if layer.magnitude is not None}
    if not scale > 0:
        raise UserError(f"--init_lora {path}: its alpha is {largest.alpha:g}; nothing to go on from.", MODEL)
    if lengths and len(lengths) < len(layers):
        raise UserError(f"--init_lora {path}: DoRA in some of its modules only; PEFT can't do that.", MODEL)
    if any(layers[name].magnitude.shape[0] != layers[name].up.shape[0] for name in lengths):
        reason = "its DoRA measures columns, PEFT's measures rows"
        raise UserError(f"--init_lora {path}: {reason}; it can be drawn with, not continued.", MODEL)
    alike = {name: _at_scale(layer, scale) for name, layer in layers.items()}
    return Start(path, alike, largest.rank, largest.alpha, bool(lengths))


def _at_scale(layer: LoraLayer, scale: float) -> LoraLayer:
    """The same update with this alpha / rank: the difference goes into `up`."""
    own = layer.alpha / layer.rank
    return layer if own == scale else replace(layer, up=layer.up * (own / scale), alpha=scale * layer.rank)


# ---------------------------------------------------------------- in the model


def lora_config(cfg: TrainConfig, unet: nn.Module, start: Start | None) -> LoraConfig:
    """PEFT's configuration for the form that the settings ask for. UserError (exit 2) if PEFT can't train it
    on this base, (exit 4) if the adapter to go on from was made for another.
    """
    has_convolutions = cfg.lora_targets in ("linear", "conv")  # proj_in and proj_out are 1x1 ones
    is_half = next(unet.parameters()).dtype != torch.float32
    if cfg.use_dora and cfg.lora_dropout and has_convolutions and is_half:
        raise UserError(
            f"--use_dora with --lora_dropout and --lora_targets {cfg.lora_targets}: PEFT can't train "
            "convolutions so in half precision. Leave the dropout out, take attention+ff, or "
            "--mixed_precision no",
            USAGE,
        )
    if cfg.use_dora:
        say(
            "note: a DoRA is exact in PEFT, diffusers, LyCORIS and generate_megaman.py, and close in ComfyUI "
            "and Forge; A1111, InvokeAI and kohya's networks.lora can't apply it"
        )
    return LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules=list(TARGETS[cfg.lora_targets]) if start is None else _homes(start, unet),
        lora_dropout=cfg.lora_dropout,
        use_dora=cfg.use_dora,
        use_rslora=cfg.use_rslora,
    )


def _homes(start: Start, unet: nn.Module) -> list[str]:
    """Just the modules of the adapter to go on from."""
    paths = {underscored(name): name for name, _ in unet.named_modules()}
    paths |= {path.removesuffix("_0"): name for path, name in paths.items() if path.endswith("_to_out_0")}
    strange = sorted(start.layers.keys() - paths.keys())
    if strange:
        reason = f"changes the module {strange[0]!r}, which this base model does not have"
        raise UserError(f"--init_lora {start.path}: {reason}; it was made for another base.", MODEL)
    return [paths[name] for name in start.layers]


def begin(unet: nn.Module, start: Start | None) -> None:
    """Sets what is not drawn: DoRA's lengths, and all of the adapter to go on from."""
    _set_lengths(unet)
    if start is not None:
        _place(start, unet)


def _set_lengths(unet: nn.Module) -> None:
    """DoRA begins with the lengths that the rows of the base's weights have, in float32."""
    for module in lora_modules(unet).values():
        if ADAPTER_NAME in module.lora_magnitude_vector:
            module.lora_magnitude_vector[ADAPTER_NAME].update_layer(
                base_layer=module.get_base_layer(),
                lora_A=module.lora_A[ADAPTER_NAME].weight.data,
                lora_B=module.lora_B[ADAPTER_NAME].weight.data,
                scaling=module.scaling[ADAPTER_NAME],
            )


@torch.no_grad()
def _place(start: Start, unet: nn.Module) -> None:
    """Puts the adapter's weights into PEFT's layers. Where its rank is smaller, the rows of A that it lacks
    stay as drawn and their columns of B are zero: the update is the file's.
    """
    for name, module in lora_modules(unet).items():
        short = underscored(name)
        layer = start.layers.get(short) or start.layers[short.removesuffix("_0")]
        down, up = (getattr(module, part)[ADAPTER_NAME].weight for part in ("lora_A", "lora_B"))
        if layer.down.numel() * down.shape[0] != down.numel() * layer.rank or len(up) != len(layer.up):
            shapes = f"{tuple(layer.up.shape)} x {tuple(layer.down.shape)}"
            reason = f"{name} is {shapes} there and {tuple(up.shape)} x {tuple(down.shape)} here"
            raise UserError(f"--init_lora {start.path}: made for another base: {reason}.", MODEL)
        down[: layer.rank] = layer.down.reshape(layer.rank, *down.shape[1:]).to(down.device)
        up[:, : layer.rank] = layer.up.reshape(len(up), layer.rank, *up.shape[2:]).to(up.device)
        if layer.magnitude is not None:
            lengths = module.lora_magnitude_vector[ADAPTER_NAME].weight
            lengths.copy_(layer.magnitude.reshape(lengths.shape))
