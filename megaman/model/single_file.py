"""Single .safetensors files, as web UIs keep their models: what one is, told by its header, and its parts,
loaded without a network.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from megaman.common.console import Exit, UserError
from megaman.common.kinds import Kind
from megaman.model.detection import kind_of_file
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
        raise UserError(f"{file}: is {found}; this tool trains Stable Diffusion 1.x.", Exit.MODEL)
    return found


def load_file(file: Path, kind: Kind, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The parts of a single file, the VAE in float32, the others in this precision. Raises what diffusers
    raises, and ValueError where a tensor is missing.
    """
    ours: dict[str, Any] = {"config": str(kind.config), "local_files_only": True}
    unet = UNet2DConditionModel.from_single_file(str(file), subfolder="unet", torch_dtype=dtype, **ours)
    vae = AutoencoderKL.from_single_file(str(file), subfolder="vae", torch_dtype=torch.float32, **ours)
    pipeline = StableDiffusionPipeline.from_single_file(
        str(file),
        unet=unet,
        vae=vae,
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        torch_dtype=dtype,
        **ours,
    )
    for name in ("unet", "vae", "text_encoder"):
        tensors = getattr(pipeline, name).state_dict()
        missing = [key for key, tensor in tensors.items() if tensor.is_meta]
        if missing:  # diffusers leaves them without numbers
            raise ValueError(f"{len(missing)} tensors of its {name} are missing, such as {missing[0]}")
    return pipeline
