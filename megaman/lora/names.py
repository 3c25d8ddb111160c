"""A module's path in every spelling: dotted or underscored, as diffusers names it or as LDM does (Stability's
and CompVis' code), with and without the "text_model." that transformers 5 dropped from one class.
"""

import itertools
import re
from collections.abc import Mapping

from megaman.common.kinds import UNET, Kind

# ---------------------------------------------------------------- dots
_WORDS = """
    down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers conv conv_in conv_out
    conv_norm_out time_embedding add_embedding linear_1 linear_2 transformer_blocks attn1 attn2 to_q to_k to_v
    to_out ff net proj proj_in proj_out norm norm1 norm2 norm3 conv1 conv2 conv_shortcut time_emb_proj
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection time_embed
    label_emb op out
    text_model embeddings token_embedding position_embedding encoder layers self_attn q_proj k_proj v_proj
    out_proj mlp fc1 fc2 layer_norm1 layer_norm2 final_layer_norm text_projection
"""  # between the dots: of diffusers' UNets, of LDM's, of transformers' text encoders
_WORD = re.compile(rf"(?:^|_)({'|'.join(sorted(_WORDS.split(), key=len, reverse=True))}|\d+)(?=_|$)")


def dotted(name: str) -> str:
    """A module's path with dots, of one that may have underscores in their place. A path that is not of known
    words stays as it is.
    """
    words = _WORD.findall(name)
    return ".".join(words) if "_".join(words) == name else name


# ---------------------------------------------------------------- LDM
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_FIRST_UPSAMPLER = "up_blocks.0.upsamplers.0.conv"
_FIRST_SLOTS = ("output_blocks.2.1.conv", "output_blocks.2.2.conv")  # the second: behind an attention


def _ldm_places() -> dict[str, str]:
    """The places in a UNet of two layers a block (Stable Diffusion 1.x, 2.x, XL), as LDM names them, and as
    diffusers does.
    """
    places = {
        "input_blocks.0.0": "conv_in",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        **dict.fromkeys(_FIRST_SLOTS, _FIRST_UPSAMPLER),
    }
    for block, i in itertools.product(range(4), range(3)):
        down, up = f"input_blocks.{3 * block + i + 1}", f"output_blocks.{3 * block + i}"
        if i < 2:
            places[f"{down}.0"] = f"down_blocks.{block}.resnets.{i}"
            places[f"{down}.1"] = f"down_blocks.{block}.attentions.{i}"
        places[f"{up}.0"] = f"up_blocks.{block}.resnets.{i}"
        places[f"{up}.1"] = f"up_blocks.{block}.attentions.{i}"
    for block in range(4):
        places[f"input_blocks.{3 * block + 3}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
        if block > 0:
            places[f"output_blocks.{3 * block + 2}.2.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    return places


_PLACES = _ldm_places()
_LDM_PLACES = {place: ldm for ldm, place in _PLACES.items()}
_LDM_RESNET = {part: ldm for ldm, part in _RESNET.items()}


def _moved(name: str, places: Mapping[str, str], inside: Mapping[str, str]) -> str | None:
    """The name with the longest place at its beginning exchanged, and what lies within; None if it lies in
    none of the places.
    """
    words = name.split(".")
    for size in range(len(words), 0, -1):
        place = places.get(".".join(words[:size]))
        if place is not None:
            within = ".".join(words[size:])
            return f"{place}.{inside.get(within, within)}".removesuffix(".")
    return None


def diffusers_name(name: str) -> str:
    """diffusers' path of a module of a UNet, with dots, of one in any spelling."""
    name = dotted(name)
    return _moved(name, _PLACES, _RESNET) or name


def ldm_name(name: str, kind: Kind) -> str:
    """LDM's path of a module of the kind's UNet, which comes under diffusers', with dots. ValueError if there
    is no such place.
    """
    if name == _FIRST_UPSAMPLER:
        return _FIRST_SLOTS[kind.first_up_attends]
    moved = _moved(name, _LDM_PLACES, _LDM_RESNET)
    if moved is None:
        raise ValueError(f"{name}: LDM has no name for it")
    return moved


# ---------------------------------------------------------------- every part
_TEXT_MODEL = "text_model."  # what some of transformers' classes have in front
_IN_TEXT_MODEL = ("encoder.", "embeddings.", "final_layer_norm")


def canonical(component: str, name: str) -> str:
    """The path in an Adapter's keys, of one in any spelling, from a file or a live model."""
    if component == UNET:
        return diffusers_name(name)
    name = dotted(name)
    return _TEXT_MODEL + name if name.startswith(_IN_TEXT_MODEL) else name


def live_name(component: str, name: str, kind: Kind) -> str:
    """The path in the part itself, of one of an Adapter's keys: CLIPTextModel has no text_model, and
    CLIPTextModelWithProjection has one.
    """
    if component == UNET or kind.encoder(component).has_pooled:
        return name
    return name.removeprefix(_TEXT_MODEL)
