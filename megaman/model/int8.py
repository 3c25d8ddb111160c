"""A frozen UNet's weights in a byte each: half of what half precision takes, rounded by less than a percent.

Each row of a weight is stored as whole numbers from -127 to 127 and the one factor that they share. A layer
makes its weight anew in the precision of its input, forward and backward, and keeps nothing of it. Dettmers
et al. 2022 (without outliers, which weights don't have).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megaman.kernels import convolutions, products

LARGEST = 127
SMALLEST_LAYER = 4096  # weights; below, nothing is saved
IN_CACHE = 2**19  # weights that are made whole at a time


class Int8Linear(nn.Linear):
    """A frozen linear layer whose weight (out,in) is int8; factors (out,1) float32."""

    factors: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(…,in) -> (…,out)."""
        if self.weight.is_floating_point():  # PEFT makes its own layers of the class that it wraps
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        return _Linear.apply(rows, self.weight, self.factors, self.bias).reshape(
            *x.shape[:-1], self.out_features
        )

    def product(self, x: Tensor) -> Tensor:
        """As `forward`, of rows (N,in) -> (N,out), without a gradient."""
        return products.linear(x, whole(self.weight, self.factors, x.dtype), self.bias)

    def gradient_to_input(self, grad: Tensor, _: torch.Size) -> Tensor:
        """Of the output's gradient (N,out): the input's (N,in)."""
        return products.matmul(grad, whole(self.weight, self.factors, grad.dtype))


class Int8Conv2d(nn.Conv2d):
    """A frozen convolution whose weight (out,in,kh,kw) is int8; factors (out,1,1,1) float32."""

    factors: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B,in,h,w) -> (B,out,h',w')."""
        if self.weight.is_floating_point():  # as above
            return super().forward(x)
        return _Conv2d.apply(x, self.weight, self.factors, self.bias, convolutions.window_of(self))


IN_INT8: dict[type, type] = {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d}


def whole(weight: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that the bytes stand for, without a float32 copy of it: on a card in one pass; on a CPU,
    whose products are slow while they convert, in pieces that stay in its cache.
    """
    made = torch.empty_like(weight, dtype=dtype)
    if weight.device.type != "cpu":
        return torch.mul(weight, factors, out=made)
    rows = max(1, IN_CACHE * len(weight) // weight.numel())
    for piece, stored, factor in zip(made.split(rows), weight.split(rows), factors.split(rows), strict=True):
        piece.copy_(stored.float().mul_(factor))
    return made


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, factors)
        return products.linear(x, whole(weight, factors, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, factors = ctx.saved_tensors
        return products.matmul(grad, whole(weight, factors, grad.dtype)), None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, factors: Tensor, bias: Tensor | None, window: Any
    ) -> Tensor:
        ctx.save_for_backward(weight, factors)
        ctx.shape, ctx.window = x.shape, window
        return convolutions.conv2d(x, whole(weight, factors, x.dtype), bias, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, factors = ctx.saved_tensors
        made = whole(weight, factors, grad.dtype)
        return convolutions.conv2d_to_input(ctx.shape, made, grad, ctx.window), None, None, None, None


@torch.no_grad()
def store_in_int8(unet: nn.Module) -> None:
    """Turns a frozen UNet's linear layers and convolutions into layers of bytes, one after the other; its
    first and its last convolution, by which a base is known, stay whole.
    """
    known_by = {id(getattr(unet, name, None)) for name in ("conv_in", "conv_out")}
    for module in list(unet.modules()):
        if type(module) not in IN_INT8 or id(module) in known_by:
            continue
        layer: Any = module
        weight = layer.weight.float()
        if weight.numel() < SMALLEST_LAYER:
            continue
        rows = weight.abs().flatten(1).amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        factors = (rows / LARGEST).reshape(-1, *[1] * (weight.ndim - 1))
        stored = (weight / factors).round().to(torch.int8)
        layer.weight = nn.Parameter(stored, requires_grad=False)
        layer.register_buffer("factors", factors)
        layer.__class__ = IN_INT8[type(module)]
