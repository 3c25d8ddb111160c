"""Products of float32 matrices on a CPU, by the faster of torch's two libraries.

torch leaves them to Intel's, which on AMD's CPUs makes no use of AVX-512; oneDNN, which torch has for
convolutions, takes less than half of its time there. Both are exact to rounding, but not the same bits, so
the CPU and the sizes decide, never a clock: a run that is repeated ends in the same numbers.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SMALLEST_RESULT = 12_000  # numbers; oneDNN shares out a smaller one badly
SMALLEST_WORK = 2_000_000  # multiplications, 20 microseconds: below, its longer call costs more than it gains


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x (N,in), weight (out,in), bias (out,) -> (N,out)."""
    return _by_onednn(x, weight, bias) if _is_faster(x, weight) else functional.linear(x, weight, bias)


def matmul(one: Tensor, other: Tensor) -> Tensor:
    """one (N,K), other (K,M) -> (N,M)."""
    turned = other.t()
    return _by_onednn(one, turned, None) if _is_faster(one, turned) else one @ other


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether x W^T is faster by oneDNN."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    result = len(x) * len(weight)
    return result >= SMALLEST_RESULT and result * x.shape[1] >= SMALLEST_WORK and prefers_onednn()


@cache
def prefers_onednn() -> bool:
    """Whether this is a CPU of AMD's with AVX-512, and torch's private operator multiplies."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in _processor():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn((64, 64), generator=generator) for _ in range(2))
    try:
        made = _by_onednn(x, weight, None)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):  # it is private, and may go
        return False
    return torch.allclose(made, functional.linear(x, weight), rtol=0, atol=1e-4)


def _processor() -> str:
    """What the system tells of its processor, whose maker is in it."""
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8") if info.exists() else platform.processor()


# ---------------------------------------------------------------- frozen layers


class FrozenLinear(nn.Linear):
    """A frozen linear layer whose products are these."""

    def forward(self, x: Tensor) -> Tensor:
        """(…,in) -> (…,out)."""
        made = _Frozen.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return made.reshape(*x.shape[:-1], -1)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return matmul(grad, weight), None, None


def take_over(model: nn.Module) -> None:
    """Lets the frozen linear layers of a float32 model compute so, where this CPU gains by it."""
    for module in model.modules():
        if type(module) is nn.Linear and _is_frozen(module.weight) and prefers_onednn():
            module.__class__ = FrozenLinear


def _is_frozen(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.requires_grad
