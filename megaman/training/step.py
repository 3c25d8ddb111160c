"""A training step's two halves on the device: losses with their gradients, and what is made of those."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.optim import Optimizer

from megaman.common.console import say
from megaman.config.train import TrainConfig
from megaman.model import compute
from megaman.model.stable_diffusion import StableDiffusion
from megaman.training import checkpoints, objective, optim
from megaman.training.graph import CudaRecorder, Replayed
from megaman.training.objective import Batch
from megaman.training.optim import set_learning_rates
from megaman.training.schedule import peak_rates


@dataclass
class Step:
    """How a run computes a step: kernel by kernel, as Python calls them."""

    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    cfg: TrainConfig
    accelerator: Accelerator
    trainable: Mapping[str, nn.Parameter]
    optimizer: Optimizer

    def backward(self, batch: Batch, weight: float) -> Tensor:
        """The loss of each example (B,); the gradients of their sum, times a weight, are added up."""
        losses, strayed = objective.training_losses(self.unet, batch, self.scheduler, self.cfg.snr_gamma or 0)
        self.accelerator.backward(weight * (losses.sum() + self.cfg.preserve_weight * strayed.sum()))
        return losses.detach()

    def update(self, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The gradients' norm, and whether fp16's scaler left the step out; tensors of one number.

        Clips the gradients, takes the optimizer's step at these rates of its groups, and clears them.
        """
        set_learning_rates(self.optimizer, rates)
        norm = self.accelerator.clip_grad_norm_(self.trainable.values(), self.cfg.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, self._was_skipped(norm)

    def _was_skipped(self, norm: Tensor) -> Tensor:
        """Whether a gradient's norm makes the scaler leave a step out; a fused optimizer decides that on the
        device, and accelerate does not hear of it.
        """
        has_scaler = self.accelerator.scaler is not None
        return norm.isfinite().logical_not() if has_scaler else torch.zeros_like(norm, dtype=torch.bool)

    def clear(self) -> None:
        """Clears the gradients, and what is remembered of how the UNet computes, which may change now."""
        self.optimizer.zero_grad()


@dataclass
class GraphedStep(Step):
    """The same as CUDA graphs. Its optimizer is AdamW, fused, with its rates in tensors."""

    def __post_init__(self) -> None:
        recorder = CudaRecorder()
        self.replayed_backward = Replayed(self._backward, recorder)
        self.replayed_update = Replayed(self._update, recorder)
        for parameter in self.trainable.values():
            parameter.grad = torch.zeros_like(parameter)  # where all recordings add theirs

    @property
    def _gradients(self) -> list[Tensor]:
        return [each.grad for each in self.trainable.values() if each.grad is not None]

    def backward(self, batch: Batch, weight: float) -> Tensor:
        """See `Step`."""
        (losses,) = self.replayed_backward(batch.tensors(), weight)
        return losses

    def update(self, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate)
        norm, was_skipped = self.replayed_update([])
        return norm, was_skipped

    def clear(self) -> None:
        """See `Step`."""
        self.replayed_backward.forget()
        torch._foreach_zero_(self._gradients)

    def _backward(self, *arguments: Any) -> list[Tensor]:
        *tensors, weight = arguments
        return [super().backward(Batch.of(tensors), weight)]

    def _update(self) -> list[Tensor]:
        parameters = [*self.trainable.values()]
        optimizer: Any = self.optimizer
        inner, scaler = optimizer.optimizer, self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(inner)
        norm = nn.utils.clip_grad_norm_(parameters, self.cfg.max_grad_norm)
        if scaler is None:
            inner.step()
        else:
            scaler.step(inner)  # a fused optimizer looks on the device whether to step
            scaler.update()
        torch._foreach_zero_(self._gradients)
        return [norm, self._was_skipped(norm)]


def why_no_graph(cfg: TrainConfig, accelerator: Accelerator, *, is_crowded: bool) -> str | None:
    """Why a run can't be recorded; None if it can."""
    reasons = {
        "it needs an NVIDIA card": accelerator.device.type != "cuda",
        "several processes share their gradients": accelerator.num_processes > 1,
        "only --optimizer adamw can be": cfg.optimizer != "adamw",
        "captions are read anew in each step (--text_encoder_lr)": cfg.text_encoder_lr > 0,
        "--lora_dropout draws anew in each step": cfg.lora_dropout > 0,
        "the card is too small to keep the UNet in its place": is_crowded,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def prepared(
    base: StableDiffusion, trainable: Mapping[str, nn.Parameter], cfg: TrainConfig, accelerator: Accelerator
) -> Step:
    """How the run computes a step, with the kernels that were asked for."""
    compute.apply_kernels(base.unet, cfg.attention, cfg.compile)
    why = why_no_graph(cfg, accelerator, is_crowded=base.is_crowded) if cfg.cuda_graph else None
    if why is not None:
        say(f"note: --cuda_graph is left out: {why}")
    is_graph = cfg.cuda_graph and why is None
    as_in_training(base.parts)
    optimizer = accelerator.prepare(_optimizer_of(trainable, cfg, is_graph))
    kind = GraphedStep if is_graph else Step
    return kind(base.unet, base.scheduler, cfg, accelerator, trainable, optimizer)


def _optimizer_of(trainable: Mapping[str, nn.Parameter], cfg: TrainConfig, recorded: bool) -> Optimizer:
    """The optimizer: a group of the UNet's parameters, one of the text encoders' if they are trained.
    recorded: for a CUDA graph.
    """
    is_of_text = checkpoints.is_of_text
    unets = [parameter for name, parameter in trainable.items() if not is_of_text(name)]
    others = [parameter for name, parameter in trainable.items() if is_of_text(name)]
    groups = [unets, others] if others else [unets]
    return optim.optimizer_of(cfg.optimizer, groups, peak_rates(cfg), cfg.weight_decay, recorded=recorded)


def as_in_training(parts: Mapping[str, nn.Module]) -> None:
    """Lets LoRAs drop out. Of the UNet's blocks, those with a shortcut would copy its input for DDP's sake,
    which nobody uses here.
    """
    for part in parts.values():
        part.train()
        for block in part.modules():
            if isinstance(block, ResnetBlock2D):
                block.training = False


@contextmanager
def at_rest(parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block nothing is dropped out."""
    for part in parts.values():
        part.eval()
    try:
        yield
    finally:
        as_in_training(parts)
