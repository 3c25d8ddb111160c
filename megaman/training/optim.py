"""What turns gradients into steps: torch's AdamW, or what the user asked for, imported only then."""

import importlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from megaman.common.console import USAGE, UserError, say

Name = Literal["adamw", "adamw8bit", "prodigy", "adafactor"]
TIMID = 0.1  # Prodigy finds the rate itself and takes ours as a factor: 1 is usual


def optimizer_of(name: Name, parameters: Sequence[Tensor], rate: float, weight_decay: float) -> Optimizer:
    """The optimizer. UserError (exit 2) if its package is missing."""
    own: dict[str, Any] = {"lr": rate, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **own)
    if name == "adafactor":
        return Adafactor(parameters, **own, relative_step=False, scale_parameter=False, warmup_init=False)
    if name == "prodigy":
        if rate < TIMID:
            say(
                f"note: --optimizer prodigy takes --learning_rate {rate:g} as a factor of its own; 1 is usual"
            )
        prodigy = _imported("prodigyopt", name).Prodigy
        return prodigy(parameters, **own, safeguard_warmup=True, use_bias_correction=True)
    return _imported("bitsandbytes", name).optim.AdamW8bit(parameters, **own)


def _imported(package: str, name: Name) -> Any:
    try:
        return importlib.import_module(package)
    except Exception as error:  # also a package that is there but can't load its kernels
        remedy = "is not installed" if isinstance(error, ModuleNotFoundError) else "can't be loaded"
        reason = f"--optimizer {name}: its package {remedy}; pip install {package}"
        raise UserError(reason, USAGE) from error


def set_learning_rate(optimizer: Optimizer, rate: float) -> float:
    """Sets the rate of every group; returns it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
