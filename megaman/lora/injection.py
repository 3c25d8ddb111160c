"""The adapter in the live model: which modules get a LoRA, through PEFT, and what they hold. Knows PEFT's
modules.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig
from torch import Tensor, nn

from megaman.common.console import Exit, UserError, say
from megaman.common.kinds import UNET, Kind
from megaman.config.train import Targets, TrainConfig
from megaman.lora.adapter import Adapter, Component, Key, LoraLayer, check_finite
from megaman.lora.names import canonical

ADAPTER_NAME = "default"  # PEFT's own name for the only adapter
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_PROJECTIONS = ("proj_in", "proj_out")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")  # of the resnets; conv_in and conv_out kohya can't read
TARGETS: dict[Targets, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION + _FEED_FORWARD,
    "linear": _ATTENTION + _FEED_FORWARD + _PROJECTIONS,
    "conv": _ATTENTION + _FEED_FORWARD + _PROJECTIONS + _CONVOLUTIONS,
}  # each holds the one before
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # A1111 takes all four of an OpenCLIP, or none
_TEXT_ALL = (*_TEXT_ATTENTION, "fc1", "fc2")
TEXT_TARGETS: dict[Targets, tuple[str, ...]] = {
    "attention": _TEXT_ATTENTION,
    "attention+ff": _TEXT_ALL,
    "linear": _TEXT_ALL,
    "conv": _TEXT_ALL,
}  # of a text encoder


class Start(Protocol):
    """An earlier adapter to go on from."""

    def check(self, parts: Mapping[str, nn.Module], kind: Kind | None) -> None:
        """UserError unless training these parts of a base of this kind can go on from it."""

    def module_names(self, part: Component, model: nn.Module) -> list[str] | None:
        """The paths of just the modules of a part that it changes; None if it leaves the part as it is."""

    def copy_weights(self, part: Component, model: nn.Module) -> None:
        """Puts its weights into PEFT's layers of a part."""


def targets_of(part: Component, model: nn.Module, targets: Targets, kind: Kind) -> list[str]:
    """The paths of the modules of a part that --lora_targets asks for. Of a text encoder, the last layers are
    left out if nobody reads them: no gradient would reach them.
    """
    modules = [name for name, _ in model.named_modules()]
    ends = tuple(f".{end}" for end in (TARGETS if part == UNET else TEXT_TARGETS)[targets])
    if part == UNET:
        return [name for name in modules if name.endswith(ends)]
    encoder = kind.encoder(part)
    layers = {name: int(found[1]) for name in modules if (found := re.search(r"layers\.(\d+)\.", name))}
    unread = 0 if encoder.has_pooled else -1 - encoder.layer
    last_read = max(layers.values()) - unread
    return [name for name in layers if name.endswith(ends) and layers[name] <= last_read]


def lora_config(cfg: TrainConfig, model: nn.Module, modules: Sequence[str]) -> LoraConfig:
    """PEFT's configuration for the form that the settings ask for. UserError (exit 2) if PEFT can't train it
    on this base.

    modules: their paths in the model, a part of the base.
    """
    has_convolutions = any(isinstance(model.get_submodule(name), nn.Conv2d) for name in modules)
    is_half = next(model.parameters()).dtype != torch.float32
    if cfg.use_dora and cfg.lora_dropout and has_convolutions and is_half:
        raise UserError(
            f"--use_dora with --lora_dropout and --lora_targets {cfg.lora_targets}: PEFT can't train "
            "convolutions so in half precision. Leave the dropout out, take attention+ff, or "
            "--mixed_precision no",
            Exit.USAGE,
        )
    return LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules=list(modules),
        lora_dropout=cfg.lora_dropout,
        use_dora=cfg.use_dora,
        use_rslora=cfg.use_rslora,
    )


def inject(
    parts: Mapping[str, nn.Module],
    cfg: TrainConfig,
    kind: Kind,
    generator: Callable[[str, int], torch.Generator],
    init: Start | None = None,
) -> None:
    """Wraps the modules of each part (the UNet, text encoders) through PEFT. What is trained is float32, all
    else is frozen.

    B = 0, so that training starts at the base itself; A ~ N(0, 1/rank), the same numbers on every device.
    generator: of a purpose and a number. init: an earlier adapter, whose modules and weights are taken.
    """
    if init is not None:
        init.check(parts, kind)
    if cfg.use_dora:
        say(
            "note: a DoRA is exact in PEFT, diffusers, LyCORIS, SD.Next and generate_megaman.py, close in "
            "ComfyUI and Forge after a gentle training; A1111, InvokeAI, kohya's networks.lora and "
            "stable-diffusion.cpp can't apply it"
        )
    for part, model in parts.items():
        earlier = None if init is None else init.module_names(part, model)
        modules = targets_of(part, model, cfg.lora_targets, kind) if earlier is None else earlier
        peft_model: Any = model  # torch's types don't know what diffusers and transformers hang on theirs
        peft_model.add_adapter(lora_config(cfg, model, modules), adapter_name=ADAPTER_NAME)
        _begin(model, cfg.lora_rank, "lora" if part == UNET else f"lora {part}", generator)
        reset_dora(model)
        if init is not None and earlier is not None:
            init.copy_weights(part, model)
        _freeze_unread(part, model, kind)


def _freeze_unread(part: str, model: nn.Module, kind: Kind) -> None:
    """Lets the LoRAs of layers that nobody reads stay as they are: an earlier adapter may hold some."""
    wanted = set(targets_of(part, model, "conv", kind))
    for name, module in lora_modules(model).items():
        if part != UNET and name not in wanted:
            module.requires_grad_(False)


def _begin(
    model: nn.Module, rank: int, purpose: str, generator: Callable[[str, int], torch.Generator]
) -> None:
    """Draws A and empties B."""
    for number, module in enumerate(lora_modules(model).values()):
        down = module.lora_A[ADAPTER_NAME].weight
        down.data = (torch.randn(down.shape, generator=generator(purpose, number)) / rank).to(down.device)
        up = module.lora_B[ADAPTER_NAME].weight
        up.data = torch.zeros_like(up, dtype=torch.float32)  # half precision would lose updates of 1e-4


def reset_dora(model: nn.Module) -> None:
    """Lets DoRA begin with the lengths that the rows of the base's weights have, in float32. Without DoRA,
    nothing.
    """
    for module in lora_modules(model).values():
        if ADAPTER_NAME in module.lora_magnitude_vector:
            module.lora_magnitude_vector[ADAPTER_NAME].update_layer(
                base_layer=module.get_base_layer(),
                lora_A=module.lora_A[ADAPTER_NAME].weight.data,
                lora_B=module.lora_B[ADAPTER_NAME].weight.data,
                scaling=module.scaling[ADAPTER_NAME],
            )


def lora_modules(model: nn.Module) -> dict[str, Any]:
    """The modules that PEFT has wrapped, by their path in the plain model. Any: torch's types don't know what
    PEFT hangs on a module (lora_A, lora_B, scaling, …).
    """
    return {
        name: module
        for name, module in model.named_modules()
        if ADAPTER_NAME in getattr(module, "lora_A", {})
    }


_LAYERS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # finding them takes milliseconds


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside the block a model with a LoRA computes as without one. For passes that need no gradients: PEFT's
    own switch also walks all modules and their parameters, which takes a tenth of a small model's step.
    """
    if model not in _LAYERS:
        _LAYERS[model] = [*lora_modules(model).values()]
    layers = _LAYERS[model]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_of(
    parts: Mapping[str, nn.Module], kind: Kind | None, metadata: Mapping[str, Any] | None = None
) -> Adapter:
    """A float32 copy, on the CPU, of the adapter that is being trained in the parts of a base of this kind.

    The real alpha is scaling x rank, rsLoRA's too. UserError (exit 5) if a number isn't finite.
    """
    layers: dict[Key, LoraLayer] = {}
    for part, model in parts.items():
        for name, module in lora_modules(model).items():
            down, up = (_copy(getattr(module, half)[ADAPTER_NAME].weight) for half in ("lora_A", "lora_B"))
            alpha = float(module.scaling[ADAPTER_NAME]) * down.shape[0]
            layers[part, canonical(part, name)] = LoraLayer(down, up, alpha, _magnitude(module, up))
    adapter = Adapter(layers, metadata or {}, kind)
    check_finite(adapter, "the adapter in training", Exit.NUMBERS)
    return adapter


def _magnitude(module: Any, up: Tensor) -> Tensor | None:
    """DoRA's magnitude of a live module, one a row; PEFT keeps it as (out,) or (1,out,1,1)."""
    magnitude = module.lora_magnitude_vector
    if ADAPTER_NAME not in magnitude:
        return None
    return _copy(magnitude[ADAPTER_NAME].weight).reshape(-1, *[1] * (up.ndim - 1))


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().float().cpu().clone()
