"""An adapter inside a base's own weights, at any strength. Knows which module each layer belongs to."""

import math
import re

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from megaman.common.console import Exit, UserError
from megaman.lora.adapter import Adapter, LoraLayer, underscored


class MergedAdapter:
    """An adapter inside a base's own weights, at any strength.

    The untouched weights are kept, so strength 0 is the base to the bit.
    """

    def __init__(self, adapter: Adapter, unet: UNet2DConditionModel, text_encoder: nn.Module | None) -> None:
        """Raises UserError (exit 4) unless every layer finds its module with the right shape and one acts."""
        if not any(map(_acts, adapter.layers.values())):
            raise UserError(
                "the adapter changes nothing: every update or alpha is 0. Train it longer.", Exit.MODEL
            )
        self.targets: list[tuple[Tensor, Tensor, LoraLayer]] = []  # a weight, and what it was
        homes = {
            "unet": _modules(unet),
            "text_encoder": _modules(text_encoder) if text_encoder is not None else {},
        }
        for (component, name), layer in adapter.layers.items():
            module = homes[component].get(_plain(underscored(name)))
            weight = _fitting_weight(module, component, name, layer, unet)
            self.targets.append((weight, weight.detach().clone(), layer))
        self.counts = {component: sum(key[0] == component for key in adapter.layers) for component in homes}

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Weights = base + scale * change, summed in float32; DoRA's change too, as PEFT merges it."""
        for weight, original, layer in self.targets:
            if scale == 0:
                weight.copy_(original)
            else:
                base = original.float()
                weight.copy_((base + scale * layer.change(base)).to(original.dtype))


def _acts(layer: LoraLayer) -> bool:
    """Whether the layer changes anything; of a DoRA, the magnitudes may."""
    return layer.magnitude is not None or bool(layer.alpha and layer.down.any() and layer.up.any())


def _modules(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The modules that a LoRA may change, by underscored path; `to_out` is the old diffusers name of
    `to_out.0`.
    """
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            plain = _plain(underscored(name))
            found |= {plain: module, re.sub(r"_to_out_0$", "_to_out", plain): module}
    return found


def _fitting_weight(
    module: nn.Linear | nn.Conv2d | None,
    component: str,
    name: str,
    layer: LoraLayer,
    unet: UNet2DConditionModel,
) -> Tensor:
    """The module's weight, if the layer fits it."""
    if module is None:
        raise UserError(
            f"the adapter changes {component} module {name[:100]!r}, which this base model does not have; it "
            "was made for another base.",
            Exit.MODEL,
        )
    expected: tuple[int, ...] = tuple(module.weight.shape)
    found: tuple[int, ...] = (layer.up.shape[0], *layer.down.shape[1:])
    # A 1x1 convolution may be stored as a matrix.
    if expected != found and math.prod(expected[2:]) * math.prod(found[2:]) == 1:
        expected, found = expected[:2], found[:2]
    if expected != found:
        width = layer.down.shape[1] if re.search(r"attn2.to_[kv]$", name) else None
        hint = (
            f" (its text is {width} wide, this base's {unet.config.cross_attention_dim})"
            if width not in (None, unet.config.cross_attention_dim)
            else ""
        )
        raise UserError(
            f"the adapter was made for another base: {name} is {found} there and {expected} here{hint}. "
            "Name its own with --base_model.",
            Exit.MODEL,
        )
    return module.weight


def _plain(name: str) -> str:
    return name.removeprefix("text_model_")  # of CLIPTextModel: transformers 5 dropped it, files keep it
