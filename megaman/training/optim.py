"""The optimizers, torch's AdamW or one whose package is imported only when asked for; the moving average."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from megaman.common.console import Exit, UserError, say
from megaman.config.train import OptimizerName

PRODIGY_SMALLEST_RATE = 0.1  # Prodigy finds the rate itself and takes ours as a factor: 1 is usual


def optimizer_of(
    name: OptimizerName,
    groups: Sequence[Sequence[Tensor]],
    rates: Sequence[float],
    weight_decay: float,
    *,
    recorded: bool = False,
) -> Optimizer:
    """The optimizer of these groups of parameters, each with its own rate. UserError (exit 2) if its package
    is missing. recorded: AdamW as a CUDA graph takes it, all its numbers in tensors on the device.
    """
    rate = rates[0]
    own: dict[str, Any] = {"lr": rate, "weight_decay": weight_decay}
    parameters = [{"params": list(group), "lr": lr} for group, lr in zip(groups, rates, strict=True)]
    if name == "adamw":
        device = groups[0][0].device
        for group in parameters if recorded else ():
            group["lr"] = torch.tensor(group["lr"], device=device)
        is_captured = recorded and device.type == "cuda"
        return torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=True, capturable=is_captured)
    if name == "adafactor":
        return Adafactor(parameters, **own, relative_step=False, scale_parameter=False, warmup_init=False)
    if name == "prodigy":
        if rate < PRODIGY_SMALLEST_RATE:
            say(
                f"note: --optimizer prodigy takes --learning_rate {rate:g} as a factor of its own; 1 is usual"
            )
        prodigy = _imported("prodigyopt", name).Prodigy
        return prodigy(parameters, **own, safeguard_warmup=True, use_bias_correction=True)
    return _imported("bitsandbytes", name).optim.AdamW8bit(parameters, **own)


def _imported(package: str, name: OptimizerName) -> Any:
    try:
        return importlib.import_module(package)
    except Exception as error:  # also a package that is there but can't load its kernels
        remedy = "is not installed" if isinstance(error, ModuleNotFoundError) else "can't be loaded"
        reason = f"--optimizer {name}: its package {remedy}; pip install {package}"
        raise UserError(reason, Exit.USAGE) from error


def set_learning_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """Sets the rate of each group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


# ---------------------------------------------------------------- the moving average

EMA_PREFIX = "average."  # of its tensors in a checkpoint


class EMA:
    """An exponential moving average of parameters; decay 0 switches it off."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """It begins where the parameters are."""
        self.parameters = dict(parameters if decay else {})
        self.decay = decay
        self.kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes a step's result in; step is counted from 0. The first ones weigh more, so that the beginning
        is forgotten: the decay is (1 + step) / (10 + step) until that exceeds it.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.kept[name].lerp_(parameter, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the parameters are the moving average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.kept[name] = self.kept[name], parameter.data

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, on the CPU."""
        return {f"{EMA_PREFIX}{name}": value.cpu().contiguous() for name, value in self.kept.items()}

    def take_from(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes the average's tensors out of a checkpoint's and returns the rest. UserError (exit 7) if one
        is missing.
        """
        left = dict(tensors)
        for name, value in self.kept.items():
            if f"{EMA_PREFIX}{name}" not in left:
                raise UserError(f"the checkpoint holds no average of {name}", Exit.STATE)
            value.copy_(left.pop(f"{EMA_PREFIX}{name}"))
        return left
