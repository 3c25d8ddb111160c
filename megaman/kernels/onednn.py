"""A frozen UNet's convolutions and linear layers on a CPU, their weights in the order in which it computes.

torch keeps a weight in its own order, and oneDNN, which computes on CPUs, lays it out at every call: that
takes longer than the product itself where a large weight meets few latent cells. Here it is laid out once for
each direction, and torch's copy is given up. The operators are private ones: what they make is compared with
torch's own, to the bit, before any layer is changed. Where they are missing, no faster or not equal, torch's
layers stay, so this changes no number. What `products` and `convolutions` compute needs no second copy.
"""

import copy
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megaman.kernels import convolutions, heap, products

LEAST_GAIN = 0.04  # of a layer's time both ways: below, it may be chance
LEAST_WORTH = 0.1  # seconds gained in a step by each GiB of second copies: below, the memory is worth more
LARGEST_SHARE = 0.5  # of the memory that is free: the second copies of the weights take no more
FEWEST_CHANNELS = 16  # of fewer are the UNet's first and last layers, by which a base is known
PRECISIONS = (torch.float32, torch.bfloat16)
TRIES = 2  # of which the faster counts
GIB = 2**30


@dataclass
class _Layouts:
    """One weight, for both directions; opaque to all but oneDNN. Few layers never need the way back."""

    onward: Tensor
    back: Tensor  # for the gradient to the input


class _LaidOut:
    """What both kinds of layers have in common."""

    layouts: _Layouts

    @property
    def weight(self) -> Tensor:
        """The weight in torch's order; made anew at every look, of the same bits."""
        whole = self.layouts.onward.to_dense()
        return whole.clone(memory_format=torch.channels_last) if whole.ndim == 4 else whole

    def take(self, layouts: _Layouts) -> None:
        """Gives up torch's weight; what walks a model's parameters does not meet the layouts."""
        layer: Any = self
        del layer._parameters["weight"]
        self.__dict__["layouts"] = layouts

    def forward(self, x: Tensor) -> Tensor:
        """As the class that it was made of."""
        return _Product.apply(x, self)

    def product(self, x: Tensor) -> Tensor:
        """As `forward`, without a gradient."""
        return _proven(self, "product", x.shape, lambda: self._fast(x), lambda: _plain(self, x))

    def gradient_to_input(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """Of the output's gradient: the input's, of this shape."""
        return _proven(
            self,
            "gradient",
            shape,
            lambda: self._fast_gradient(grad, shape),
            lambda: _plain_gradient(self, grad, shape),
        )

    def _fast(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _fast_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        raise NotImplementedError


class LaidOutLinear(_LaidOut, nn.Linear):  # type: ignore[override]
    """A frozen linear layer, (…,in) -> (…,out); see above."""

    def _fast(self, x: Tensor) -> Tensor:
        return products.by_onednn(x, self.layouts.onward, self.bias)

    def _fast_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return products.by_onednn(grad.contiguous(), self.layouts.back, None)


class LaidOutConv2d(_LaidOut, nn.Conv2d):  # type: ignore[override]
    """A frozen convolution of single steps, (B,in,h,w) -> (B,out,h,w); see above."""

    def _fast(self, x: Tensor) -> Tensor:
        return _conv(x, self.layouts.onward, self.bias, self)

    def _fast_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return _conv(grad, self.layouts.back, None, self)


class _Product(torch.autograd.Function):
    """Keeps nothing of the input: a frozen layer's gradient does not need it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _LaidOut) -> Tensor:
        """As the layer: (…,in) or (B,in,h,w) -> (…,out) or (B,out,h,w)."""
        ctx.layer = layer
        ctx.shape = x.shape
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The output's gradient -> the input's."""
        return ctx.layer.gradient_to_input(grad, ctx.shape), None


_PROOFS: dict[object, bool] = {}  # by form of layer, direction and input: whether the bits are torch's own


def _form(layer: Any, what: str, shape: torch.Size) -> tuple[object, ...]:
    """All that decides how oneDNN computes."""
    sizes = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else _sizes(layer)
    dtype = layer.layouts.onward.dtype
    return (sizes, layer.bias is None, what, shape, dtype, torch.get_num_threads())


def _sizes(layer: nn.Conv2d) -> tuple[object, ...]:
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride


def _is_same(one: Tensor, other: Tensor) -> bool:
    """To the bit, and lying alike: the next operator's rounding may depend on that."""
    return one.stride() == other.stride() and torch.equal(one, other)


def _proven(
    layer: _LaidOut, what: str, shape: torch.Size, fast: Callable[[], Tensor], plain: Callable[[], Tensor]
) -> Tensor:
    """What the faster way makes, where it is known to make torch's own bits; found out at the first call."""
    form = _form(layer, what, shape)
    if form not in _PROOFS:
        made = plain()
        _PROOFS[form] = _is_same(fast(), made)
        return made
    return fast() if _PROOFS[form] else plain()


# ---------------------------------------------------------------- the private operators


def _linear_layout(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _conv_layout(weight: Tensor, like: nn.Conv2d, shape: torch.Size) -> Tensor:
    """A weight (out,in,k,k) laid out for inputs of this shape; others are taken too."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    return reorder(weight.to_mkldnn(), *_window(like), [*shape])


def _conv(x: Tensor, layout: Tensor, bias: Tensor | None, like: nn.Conv2d) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(x, layout, bias, *_window(like), "none", [], "")


def _window(like: Any) -> tuple[Any, ...]:
    """A convolution's, as the operators take it."""
    return [*like.padding], [*like.stride], [*like.dilation], like.groups


def laid_out(layer: Any, shape: torch.Size) -> _Layouts:
    """A layer's weight laid out for inputs of this shape."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        rows = shape.numel() // shape[-1]
        return _Layouts(_linear_layout(weight, rows), _linear_layout(weight.t().contiguous(), rows))
    turned = weight.flip(2, 3).transpose(0, 1).contiguous()
    shape_out = torch.Size((shape[0], len(weight), *shape[2:]))
    return _Layouts(_conv_layout(weight.contiguous(), layer, shape), _conv_layout(turned, layer, shape_out))


LAID_OUT: dict[type, type] = {
    nn.Linear: LaidOutLinear,
    nn.Conv2d: LaidOutConv2d,
    convolutions.FrozenConv2d: LaidOutConv2d,
}


def layouts_of(model: nn.Module) -> list[Tensor]:
    """Of each weight that was laid out, a layout of its size, for what counts memory: in training it is there
    twice, once a direction, and no parameter any more.
    """
    return [each.layouts.onward for each in model.modules() if isinstance(each, _LaidOut)]


def can_be_laid_out(layer: nn.Module) -> bool:
    """Whether a layer is a frozen one of a form that the operators know, and whose gradient is a product of
    the same form. A convolution that steps over cells is none: the UNet has two or three.
    """
    known: Any = layer
    if type(layer) not in LAID_OUT or known.weight.requires_grad or known.weight.dtype not in PRECISIONS:
        return False
    if isinstance(layer, nn.Linear):
        return True
    halves = tuple(side // 2 for side in known.kernel_size)
    is_usual = known.padding == halves and known.groups == 1 and known.dilation == known.stride == (1, 1)
    return is_usual and known.padding_mode == "zeros" and min(known.weight.shape[:2]) >= FEWEST_CHANNELS


# ---------------------------------------------------------------- whether it gains


def as_channels_last(unet: Any) -> None:
    """Lets cells lie beside each other, channel by channel: the order for which weights are laid out."""
    unet.to(memory_format=torch.channels_last)


@torch.no_grad()
def lay_out(
    unet: nn.Module, run: Callable[[], object], keep: Collection[nn.Module] = (), processes: int = 1
) -> int:
    """Lays out the weights of a frozen UNet's layers, where that is worth a second copy; returns how many.

    run: one pass through the UNet, as in training, which shows what each layer is given. keep: layers whose
    weights others read in each step. processes: that do the same, and share the memory. Layers of one form
    and input are measured once in a process. Where memory is short, those that gain most by it come first.
    """
    as_channels_last(unet)
    kept = set(keep)
    room = LARGEST_SHARE * psutil.virtual_memory().available / processes
    known: list[Any] = [each for each in unet.modules() if can_be_laid_out(each) and each not in kept]
    layers = [each for each in known if each.weight.nbytes <= room]
    shapes = _shapes(layers, run) if layers else {}
    count = 0
    try:
        gains = {layer: _gain(layer, shape) for layer, shape in shapes.items()}
        worthy = {layer: gain for layer, gain in gains.items() if gain is not None}
        for layer in sorted(worthy, key=lambda each: -worthy[each]):
            if layer.weight.nbytes <= room:
                room -= layer.weight.nbytes
                layouts = laid_out(layer, shapes[layer])
                layer.__class__ = LAID_OUT[type(layer)]
                layer.take(layouts)
                heap.give_back()  # torch's copy, which malloc would keep
                count += 1
    except (RuntimeError, AttributeError, TypeError):
        pass  # the operators are private ones, which may go
    return count


_GAINS: dict[object, float | None] = {}  # by form of layer and input: see `_gain`


def _gain(layer: Any, shape: torch.Size) -> float | None:
    """Seconds that a layer gains in a step by each GiB of its second copy; None where that is too little, or
    the bits are others.
    """
    window = getattr(layer, "stride", None)
    form = (type(layer), layer.weight.shape, window, shape, layer.weight.dtype, torch.get_num_threads())
    if form not in _GAINS:
        _GAINS[form] = _measured_gain(layer, shape)
    return _GAINS[form]


def _shapes(layers: Collection[Any], run: Callable[[], object]) -> dict[Any, torch.Size]:
    """The shape of what each layer is given in a pass; not of those that it leaves out, nor of convolutions
    that are products.
    """
    shapes: dict[Any, torch.Size] = {}

    def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        if not convolutions.makes_product(layer, given[0].shape):
            shapes[layer] = given[0].shape

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _measured_gain(layer: Any, shape: torch.Size) -> float | None:
    """See `_gain`."""
    like: Any = copy.copy(layer)  # its twin, with parameters of its own
    like._parameters = dict(layer._parameters)
    like.__class__ = LAID_OUT[type(layer)]
    like.take(laid_out(layer, shape))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(layer.weight.dtype)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    plain_s, made = _timed(lambda: layer(x))
    grad = torch.randn(made.shape, generator=generator).to(made.dtype)
    if grad.ndim == 4:
        grad = grad.contiguous(memory_format=torch.channels_last)
    plain_back_s, expected = _timed(lambda: _plain_gradient(layer, grad, shape))
    onward_s, product = _timed(lambda: like._fast(x))
    back_s, gradient = _timed(lambda: like._fast_gradient(grad, shape))
    gained_s = plain_s + plain_back_s - onward_s - back_s
    worth = gained_s / layer.weight.nbytes * GIB
    is_equal = _is_same(product, made) and _is_same(gradient, expected)
    is_worth_it = gained_s > LEAST_GAIN * (plain_s + plain_back_s) and worth > LEAST_WORTH
    return worth if is_equal and is_worth_it else None


def _plain(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return functional.linear(x, layer.weight, layer.bias)
    return convolutions.conv2d(x, layer.weight, layer.bias, convolutions.window_of(layer))


def _plain_gradient(layer: Any, grad: Tensor, shape: torch.Size) -> Tensor:
    if isinstance(layer, nn.Linear):
        return grad @ layer.weight
    return convolutions.conv2d_to_input(shape, layer.weight, grad, convolutions.window_of(layer))


def _timed(compute: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds that it takes, of the faster try, and its result."""
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        result = compute()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result
