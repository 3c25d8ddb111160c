"""Writes a diffusers folder as the single file that a web UI keeps: the names of CompVis' code (LDM)."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_name(name: str, unet: torch.nn.Module) -> str:
    """LDM's path of a UNet's module."""
    if name in ENDS:
        return ENDS[name]
    pattern = r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+?)\.(\d+)\.(.+)"
    where, block, kind, number, rest = re.fullmatch(pattern, name).groups()
    block, number, each = int(block or 0), int(number), unet.config.layers_per_block + 1
    if kind == "resnets":
        rest = RESNET[rest]
    if where == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{each * (block + 1)}.0.op"
    if kind == "upsamplers":
        slot = 1 + hasattr(unet.up_blocks[block], "attentions")
        return f"output_blocks.{each * block + each - 1}.{slot}.conv"
    at = each * block + number + (where == "down")
    return f"{'input' if where == 'down' else 'output'}_blocks.{at}.{int(kind == 'attentions')}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """LDM's path of a VAE's module."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    up = re.match(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)", name)
    if up:
        inner = "upsample" if up[2] is None else f"block.{up[2]}"
        name = f"decoder.up.{blocks - 1 - int(up[1])}.{inner}{name[up.end() :]}"
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for ours, theirs in ATTENTION.items():
        name = re.sub(rf"mid_block\.attentions\.0\.{re.escape(ours)}$", f"mid.attn_1.{theirs}", name)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def tensors_of(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The pipeline's weights under LDM's names."""
    found = {}
    for key, tensor in pipeline.unet.state_dict().items():
        module, _, kind = key.rpartition(".")
        found[f"model.diffusion_model.{ldm_name(module, pipeline.unet)}.{kind}"] = tensor
    for key, tensor in pipeline.vae.state_dict().items():
        module, _, kind = key.rpartition(".")
        name = vae_name(module, len(pipeline.vae.config.block_out_channels))
        is_linear = "attn_1" in name and "norm" not in name and kind == "weight"
        found[f"first_stage_model.{name}.{kind}"] = tensor[:, :, None, None] if is_linear else tensor
    for key, tensor in pipeline.text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    return found


def write_single_file(folder: Path, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model of a diffusers folder in one file."""
    tensors = tensors_of(StableDiffusionPipeline.from_pretrained(folder, safety_checker=None))
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, file)
    return file
