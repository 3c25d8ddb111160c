"""Beginning a run in its output folder, or going on with one: what must be the same, what is recorded."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaman.common.console import Exit, UserError, command_of, say, shell_quoted
from megaman.common.files import write_text
from megaman.common.kinds import CHUNK
from megaman.common.output_folder import (
    ADAPTER_FILE,
    OutputLock,
    RunFolder,
    claim,
    must_stay,
    step_folders,
)
from megaman.common.signals import StopRequest, after_this_step
from megaman.config.record import decisive
from megaman.config.train import TrainConfig
from megaman.training import checkpoints
from megaman.training.checkpoints import Checkpoint
from megaman.training.encoding import CHUNKS, SIDES
from megaman.training.sampler import ORDER

DECIDED_BY_THE_BASE = ("--snr_gamma",)  # where the user names none
PICTURES = "the pictures"  # whose fingerprint is one of a run's origins


def checkpoint_of(wanted: str | None, run: RunFolder) -> Checkpoint | None:
    """The checkpoint that --resume_from_checkpoint names; None if a run begins anew. UserError (exit 7) if
    there is none.
    """
    if wanted is None:
        return None
    return checkpoints.find_checkpoint(wanted, run.checkpoints)


def tell_of_rounding(checkpoint: Checkpoint, digits: str) -> None:
    """Says if the checkpoint was made where numbers are rounded otherwise. digits: see compute.digits_of."""
    made_with = checkpoint.run.get(
        "digits", f"an earlier version of this program, {checkpoint.threads} threads"
    )
    if made_with != digits:
        say(
            f"note: the checkpoint was made with {made_with}; this run has {digits}: equal up to rounding, "
            "not to the bit"
        )


def _how_to_go_on_with_others(checkpoint: Path, data_dir: str) -> str:
    """The command that trains on with other pictures from what a checkpoint has learned, if its run is there.
    It writes to a new folder, since the checkpoint must stay in its place as long as that run goes on.
    """
    run = RunFolder.of_adapter(checkpoint)
    if not run.record.is_file():
        return ""
    flags = {
        "config": run.record,
        "data_dir": data_dir,
        "init_lora": checkpoint / ADAPTER_FILE,
        "output_dir": run.path.with_name(f"{run.path.name}_more"),
    }
    words = " ".join(f"--{name} {shell_quoted(str(value))}" for name, value in flags.items())
    again = f"{command_of('megaman_lora.py')} {words}"
    return f" To go on with these pictures from what it has learned: {again}"


def _number_in(fingerprint: Any) -> str:
    """How many pictures a data set's fingerprint counts: 6 of "6 with sum 1f…"."""
    return str(fingerprint).split()[0]


def check_resume(checkpoint: Checkpoint | None, cfg: TrainConfig, origins: Mapping[str, Any]) -> None:
    """Checks that a resume, if it is one, uses the settings and data the checkpoint was made with; only its
    total may change. UserError (exit 7) if not.

    origins: fingerprints of what the run is made from; those that are not known yet are left out.
    """
    if checkpoint is None:
        return
    then, now = decisive(checkpoint.settings), decisive(asdict(cfg))
    for name in DECIDED_BY_THE_BASE:
        if now[name] is None:  # it is not loaded yet; the second look sees it
            del then[name], now[name]
    then |= {key: checkpoint.origins.get(key) for key in origins}
    now |= origins
    if then.get(PICTURES) != now.get(PICTURES):  # another order follows from other pictures
        then[ORDER] = now.get(ORDER)
    if checkpoints.changed_entries(then, now) == [PICTURES]:
        numbers = f"{_number_in(then[PICTURES])} pictures then, {_number_in(now[PICTURES])} now"
        raise UserError(
            f"{checkpoint.path}: can't be resumed: pictures, captions, repeats or masks in {cfg.data_dir} "
            f"were changed since ({numbers}). Undo that, or leave --resume_from_checkpoint out."
            + _how_to_go_on_with_others(checkpoint.path.resolve(), cfg.data_dir),
            Exit.STATE,
        )
    if now.get(SIDES) and not then.get(SIDES):
        raise UserError(
            f"{checkpoint.path}: can't be resumed: it was made before --flip exchanged left and right in "
            "captions. Leave --resume_from_checkpoint out."
            + _how_to_go_on_with_others(checkpoint.path.resolve(), cfg.data_dir),
            Exit.STATE,
        )
    if then.get(CHUNKS) != now.get(CHUNKS):
        read, fill = then.get(CHUNKS) or 1, now.get(CHUNKS) or 1
        raise UserError(
            f"{checkpoint.path}: can't be resumed: of captions {CHUNK * read} tokens were read then, and "
            f"{CHUNK * fill} now; give --max_tokens {CHUNK * read}, as it was.",
            Exit.STATE,
        )
    checkpoints.check_same(checkpoint.path, then, now)
    if checkpoint.step > cfg.max_train_steps:
        total = f"--max_train_steps {cfg.max_train_steps} is the total, give more."
        raise UserError(f"{checkpoint.path}: at step {checkpoint.step}; {total}", Exit.STATE)


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
        say(f"what was saved is kept; go on with: {run.resume_command}")


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
    write_record(run, settings)
    return lock


def write_record(run: RunFolder, settings: Mapping[str, Any]) -> None:
    """Writes training_config.json."""
    write_text(run.record, json.dumps(settings, indent=2) + "\n")
