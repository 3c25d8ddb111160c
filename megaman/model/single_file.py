"""Single .safetensors files, as web UIs keep their models: what one is, told by its header, and its parts,
loaded without a network.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as load_tensors
from torch import Tensor, nn
from transformers import CLIPTokenizer

from megaman.common.console import Exit, UserError
from megaman.common.kinds import Encoder, Kind
from megaman.model.detection import UNET_KEY, VAE_KEY, kind_of_file
from megaman.model.open_clip import text_encoder_of
from megaman.model.tokenizer import clip_tokenizer


def kind_in(file: Path) -> Kind:
    """The kind of Stable Diffusion that a file holds; only its header is read. UserError (exit 4) that names
    what it is, if it is none of ours.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{file}: not a whole safetensors file ({reason}). Copy it again.", Exit.MODEL
        ) from error
    found = kind_of_file(shapes)
    if isinstance(found, str):
        raise UserError(f"{file}: is {found}; this tool trains Stable Diffusion 1.x, 2.x and XL.", Exit.MODEL)
    return found


def load_file(file: Path, kind: Kind, dtype: torch.dtype) -> DiffusionPipeline:
    """The parts of a single file: the VAE in float32, the others as they are stored, in pages of the file
    that cost no memory until somebody casts or moves them. The tokenizers pad as their encoders expect.

    dtype: of a part that the file holds in more than one precision. Raises what diffusers raises, and
    ValueError where a tensor is missing.
    """
    tensors = load_tensors(file)
    unet, vae = _of(tensors, UNET_KEY), _of(tensors, VAE_KEY)
    parts = {
        "unet": _converted(UNet2DConditionModel, "unet", unet, kind, _precision(unet, dtype)),
        "vae": _converted(AutoencoderKL, "vae", vae, kind, torch.float32),
    }
    for encoder in kind.encoders:
        model = text_encoder_of(tensors, kind, encoder)
        parts[encoder.part] = model.to(_precision(model.state_dict(), dtype))
    tokenizers = {
        encoder.part.replace("text_encoder", "tokenizer"): _tokenizer(encoder) for encoder in kind.encoders
    }
    return DiffusionPipeline.from_pretrained(str(kind.config), local_files_only=True, **parts, **tokenizers)


def _of(tensors: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(key)}


def _converted(
    model: Any, name: str, tensors: dict[str, Tensor], kind: Kind, dtype: torch.dtype
) -> nn.Module:
    try:
        return model.from_single_file(
            tensors, config=str(kind.config), subfolder=name, torch_dtype=dtype, local_files_only=True
        )
    except NotImplementedError as error:  # torch can't move what diffusers has found no numbers for
        raise ValueError(f"tensors of its {name} are missing") from error


def _precision(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    """The one that all tensors have; else dtype."""
    found = {tensor.dtype for tensor in tensors.values()}
    return found.pop() if len(found) == 1 else dtype


def _tokenizer(encoder: Encoder) -> CLIPTokenizer:
    tokenizer = clip_tokenizer()
    if encoder.pads_with is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = encoder.pads_with
    return tokenizer
