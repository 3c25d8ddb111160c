"""A LoRA apart from any model and any file: its layers, and what they add to weights.

B @ A * alpha / rank is added to a module's weight (A is "down", B is "up"). DoRA then gives every row of the
sum the length that its magnitude says.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from megaman.common.console import Exit, UserError
from megaman.common.kinds import Kind

SMALL_B_EXPONENT, GAP_EXPONENT = -8, 4  # B below 2^-8, and 2^4 below A, loses digits in float16
STRENGTH = "preferred_weight"  # key of an adapter's metadata: the strength to draw with, if one was chosen
Component = str  # one of kinds.PARTS
Key = tuple[Component, str]  # with diffusers' dotted path; of a text encoder with "text_model." in front


def underscored(name: str) -> str:
    """A module's path as kohya writes it."""
    return name.replace(".", "_")


@dataclass(frozen=True)
class LoraLayer:
    """One module's update. down (r,in) or (r,in,kh,kw); up (out,r) or (out,r,1,1); magnitude, DoRA's:
    (out,1) or (out,1,1,1), or along the inputs as others write it: (1,in) or (1,in,1,1).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def is_vector(self) -> bool:
        """Whether it belongs to a bias or a norm's weight (n,), as up (n,1) and down (1,1)."""
        return self.down.numel() == 1

    def delta(self) -> Tensor:
        """B @ A * alpha / rank, float32: (out,in) or (out,in,kh,kw)."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return product.mul_(self.alpha / self.rank).reshape(self.up.shape[0], *self.down.shape[1:])

    def change(self, weight: Tensor) -> Tensor:
        """What the layer adds to this weight at strength 1, float32 and of the weight's shape; nobody else
        holds it.
        """
        delta = self.delta().to(weight.device).reshape(weight.shape)
        if self.magnitude is None:
            return delta
        turned = weight + delta
        magnitude = self.magnitude.to(weight.device).float()
        magnitude = magnitude.reshape(*magnitude.shape[:2], *[1] * (weight.ndim - 2))
        axis = 0 if magnitude.shape[0] == weight.shape[0] else 1
        others = [i for i in range(weight.ndim) if i != axis]
        lengths = turned.square().sum(dim=others, keepdim=True).sqrt()
        return magnitude / lengths * turned - weight

    def balanced(self) -> "LoraLayer":
        """The same update for float16, whose digits fade below 6e-5: a `up` that has hardly been trained yet
        is enlarged, and `down` made smaller, by a power of two, which costs nothing.
        """
        down_size, up_size = (math.frexp(part.abs().max().item())[1] for part in (self.down, self.up))
        if up_size > SMALL_B_EXPONENT or down_size - up_size < GAP_EXPONENT or not self.up.any():
            return self
        factor = 2.0 ** ((down_size - up_size) // 2)
        return replace(self, down=self.down / factor, up=self.up * factor)


@dataclass(frozen=True)
class Adapter:
    """A LoRA apart from any model.

    Layers are keyed by component and module path. A path that nothing is known of stays as its file says it.
    """

    layers: Mapping[Key, LoraLayer]
    metadata: Mapping[str, Any] = field(default_factory=dict)  # trigger, base, resolution, configuration
    kind: Kind | None = None  # of the bases that it is for; None: its file does not tell

    @property
    def components(self) -> tuple[Component, ...]:
        """The parts that it changes, in the order of its layers."""
        return tuple(dict.fromkeys(component for component, _ in self.layers))

    def only(self, component: Component) -> "Adapter":
        """What it does to one part."""
        return replace(self, layers={key: self.layers[key] for key in self.layers if key[0] == component})

    @property
    def is_dora(self) -> bool:
        """Whether it holds magnitudes."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that name these weights, whatever file they came from."""
        total = hashlib.sha256()
        ordered = sorted(self.layers.items(), key=lambda item: (item[0][0], underscored(item[0][1])))
        for (component, name), layer in ordered:
            total.update(f"{component} {underscored(name)} {layer.alpha:.6g}".encode())
            layer = layer.balanced()
            for part in (layer.down.half(), layer.up.half()):
                total.update(part.contiguous().numpy().tobytes())
            if layer.magnitude is not None:
                total.update(layer.magnitude.float().contiguous().numpy().tobytes())
        return total.hexdigest()[:12]


def check_finite(adapter: Adapter, where: str, exit_code: int) -> None:
    """UserError unless every number of the adapter is one."""
    for (_, name), layer in adapter.layers.items():
        parts = [part for part in (layer.down, layer.up, layer.magnitude) if part is not None]
        if not (all(part.isfinite().all() for part in parts) and math.isfinite(layer.alpha)):
            raise UserError(
                f"{where}: {name} holds NaN or infinite numbers; it would draw black pictures. Train "
                "again with a lower --learning_rate.",
                exit_code,
            )


def check_kind(made_for: Kind | None, base: Kind | None, what: str, next_step: str) -> None:
    """UserError (exit 4) that names both kinds, where both are known and differ. what: the adapter, in the
    user's words.
    """
    if made_for is not None and base is not None and made_for is not base:
        raise UserError(
            f"{what} was made for {made_for.name}, this base is {base.name}. {next_step}", Exit.MODEL
        )
