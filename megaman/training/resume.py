"""An output folder and the run in it: what it records, who may write there, where it goes on."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megaman.common import files
from megaman.common.console import RESOURCES, STATE, UserError, say, shell_quoted
from megaman.common.files import RECORD
from megaman.common.signals import StopRequest, after_this_step
from megaman.config.train import TrainConfig, decisive
from megaman.training import checkpoints
from megaman.training.checkpoints import Progress

CHECKPOINTS = "checkpoints"


def progress_of(wanted: str | None, output: Path) -> Progress | None:
    """Where --resume_from_checkpoint goes on; None for a run from the beginning. UserError (exit 7)."""
    if wanted is None:
        return None
    progress = checkpoints.find_checkpoint(wanted, output / CHECKPOINTS)
    if progress.threads != torch.get_num_threads():
        say(
            f"note: the checkpoint was made with {progress.threads} threads, this run has "
            f"{torch.get_num_threads()}: equal up to rounding, not to the bit"
        )
    return progress


def check_resume(progress: Progress, cfg: TrainConfig, origins: Mapping[str, Any]) -> None:
    """UserError (exit 7) unless the run goes on as it began. Its total may change.

    origins: fingerprints of what it is made from; those that are not known yet are left out.
    """
    then = decisive(progress.settings) | {key: progress.origins.get(key) for key in origins}
    checkpoints.check_same(progress.path, then, decisive(asdict(cfg)) | dict(origins))
    if progress.step > cfg.max_train_steps:
        total = f"--max_train_steps {cfg.max_train_steps} is the total, give more."
        raise UserError(f"{progress.path}: at step {progress.step}; {total}", STATE)


def checkpoints_beside(adapter: Path) -> list[Path]:
    """The checkpoints of the run that an adapter's file or folder belongs to, by step. UserError (exit 7) if
    it has none.
    """
    path = adapter.resolve()
    folder = path if path.is_dir() else path.parent
    is_checkpoint = folder.parent.name == CHECKPOINTS
    beside = folder.parent if is_checkpoint else folder.parent / CHECKPOINTS
    found = [step for step in checkpoints.steps(beside) if (step / checkpoints.ADAPTER).is_file()]
    if not found:
        raise UserError(
            f"{adapter}: no checkpoints beside it ({CHECKPOINTS}/step-…/{checkpoints.ADAPTER}). Name a run's "
            "lora_weights with --lora_path, or leave --compare_checkpoints out.",
            STATE,
        )
    return found[::-1]


def resume_command(output: Path) -> str:
    """What goes on with a stopped run."""
    record = shell_quoted(str(output / RECORD))
    return f"python megaman_lora.py --config {record} --resume_from_checkpoint latest"


@contextmanager
def ready(
    output: Path, settings: Mapping[str, Any], progress: Progress | None, *, writes: bool
) -> Iterator[StopRequest]:
    """The output folder is this run's, and a signal waits for the end of a step.

    settings: to be recorded. An earlier run in the folder is moved aside, unless it is this one that goes on.
    writes: only the first of several processes does. Where memory or disk give out, the command that goes on
    is told.
    """
    lock = _begin(output, settings, progress) if writes else None
    try:
        with after_this_step() as stop:
            yield stop
    except (OSError, MemoryError, RuntimeError, UserError) as error:
        is_scarce = getattr(error, "exit_code", RESOURCES) == RESOURCES
        if is_scarce and any((output / CHECKPOINTS).glob("step-*")):
            say(f"what was saved is kept; go on with: {resume_command(output)}")
        raise
    finally:
        if lock is not None:
            lock.close()


def _begin(output: Path, settings: Mapping[str, Any], progress: Progress | None) -> files.OutputLock:
    folder = output / CHECKPOINTS
    goes_on = progress is not None and progress.path.resolve().parent == folder.resolve()
    lock, aside = files.claim(output, fresh=not goes_on)
    if aside is not None:
        shown = aside if files.is_link(output) else output.with_name(aside.name)
        say(f"output: {output} held an earlier run; it is kept as {shown}")
    later = checkpoints.set_aside_later(folder, progress.step) if goes_on else None
    if later is not None:
        say(f"output: checkpoints beyond step {progress.step} are kept in {later}")
    files.write_text(output / RECORD, json.dumps(settings, indent=2) + "\n")
    return lock
