"""Products of float32 matrices on a CPU, by the faster of torch's two libraries.

torch leaves them to MKL, Intel's, which on AMD's CPUs makes no use of AVX-512; oneDNN, which torch has for
convolutions, takes about half of its time there. Both are exact to rounding, but not the same bits, so the
CPU and the sizes decide, never a clock: a run that is repeated ends in the same numbers.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

SMALLEST_RESULT = 12_000  # numbers; oneDNN shares out a smaller one badly
SMALLEST_WORK = 2_000_000  # multiplications, 20 microseconds: below, its longer call costs more than it gains


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x (N,in), weight (out,in), bias (out,) -> (N,out). No gradient goes through it."""
    return by_onednn(x, weight, bias) if _is_faster(x, weight) else functional.linear(x, weight, bias)


def matmul(one: Tensor, other: Tensor) -> Tensor:
    """one (N,K), other (K,M) -> (N,M). No gradient goes through it."""
    turned = other.t()
    return by_onednn(one, turned, None) if _is_faster(one, turned) else one @ other


def addmm(summand: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """summand (N,1) or (N,M) + one (N,K) other (K,M) -> (N,M), rounded once in half precision."""
    turned = other.t()
    if _is_faster(one, turned):
        return by_onednn(one, turned, None).add_(summand)
    return torch.addmm(summand, one, other)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by its private operator: x (…,in), weight (out,in) or its layout, bias (out,) -> (…,out)."""
    bias = None if bias is None else bias.contiguous()  # the operator reads no other one right
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether x W^T is faster by oneDNN."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    result = len(x) * len(weight)
    return result >= SMALLEST_RESULT and result * x.shape[1] >= SMALLEST_WORK and prefers_onednn()


@cache
def prefers_onednn() -> bool:
    """Whether this is a CPU of AMD's with AVX-512, torch has MKL, and its private operator multiplies."""
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()
    if not is_wide or "AuthenticAMD" not in _processor():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn((64, 64), generator=generator) for _ in range(2))
    try:
        made = by_onednn(x, weight, None)
    except (RuntimeError, AttributeError, TypeError):  # it is private, and may go
        return False
    return torch.allclose(made, functional.linear(x, weight), rtol=0, atol=1e-4)


@cache
def has_bfloat16() -> bool:
    """Whether torch leaves bfloat16's products on this CPU to oneDNN."""
    try:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (RuntimeError, AttributeError, TypeError):  # it is private, and may go
        return False


def _processor() -> str:
    """What the system tells of its processor, whose maker is in it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it is Linux's
        return platform.processor()


# ---------------------------------------------------------------- frozen layers


class FrozenLinear(nn.Linear):
    """A frozen linear layer that multiplies by the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        """(…,in) -> (…,out)."""
        made = _Frozen.apply(x.reshape(-1, self.in_features), self.weight, self.bias)
        return made.reshape(*x.shape[:-1], self.out_features)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return matmul(grad, weight), None, None


def take_over(model: nn.Module) -> None:
    """Makes the frozen linear layers of a float32 model multiply by oneDNN, where this CPU gains by it: for a
    model that computes on the CPU.
    """
    for module in model.modules():
        is_whole = type(module) is nn.Linear and module.weight.dtype == torch.float32
        if is_whole and not module.weight.requires_grad and prefers_onednn():
            module.__class__ = FrozenLinear
