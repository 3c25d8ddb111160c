"""Output folders: what lies in a run's, who may write there, and one process at a time."""

import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaman.common.console import Exit, UserError, command_of, shell_quoted
from megaman.common.files import courtesy, is_within, make_folder
from megaman.common.html import check_page, is_page

LOCK = ".lock"  # holds our mark and the number of the process that works in the folder
MARK = "megaman"
SIGNATURE_LETTERS = 64  # read of a lock: a number is shorter
RECORD = "training_config.json"  # the settings of the run in the folder
RECORDED = frozenset({"pretrained_model_name", "data_dir", "lora_rank", "lora_alpha"})  # in every record
PAGE = "dataset.html"
GALLERY_PAGE = RUN_PAGE = "index.html"
CAPTIONS = "captions"
WEIGHTS = "lora_weights"
CHECKPOINTS = "checkpoints"
ADAPTER_FILE = "adapter.safetensors"  # of a checkpoint
LEFT_BY_DRY_RUN = frozenset({PAGE, CAPTIONS, LOCK})  # a run goes on beside it
OF_A_RUN = re.compile(
    rf"({WEIGHTS}|{CHECKPOINTS})(\.\d{{3,}})?|samples|logs|dry_run|{CAPTIONS}|(dataset|index)\.html|metrics\.jsonl|"
    + re.escape(RECORD)
)  # what lies in a run's folder
STEP_FOLDER = re.compile(r"step-(\d+)")
CONTENT = "content"  # among what metrics.jsonl tells of the pictures: by it they are known again
LAST_STEP = 10**9  # nobody trains for longer; a larger number in a file is damage
PROBE_BYTES = 1 << 20  # a disk without room for so much is full


@dataclass(frozen=True)
class RunFolder:
    """What lies where in the output folder of a training run."""

    path: Path

    @classmethod
    def of_adapter(cls, adapter: Path) -> "RunFolder":
        """The run that an adapter's file or folder belongs to: in lora_weights/, or in a checkpoint."""
        path = adapter.resolve()
        folder = path if path.is_dir() else path.parent
        return cls(folder.parents[1] if folder.parent.name == CHECKPOINTS else folder.parent)

    @property
    def record(self) -> Path:
        """The run's settings."""
        return self.path / RECORD

    @property
    def weights(self) -> Path:
        """The folder of the finished adapter's files."""
        return self.path / WEIGHTS

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints' folders."""
        return self.path / CHECKPOINTS

    @property
    def samples(self) -> Path:
        """The folder of the sample pictures."""
        return self.path / "samples"

    @property
    def metrics(self) -> Path:
        """Loss, rate and speed, a JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def page(self) -> Path:
        """Curves, samples and settings, and what to type next."""
        return self.path / RUN_PAGE

    @property
    def logs(self) -> Path:
        """TensorBoard's folder, unless the user names another."""
        return self.path / "logs"

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run, where it stopped."""
        record = shell_quoted(str(self.record))
        return f"{command_of('megaman_lora.py')} --config {record} --resume_from_checkpoint latest"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / step_name(step)


def step_name(step: int) -> str:
    """The name of a step's folder: step-000250."""
    return f"step-{step:06}"


def step_folders(folder: Path) -> dict[int, Path]:
    """The folders step-000250, … below a folder (of checkpoints or samples), by step number, ascending."""
    found = ((STEP_FOLDER.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that tell something of a step; not the half one that a killed run left."""
    rows = []
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] <= LAST_STEP:
            rows.append(row)
    return rows


def holds_files(folder: Path) -> bool:
    """Whether anything lies there but what a dry run leaves."""
    return folder.is_dir() and any(path.name not in LEFT_BY_DRY_RUN for path in folder.iterdir())


def is_signed(folder: Path) -> bool:
    """Whether a process of ours has worked in the folder: it left our mark in the lock."""
    try:
        return (folder / LOCK).read_text(encoding="ascii").startswith(MARK)
    except (OSError, ValueError):
        return False


def holds_pages(folder: Path) -> bool:
    """Whether a page of ours lies in the folder."""
    return is_page(folder / PAGE) or is_page(folder / GALLERY_PAGE)


def holds_run(folder: Path) -> bool:
    """Whether a run of ours lies in the folder: its record says so, not that record's name alone."""
    return recorded_settings(RunFolder(folder)).keys() >= RECORDED


def recorded_settings(run: RunFolder) -> dict[str, Any]:
    """What the record of a run says; nothing where there is none, or a damaged one."""
    try:
        record = json.loads(run.record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def adapter_in(path: Path) -> Path:
    """What is meant by the path of an adapter: of a run's folder, the adapter that the run made."""
    return RunFolder(path).weights if holds_run(path) else path


def check_output(folder: Path, data_dir: Path) -> None:
    """Checks, without creating anything, that a run may start in `folder`: it holds nothing, or an earlier
    run, which will be moved aside. UserError if not.
    """
    if data_dir.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: holds the pictures ({data_dir}). Name another --output_dir.", Exit.USAGE)
    if holds_files(folder) and not holds_run(folder):
        raise UserError(
            f"{folder}: holds files that no run of ours made. Name another --output_dir.", Exit.STATE
        )
    check_page(folder / PAGE)
    check_page(RunFolder(folder).page)
    check_unused(folder)
    check_writable(folder)


def check_unused(folder: Path) -> None:
    """Checks, without creating anything, that no other process works in `folder`. UserError (exit 7) if one
    does.
    """
    if (folder / LOCK).exists():
        OutputLock(folder).close()


def check_apart(flag: str, folder: str | None, data_dir: str | None) -> None:
    """Checks that the folder of a flag lies outside the user's pictures. UserError (exit 2) if not."""
    if folder is not None and data_dir is not None and is_within(folder, data_dir):
        reason = f"--{flag} {folder}: lies in the folder that holds the pictures, which is never written to"
        raise UserError(f"{reason}. Name another.", Exit.USAGE)


def check_writable(folder: Path) -> None:
    """Checks, without creating anything, that `folder` can be made and written to. Else exit 6."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"\0" * PROBE_BYTES)
    except OSError as error:
        reason = (
            f"{folder}: can't write there ({error.strerror}). Free some space, or name another --output_dir."
        )
        raise UserError(reason, Exit.RESOURCES) from error


def free_name(path: Path) -> Path:
    """The first of NAME.001, NAME.002, … that is not there."""
    number = 1
    while (free := path.with_name(f"{path.name}.{number:03}")).exists():
        number += 1
    return free


def is_link(folder: Path) -> bool:
    """Whether the path itself, not a folder above it, leads elsewhere: a symbolic link, Windows' junction."""
    parent, name = os.path.split(os.path.abspath(folder))
    itself = os.path.join(os.path.realpath(parent), name)
    return os.path.normcase(os.path.realpath(folder)) != os.path.normcase(itself)


def must_stay(folder: Path) -> bool:
    """Whether the folder itself is not to be renamed: a link leads to it, or this process stands in it."""
    return is_link(folder) or Path(os.path.realpath(os.curdir)).is_relative_to(os.path.realpath(folder))


def move_aside(folder: Path) -> Path | None:
    """Renames a folder that holds anything to the first free NAME.001, NAME.002, …; None if it holds nothing.
    A folder that must stay (see `must_stay`) does: only the run in it moves, to a folder beside it.
    """
    real = Path(os.path.realpath(folder))
    if not holds_files(real):
        return None
    if not holds_run(real):  # asked again: it may have been filled since the run was prepared
        raise UserError(
            f"{folder}: holds files that no run of ours made. Name another --output_dir.", Exit.STATE
        )
    aside = free_name(real)
    try:
        if must_stay(folder):
            _move_run(real, aside)
        else:
            real.rename(aside)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be moved aside ({error.strerror}). Name another --output_dir.", Exit.STATE
        ) from error
    (aside / LOCK).unlink(missing_ok=True)
    return aside


def _move_run(folder: Path, aside: Path) -> None:
    aside.mkdir()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RECORD):  # it goes last: until then
        if OF_A_RUN.fullmatch(path.name):  # the folder is known for a run's, if this is interrupted
            path.rename(aside / path.name)


class OutputLock:
    """The right to write in a folder: one process has it until it ends, however it ends.

    The system keeps the lock, not the file, so what a killed process leaves behind locks nobody out.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder. UserError (exit 7) with the other's number if it is in use."""
        make_folder(folder)
        self.path = folder / LOCK
        if self.path.is_symlink():  # writing would change a file elsewhere
            raise UserError(f"{self.path}: is a link, and ours never is. Remove it.", Exit.STATE)
        self.file = self.path.open("a+", encoding="ascii", errors="replace")
        is_free = _locked(self.file.fileno())
        self.file.seek(0)
        signature = self.file.read(SIGNATURE_LETTERS).strip()
        is_of_before = signature.isdigit() and (holds_run(folder) or holds_pages(folder))  # without our mark
        if is_free and (is_of_before or re.fullmatch(rf"({MARK} [0-9]+)?", signature)):
            return
        self.file.close()
        if is_free:
            raise UserError(f"{self.path}: is no lock of ours. Name another --output_dir.", Exit.STATE)
        number = signature.removeprefix(MARK).strip()
        raise UserError(
            f"{folder}: in use by process {number}. Wait for it, or name another --output_dir.", Exit.STATE
        )

    def sign(self) -> "OutputLock":
        """Leaves our mark there, and this process's number for those who are refused."""
        self.file.truncate(0)
        self.file.write(f"{MARK} {os.getpid()}")
        self.file.flush()
        return self

    def close(self) -> None:
        """Lets others in. The file stays: deleting it could delete the next one's. Safe to call twice."""
        self.file.close()


def claim(folder: Path, *, fresh: bool) -> tuple[OutputLock, Path | None]:
    """Locks an output folder. If `fresh`, an earlier run in it is moved aside first; its new place is
    returned too.
    """
    lock = OutputLock(folder).sign()
    if not fresh or not holds_files(folder):
        return lock, None
    if must_stay(folder):
        return lock, move_aside(folder)  # the folder stays, and its lock with it
    if os.name == "nt":  # Windows moves no folder with an open file in it
        lock.close()
    aside = move_aside(folder)
    try:
        return OutputLock(folder).sign(), aside
    finally:
        lock.close()


def _locked(handle: int) -> bool:
    """Whether this process now has the lock; the system gives it back when the process ends. Where the file
    system has no locks, everybody has it.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, PROBE_BYTES, os.SEEK_SET)  # beyond the number, which others may read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            with courtesy("locks", "two runs at once in one folder would not notice each other"):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
