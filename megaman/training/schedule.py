"""How many steps a run has, and the learning rate of each: pure functions of the settings."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from megaman.common.console import Exit, UserError, count, say
from megaman.common.output_folder import RunFolder, recorded_settings
from megaman.config.train import TrainConfig
from megaman.training.checkpoints import Checkpoint
from megaman.training.sampler import Sampler


def plan(cfg: TrainConfig, sampler: Sampler, checkpoint: Checkpoint | None = None) -> TrainConfig:
    """The configuration with everything that was left open decided: steps from passes over the pictures, the
    warm-up. A run that goes on keeps its warm-up, however its total changes. What --max_minutes decides is
    that of an earlier command, if there was one, else left open.
    """
    if cfg.max_minutes is not None:
        return cfg if checkpoint is None else _as_decided(cfg, checkpoint)
    timed = None if checkpoint is None else checkpoint.settings.get("max_minutes")
    if timed is not None:
        say(f"note: the run went by the clock (--max_minutes {timed:g}), and goes on without one")
    steps = cfg.max_train_steps
    if cfg.num_train_epochs is not None:
        steps = math.ceil(cfg.num_train_epochs * len(sampler) / sampler.step_size)
    warmup = cfg.lr_warmup_steps
    if warmup is None:
        warmup = round(0.05 * steps) if checkpoint is None else checkpoint.settings["lr_warmup_steps"]
    return replace(cfg, max_train_steps=steps, num_train_epochs=None, lr_warmup_steps=warmup)


def _as_decided(cfg: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """The configuration with what an earlier command has found out for --max_minutes: both totals, or the
    first. The run's record knows of more than a checkpoint that was made before. UserError (exit 7) if the
    run never went by the clock.
    """
    found: Mapping[str, Any] = recorded_settings(RunFolder.of_adapter(checkpoint.path))
    if not found.get("earlier_total"):
        found = checkpoint.settings
    known: dict[str, Any] = {
        name: found.get(name) for name in ("max_train_steps", "earlier_total", "max_minutes")
    }
    if known["max_minutes"] is not None:
        known["max_minutes"] = cfg.max_minutes
    elif known["earlier_total"] is None:
        never = f"the run has {known['max_train_steps']} steps in all, and was never timed"
        raise UserError(f"{checkpoint.path}: {never}; leave --max_minutes out.", Exit.STATE)
    else:
        say(f"time: {known['max_train_steps']} steps in all, as an earlier command has decided")
    warmup = found["lr_warmup_steps"] if cfg.lr_warmup_steps is None else cfg.lr_warmup_steps
    return replace(cfg, **known, lr_warmup_steps=warmup)


def begun(cfg: TrainConfig, total: int) -> TrainConfig:
    """The configuration of a run by the clock with its first total, and the warm-up that follows from it."""
    warmup = round(0.05 * total) if cfg.lr_warmup_steps is None else cfg.lr_warmup_steps
    return replace(cfg, max_train_steps=total, lr_warmup_steps=warmup)


def settled(cfg: TrainConfig, step: int, total: int) -> TrainConfig:
    """The configuration of a run by the clock with its final total, decided after `step` steps: from here on
    it is a run like any other, and can be repeated.
    """
    earlier = [step, cfg.max_train_steps]
    return replace(cfg, max_train_steps=total, max_minutes=None, earlier_total=earlier)


def pictures_a_step(cfg: TrainConfig, processes: int) -> int:
    """Pictures per optimizer step, over all processes."""
    return cfg.train_batch_size * cfg.gradient_accumulation_steps * processes


def describe_plan(cfg: TrainConfig, sampler: Sampler) -> list[str]:
    """The arithmetic of the run, and what in it can hardly be meant, a line each. cfg: with its steps
    decided.
    """
    steps = cfg.max_train_steps
    seen = steps * sampler.step_size
    amount = f"{steps} steps of {sampler.step_size} pictures = {seen} seen, {seen / len(sampler):.1f} passes"
    if cfg.max_minutes is not None:
        amount = f"as many steps of {sampler.step_size} pictures as {cfg.max_minutes:g} minutes leave, passes"
    pictures = {picture for bucket in sampler.buckets for picture in bucket}
    repeated = ", their repeats counted" if len(pictures) < len(sampler) else ""
    lines = [
        f"plan: {amount} over {len(sampler)}{repeated}; rank {cfg.lora_rank}, "
        f"alpha {cfg.lora_alpha:g}, learning rate "
        f"{cfg.learning_rate:g}{f', of text encoders {cfg.text_encoder_lr:g}' if cfg.text_encoder_lr else ''}"
    ]
    small = sum(len(set(bucket)) < sampler.step_size for bucket in sampler.buckets)
    if small:
        of_all = f"{small} of {count(len(sampler.buckets), 'training size')}"
        again = "fewer pictures than a step, which shows them again, under other noise"
        lines.append(f"note: {of_all} {'has' if small == 1 else 'have'} {again}")
    if steps <= (cfg.lr_warmup_steps or 0) and cfg.max_minutes is None:
        takes_all = f"the warm-up of {cfg.lr_warmup_steps} steps takes the whole run"
        remedy = "lower --lr_warmup_steps, or leave it out for 5 % of the run"
        lines.append(f"note: {takes_all}, so the learning rate only rises; {remedy}")
    return lines


def lr_at(step: int, cfg: TrainConfig, peak: float | None = None) -> float:
    """The learning rate of a step (counted from 0): linear warm-up to the peak (--learning_rate's), then the
    schedule down to zero.

    Restarts: three cosines; polynomial: squared.
    """
    peak = cfg.learning_rate if peak is None else peak
    warmup = cfg.lr_warmup_steps or 0
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * SCHEDULES[cfg.lr_scheduler](_progress_at(step, warmup, cfg))


def _progress_at(step: int, warmup: int, cfg: TrainConfig) -> float:
    """How far a step is between the end of the warm-up and that of the run, 0 to 1. Where the total was
    another one at first, the rest of the way is cut anew there: no rate jumps.
    """
    total = cfg.max_train_steps
    at, before = cfg.earlier_total or (0, total)
    if at >= total:  # the user has shortened the run since
        return (step - warmup) / max(1, total - warmup)
    if step <= at:
        return (step - warmup) / max(1, before - warmup)
    done = max(0.0, (at - warmup) / max(1, before - warmup))
    begin = max(at, warmup)
    return done + (1 - done) * (step - begin) / max(1, total - begin)


def rates_at(step: int, cfg: TrainConfig) -> list[float]:
    """The rates of a step: the UNet's and, where they are trained, the text encoders'."""
    return [lr_at(step, cfg, peak) for peak in peak_rates(cfg)]


def peak_rates(cfg: TrainConfig) -> list[float]:
    """The highest rates of the UNet and, where they are trained, of the text encoders."""
    return [cfg.learning_rate, *[cfg.text_encoder_lr] * bool(cfg.text_encoder_lr)]


def text_encoder_stop_at(cfg: TrainConfig) -> int:
    """The step (counted from 0) from which on the text encoders stay as they are. Where the total was another
    one at first, what had stopped by then stays so.
    """
    at, before = cfg.earlier_total or (0, 0)
    early, late = (max(1, round(cfg.text_encoder_stop * total)) for total in (before, cfg.max_train_steps))
    return early if early <= at else max(at, late)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "polynomial": lambda progress: (1 - progress) ** 2,
    "cosine": _half_cosine,
    "cosine_with_restarts": lambda progress: _half_cosine(3 * progress % 1),
}  # the share of the peak rate, from 0 = the end of the warm-up to 1 = the end
