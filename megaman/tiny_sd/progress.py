"""Training that goes on where it was interrupted: the step loop of the VAE and of the denoiser."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from megaman.common.files import replacing

SECONDS_BETWEEN_SAVES = 240
STARTED = time.monotonic()


def tell(line: str) -> None:
    """A line of the build's log, with the hours and minutes since its start."""
    minutes = int(time.monotonic() - STARTED) // 60
    print(f"{minutes // 60}:{minutes % 60:02} {line}", flush=True)


class Progress:
    """What an interrupted stage needs to go on, in one file: parameters, moments, the average, the step."""

    def __init__(self, file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
        self.file, self.model, self.optimizer, self.ema = file, model, optimizer, ema
        self.saved_at = time.monotonic()

    def restore(self) -> int:
        """The step to go on from; 0 for a fresh start."""
        if not self.file.exists():
            return 0
        tensors = load_file(self.file)
        for i, parameter in enumerate(self.model.parameters()):
            parameter.data.copy_(tensors[f"parameter.{i}"])
            self.ema.shadow_params[i].copy_(tensors[f"average.{i}"])
            moments = {
                key: tensors[f"{key}.{i}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{i}" in tensors
            }
            if moments:
                self.optimizer.state[parameter] = moments
        self.ema.optimization_step = step = int(tensors["at"])
        return step

    def save(self, step: int, *, now: bool = False) -> None:
        """Writes the state if the last one is old enough, or at once."""
        if not now and time.monotonic() - self.saved_at < SECONDS_BETWEEN_SAVES:
            return
        tensors = {"at": torch.tensor(step)}
        for i, parameter in enumerate(self.model.parameters()):
            tensors |= {f"parameter.{i}": parameter.data, f"average.{i}": self.ema.shadow_params[i]}
            tensors |= {f"{key}.{i}": value for key, value in self.optimizer.state[parameter].items()}
        with replacing(self.file) as partial:
            save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, partial)
        self.saved_at = time.monotonic()


def cosine(step: int, total: int, warmup: int = 200, floor: float = 0.03) -> float:
    """Factor of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def steps(progress: Progress, total: int, rate_steps: int) -> Iterator[int]:
    """The steps still to do of `total`, with the learning rate set (a cosine over `rate_steps`), the step
    taken (clipped) and the state saved around the caller's backward.
    """
    peaks = [group["lr"] for group in progress.optimizer.param_groups]
    start = progress.restore()
    for step in range(start, total):
        for group, peak in zip(progress.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine(step, rate_steps)
        progress.optimizer.zero_grad(set_to_none=True)
        yield step
        nn.utils.clip_grad_norm_(list(progress.model.parameters()), 1.0)
        progress.optimizer.step()
        progress.ema.step(list(progress.model.parameters()))
        progress.save(step + 1)
    if start < total:
        progress.save(total, now=True)
    progress.ema.copy_to(list(progress.model.parameters()))
