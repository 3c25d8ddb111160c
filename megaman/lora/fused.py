"""LoRA layers with few operators: one function forward and one backward for what PEFT's layers compute.

PEFT computes the update beside the frozen layer, in float32 whatever the base's precision: the whole input is
cast, two products are made, scaled, added and cast down. Here a layer in half precision gets its update in
half precision, added within the product; parameters and their gradients stay float32. In float32 the update
is added to a copy of the weight, so that all inputs pass one product, where there are enough of them.

The modules stay PEFT's, by name and by what is saved. What is not covered goes PEFT's own way: DoRA, dropout,
windows larger than 1 x 1.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megaman.kernels import convolutions, products
from megaman.lora.injection import ADAPTER_NAME, lora_modules

LINEAR = (nn.Linear, products.FrozenLinear)
CONVOLUTIONS = (nn.Conv2d, convolutions.FrozenConv2d)
DENSE = 0.4  # of a weight's size: factors that hold more give their gradients through the whole one's


class FusedLinear(LoraLinear):
    """PEFT's layer around a linear one, see above."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…,in) -> (…,out)."""
        if self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        if self.disable_adapters:
            return self.base_layer(x)
        rows = x.reshape(-1, self.in_features)
        return _updated(self, rows).reshape(*x.shape[:-1], self.out_features)


class FusedPointwise(LoraConv2d):
    """PEFT's layer around a convolution of single cells, which is a linear layer of each cell."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B,in,h,w) -> (B,out,h,w)."""
        lies_so = x.device.type == "cpu" or x.is_contiguous(memory_format=torch.channels_last)
        if self.merged or args or kwargs or not lies_so:
            return super().forward(x, *args, **kwargs)
        if self.disable_adapters:
            return self.base_layer(x)
        cells = x.permute(0, 2, 3, 1)
        made = _updated(self, cells.reshape(-1, x.shape[1]))
        return made.reshape(*cells.shape[:-1], -1).permute(0, 3, 1, 2)


def fuse(model: nn.Module) -> None:
    """Lets the LoRA layers of a model compute so, those that it is right for."""
    for module in lora_modules(model).values():
        if _is_plain(module):
            module.__class__ = FusedLinear if isinstance(module, LoraLinear) else FusedPointwise


def _is_plain(module: Any) -> bool:
    """Whether it is PEFT's simplest: one LoRA without dropout, DoRA or a bias, of a layer of single cells."""
    base = module.get_base_layer()
    if type(module) is LoraConv2d:
        is_known = (
            type(base) in CONVOLUTIONS and base.kernel_size == base.stride == (1, 1) and base.groups == 1
        )
    else:
        is_known = type(module) is LoraLinear and (type(base) in LINEAR or hasattr(base, "product"))
    names = {*module.active_adapters, *module.lora_A}
    is_alone = names == {ADAPTER_NAME} and ADAPTER_NAME not in module.lora_variant
    dropout = module.lora_dropout[ADAPTER_NAME]
    return is_known and is_alone and isinstance(dropout, nn.Identity) and not module.lora_bias[ADAPTER_NAME]


def merges(width_in: int, width_out: int, rows: int) -> bool:
    """Whether adding an update to a weight is less work than computing it beside, for so many inputs."""
    return rows * (width_in + width_out) > width_in * width_out


def _updated(module: Any, rows: Tensor) -> Tensor:
    """The layer with its update, (N,in) -> (N,out)."""
    base = module.base_layer
    down, up = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
    scale = module.scaling[ADAPTER_NAME]
    down, up = down.flatten(1), up.flatten(1)
    is_merged = rows.dtype == down.dtype and merges(down.shape[1], up.shape[0], len(rows))
    if is_merged and not hasattr(base, "product"):
        return _Merged.apply(rows, down, up, base, scale)
    return _Beside.apply(rows, down, up, base, scale)


def layers_read(model: nn.Module) -> set[nn.Module]:
    """The frozen layers at whose weights a LoRA layer looks in each step."""
    found = set()
    for module in lora_modules(model).values():
        base = module.get_base_layer()
        if not isinstance(module, FusedLinear) or base.weight.dtype == torch.float32:
            found.add(base)
    return found


class _Merged(torch.autograd.Function):
    """In float32: x (W + s B A)^T + b, of which only x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Any, scale: float) -> Tensor:
        """x (N,in), down (r,in), up (out,r), and the frozen layer -> (N,out)."""
        ctx.save_for_backward(x, down, up)
        ctx.base = base
        ctx.scale = scale
        return products.linear(x, _merged(base, down, up, scale), base.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The output's gradient (N,out) -> those of x (where one is asked for), down and up."""
        x, down, up = ctx.saved_tensors
        scale = ctx.scale
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = products.matmul(grad, _merged(ctx.base, down, up, scale))
        if len(down) * (x.shape[1] + grad.shape[1]) > DENSE * x.shape[1] * grad.shape[1]:
            whole = products.matmul(grad.t(), x)  # less time than the four products with the factors
            factors = (up.t() @ whole, whole @ down.t())
        else:
            factors = ((grad @ up).t() @ x, grad.t() @ (x @ down.t()))
        return to_x, *(factor.mul_(scale) for factor in factors), None, None


def _merged(base: Any, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """A layer's weight with its update, (out,in)."""
    return torch.addmm(base.weight.flatten(1), up, down, alpha=scale)


class _Beside(torch.autograd.Function):
    """In the precision of x: W x + b + s B (A x), of which x and A x are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Any, scale: float) -> Tensor:
        """x (N,in), down (r,in), up (out,r), and the frozen layer -> (N,out)."""
        ctx.dtype = down.dtype
        down, up = (factor.to(x.dtype) for factor in (down, up))
        narrow = torch.addmm(x.new_empty(1), x, down.t(), beta=0, alpha=scale)  # (N,r)
        made = base.product(x) if hasattr(base, "product") else _product(x, base)
        ctx.save_for_backward(x, narrow, down, up)
        ctx.base = base
        ctx.scale = scale
        return made.addmm_(narrow, up.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The output's gradient (N,out) -> those of x (where one is asked for), down and up."""
        x, narrow, down, up = ctx.saved_tensors
        to_narrow = torch.addmm(grad.new_empty(1), grad, up, beta=0, alpha=ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = _gradient_to_input(ctx.base, grad, x.shape).addmm_(to_narrow, down)
        return to_x, _summed(to_narrow, x, ctx.dtype), _summed(grad, narrow, ctx.dtype), None, None


def _product(x: Tensor, base: Any) -> Tensor:
    return products.linear(x, base.weight.flatten(1), base.bias)


def _gradient_to_input(base: Any, grad: Tensor, shape: torch.Size) -> Tensor:
    if hasattr(base, "gradient_to_input"):
        return base.gradient_to_input(grad, shape)
    return products.matmul(grad, base.weight.flatten(1))


def _summed(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """one^T other in this precision; of float16, which overflows, no number in between is a half one."""
    if one.is_cuda and one.dtype != dtype:
        return torch.mm(one.t(), other, out_dtype=dtype)
    if one.dtype == torch.float16 and one.device.type == "cpu":
        return one.t().to(dtype) @ other.to(dtype)
    return (one.t() @ other).to(dtype)
