"""WD14-style taggers: models of timm that know thousands of tags, and how sure they are of each."""

import csv
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from megaman.common.cache import key_of
from megaman.common.console import REQUIREMENTS, Exit, UserError, control_in
from megaman.common.files import sha256_of
from megaman.config.train import LEAST_SCORE

CONFIG, TAGS, WEIGHTS = "config.json", "selected_tags.csv", "model.safetensors"
RECIPE = 1  # raised when pixels or scores are made in another way
FLAG = "--caption_with"
ONE_OF_TIMM = "Name a tagger of timm, such as SmilingWolf/wd-vit-tagger-v3; if it is one, fetch it whole."
WHITE = (255, 255, 255)

Seen = tuple[str, int, float]  # a tag as the file spells it, its category, the score (0-1)


@dataclass(frozen=True)
class Look:
    """How the model wants a picture: the side of the square in pixels, the share of it that is looked at,
    mean and std of each channel (red, green, blue; 1 is white), and how it is scaled.
    """

    side: int
    crop: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resampling: Image.Resampling

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Look":
        """What a timm model's config.json says; timm's own defaults where it is silent. KeyError, ValueError
        or TypeError where it makes no sense.
        """
        said = config.get("pretrained_cfg", config)
        _, height, width = said["input_size"]
        side = config.get("model_args", {}).get("img_size", width)
        if height != width or not isinstance(side, int) or side < 1:
            raise ValueError(f"an input of {said['input_size']}, which is no square")
        mean, std = (
            said.get("mean") or (0.485, 0.456, 0.406),
            said.get("std") or (0.229, 0.224, 0.225),
        )  # of ImageNet
        (red, green, blue), (red_std, green_std, blue_std) = (map(float, mean), map(float, std))
        resampling = Image.Resampling[str(said.get("interpolation") or "bicubic").upper()]
        crop = float(said.get("crop_pct") or 0.875)
        return cls(side, crop, (red, green, blue), (red_std, green_std, blue_std), resampling)


def pixels_of(image: Image.Image, look: Look) -> Tensor:
    """The picture as the tagger was taught to see it, (3,side,side): padded to a square with white, scaled,
    normalised, blue before green before red.

    image: RGB; what was transparent is white already.
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    scaled = math.floor(look.side / look.crop)
    at = round((scaled - look.side) / 2)
    small = square.resize((scaled, scaled), look.resampling)
    seen = small.crop((at, at, at + look.side, at + look.side))
    rgb = torch.from_numpy(np.array(seen)).permute(2, 0, 1).to(torch.float32) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (look.mean, look.std))
    return ((rgb - mean) / std)[[2, 1, 0]]


@dataclass(frozen=True)
class Tagger:
    """A tagger's files, looked at; its weights are not loaded yet."""

    name: str  # as the user knows it
    folder: Path
    config: Mapping[str, Any]
    look: Look
    tags: Sequence[tuple[str, int]]  # each with its category, in the order of the model's outputs
    weights: ClassVar[str] = WEIGHTS  # the names of the files to fetch
    are_tags: ClassVar[bool] = True  # what it tells of a picture

    @property
    def title(self) -> str:
        """What it is, in words."""
        return f"a tagger of {len(self.tags)} tags"

    @property
    def key(self) -> str:
        """What decides what it sees in a picture."""
        return key_of("tags", RECIPE, *(sha256_of(self.folder / name) for name in (CONFIG, TAGS, WEIGHTS)))

    @classmethod
    def open(cls, name: str, folder: Path) -> "Tagger":
        """The tagger whose configuration and tags lie in a folder. UserError (exit 4) if they are broken or
        don't belong together, (exit 2) if timm is not installed.
        """
        config = _config_of(name, folder)
        tags = read_tags(folder / TAGS)
        try:
            look = Look.of(config)
            outputs = config.get("num_classes") or config.get("pretrained_cfg", {}).get("num_classes")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reason = f"its {CONFIG} makes no sense ({str(error)[:100]})"
            raise UserError(f"{name}: {reason}. Copy the model again.", Exit.MODEL) from error
        if outputs is not None and outputs != len(tags):
            raise UserError(
                f"{name}: {TAGS} holds {len(tags)} tags, and the model knows {outputs}. Copy both from the "
                "same place.",
                Exit.MODEL,
            )
        _timm()
        return cls(name, folder, config, look, tags)

    def check_weights(self) -> None:
        """UserError (exit 4) if the weights don't lie there."""
        if not (self.folder / WEIGHTS).is_file():
            is_onnx = any(self.folder.glob("*.onnx"))
            lacks = "is an ONNX tagger, which is not read" if is_onnx else f"has no {WEIGHTS}"
            raise UserError(f"{self.name}: {lacks}. {ONE_OF_TIMM}", Exit.MODEL)

    def load(self, device: torch.device) -> Callable[[Sequence[Image.Image]], list[list[Seen]]]:
        """Loads the weights; what is returned tells of each RGB picture the tags with a score, the surest
        first. UserError (exit 4) if they can't be loaded.
        """
        said = self.config.get("pretrained_cfg", {})
        own = dict(self.config.get("model_args", {})) | {"num_classes": len(self.tags)}
        try:
            model = _timm().create_model(
                self.config["architecture"], pretrained=False, pretrained_cfg=dict(said), **own
            )
            model.load_state_dict(load_file(self.folder / WEIGHTS))
        except Exception as error:  # timm and safetensors raise what they like
            text = " ".join(str(error).split())[:200]
            reason = f"this tagger can't be loaded ({text})"
            raise UserError(
                f"{self.name}: {reason}. Is it complete, and does your timm know it?", Exit.MODEL
            ) from error
        model.eval().to(device, torch.float32)

        def read(images: Sequence[Image.Image]) -> list[list[Seen]]:
            """What is seen in each picture, the surest first. UserError (exit 5) on scores that are not
            finite.
            """
            pixels = torch.stack([pixels_of(image, self.look) for image in images])
            with torch.inference_mode():
                scores = model(pixels.to(device)).sigmoid().cpu()
            if not scores.isfinite().all():
                raise UserError(
                    f"{self.name}: gives scores that are no numbers. Copy it again.", Exit.NUMBERS
                )
            return [self._told(row.tolist()) for row in scores]

        return read

    def _told(self, scores: Sequence[float]) -> list[Seen]:
        rated = zip(self.tags, scores, strict=True)
        seen = [(tag, category, score) for (tag, category), score in rated if score >= LEAST_SCORE]
        return sorted(seen, key=lambda each: -each[2])


def _config_of(name: str, folder: Path) -> dict[str, Any]:
    """A tagger's config.json. UserError (exit 4) if it is missing, damaged, or another's."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: its {CONFIG} is missing or damaged. {ONE_OF_TIMM}", Exit.MODEL) from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{name}: its {CONFIG} names no architecture of timm. {ONE_OF_TIMM}", Exit.MODEL)
    return config


def read_tags(file: Path) -> list[tuple[str, int]]:
    """The tags of a selected_tags.csv and their categories, in their order. UserError (exit 4) if it is
    broken.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = [(row["name"], int(row["category"])) for row in csv.DictReader(stream, strict=True)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        reason = "no table of tags with the columns name and category"
        raise UserError(f"{file}: {reason} ({str(error)[:80]}). Copy it again.", Exit.MODEL) from error
    bad = next((at for at, (tag, _) in enumerate(rows, 2) if not tag.strip() or control_in(tag)), None)
    if bad is not None or not rows:
        where = "holds no tag" if bad is None else f"row {bad} holds no tag"
        raise UserError(f"{file}: {where}. Copy it again.", Exit.MODEL)
    return rows


def _timm() -> Any:
    """The optional package. UserError (exit 2) with what to type if it is missing or can't be loaded."""
    try:
        return importlib.import_module("timm")
    except Exception as error:  # also where its torchvision doesn't belong to this torch
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "timm"
        remedy = "is not installed" if is_missing else f"can't be loaded ({str(error)[:100]})"
        reason = f"{FLAG}: a tagger needs the package timm, which {remedy}"
        with_torch = f"pip install -r {REQUIREMENTS} timm"  # alone, timm would bring another torch along
        raise UserError(f"{reason}; {with_torch}", Exit.USAGE) from error
