"""A CLIP image model that looks at pictures (--judge). Knows transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging

from megaman.common.console import Exit, UserError
from megaman.model.hub import hub_id_of, is_local, small_json, why_not_loaded

FLAG = "--judge"
KINDS_OF_CLIP = ("clip", "clip_vision_model")  # as their config.json calls themselves
WANTED = "Name a folder or hub id of a CLIP image model (transformers' CLIPModel or CLIPVisionModel)."


def load_judge(name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A look of `features_of` through a CLIP image model: its pooled output, of length 1. UserError (exit 4)
    if there is no such model. Only what the name asks for is ever fetched.
    """
    source = Path(name).expanduser() if is_local(name) else hub_id_of(name)
    if isinstance(source, Path):
        _check_folder(source)
    transformers_logging.disable_progress_bar()
    try:
        model, facts = CLIPVisionModel.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # the hub, its HTTP library and a damaged file raise what they like
        raise UserError(_reason(name, source, error), Exit.MODEL) from error
    lacking = len(facts["missing_keys"]) + len(facts["mismatched_keys"])
    if model.config.model_type != "clip_vision_model" or lacking:
        reason = f"no CLIP image model: {lacking} of such a one's tensors are not there"
        raise UserError(f"{name}: {reason}. {WANTED}", Exit.MODEL)
    model.requires_grad_(False).eval().to(device, torch.float32)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in _scaling_of(name))
    side = model.config.image_size

    @torch.no_grad()
    def look(pixels: Tensor) -> Tensor:
        seen = (_squared(pixels.cpu(), side) / 2 + 0.5 - mean) / std
        return functional.normalize(model(pixel_values=seen.to(device)).pooler_output, dim=1)

    return look


def _check_folder(source: Path) -> None:
    """UserError (exit 4) unless a folder holds the configuration of a CLIP model and safetensors."""
    reason = None
    try:
        kind = json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind not in KINDS_OF_CLIP:
            reason = f"no CLIP image model but {kind or 'something else'}"
        elif not any(source.glob("*.safetensors")):
            reason = "only .safetensors weights are read, and it holds none"
    except FileNotFoundError:
        reason = "no such folder of a model (no config.json)"
    except (OSError, ValueError, AttributeError, RecursionError):
        reason = "its config.json can't be read"
    if reason is not None:
        raise UserError(f"{FLAG} {source}: {reason}. {WANTED}", Exit.MODEL)


def _reason(name: str, source: Path | str, error: Exception) -> str:
    """Why a judge can't be loaded, in a sentence."""
    if isinstance(source, Path):
        text = " ".join(str(error).split())[:200]
        return f"{FLAG} {source}: can't be loaded ({text}). Copy it again. {WANTED}"
    return why_not_loaded(name, source, error, what="judge", flag=FLAG)


def _scaling_of(name: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the colours that the model was trained on; CLIP's own where it tells none."""
    try:
        told = small_json(name, "preprocessor_config.json")
        mean, std = ([float(each) for each in told[key]] for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError):
        return list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)
    is_sound = len(mean) == len(std) == 3 and min(std) > 0
    return (mean, std) if is_sound else (list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD))


def _squared(pixels: Tensor, side: int) -> Tensor:
    """The middle square of pictures (B,3,H,W) at this side, as CLIP is shown them."""
    height, width = pixels.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    scaled = functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((long - side) // 2 for long in size)
    return scaled[..., top : top + side, left : left + side]
