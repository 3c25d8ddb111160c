"""The adapters to draw with: those that a comparison asks for, their names, the base that they want."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megaman.common.console import Exit, UserError, say
from megaman.common.files import autov3, path_from
from megaman.common.output_folder import (
    ADAPTER_FILE,
    CHECKPOINTS,
    WEIGHTS,
    RunFolder,
    holds_run,
    step_folders,
)
from megaman.config.train import EMBEDDED, PredictionType
from megaman.lora.adapter import Adapter
from megaman.lora.load import KOHYA_FILE, PEFT_FILE, read_adapter
from megaman.lora.metadata import NAME
from megaman.model.hub import hub_id_of, is_local


@dataclass(frozen=True)
class Candidate:
    """An adapter to draw with."""

    name: str  # in the pictures' settings
    adapter: Adapter
    digest: str
    is_chosen: bool  # the one of --lora_path
    place: Path  # its folder or file on this disk
    lora_file: str  # as web UIs name it, "" where they can read none
    lora_hash: str  # and their hash of it

    def facts(self, output: Path) -> dict[str, str]:
        """What the record of a picture in `output` says of the adapter that drew it."""
        return {
            "adapter": self.name,
            "adapter_hash": self.digest,
            "lora_file": self.lora_file,
            "lora_hash": self.lora_hash,
            "adapter_path": "" if self.name.count("/") else path_from(output, self.place),
        }


def candidates_of(lora_path: str, fetched: Path, *, with_checkpoints: bool) -> list[Candidate]:
    """The adapter of --lora_path; before it, if wanted, those of its run's checkpoints, step by step.
    Adapters with equal weights count once; the last checkpoint usually equals the final adapter.

    fetched: where the adapter lies. UserError (exit 7) if checkpoints are wanted and there are none.
    """
    chosen = read_adapter(fetched)
    found = {}
    for path in checkpoints_beside(fetched) if with_checkpoints else ():
        adapter = read_adapter(path)
        found[adapter.digest] = _candidate(path.name, adapter, path, is_chosen=False)
    found[chosen.digest] = _candidate(adapter_name(lora_path), chosen, fetched, is_chosen=True)
    return list(found.values())


def _candidate(name: str, adapter: Adapter, place: Path, *, is_chosen: bool) -> Candidate:
    file = file_for_web_uis(place)
    known_as = ("", "") if file is None else (file.stem, autov3(file))
    return Candidate(name, adapter, adapter.digest, is_chosen, place, *known_as)


def check_hash(adapter: Candidate, wanted: str | None) -> None:
    """UserError (exit 4) unless it is the adapter that --adapter_hash asks for, if it asks for one."""
    if wanted is not None and not adapter.digest.startswith(wanted.lower()):
        raise UserError(
            f"{adapter.place}: holds the adapter {adapter.digest}, not {wanted.lower()}: another one, or "
            "trained again since. Name the right one with --lora_path, or leave --adapter_hash out.",
            Exit.MODEL,
        )


def file_for_web_uis(adapter: Path) -> Path | None:
    """The file of an adapter's folder that A1111 and its kin read; None if there is none."""
    if adapter.is_file():
        return adapter
    files = sorted(adapter.glob("*.safetensors"))
    in_kohyas_layout = (adapter / name for name in (KOHYA_FILE, ADAPTER_FILE))
    only = files[0] if len(files) == 1 and files[0].name != PEFT_FILE else None
    return next((file for file in in_kohyas_layout if file in files), only)


def has_checkpoints(adapter: Path) -> bool:
    """Whether the run that an adapter's file or folder belongs to has any; said if it has none."""
    folders = step_folders(RunFolder.of_adapter(adapter).checkpoints).values()
    found = any((folder / ADAPTER_FILE).is_file() for folder in folders)
    if adapter.exists() and not found:
        say(f"note: {adapter}: no checkpoints beside it; only strengths are compared")
    return found


def checkpoints_beside(adapter: Path) -> list[Path]:
    """The checkpoints of the run that an adapter's file or folder belongs to, by step. UserError (exit 7) if
    it has none.
    """
    folders = step_folders(RunFolder.of_adapter(adapter).checkpoints).values()
    found = [folder for folder in folders if (folder / ADAPTER_FILE).is_file()]
    if not found:
        raise UserError(
            f"{adapter}: no checkpoints beside it ({CHECKPOINTS}/step-…/{ADAPTER_FILE}). Name a run's "
            f"{WEIGHTS} with --lora_path, or leave --compare_checkpoints out.",
            Exit.STATE,
        )
    return found


def adapter_name(lora_path: str) -> str:
    """The adapter's name in the pictures' settings: the hub id, or the file or folder to copy, never a
    path.
    """
    if not is_local(lora_path) and hub_id_of(lora_path).count("/") == 1:
        return hub_id_of(lora_path)
    path = Path(lora_path).expanduser().resolve()
    if path.name == ADAPTER_FILE:
        path = path.parent  # step-000250 says more than adapter
    return NAME if path.name == WEIGHTS else path.stem if path.suffix else path.name


def base_of(adapter: Adapter, lora_path: Path, wanted: str | None) -> str:
    """The base model to load: the user's choice, else the one the adapter was trained on."""
    if wanted is not None:
        return wanted
    name = adapter.metadata.get("base")
    if not name:
        raise UserError(
            f"{lora_path}: does not say which base model it was trained on; name one with --base_model",
            Exit.MODEL,
        )
    if name == EMBEDDED or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name  # a hub id; a path is never taken from an adapter that somebody else may have made
    path = path_in_record(lora_path, "pretrained_model_name")
    if path is not None and Path(path).expanduser().resolve().name == name:
        return path
    raise UserError(
        f"{lora_path}: was trained on the local base model {name!r}, which is not where it was; name it "
        "with --base_model",
        Exit.MODEL,
    )


def trained_as(adapter: Adapter) -> PredictionType:
    """What the user has told in training that the adapter's base predicts."""
    settings = adapter.metadata.get("config")
    told = settings.get("prediction_type") if isinstance(settings, dict) else None
    return next((known for known in get_args(PredictionType) if told == known), "auto")


def record_of_run(lora_path: Path) -> dict[str, Any] | None:
    """The settings of the run of ours that an adapter's file or folder lies in; None if it lies in none."""
    for folder in lora_path.resolve().parents[:3]:
        if holds_run(folder):
            return json.loads(RunFolder(folder).record.read_text(encoding="utf-8"))
    return None


def path_in_record(lora_path: Path, setting: str) -> str | None:
    """The path that the record of the adapter's run names for a setting, if it is still there; None for an
    adapter that lies in no run of ours.
    """
    path = (record_of_run(lora_path) or {}).get(setting)
    return path if isinstance(path, str) and Path(path).expanduser().exists() else None
