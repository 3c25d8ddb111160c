"""Convolutions with a large frozen weight over few latent cells, on a CPU: as one product of matrices.

At every call oneDNN lays a convolution's weight out in its own order, which takes longer than the product
itself where there are few cells. A product takes the weight as it lies, forward and back, and needs no second
copy of it: what surrounds a cell is put in a row, and the rows meet the weight. Equal to torch's convolution
to rounding; the CPU and the sizes decide, never a clock, so a run that is repeated ends in the same numbers.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_input

from megaman.kernels import products

MOST_CELLS = {torch.bfloat16: 128, torch.float32: 256}  # of all pictures, that come out; with more, the
# product itself takes the time, and a layout is worth its memory, see onednn.lay_out
SMALLEST_WEIGHT = 2**20  # numbers; of a smaller one a second copy is cheap, see onednn.lay_out


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, window: Any) -> Tensor:
    """x (B,in,h,w), weight (out,in,k,k), bias (out,) -> (B,out,h',w'). window: the convolution's stride and
    padding. No gradient goes through it.
    """
    if not is_product(x.shape, weight, window):
        return functional.conv2d(x, weight, bias, *window)
    (down, across), (above, beside) = window
    padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, beside, beside, above, above))
    height, width = weight.shape[2:]
    around = padded.unfold(1, height, down).unfold(2, width, across)  # (B,h',w',in,k,k)
    rows = around.permute(0, 1, 2, 4, 5, 3).reshape(-1, weight[0].numel())
    made = products.matmul(_rows_of(weight), rows.t()).t().contiguous()  # faster so than the other way round
    made = made if bias is None else made.add_(bias)
    return made.reshape(*around.shape[:3], -1).permute(0, 3, 1, 2)


def conv2d_to_input(shape: torch.Size, weight: Tensor, grad: Tensor, window: Any) -> Tensor:
    """The gradient to the input, of this shape (B,in,h,w), of the output's (B,out,h',w'); see `conv2d`."""
    if not is_product(shape, weight, window):
        return conv2d_input(shape, weight, grad, *window)
    (down, across), (above, beside) = window
    batch, channels, high, wide = shape
    cells = grad.permute(0, 2, 3, 1)
    tall, broad = cells.shape[1:3]
    parts = products.matmul(cells.reshape(-1, len(weight)), _rows_of(weight))
    parts = parts.reshape(*cells.shape[:3], *weight.shape[2:], channels)  # (B,h',w',k,k,in)
    padded = grad.new_zeros((batch, high + 2 * above, wide + 2 * beside, channels), dtype=torch.float32)
    for y, x in product(range(weight.shape[2]), range(weight.shape[3])):
        to = padded[:, y : y + down * tall : down, x : x + across * broad : across]
        to += parts[:, :, :, y, x]
    inner = padded[:, above : above + high, beside : beside + wide]
    return inner.to(grad.dtype).contiguous().permute(0, 3, 1, 2)


def _rows_of(weight: Tensor) -> Tensor:
    """A weight that lies channel by channel, as a matrix (out,k*k*in); no copy."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def is_product(shape: Sequence[int], weight: Tensor, window: Any) -> bool:
    """Whether an input of this shape (B,in,h,w) meets this weight (out,in,k,k) in a product."""
    (down, across), (above, beside) = window
    batch, _, high, wide = shape
    height, width = weight.shape[2:]
    rows = (high + 2 * above - height) // down + 1
    columns = (wide + 2 * beside - width) // across + 1
    is_few = 0 < batch * rows * columns <= MOST_CELLS.get(weight.dtype, 0)
    is_large = weight.numel() >= SMALLEST_WEIGHT and weight.is_contiguous(memory_format=torch.channels_last)
    return is_few and is_large and _gains(weight)


def _gains(weight: Tensor) -> bool:
    """Whether this CPU's products in the weight's precision are known to gain: oneDNN's."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.bfloat16 or (weight.dtype == torch.float32 and products.prefers_onednn())


# ---------------------------------------------------------------- frozen layers


class FrozenConv2d(nn.Conv2d):
    """A frozen convolution that is computed as a product where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(B,in,h,w) -> (B,out,h',w')."""
        return _Frozen.apply(x, self.weight, self.bias, (self.stride, self.padding))


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.window = x.shape, window
        return conv2d(x, weight, bias, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_to_input(ctx.shape, weight, grad, ctx.window), None, None, None


def take_over(model: Any) -> None:
    """Lets a model's frozen convolutions be products where that is faster: for a model that computes on the
    CPU. If it has any, all its weights come to lie channel by channel, as products need them.
    """
    layers = [module for module in model.modules() if type(module) is nn.Conv2d and _is_usual(module)]
    for layer in (each for each in layers if _gains(each.weight)):
        layer.__class__ = FrozenConv2d
        model.to(memory_format=torch.channels_last)


def is_one(layer: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a layer computes an input of this shape as a product of its own."""
    return isinstance(layer, FrozenConv2d) and is_product(shape, layer.weight, (layer.stride, layer.padding))


def _is_usual(layer: nn.Conv2d) -> bool:
    """Frozen, with a weight that is large enough, and nothing that `conv2d` does not know."""
    is_large = layer.weight.numel() >= SMALLEST_WEIGHT and not layer.weight.requires_grad
    is_plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return is_large and is_plain and not isinstance(layer.padding, str)
