"""Text encoders out of single files, which name their tensors as CLIP's code does or as OpenCLIP's."""

import re
from collections.abc import Iterator, Mapping

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from megaman.common.kinds import Encoder, Kind

ROOT = "text_model."  # of CLIP's names, and of those of one of transformers' two classes
ENDS = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
JOINED = re.compile(r"attn\.in_proj_(weight|bias)")


def text_encoder_of(
    tensors: Mapping[str, Tensor], kind: Kind, encoder: Encoder
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder of a single file's tensors, in the precision and the memory that they have. ValueError
    where one is missing.
    """
    config = CLIPTextConfig.from_pretrained(kind.config / encoder.part)
    with init_empty_weights():
        model = (CLIPTextModelWithProjection if encoder.has_pooled else CLIPTextModel)(config)
    states = dict(states_of(tensors, encoder.key))
    wanted = model.state_dict().keys()
    if any(name.startswith(ROOT) for name in wanted):
        states |= {f"{ROOT}{name}": tensor for name, tensor in states.items()}
    missing = sorted(wanted - states.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors of its {encoder.part} are missing, such as {missing[0]}")
    model.load_state_dict({name: states[name] for name in wanted}, assign=True)
    return model.eval()


def states_of(tensors: Mapping[str, Tensor], key: str) -> Iterator[tuple[str, Tensor]]:
    """A text encoder's tensors by transformers' names without their root, of those whose keys begin so: views
    of them where a layout joins what another keeps apart.
    """
    own = {name.removeprefix(key): tensor for name, tensor in tensors.items() if name.startswith(key)}
    if any(name.startswith("transformer.resblocks.") for name in own):
        yield from _of_open_clip(own)
        return
    for name, tensor in own.items():
        yield name.removeprefix(ROOT), tensor  # which the first finetunes' files leave out


def _of_open_clip(own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in own.items():
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if name == "positional_embedding":
            yield "embeddings.position_embedding.weight", tensor
        elif name == "text_projection":  # OpenCLIP multiplies from the other side
            yield "text_projection.weight", tensor.T.contiguous()
        elif block is not None:
            yield from _of_block(f"encoder.layers.{block[1]}", block[2], tensor)
        else:
            yield f"{ENDS.get(module, module)}.{kind}", tensor


def _of_block(layer: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if joined := JOINED.fullmatch(name):
        for part, own in zip("qkv", torch.chunk(tensor, 3), strict=True):
            yield f"{layer}.self_attn.{part}_proj.{joined[1]}", own
        return
    module, _, kind = name.rpartition(".")
    yield f"{layer}.{BLOCK.get(module, module)}.{kind}", tensor
