"""The adapters to draw with: those that a comparison asks for, their names, the base that they want."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from megaman.common import console as errors
from megaman.common import files
from megaman.common.console import UserError
from megaman.lora import save as adapters
from megaman.lora.save import Adapter
from megaman.model import stable_diffusion as base_models
from megaman.training import resume as runs


@dataclass(frozen=True)
class Source:
    """An adapter to draw with."""

    name: str  # in the pictures' settings
    adapter: Adapter
    digest: str
    is_chosen: bool  # the one of --lora_path


def sources_of(lora_path: str, fetched: Path, *, with_checkpoints: bool) -> list[Source]:
    """The adapter of --lora_path; before it, if wanted, those of its run's checkpoints, step by step. Equal
    weights are drawn once: the last checkpoint's are mostly the adapter's own.

    fetched: where the adapter lies. UserError (exit 7) if checkpoints are wanted and there are none.
    """
    chosen = adapters.read_adapter(fetched)
    found = {}
    for path in runs.checkpoints_beside(fetched) if with_checkpoints else ():
        adapter = adapters.read_adapter(path)
        found[adapter.digest] = (path.name, adapter)
    found[chosen.digest] = (adapter_name(lora_path), chosen)
    return [
        Source(name, adapter, digest, digest == chosen.digest) for digest, (name, adapter) in found.items()
    ]


def adapter_name(lora_path: str) -> str:
    """The adapter's name in the pictures' settings: the hub id, or the file or folder to copy, never a
    path.
    """
    if lora_path.count("/") == 1 and not base_models.is_local(lora_path):
        return lora_path
    path = Path(lora_path).expanduser().resolve()
    if path.name == adapters.CHECKPOINT_FILE:
        path = path.parent  # step-000250 says more than adapter
    return "megaman_lora" if path.name == "lora_weights" else path.stem if path.suffix else path.name


def base_of(adapter: Adapter, lora_path: Path, wanted: str | None) -> str:
    """The base model to load: the user's choice, else the one the adapter was trained on."""
    if wanted is not None:
        return wanted
    name = adapter.metadata.get("base")
    if not name:
        raise UserError(
            f"{lora_path}: does not say which base model it was trained on; name one with --base_model",
            errors.MODEL,
        )
    if name == base_models.EMBEDDED or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name  # a hub id; a path is never taken from an adapter that somebody else may have made
    path = recorded(lora_path, "pretrained_model_name")
    if path is not None and Path(path).expanduser().resolve().name == name:
        return path
    raise UserError(
        f"{lora_path}: was trained on the local base model {name!r}, which is not where it was; name it "
        "with --base_model",
        errors.MODEL,
    )


def recorded(lora_path: Path, setting: str) -> str | None:
    """The path that the record of the adapter's run names for a setting, if it is still there; None for an
    adapter that lies in no run of ours.
    """
    for folder in lora_path.resolve().parents[:3]:
        if files.holds_run(folder):
            path = json.loads((folder / files.RECORD).read_text(encoding="utf-8"))[setting]
            return path if isinstance(path, str) and Path(path).expanduser().exists() else None
    return None
