"""Checkpoints: a folder each, complete or absent, and whole or refused. Knows fsync, manifests and rotation.

step-000250/
    adapter.safetensors   the adapter in kohya's layout, float16: small, draws like any other, stays for good
    state.safetensors     trained parameters and the optimizer's moments, float32: what an exact resume needs
    manifest.json         step, settings, fingerprints, run state, and the sha256 of each file and of itself
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from megaman.common.console import Exit, UserError, listed, say
from megaman.common.files import save_tensors, sha256_of, sync
from megaman.common.kinds import UNET
from megaman.common.output_folder import (
    ADAPTER_FILE,
    CHECKPOINTS,
    RECORD,
    free_name,
    step_folders,
    step_name,
)
from megaman.lora.adapter import Adapter
from megaman.lora.save import write_kohya

FORMAT = 2  # raised when older checkpoints can no longer be resumed
LEFTOVER = re.compile(r"\.step-\d{6,}\.(partial|replaced)")
MANIFEST, STATE_FILE = "manifest.json", "state.safetensors"
PLAIN_NUMBER_DTYPES = (
    torch.int64,
    torch.float64,
)  # no optimizer has moments of these: they stand for plain numbers
_NAMES = "|".join(map(re.escape, (MANIFEST, ADAPTER_FILE, STATE_FILE)))
OWN_FILE = re.compile(rf"{_NAMES}|\.({_NAMES})\.\w+\.partial")  # the last: half written when it was killed
OWN_SUM = "sha256_of_this"  # of the manifest's other entries


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content: what the next step needs beyond the seed and the step number."""

    step: int  # optimizer steps done
    settings: Mapping[str, Any]  # those that decide the result
    origins: Mapping[str, Any]  # fingerprints of what was given: pictures and captions, base
    run: Mapping[str, Any]  # what the run has found out: the batch that fits, the scaler's factor
    threads: int  # another count adds up in another order: equal to rounding, not to the bit
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # names of the live objects, float32
    path: Path = Path()  # where it was read from


class Damaged(Exception):
    """Why a checkpoint is of no use, in the user's words."""


# ---------------------------------------------------------------- live objects and tensors


Parameters = Mapping[str, nn.Parameter]  # those that are trained


def trained(parts: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of a base's parts that are trained, by name: the UNet's as it calls them, others' with
    their part before.
    """
    return {
        name if part == UNET else f"{part}.{name}": parameter
        for part, model in parts.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def is_of_text(name: str) -> bool:
    """Whether a parameter of `trained` belongs to a text encoder."""
    return name.startswith("text_encoder")


def _group_key(number: int) -> str:
    """What the tensors of an optimizer's group are called: the first one's had always been alone."""
    return f"group{number or ''}."


def tensors_of(parameters: Parameters, optimizer: Optimizer) -> dict[str, Tensor]:
    """`parameter.<name>` and the optimizer's moments, such as `exp_avg.<name>`, on the CPU; what it has found
    out for all of a group, such as Prodigy's rate, is `group.<key>`, `group1.<key>`.
    """
    found: dict[str, Any] = {}
    for number, group in enumerate(optimizer.param_groups):
        usual = optimizer.defaults | {"lr": group["lr"]}  # the rate is a function of the step
        found |= {
            f"{_group_key(number)}{key}": value
            for key, value in group.items()
            if isinstance(value, int | float) and value != usual.get(key)
        }
    for name, parameter in parameters.items():
        found[f"parameter.{name}"] = parameter
        found |= {f"{moment}.{name}": value for moment, value in optimizer.state[parameter].items()}
    return {key: _kept(value) for key, value in found.items()}


def _kept(value: Tensor | float) -> Tensor:
    """A copy on the CPU, since optimizers may share a table; a plain number as one of PLAIN_NUMBER_DTYPES."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return torch.tensor([value], dtype=torch.int64 if isinstance(value, int) else torch.float64)


@torch.no_grad()
def restore(parameters: Parameters, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts a checkpoint's tensors back into parameters and optimizer. UserError (exit 7) unless each fits."""
    left = dict(tensors)
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for number, group in enumerate(optimizer.param_groups):
        start = _group_key(number)
        for key in [key for key in left if key.startswith(start)]:
            group[key.removeprefix(start)] = left.pop(key).item()
    for name, parameter in parameters.items():
        value = left.pop(f"parameter.{name}", None)
        if value is None or value.shape != parameter.shape:
            reason = f"the checkpoint does not fit this adapter: {name} is missing or of another shape"
            raise UserError(reason, Exit.STATE)
        parameter.copy_(value)
        moments = [key for key in left if key.partition(".")[2] == name]
        optimizer.state[parameter] = {
            key.partition(".")[0]: _placed(left.pop(key), parameter, is_fused) for key in moments
        }
    if left:
        raise UserError(f"the checkpoint does not fit this adapter: nothing is named {next(iter(left))}",
                        Exit.STATE)  # fmt: skip


def _placed(moment: Tensor, parameter: Tensor, is_fused: bool) -> Tensor | float:
    """Where a moment belongs: Adam's step count stays a CPU tensor, unless one kernel does all of a step;
    plain numbers stay numbers, all else goes to the parameter's device.
    """
    if moment.dtype in PLAIN_NUMBER_DTYPES:
        return moment.item()
    return moment if moment.ndim == 0 and not is_fused else moment.to(parameter.device)


# ---------------------------------------------------------------- writing


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, adapter: Adapter, *, keep: int, best: int | None = None
) -> Path:
    """Writes `folder`/step-000250 through a temporary folder; all but the newest `keep` and the one at step
    `best` then drop their state.
    """
    final = folder / step_name(checkpoint.step)
    partial, replaced = (folder / f".{final.name}.{word}" for word in ("partial", "replaced"))
    for leftover in folder.glob(".step-*"):  # of a run that was killed here
        if LEFTOVER.fullmatch(leftover.name):
            _remove(leftover)
    partial.mkdir(parents=True)
    write_kohya(adapter, partial / ADAPTER_FILE)
    save_tensors(checkpoint.tensors, partial / STATE_FILE, {"format": "pt"})
    manifest = {key: getattr(checkpoint, key) for key in ("step", "settings", "origins", "run", "threads")}
    sums = {name: sha256_of(partial / name) for name in (ADAPTER_FILE, STATE_FILE)}
    (partial / MANIFEST).write_text(_signed({"format": FORMAT, **manifest, "sha256": sums}), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    _sync(folder)
    _remove(replaced)
    _prune(folder, keep, best)
    return final


def _signed(manifest: Mapping[str, Any]) -> str:
    """A manifest's text, with a sum of its own: the only spelling that is accepted."""
    text = json.dumps({key: manifest[key] for key in manifest if key != OWN_SUM}, sort_keys=True)
    signed = json.loads(text) | {OWN_SUM: hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(signed, indent=2, sort_keys=True) + "\n"


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint's own files, and the folder if nothing else lies there."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return
    with contextlib.suppress(OSError):
        for path in checkpoint.iterdir():
            if OWN_FILE.fullmatch(path.name):
                path.unlink()
        checkpoint.rmdir()


def _prune(folder: Path, keep: int, best: int | None) -> None:
    """Adapters stay; only what is large and superseded goes."""
    for step, old in [*step_folders(folder).items()][:-keep]:
        if step != best and _is_ours(old):
            (old / STATE_FILE).unlink(missing_ok=True)


def _is_ours(checkpoint: Path) -> bool:
    """Whether a manifest that we signed speaks of the state in the folder."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        return text == _signed(manifest) and STATE_FILE in manifest["sha256"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows has no fsync of a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        sync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- reading


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    """Inside the block whatever is wrong with a checkpoint's files is Damaged, with the reason."""
    try:
        yield
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename or MANIFEST).name} is not there") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise Damaged(f"{MANIFEST} is damaged or can't be read") from error


def read_manifest(folder: Path, files: Collection[str] | None = None) -> dict[str, Any]:
    """A checkpoint's manifest, every byte of its files verified, or of just these. Damaged, with the reason,
    if one is not whole.
    """
    with _damage_named():
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        if text != _signed(manifest):
            raise Damaged(f"{MANIFEST} is damaged")
        if manifest["format"] != FORMAT:
            raise Damaged(f"{MANIFEST} is of format {manifest['format']}, this program reads {FORMAT}")
        sums = manifest["sha256"]
        for name, digest in sums.items() if files is None else [(name, sums[name]) for name in files]:
            if not (folder / name).is_file():
                raise Damaged(
                    f"{name} is not there" + (" (older checkpoints keep none)" if name == STATE_FILE else "")
                )
            if sha256_of(folder / name) != digest:
                raise Damaged(f"{name} is damaged")
        return manifest


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, every byte of it verified. Damaged, with the reason, if it is not whole."""
    manifest = read_manifest(folder)
    with _damage_named():
        known = {key: manifest[key] for key in ("step", "settings", "origins", "run", "threads")}
        return Checkpoint(**known, tensors=load_file(folder / STATE_FILE), path=folder)


def latest_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint below `folder` that is whole; says which newer ones are not. UserError (exit 7)
    if there is none.
    """
    for path in reversed(step_folders(folder).values()):
        try:
            return read_checkpoint(path)
        except Damaged as error:
            say(f"warning: {path} can't be resumed: {error}; an older checkpoint is looked for")
    raise UserError(f"{folder}: no checkpoint that can be resumed. {_where_now(folder.parent)}", Exit.STATE)


def _where_now(output: Path) -> str:
    """What to do where a run's folder has not the checkpoint that is meant."""
    output = output.absolute()
    beside = [path for path in sorted(output.parent.glob("*")) if step_folders(path / CHECKPOINTS)]
    others = listed(path.name for path in beside if path != output)
    return (
        "If the run was moved or renamed, name the folder where it lies now with --output_dir, or its "
        f"{RECORD} with --config{f' (beside this one: {others})' if others else ''}. To begin anew, leave "
        "--resume_from_checkpoint out."
    )


def find_checkpoint(wanted: str, folder: Path) -> Checkpoint:
    """The checkpoint that --resume_from_checkpoint names: `latest` in `folder`, or a path; of a run's folder,
    and of its folder of checkpoints, the newest. UserError (exit 7) if it is not whole.
    """
    if wanted == "latest":
        return latest_checkpoint(folder)
    path = Path(wanted).expanduser()
    for place in (path, path / CHECKPOINTS):
        if step_folders(place):
            return latest_checkpoint(place)
    if not path.is_dir():
        output = path.parents[1] if path.absolute().parent.name == CHECKPOINTS else path
        raise UserError(f"{path}: no such checkpoint folder. {_where_now(output)}", Exit.STATE)
    try:
        return read_checkpoint(path)
    except Damaged as error:
        raise UserError(f"{path}: {error}. Name another checkpoint, or latest.", Exit.STATE) from error


def changed_entries(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The entries in which a resume differs from its checkpoint."""
    then, now = (json.loads(json.dumps(dict(entries))) for entries in (then, now))  # tuples become lists
    return [key for key in {**then, **now} if then.get(key) != now.get(key)]


def check_same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UserError (exit 7) that names every entry in which a resume differs from its checkpoint."""
    if changed := changed_entries(then, now):
        words = "; ".join(f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise UserError(
            f"{path}: can't be resumed with other settings: {words}. Give the same, such as by --config "
            f"with the run's {RECORD}, or leave --resume_from_checkpoint out.",
            Exit.STATE,
        )


def set_aside_later(folder: Path, step: int) -> Path | None:
    """Moves checkpoints beyond `step` to a folder of their own, for the run goes another way from here."""
    later = [path for number, path in step_folders(folder).items() if number > step]
    if not later:
        return None
    aside = free_name(Path(os.path.realpath(folder)))  # a link's target may lie on another disk
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    return aside
