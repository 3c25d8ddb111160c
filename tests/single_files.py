"""Writes a diffusers folder as the single file that a web UI keeps: the names of CompVis' code (LDM)."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from megaman.common.kinds import SD1, SD2, XL, Encoder, Kind

ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


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


def kind_of(pipeline: DiffusionPipeline) -> Kind:
    """The kind that a pipeline is built as."""
    if hasattr(pipeline, "text_encoder_2"):
        return XL
    return SD2 if pipeline.unet.config.use_linear_projection else SD1


def clip_tensors(model: CLIPTextModel) -> dict[str, Tensor]:
    """A text encoder's weights as CLIP's own code names them."""
    states = {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    device = states["final_layer_norm.bias"].device
    states["embeddings.position_ids"] = torch.arange(77, device=device)[None]
    return {f"text_model.{key}": tensor for key, tensor in states.items()}


def open_clip_tensors(model: CLIPTextModel) -> dict[str, Tensor]:
    """A text encoder's weights as OpenCLIP names them: projections joined; the last layer and the whole
    text's vector also where a pipeline does without them.
    """
    states = {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    projection = states.pop("text_projection.weight", None)
    layers = model.config.num_hidden_layers
    if projection is None:
        last = f"encoder.layers.{layers - 1}."
        more = {key.replace(last, f"encoder.layers.{layers}."): t for key, t in states.items() if last in key}
        states |= {key: tensor + 1 for key, tensor in more.items()}
        projection = torch.ones_like(states["encoder.layers.0.self_attn.q_proj.weight"])
    found = {"text_projection": projection.T, "logit_scale": projection.new_ones(())}
    for key, tensor in states.items():
        joined = re.fullmatch(r"(.+self_attn)\.([qkv])_proj\.(weight|bias)", key)
        if joined and joined[2] != "q":
            continue
        if joined:
            key = f"{joined[1]}.in_proj_{joined[3]}"
            tensor = torch.cat([states[f"{joined[1]}.{part}_proj.{joined[3]}"] for part in "qkv"])
        for theirs, ours in OPEN_CLIP.items():
            key = key.replace(theirs, ours)
        found[key] = tensor
    return found


def tensors_of(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
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
    for encoder in kind_of(pipeline).encoders:
        named = open_clip_tensors if encoder.key.endswith(".model.") else clip_tensors
        states = named(getattr(pipeline, encoder.part))
        found |= {f"{encoder.key}{key}": tensor for key, tensor in states.items()}
    return found


def write_single_file(
    folder: Path, file: Path, dtype: torch.dtype = torch.float32, metadata: Mapping[str, str] | None = None
) -> Path:
    """The model of a diffusers folder in one file. metadata: of the file; if none is given, what the model
    predicts.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder)
    tensors = {
        key: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in tensors_of(pipeline).items()
    }
    if metadata is None:
        metadata = {"modelspec.prediction_type": pipeline.scheduler.config.prediction_type}
    save_file(tensors, file, dict(metadata))
    return file


# ----------------------------------------------------------- true shapes, from the shipped configurations
def unet_of_true_shape(kind: Kind) -> UNet2DConditionModel:
    """A kind's UNet on the meta device."""
    with init_empty_weights():
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(kind.config / "unet"))


def encoder_of_true_shape(kind: Kind, encoder: Encoder) -> CLIPTextModel:
    """A kind's text encoder on the meta device."""
    config = CLIPTextConfig.from_pretrained(kind.config / encoder.part)
    with init_empty_weights():
        return (CLIPTextModelWithProjection if encoder.has_pooled else CLIPTextModel)(config)


def tensors_of_true_shape(kind: Kind) -> dict[str, Tensor]:
    """All of a kind's tensors under LDM's names, on the meta device."""
    with init_empty_weights():
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(kind.config / "vae"))
    models = {encoder.part: encoder_of_true_shape(kind, encoder) for encoder in kind.encoders}
    return tensors_of(_Parts(unet=unet_of_true_shape(kind), vae=vae, **models))


class _Parts:
    """Something with the parts of a pipeline."""

    def __init__(self, **parts: torch.nn.Module) -> None:
        self.__dict__ |= parts


def write_true_shape(
    kind: Kind, file: Path, fill: Callable[[str, tuple[int, ...]], Iterator[bytes]] | None = None
) -> Path:
    """A file of a kind's true shape in half precision that says it predicts epsilon. fill: the bytes of a
    tensor, one piece after the other; without it, the file is a hole but for its header.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of_true_shape(kind).items()}
    header: dict[str, object] = {"__metadata__": {"modelspec.prediction_type": "epsilon"}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        if fill is None:
            opened.truncate(8 + len(text) + end)
            return file
        for key, shape in shapes.items():
            opened.writelines(fill(key, shape))
    return file
