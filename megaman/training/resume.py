"""Beginning a run in its output folder, or going on with one: what must be the same, what is recorded."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from megaman.common.console import Exit, UserError, say, shell_quoted
from megaman.common.files import write_text
from megaman.common.output_folder import OutputLock, RunFolder, claim, must_stay, step_folders
from megaman.common.signals import StopRequest, after_this_step
from megaman.config.train import TrainConfig, decisive
from megaman.training import checkpoints
from megaman.training.checkpoints import Checkpoint


def checkpoint_of(wanted: str | None, run: RunFolder) -> Checkpoint | None:
    """The checkpoint that --resume_from_checkpoint names; None if a run begins anew. UserError (exit 7) if
    there is none.
    """
    if wanted is None:
        return None
    checkpoint = checkpoints.find_checkpoint(wanted, run.checkpoints)
    if checkpoint.threads != torch.get_num_threads():
        say(
            f"note: the checkpoint was made with {checkpoint.threads} threads, this run has "
            f"{torch.get_num_threads()}: equal up to rounding, not to the bit"
        )
    return checkpoint


def check_resume(checkpoint: Checkpoint | None, cfg: TrainConfig, origins: Mapping[str, Any]) -> None:
    """Checks that a resume, if it is one, uses the settings and data the checkpoint was made with; only its
    total may change. UserError (exit 7) if not.

    origins: fingerprints of what the run is made from; those that are not known yet are left out.
    """
    if checkpoint is None:
        return
    then = decisive(checkpoint.settings) | {key: checkpoint.origins.get(key) for key in origins}
    checkpoints.check_same(checkpoint.path, then, decisive(asdict(cfg)) | dict(origins))
    if checkpoint.step > cfg.max_train_steps:
        total = f"--max_train_steps {cfg.max_train_steps} is the total, give more."
        raise UserError(f"{checkpoint.path}: at step {checkpoint.step}; {total}", Exit.STATE)


def resume_command(run: RunFolder) -> str:
    """The command that goes on with a stopped run."""
    record = shell_quoted(str(run.record))
    return f"python megaman_lora.py --config {record} --resume_from_checkpoint latest"


@contextmanager
def claimed(
    run: RunFolder, settings: Mapping[str, Any], checkpoint: Checkpoint | None, *, is_main: bool
) -> Iterator[StopRequest]:
    """Claims the output folder; inside, Ctrl-C and SIGTERM are answered after the current step.

    settings: to be recorded. An earlier run in the folder is moved aside, unless it is this one that goes on.
    is_main: only the first of several processes writes. Where memory or disk give out, the command that goes
    on is told.
    """
    lock = _begin(run, settings, checkpoint) if is_main else None
    try:
        with after_this_step() as stop:
            yield stop
    except UserError as error:
        if error.exit_code == Exit.RESOURCES:
            _tell_how_to_go_on(run)
        raise
    except (OSError, MemoryError, RuntimeError):
        _tell_how_to_go_on(run)
        raise
    finally:
        if lock is not None:
            lock.close()


def _tell_how_to_go_on(run: RunFolder) -> None:
    if step_folders(run.checkpoints):
        say(f"what was saved is kept; go on with: {resume_command(run)}")


def _begin(run: RunFolder, settings: Mapping[str, Any], checkpoint: Checkpoint | None) -> OutputLock:
    folder = run.checkpoints.resolve()
    goes_on = checkpoint is not None and checkpoint.path.resolve().parent == folder
    lock, aside = claim(run.path, fresh=not goes_on)
    if aside is not None:
        shown = aside if must_stay(run.path) else run.path.with_name(aside.name)
        say(f"output: {run.path} held an earlier run; it is kept as {shown}")
    if checkpoint is not None and goes_on:
        later = checkpoints.set_aside_later(run.checkpoints, checkpoint.step)
        if later is not None:
            say(f"output: checkpoints beyond step {checkpoint.step} are kept in {later}")
    write_text(run.record, json.dumps(settings, indent=2) + "\n")
    return lock
