"""The pictures that an adapter was trained on, as its training saw them, and its run's held-out losses: found
by the record of the run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megaman.common.cache import Store
from megaman.common.console import UserError, say
from megaman.common.output_folder import RunFolder, read_rows
from megaman.config.train import PROJECT, STARTER_IMAGES, CropMode
from megaman.data import buckets, scan
from megaman.data.buckets import Crop
from megaman.data.folder import look_into
from megaman.generation.candidates import record_of_run

MOST = 400  # pictures that are looked at: as many as all drawings of a usual comparison


@dataclass(frozen=True)
class TrainingPicture:
    """One of them."""

    name: str  # below the data folder
    crop: Crop  # as it was trained at
    thumbnail: str  # a small WebP, base64


@dataclass(frozen=True)
class TrainingPictures:
    """Those that can be found, or why there are none, in words."""

    pictures: tuple[TrainingPicture, ...] = ()
    missing: str = ""


def find_training_pictures(lora_path: Path, side: int, cell_px: int) -> TrainingPictures:
    """The pictures of the run that made an adapter, cut and sized as there. side: of its training square in
    pixels, where the record does not tell; cell_px: of the base.
    """
    record = record_of_run(lora_path)
    if record is None:
        return TrainingPictures(missing="the adapter lies in no training run of ours")
    folder = _folder_in(record)
    if folder is None:
        return TrainingPictures(missing=f"the training pictures are no longer in {record.get('data_dir')}")
    resolution = record.get("resolution")
    side = resolution if isinstance(resolution, int) and resolution > 0 else side
    modes: tuple[CropMode, ...] = get_args(CropMode)
    crop = next((mode for mode in modes if mode == record.get("crop")), modes[0])
    try:
        scanned, _ = scan.scan(look_into(folder), Store(None))
    except UserError as error:
        return TrainingPictures(missing=str(error))
    if not scanned:
        return TrainingPictures(missing=f"{folder} holds no pictures any more")
    if len(scanned) > MOST:
        say(f"note: {MOST} of the {len(scanned)} training pictures are compared, evenly picked")
        scanned = [scanned[i] for i in np.linspace(0, len(scanned) - 1, MOST).astype(int)]
    offered = buckets.buckets_of(side, cell_px, crop)
    return TrainingPictures(
        tuple(
            TrainingPicture(
                each.path.relative_to(folder).as_posix(),
                Crop(each.path, each.digest, buckets.bucket_for(each.size, offered), whole=each.size),
                each.thumbnail,
            )
            for each in scanned
        )
    )


def _folder_in(record: dict[str, Any]) -> Path | None:
    """The data folder that a run's record names, if it is still there; the demo's wherever it runs."""
    named = record.get("data_dir")
    if not isinstance(named, str):
        return None
    folder = Path(named).expanduser()
    places = [folder, PROJECT / folder] if Path(named) == Path(STARTER_IMAGES) else [folder]
    return next((place for place in places if place.is_dir()), None)


def held_out_losses(lora_path: Path) -> dict[int, float]:
    """The loss on the run's held-out pictures by step, as its metrics.jsonl has it; empty where it has none.
    A damaged line loses only its own.
    """
    if record_of_run(lora_path) is None:
        return {}
    rows = read_rows(RunFolder.of_adapter(lora_path).metrics)
    found = {row["step"]: row["validation_loss"] for row in rows if _is_loss(row.get("validation_loss"))}
    return dict(sorted(found.items()))


def _is_loss(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def rise_at(step: int, losses: Mapping[int, float]) -> float | None:
    """By how much the held-out loss of a step lies above the smallest until then, as a share of that; None
    where that step was not measured.
    """
    if step not in losses:
        return None
    return losses[step] / min(loss for at, loss in losses.items() if at <= step) - 1
