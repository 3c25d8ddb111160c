"""An adapter inside a base's own weights, at any strength. Knows which module each layer belongs to."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from megaman.common.console import Exit, UserError
from megaman.common.kinds import Kind
from megaman.lora.adapter import Adapter, LoraLayer, check_kind, underscored

ANOTHER_BASE = "Name its own with --base_model."


class MergedAdapter:
    """An adapter inside a base's own weights, at any strength; at 0, with which it begins, not at all.

    The untouched weights are kept from the first other strength on, so strength 0 is the base to the bit.
    """

    def __init__(self, adapter: Adapter, parts: Mapping[str, nn.Module], kind: Kind | None) -> None:
        """Raises UserError (exit 4) unless every layer finds its module with the right shape and one acts.
        Copies no weight.

        parts: the base's UNet and text encoders, by their names in pipelines. kind: the base's, if known.
        """
        if not any(map(_acts, adapter.layers.values())):
            raise UserError(
                "the adapter changes nothing: every update or alpha is 0. Train it longer.", Exit.MODEL
            )
        check_kind(adapter.kind, kind, "the adapter", ANOTHER_BASE)
        homes = {part: _weights(model) for part, model in parts.items()}
        self.targets: list[tuple[Tensor, LoraLayer]] = []
        self.originals: list[Tensor] = []  # what their weights were; on the CPU: a device has less room
        self.scale: float | None = 0.0  # the strength that the weights have now; None: some have, some not
        self.counts = dict.fromkeys(homes, 0)
        homeless = []
        for (component, name), layer in adapter.layers.items():
            weight = homes.get(component, {}).get(_plain(underscored(name)))
            if weight is not None:
                _check_fit(weight, name, layer)
                self.targets.append((weight, layer))
                self.counts[component] += 1
            elif _acts(layer):  # ComfyUI writes what it found unchanged too, the text encoder's embeddings
                homeless.append(f"{component} module {name[:100]!r}")  # among it
        if homeless:
            others = f" and {len(homeless) - 1} others" if len(homeless) > 1 else ""
            raise UserError(
                f"the adapter changes {homeless[0]}{others}, which this base model does not have; it was "
                "made for another base.",
                Exit.MODEL,
            )

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Weights = base + scale * change, summed in float32; DoRA's change too, as PEFT merges it. Nothing
        is done where they have that strength already.
        """
        if scale == self.scale:
            return
        if not self.originals:
            self.originals = [weight.detach().to("cpu", copy=True) for weight, _ in self.targets]
        self.scale = None  # until all have it: memory may run out between two of them
        for (weight, layer), original in zip(self.targets, self.originals, strict=True):
            weight.copy_(original if scale == 0 else _merged(original.to(weight.device), layer, scale))
        self.scale = scale


def _merged(weight: Tensor, layer: LoraLayer, scale: float) -> Tensor:
    """weight + scale * change in float32; of the layer's tensors the small ones go to the weight's device."""
    magnitude = None if layer.magnitude is None else layer.magnitude.to(weight.device)
    near = replace(
        layer, down=layer.down.to(weight.device), up=layer.up.to(weight.device), magnitude=magnitude
    )
    return near.change(weight).mul_(scale).add_(weight)  # a half-precision weight adds as its float32


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


def _check_fit(weight: Tensor, name: str, layer: LoraLayer) -> None:
    """UserError (exit 4) unless the layer is of this weight's shape."""
    expected: tuple[int, ...] = tuple(weight.shape)
    found: tuple[int, ...] = (layer.up.shape[0], *layer.down.shape[1:])
    if layer.is_vector:
        found = found[:1]
    # A 1x1 convolution may be stored as a matrix.
    elif expected != found and math.prod(expected[2:]) * math.prod(found[2:]) == 1:
        expected, found = expected[:2], found[:2]
    if expected != found:
        is_of_text = re.search(r"attn2.to_[kv]$", name) and found[1:2] != expected[1:2]
        hint = f" (its text is {found[1]} wide, this base's {expected[1]})" if is_of_text else ""
        raise UserError(
            f"the adapter was made for another base: {name} is {found} there and {expected} here{hint}. "
            + ANOTHER_BASE,
            Exit.MODEL,
        )


def _plain(name: str) -> str:
    return name.removeprefix("text_model_")  # of CLIPTextModel: transformers 5 dropped it, files keep it
