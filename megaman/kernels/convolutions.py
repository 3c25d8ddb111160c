"""Convolutions with a large frozen weight over few latent cells, on a CPU: as one product of matrices each.

At every call oneDNN lays a convolution's weight out in its own order, which takes longer than the product
itself where there are few cells. A product takes the weight as it lies, forward and back, and needs no second
copy of it: for each cell that comes out, what surrounds it is put in a row, and the rows meet the weight.
Equal to torch's convolution to rounding; the CPU and the sizes decide, never a clock, so a run that is
repeated ends in the same numbers. (tests/bench/bench_convolutions.py shows where it gains.)
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

Window = Any  # a convolution's stride and padding, each of rows and of columns
# cells of all pictures that come out; with more, the product itself takes the time, see onednn.lay_out
MOST_CELLS = {torch.bfloat16: 128, torch.float32: 256}
SMALLEST_WEIGHT = 2**20  # numbers; of a smaller one a second copy is cheap


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """x (B,in,h,w), weight (out,in,k,k), bias (out,) -> (B,out,h',w'). No gradient goes through it."""
    if not is_product(x.shape, weight, window):
        return functional.conv2d(x, weight, bias, *window)
    stride, (above, beside) = window
    padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, beside, beside, above, above))
    around = torch.cat(_around(padded, weight.shape[2:], stride), dim=-1)  # (B,h',w',k*k*in)
    matrices = weight.permute(0, 2, 3, 1).flatten(1), around.flatten(0, 2).t()
    made = products.matmul(*matrices) if bias is None else products.addmm(bias[:, None], *matrices)
    shape = (len(x), len(weight), *around.shape[1:3])
    result = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)  # no view, see autograd
    result.permute(0, 2, 3, 1).flatten(0, 2).copy_(made.t())
    return result


def conv2d_to_input(shape: torch.Size, weight: Tensor, grad: Tensor, window: Window) -> Tensor:
    """The gradient to the input, of this shape (B,in,h,w), of the output's (B,out,h',w'); see `conv2d`."""
    if not is_product(shape, weight, window):
        return conv2d_input(shape, weight, grad, *window)
    (down, across), (above, beside) = window
    batch, channels, high, wide = shape
    tall, broad = weight.shape[2:]
    cells = grad.permute(0, 2, 3, 1)
    padded = grad.new_zeros((batch, high + tall - 1, wide + broad - 1, len(weight)))
    first = tall - 1 - above, broad - 1 - beside
    last = first[0] + down * cells.shape[1], first[1] + across * cells.shape[2]
    padded[:, first[0] : last[0] : down, first[1] : last[1] : across] = cells
    turned = _around(padded, weight.shape[2:], (1, 1))[::-1]
    around = torch.stack(turned, dim=-1).flatten(3)  # (B,h,w,out*k*k)
    made = products.matmul(around.flatten(0, 2), weight.permute(0, 2, 3, 1).reshape(-1, channels))
    return made.reshape(batch, high, wide, channels).permute(0, 3, 1, 2)


def _around(padded: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> list[Tensor]:
    """For each place of a kernel, what lies there around each cell that comes out: (B,h',w',C)."""
    ends = [side - length + 1 for side, length in zip(padded.shape[1:3], kernel, strict=True)]
    places = product(*(range(length) for length in kernel))
    return [padded[:, y : y + ends[0] : stride[0], x : x + ends[1] : stride[1]] for y, x in places]


def is_product(shape: Sequence[int], weight: Tensor, window: Window) -> bool:
    """Whether an input of this shape (B,in,h,w) meets this weight (out,in,k,k) in a product."""
    cells = shape[0]
    for side, length, step, edge in zip(shape[2:], weight.shape[2:], *window, strict=True):
        cells *= (side + 2 * edge - length) // step + 1
    is_few = 0 < cells <= MOST_CELLS.get(weight.dtype, 0)
    is_large = weight.numel() >= SMALLEST_WEIGHT and weight.is_contiguous(memory_format=torch.channels_last)
    return is_few and is_large and _gains(weight)


def _gains(weight: Tensor) -> bool:
    """Whether this CPU multiplies in the weight's precision by oneDNN, with which it gains."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if weight.dtype == torch.float32:
        return products.prefers_onednn()
    return weight.dtype == torch.bfloat16 and products.has_bfloat16()


# ---------------------------------------------------------------- frozen layers


class FrozenConv2d(nn.Conv2d):
    """A frozen convolution that is computed as a product where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(B,in,h,w) -> (B,out,h',w')."""
        return _Frozen.apply(x, self.weight, self.bias, window_of(self))


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.window = x.shape, window
        return conv2d(x, weight, bias, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_to_input(ctx.shape, weight, grad, ctx.window), None, None, None


def window_of(layer: Any) -> Window:
    """A convolution's window."""
    return layer.stride, layer.padding


def take_over(model: Any) -> None:
    """Lets a model's frozen convolutions be products where that is faster: for a model that computes on the
    CPU. If it has any, all its weights come to lie channel by channel, as products need them.
    """
    layers = [each for each in model.modules() if type(each) is nn.Conv2d and _is_usual(each)]
    for layer in layers:
        layer.__class__ = FrozenConv2d
    if layers:
        model.to(memory_format=torch.channels_last)


def makes_product(layer: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a layer that was taken over meets an input of this shape in a product."""
    return isinstance(layer, FrozenConv2d) and is_product(shape, layer.weight, window_of(layer))


def _is_usual(layer: nn.Conv2d) -> bool:
    """Frozen, with a weight that is large enough, and nothing that `conv2d` does not know."""
    is_frozen = not any(each.requires_grad for each in layer.parameters())
    is_plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    is_inside = not isinstance(layer.padding, str) and all(
        edge < length for edge, length in zip(layer.padding, layer.kernel_size, strict=True)
    )
    return (
        is_frozen
        and is_plain
        and is_inside
        and layer.weight.numel() >= SMALLEST_WEIGHT
        and _gains(layer.weight)
    )
