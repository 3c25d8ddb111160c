"""The adapter in the live model: which modules get a LoRA, through PEFT, and what they hold. Knows PEFT's
modules.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from megaman.common.console import Exit, UserError, say
from megaman.config.train import Targets, TrainConfig
from megaman.lora.adapter import Adapter, Key, LoraLayer, check_finite

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


def lora_config(cfg: TrainConfig, unet: nn.Module, modules: Sequence[str] | None = None) -> LoraConfig:
    """PEFT's configuration for the form that the settings ask for. UserError (exit 2) if PEFT can't train it
    on this base.

    modules: their paths in the UNet, where an earlier adapter decides them, and not --lora_targets.
    """
    has_convolutions = cfg.lora_targets in ("linear", "conv")  # proj_in and proj_out are 1x1 ones
    is_half = next(unet.parameters()).dtype != torch.float32
    if cfg.use_dora and cfg.lora_dropout and has_convolutions and is_half:
        raise UserError(
            f"--use_dora with --lora_dropout and --lora_targets {cfg.lora_targets}: PEFT can't train "
            "convolutions so in half precision. Leave the dropout out, take attention+ff, or "
            "--mixed_precision no",
            Exit.USAGE,
        )
    if cfg.use_dora:
        say(
            "note: a DoRA is exact in PEFT, diffusers, LyCORIS, SD.Next and generate_megaman.py, close in "
            "ComfyUI and Forge after a gentle training; A1111, InvokeAI, kohya's networks.lora and "
            "stable-diffusion.cpp can't apply it"
        )
    return LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules=list(TARGETS[cfg.lora_targets] if modules is None else modules),
        lora_dropout=cfg.lora_dropout,
        use_dora=cfg.use_dora,
        use_rslora=cfg.use_rslora,
    )


def reset_dora(unet: nn.Module) -> None:
    """Lets DoRA begin with the lengths that the rows of the base's weights have, in float32. Without DoRA,
    nothing.
    """
    for module in lora_modules(unet).values():
        if ADAPTER_NAME in module.lora_magnitude_vector:
            module.lora_magnitude_vector[ADAPTER_NAME].update_layer(
                base_layer=module.get_base_layer(),
                lora_A=module.lora_A[ADAPTER_NAME].weight.data,
                lora_B=module.lora_B[ADAPTER_NAME].weight.data,
                scaling=module.scaling[ADAPTER_NAME],
            )


def lora_modules(unet: nn.Module) -> dict[str, Any]:
    """The modules that PEFT has wrapped, by their path in the plain model. Any: torch's types don't know what
    PEFT hangs on a module (lora_A, lora_B, scaling, …).
    """
    return {
        name: module for name, module in unet.named_modules() if ADAPTER_NAME in getattr(module, "lora_A", {})
    }


def adapter_of(unet: nn.Module, metadata: Mapping[str, Any] | None = None) -> Adapter:
    """A float32 copy, on the CPU, of the adapter that is being trained.

    The real alpha is scaling x rank, rsLoRA's too. UserError (exit 5) if a number isn't finite.
    """
    layers: dict[Key, LoraLayer] = {}
    for name, module in lora_modules(unet).items():
        down, up = (_copy(getattr(module, part)[ADAPTER_NAME].weight) for part in ("lora_A", "lora_B"))
        alpha = float(module.scaling[ADAPTER_NAME]) * down.shape[0]
        layers["unet", name] = LoraLayer(down, up, alpha, _magnitude(module, up))
    adapter = Adapter(layers, metadata or {})
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


def inject(parts, cfg, kind, generator, init=None):
    for part, model in parts.items():
        if part == "unet":
            modules = None
            conf = lora_config(cfg, model, modules)
        else:
            conf = LoraConfig(
                r=cfg.lora_rank,
                lora_alpha=cfg.lora_alpha,
                target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
            )
        model.add_adapter(conf, adapter_name=ADAPTER_NAME)
        for number, module in enumerate(lora_modules(model).values()):
            down = module.lora_A[ADAPTER_NAME].weight
            drawn = (
                torch.randn(
                    down.shape, generator=generator("lora" if part == "unet" else f"lora {part}", number)
                )
                / cfg.lora_rank
            )
            down.data = drawn.to(down.device)
            up = module.lora_B[ADAPTER_NAME].weight
            up.data = torch.zeros_like(up, dtype=torch.float32)
        reset_dora(model)


_adapter_of = adapter_of


def adapter_of(parts, kind, metadata=None):
    layers = {}
    for part, model in parts.items():
        a = _adapter_of(model, metadata)
        for (_, n), l in a.layers.items():
            layers[part, n if part == "unet" else "text_model." + n.removeprefix("text_model.")] = l
    return Adapter(layers, metadata or {})
