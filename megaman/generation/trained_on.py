"""The pictures that an adapter was trained on, as its training saw them, and its run's held-out losses: found
by the record of the run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megaman.common.cache import Store
from megaman.common.console import UserError, say
from megaman.common.output_folder import CONTENT, RunFolder, read_rows
from megaman.config.train import PROJECT, CropMode
from megaman.data import buckets, scan
from megaman.data.buckets import Crop
from megaman.data.folder import look_into
from megaman.data.held_out import held_out_of
from megaman.data.scan import ScannedPicture
from megaman.generation.candidates import record_of_run
from megaman.generation.ranking import Reason

NO_RUN = "Likeness and copies are left out: the adapter lies in no training run of ours."
GONE = "Likeness and copies are left out: the training pictures are no longer in {n}."
CHANGED = "Likeness and copies are left out: {n} holds other pictures than those of the training."
MOST = 400  # pictures that are looked at: as many as all drawings of a usual comparison


@dataclass(frozen=True)
class TrainingPicture:
    """One of them."""

    name: str  # below the data folder
    crop: Crop  # as it was trained at
    thumbnail: str  # a small WebP, base64


@dataclass(frozen=True)
class TrainingPictures:
    """Those that can be found, or why there are none."""

    pictures: tuple[TrainingPicture, ...] = ()
    missing: Reason | None = None
    mirrored: tuple[Crop, ...] = ()  # the same, where they were also trained on mirrored


def find_training_pictures(lora_path: Path, side: int, cell_px: int) -> TrainingPictures:
    """The pictures of the run that made an adapter, cut and sized as there. side: of its training square in
    pixels, where the record does not tell; cell_px: of the base.
    """
    record = record_of_run(lora_path)
    if record is None:
        return TrainingPictures(missing=(NO_RUN, ""))
    run = RunFolder.of_adapter(lora_path)
    trained = next((row["dataset"].get(CONTENT) for row in read_rows(run.metrics) if _tells(row)), None)
    folders = _folders_in(record, run)
    if not folders:
        return TrainingPictures(missing=(GONE, str(record.get("data_dir"))))
    for folder in folders:
        try:
            scanned, _ = scan.scan(look_into(folder), Store(None))
        except UserError:  # it has just gone
            continue
        if scanned and trained in (None, scan.content_of(each.digest for each in scanned)):
            return _as_trained(scanned, folder, record, side, cell_px)
    return TrainingPictures(missing=(CHANGED, str(folders[0])))


def _as_trained(
    scanned: Sequence[ScannedPicture], folder: Path, record: Mapping[str, Any], side: int, cell_px: int
) -> TrainingPictures:
    """The pictures of a run's folder as the run has trained on them: those that it held out are none of
    them.
    """
    without = _held_out(scanned, record)
    trained = [each for index, each in enumerate(scanned) if index not in without]
    if len(trained) > MOST:
        say(f"note: {MOST} of the {len(trained)} training pictures are compared, evenly picked")
        trained = [trained[i] for i in np.linspace(0, len(trained) - 1, MOST).astype(int)]
    resolution = record.get("resolution")
    side = resolution if isinstance(resolution, int) and resolution > 0 else side
    modes: tuple[CropMode, ...] = get_args(CropMode)
    crop = next((mode for mode in modes if mode == record.get("crop")), modes[0])
    offered = buckets.buckets_of(side, cell_px, crop)
    found = tuple(
        TrainingPicture(
            each.path.relative_to(folder).as_posix(),
            Crop(each.path, each.digest, buckets.bucket_for(each.size, offered), whole=each.size),
            each.thumbnail,
        )
        for each in trained
    )
    turned = found if record.get("flip") is True else ()
    return TrainingPictures(found, mirrored=tuple(replace(each.crop, is_mirrored=True) for each in turned))


def _held_out(scanned: Sequence[ScannedPicture], record: Mapping[str, Any]) -> frozenset[int]:
    """Those that the run never trained on, as it chose them by its record; none where that is damaged."""
    share, seed = record.get("validation_split"), record.get("seed")
    if type(share) not in (int, float) or type(seed) is not int or not 0 < share < 1:  # type: ignore[operator]
        return frozenset()
    return held_out_of([each.digest for each in scanned], share, seed)  # type: ignore[arg-type]


def _tells(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("dataset"), dict)


def _folders_in(record: dict[str, Any], run: RunFolder) -> list[Path]:
    """Where the data folder that a run's record names may be: a relative one is seen from here, from beside
    the run, or from the project. Only those that are there.
    """
    named = record.get("data_dir")
    if not isinstance(named, str):
        return []
    folder = Path(named).expanduser()
    beside = [] if folder.is_absolute() else [run.path.parent / folder, PROJECT / folder]
    return [place for place in (folder, *beside) if place.is_dir()]


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
    """By how much the held-out loss of a step lies above the smallest until then, as a share of that: of the
    last one measured, where this one was not; None where none was until then.
    """
    known = [loss for at, loss in sorted(losses.items()) if at <= step]
    return known[-1] / min(known) - 1 if known else None
