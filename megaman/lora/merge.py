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
            "unet": _weights(unet),
            "text_encoder": _weights(text_encoder) if text_encoder is not None else {},
        }
        self.counts = dict.fromkeys(homes, 0)
        for (component, name), layer in adapter.layers.items():
            weight = homes[component].get(_plain(underscored(name)))
            if weight is None and not _acts(layer):
                continue  # ComfyUI writes what it found unchanged too, the text encoder's embeddings among it
            weight = _fitting(weight, component, name, layer, unet)
            self.targets.append((weight, weight.detach().clone(), layer))
            self.counts[component] += 1

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


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that an adapter may change, by their module's underscored path, and the biases by the same
    with _bias; `to_out` is the old diffusers name of `to_out.0`.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
            path = _plain(underscored(name))
            found[path] = module.weight
            if module.bias is not None:
                found[f"{path}_bias"] = module.bias
    return found | {re.sub(r"_to_out_0(?=$|_bias$)", "_to_out", path): found[path] for path in found}


def _fitting(
    weight: Tensor | None,
    component: str,
    name: str,
    layer: LoraLayer,
    unet: UNet2DConditionModel,
) -> Tensor:
    """The same weight, if there is one and the layer fits it."""
    if weight is None:
        raise UserError(
            f"the adapter changes {component} module {name[:100]!r}, which this base model does not have; it "
            "was made for another base.",
            Exit.MODEL,
        )
    expected: tuple[int, ...] = tuple(weight.shape)
    found: tuple[int, ...] = (layer.up.shape[0], *layer.down.shape[1:])
    if layer.is_vector:
        found = found[:1]
    # A 1x1 convolution may be stored as a matrix.
    elif expected != found and math.prod(expected[2:]) * math.prod(found[2:]) == 1:
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
    return weight


def _plain(name: str) -> str:
    return name.removeprefix("text_model_")  # of CLIPTextModel: transformers 5 dropped it, files keep it
