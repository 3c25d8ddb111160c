"""A run's lora_weights/: as its end writes it, and as a checkpoint that is adopted does (--adopt), as if the
run had ended there. What somebody has chosen is never lost.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megaman.common.console import Exit, UserError, command_of, listed, say, shell_quoted
from megaman.common.files import sha256_of
from megaman.common.kinds import PARTS, UNET
from megaman.common.output_folder import (
    ADAPTER_FILE,
    LAST_STEP,
    RECORD,
    STEP_FOLDER,
    WEIGHTS,
    OutputLock,
    RunFolder,
    check_writable,
    free_name,
    holds_run,
    step_folders,
    step_name,
)
from megaman.config.train import DataFlags, TrainConfig
from megaman.lora.adapter import STRENGTH, Adapter, Key, LoraLayer, underscored
from megaman.lora.load import DIFFUSERS_FILE, KOHYA_FILE, OURS, PEFT_FILE, read_file
from megaman.lora.metadata import PICTURE, facts_in
from megaman.lora.names import canonical
from megaman.lora.save import FLOAT16, check_written, deltas_in, write_adapter
from megaman.training.checkpoints import STATE_FILE, Damaged, read_checkpoint, read_manifest
from megaman.training.optim import EMA_PREFIX
from megaman.training.run_page import renew_page

PARTIAL = f".{WEIGHTS}.partial"  # a folder of this name in a run's holds what is not finished
ASIDE = re.compile(rf"{WEIGHTS}\.\d{{3,}}")
OWN_FILE = re.compile(
    r"adapter_(model\.safetensors|config\.json)|pytorch_lora_weights\.safetensors|README\.md|"
    r"megaman_lora\.(safetensors|json|preview\.png)|\..+\.[0-9a-f]{8}\.partial"
)  # what writing an adapter leaves, whole or half
_TRAINED = re.compile(
    r"(?:parameter|average)\.(?:(text_encoder(?:_2)?)\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)"
    r"\.default\.weight"
)  # a state's tensor: its part, module and half


# ---------------------------------------------------------------- what is meant


@dataclass(frozen=True)
class Choice:
    """A checkpoint of a run, and the strength to draw with, if one is chosen."""

    run: RunFolder
    step: int
    strength: float | None

    @property
    def folder(self) -> Path:
        """The checkpoint's."""
        return self.run.checkpoint(self.step)


def choice_of(wanted: str, output: Path) -> Choice:
    """What --adopt names: step-000900, 900, latest, or a checkpoint's folder, which then says the run; and
    behind a colon the strength. UserError if there is no such thing.
    """
    name, colon, behind = wanted.rpartition(":")
    is_whole = not colon or "/" in behind or "\\" in behind or Path(wanted).is_dir()  # C:\run\…
    name, strength = (wanted, None) if is_whole else (name, _strength_of(behind, wanted))
    name = name.rstrip("/\\")
    path = Path(name)
    is_path = path.name != name
    digits = STEP_FOLDER.fullmatch(path.name) or re.fullmatch(r"(\d+)", path.name)
    run = _run_in(_run_of(path, output) if is_path else output)
    found = step_folders(run.checkpoints).items()
    steps = [step for step, folder in found if (folder / ADAPTER_FILE).is_file()]
    wanted_steps = steps[-1:] if name == "latest" else [int(digits[1])] if digits else []
    for step in wanted_steps:
        if step in steps:
            return Choice(run, step, strength)
    there = f"there are {listed(map(step_name, steps))}" if steps else "the run has none"
    raise UserError(f"{run.checkpoints}: no checkpoint {path.name!r}; {there}.", Exit.STATE)


def _run_of(checkpoint: Path, output: Path) -> Path:
    """The folder of a checkpoint's run. UserError (exit 2) if the user names another one."""
    folder = RunFolder.of_adapter(checkpoint).path
    is_named = output != Path(DataFlags.output_dir)
    if is_named and folder != output.resolve():
        raise UserError(f"--output_dir {output}: {checkpoint} belongs to the run in {folder}", Exit.USAGE)
    return folder


def _strength_of(text: str, wanted: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not 0 < strength < math.inf:
        raise UserError(
            f"--adopt {wanted}: {text!r} must be a strength, a number above 0, such as 0.8", Exit.USAGE
        )
    return strength


def _run_in(output: Path) -> RunFolder:
    if not holds_run(output):
        none = f"holds no run of ours ({RECORD}). Name the run's folder with --output_dir."
        raise UserError(f"{output}: {none}", Exit.STATE)
    return RunFolder(output)


# ---------------------------------------------------------------- its adapter


def adapter_at(choice: Choice) -> Adapter:
    """The checkpoint's adapter, with what its file tells of it: as exact as the checkpoint still has it, in
    float32 where its state is kept. UserError (exit 7) if it is damaged.
    """
    file = choice.folder / ADAPTER_FILE
    try:
        read_manifest(choice.folder, [ADAPTER_FILE])
    except Damaged as error:
        raise UserError(f"{choice.folder}: {error}. Adopt another checkpoint.", Exit.STATE) from error
    adapter = read_file(file, file)
    with safe_open(file, framework="pt") as opened:
        told = facts_in(opened.metadata())
    in_order = sorted(adapter.layers, key=lambda key: PARTS.index(key[0]))  # as it is trained
    layers = {key: adapter.layers[key] for key in in_order}
    adapter = replace(adapter, layers=layers, metadata={**adapter.metadata, **told})
    if (choice.folder / STATE_FILE).is_file():
        try:
            adapter = _exact(adapter, read_checkpoint(choice.folder).tensors)
        except Damaged as error:
            say(f"note: {choice.folder}: {error}; its small adapter, in half precision, is taken instead")
        check_written(file, file, deltas_in(adapter), FLOAT16)
    return adapter


def _exact(adapter: Adapter, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter with its numbers from a checkpoint's state: the moving average, where one was kept."""
    found: dict[Key, dict[str, Tensor]] = {}
    for name in sorted(tensors, key=lambda name: name.startswith(EMA_PREFIX)):  # the average comes last
        match = _TRAINED.fullmatch(name)
        if match is not None:
            key = (match[1] or UNET, underscored(canonical(match[1] or UNET, match[2])))
            found.setdefault(key, {})[match[3]] = tensors[name]
    layers = {
        (part, name): _with_numbers(layer, found.get((part, underscored(name)), {}))
        for (part, name), layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def _with_numbers(layer: LoraLayer, numbers: Mapping[str, Tensor]) -> LoraLayer:
    """The layer with what was trained of it."""
    magnitude = numbers.get("lora_magnitude_vector")
    if magnitude is not None and layer.magnitude is not None:
        magnitude = magnitude.reshape(layer.magnitude.shape)
    return replace(
        layer,
        down=numbers.get("lora_A", layer.down),
        up=numbers.get("lora_B", layer.up),
        magnitude=layer.magnitude if magnitude is None else magnitude,
    )


# ---------------------------------------------------------------- into place


def adopt(cfg: TrainConfig) -> None:
    """The command: writes the chosen checkpoint's lora_weights/, keeps the earlier one, says what is next."""
    choice = choice_of(cfg.adopt or "", Path(cfg.output_dir))
    run = choice.run
    check_writable(run.path)
    with closing(OutputLock(run.path).sign()):
        adapter = adapter_at(choice)
        if choice.strength is not None:
            adapter = replace(adapter, metadata={**adapter.metadata, STRENGTH: choice.strength})
        preview = run.samples / step_name(choice.step) / "01.png"
        _replace(run, adapter, preview=preview if preview.is_file() else None)
    renew_page(run)
    drawn = "" if choice.strength is None else f", to be drawn at strength {choice.strength:g}"
    say(f"adopted: {run.weights} is the adapter of step {choice.step} now{drawn}")
    say(f"for A1111, Forge, ComfyUI, kohya: {run.weights / KOHYA_FILE}")
    usual = run.path == Path(DataFlags.output_dir)
    flag = "" if usual else f" --lora_path {shell_quoted(str(run.weights))}"
    say(f"next: {command_of('generate_megaman.py')}{flag}")


def write_at_the_end(
    run: RunFolder, adapter: Adapter, start: int, *, live: Mapping[str, nn.Module], preview: Path | None
) -> None:
    """Writes lora_weights/ of a run that ends: over what its own earlier end has left there. Anything else,
    such as an adapter that was adopted since, is kept beside it, which is said.

    start: the step that the command went on from. live, preview: as `write_adapter` has them.
    """
    if _is_of_an_end(run, start):
        write_adapter(adapter, run.weights, live=live, preview=preview)
    else:
        _replace(run, adapter, live=live, preview=preview)


def _is_of_an_end(run: RunFolder, start: int) -> bool:
    """Whether what lies in lora_weights/, if anything, was written by the run itself at its last end: its
    files are of the total they were trained for, nobody chose a strength, and no later checkpoint until
    `start` is an end.
    """
    if not run.weights.is_dir():
        return not os.path.lexists(run.weights)
    files = [run.weights / name for name in (PEFT_FILE, KOHYA_FILE, DIFFUSERS_FILE)]
    ends = [_end_told(_told_by(file)) for file in files if os.path.lexists(file)]
    sidecar = run.weights / PICTURE["sidecar"]
    if None in ends or (os.path.lexists(sidecar) and _strength_beside(sidecar) != 1):
        return False
    last = max((end for end in ends if end is not None), default=LAST_STEP)
    return not any(last < step <= start and _is_end(run, step) for step in step_folders(run.checkpoints))


def _told_by(file: Path) -> dict[str, Any]:
    """What our metadata in an adapter's file tells; nothing of a damaged one, or of another tool's."""
    try:
        with safe_open(file, framework="pt") as opened:
            known = json.loads((opened.metadata() or {}).get(OURS, "{}"))
    except (OSError, ValueError, RecursionError, SafetensorError):
        return {}
    return known if isinstance(known, dict) else {}


def _end_told(known: Mapping[str, Any]) -> int | None:
    """The step of an adapter that a run wrote at its end; None of any other."""
    config, steps = known.get("config"), known.get("steps")
    total = config.get("max_train_steps") if isinstance(config, dict) else None
    return steps if isinstance(steps, int) and steps == total and STRENGTH not in known else None


def _strength_beside(sidecar: Path) -> object:
    """The strength in a sidecar, which web UIs let their user edit; None where it can't be read."""
    try:
        known = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return known.get("preferred weight") if isinstance(known, dict) else None


def _is_end(run: RunFolder, step: int) -> bool:
    """Whether the run ended at a checkpoint of its."""
    try:
        return bool(read_manifest(run.checkpoint(step), [])["settings"]["max_train_steps"] == step)
    except (Damaged, KeyError, TypeError):
        return False


def _replace(
    run: RunFolder,
    adapter: Adapter,
    *,
    live: Mapping[str, nn.Module] | None = None,
    preview: Path | None,
) -> None:
    """Writes an adapter aside, and puts it in lora_weights/'s place once it is whole; says where the earlier
    one is kept.
    """
    partial = run.path / PARTIAL
    _clear(partial)
    write_adapter(adapter, partial, live=live, preview=preview)
    aside = _put_in_place(partial, run.weights)
    if aside is not None:
        say(f"output: the earlier {WEIGHTS} is kept as {aside}")


def _put_in_place(partial: Path, weights: Path) -> Path | None:
    """Gives a finished folder its name, and the earlier one a free one, which is returned; None if there was
    none, or if nothing of it would be lost: the same files lie in the new one, or in one that is kept.
    """
    if not os.path.lexists(weights):
        partial.rename(weights)
        return None
    beside = [path for path in weights.parent.iterdir() if ASIDE.fullmatch(path.name) and path.is_dir()]
    aside = free_name(weights)
    weights.rename(aside)
    try:
        partial.rename(weights)
    except BaseException:  # an impatient Ctrl-C too
        aside.rename(weights)
        raise
    sums = _sums(aside)
    is_ours = all(OWN_FILE.fullmatch(Path(name).name) for name in sums) and not aside.is_symlink()
    if is_ours and sums in [_sums(other) for other in (weights, *beside)]:
        _clear(aside)
    return aside if os.path.lexists(aside) else None


def _sums(folder: Path) -> dict[str, str]:
    """The sha256 of every file, by its place in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _clear(folder: Path) -> None:
    """Removes the files of an adapter of ours, by their names, and the folder, if nothing else lies there.
    Of a link, nothing.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for part in PARTS[1:]:
        _clear(folder / part)
    for path in folder.iterdir():
        if OWN_FILE.fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # something else lies there, and stays
        folder.rmdir()
