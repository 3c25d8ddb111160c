"""Checkpoints: a folder each, complete or absent. Knows fsync, manifests and rotation."""

import json
import os
import shutil
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from megaman.adapters import CHECKPOINT_FILE, Adapter, peft_tensors, write_kohya
from megaman.files import save_tensors, sha256_of

MANIFEST = "manifest.json"
ADAPTER, STATE = CHECKPOINT_FILE, "state.safetensors"


def save_checkpoint(folder: Path, step: int, adapter: Adapter, optimizer: Optimizer, *, keep: int) -> Path:
    """Writes `folder`/step-000250 through a temporary folder; all but the newest `keep` then drop their
    state.

    adapter.safetensors is small, in kohya's layout, and stays for good; state.safetensors holds the float32
    weights and the optimizer's moments; the manifest names the step and the sums.
    """
    final, partial = folder / f"step-{step:06}", folder / f".step-{step:06}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_kohya(adapter, partial / ADAPTER)
    save_tensors(peft_tensors(adapter) | optimizer_tensors(optimizer), partial / STATE, {"format": "pt"})
    sums = {name: sha256_of(partial / name) for name in (ADAPTER, STATE)}
    manifest = {"step": step, "sha256": sums, "about": adapter.metadata}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    _prune(folder, keep)
    return final


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments, named by the parameter's place: `exp_avg.12`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{name}.{i}": value.detach().cpu().contiguous()
        for i, parameter in enumerate(parameters)
        for name, value in sorted(optimizer.state.get(parameter, {}).items())
    }  # fmt: skip


def _prune(folder: Path, keep: int) -> None:
    """Adapters stay; only what is large and superseded goes."""
    for old in sorted(folder.glob("step-*"))[:-keep]:
        (old / STATE).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows has no fsync of a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
