"""What a single file holds: a kind of Stable Diffusion that is trained and drawn with, or something else."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaman.common.kinds import SD1, SD2, XL, Kind

Shapes = Mapping[str, tuple[int, ...]]  # of a file's tensors, by their keys

UNET_KEY, VAE_KEY = "model.diffusion_model.", "first_stage_model."
FIRST = f"{UNET_KEY}input_blocks.0.0.weight"
ADDED = f"{UNET_KEY}label_emb.0.0.weight"


@dataclass(frozen=True)
class Header:
    """What the header of a kind's files tells of its UNet."""

    kind: Kind
    tensors: int  # how many it has
    depths: tuple[int, int]  # transformers in input blocks 4 and 7, where distilled ones have fewer
    added: int  # width of what is added to the timestep: pooled text and sizes


HEADERS = {
    768: Header(SD1, tensors=686, depths=(1, 1), added=0),
    1024: Header(SD2, tensors=686, depths=(1, 1), added=0),
    2048: Header(XL, tensors=1680, depths=(2, 10), added=2816),
}  # by the width of the text that the UNet reads
OTHER_INPUTS = {
    9: "an inpainting model",
    8: "InstructPix2Pix",
    5: "a depth model",
    7: "an upscaler",
}  # channels that a UNet reads, where those to draw from noise have 4
OTHER_FEATURES = {384: "Stable Diffusion XL's refiner", 256: "an upscaler"}  # of its first layer
OTHER_WIDTHS = {1280: "Stable Diffusion XL's refiner"}
OTHER_ADDED = dict.fromkeys((1536, 2048), "Stable Diffusion unCLIP")
DISTILLED = {
    (2, 4): "SSD-1B, a distilled Stable Diffusion XL",
    (1, 2): "Vega, a distilled Stable Diffusion XL",
}  # by their depths
XL_DEPTHS = [1, 2, 10]  # of its transformers, as folders tell them
UNKNOWN = "no Stable Diffusion that is known here"
RELATIVES = {
    r"^edm_vpred\.sigma_max$": "CosXL",
    r"^edm_mean$": "Playground 2.5",
    r"^control_model\.": "a ControlNet",
    r"^cond_stage_model\.roberta\.": "AltDiffusion",
}  # by a pattern of keys; for files with a UNet that looks like ours
OTHER_CLASSES = {
    r"StableDiffusion3": "Stable Diffusion 3",
    r"Flux": "Flux",
    r"Inpaint": "an inpainting model",
    r"InstructPix2Pix": "InstructPix2Pix",
    r"Depth2Img": "a depth model",
    r"Upscale": "an upscaler",
    r"UnCLIP|ImageVariation": "Stable Diffusion unCLIP",
    r"LatentConsistency": "a latent consistency model",
    r"ControlNet": "a ControlNet",
    r"^(?!.*(StableDiffusion|AltDiffusion))": "no Stable Diffusion",
}  # by a pattern of the pipeline that a folder names
OTHER_SCHEDULERS = {r"^EDM": "a model of EDM's noise (Playground 2.5)", r"Flow": "a flow-matching model"}
OTHER_SETTINGS = {
    "class_embed_type": "Stable Diffusion unCLIP or another model that wants a class",
    "num_class_embeds": "a model that wants a class",
    "time_cond_proj_dim": "a latent consistency model",
    "encoder_hid_dim_type": "a model that reads more than text",
}  # of a UNet's configuration; those of ours have none
STRANGERS = {
    r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.|single_transformer_blocks\.": "Flux",
    r"\.lora_(up|down|A|B)\b|^lora_": "a LoRA, which belongs to --lora_path or --init_lora",
    r"^control_model\.|controlnet_cond_embedding|input_hint_block": "a ControlNet",
    r"^(emb_params|string_to_param\b.*|clip_[lg])$": "an embedding (textual inversion)",
    r"^(encoder|decoder)\.(down|up|mid|conv_in|down_blocks|up_blocks)\b": "a VAE alone",
    r"^text_model\.": "a text encoder alone",
    r"^(conv_in|down_blocks)\.": "a UNet alone, in diffusers' names",
    r"^input_blocks\.": "a UNet alone, without text encoder and VAE",
}  # by a pattern of keys; for files without a UNet of Stable Diffusion's


def kind_of_file(shapes: Shapes) -> Kind | str:
    """The kind of a single file with these tensors; for one that is none of ours, what it is, in the user's
    words: "an inpainting model".
    """
    if FIRST not in shapes:
        return _stranger(shapes)
    width = next((_side(shapes, key, 1) for key in shapes if key.endswith("attn2.to_k.weight")), 0)
    if name := _named(RELATIVES, shapes) or _relative(shapes, width):
        return name
    if width not in HEADERS or _side(shapes, FIRST, 1) != 4:
        return UNKNOWN
    found = HEADERS[width]
    tensors = sum(key.startswith(UNET_KEY) for key in shapes)
    if _depths(shapes) != found.depths or _side(shapes, ADDED, 1) != found.added:
        return DISTILLED.get(_depths(shapes), f"a distilled or altered {found.kind.name}")
    if lacking := _lacking_part(shapes, found.kind):
        return lacking
    if tensors != found.tensors:
        return f"a damaged or altered {found.kind.name} (its UNet has {tensors} tensors, not {found.tensors})"
    return found.kind


def _side(shapes: Shapes, key: str, axis: int) -> int:
    """The length of a tensor along an axis; 0 where there is none."""
    return (*shapes.get(key, ()), 0, 0)[axis]


def _named(patterns: Mapping[str, str], shapes: Shapes) -> str | None:
    names = "\n".join(shapes)
    return next((name for pattern, name in patterns.items() if re.search(pattern, names, re.MULTILINE)), None)


def _relative(shapes: Shapes, width: int) -> str | None:
    """What a file is whose UNet is built as ours are, but for other work; width: of the text it reads."""
    return (
        OTHER_INPUTS.get(_side(shapes, FIRST, 1))
        or OTHER_FEATURES.get(_side(shapes, FIRST, 0))
        or OTHER_WIDTHS.get(width)
        or OTHER_ADDED.get(_side(shapes, ADDED, 1))
    )


def _depths(shapes: Shapes) -> tuple[int, int]:
    """How many transformers stand one behind the other in input blocks 4 and 7."""
    four, seven = (
        {found[1] for found in map(re.compile(_TRANSFORMER.format(block)).match, shapes) if found}
        for block in (4, 7)
    )
    return len(four), len(seven)


_TRANSFORMER = re.escape(UNET_KEY) + r"input_blocks\.{}\.1\.transformer_blocks\.(\d+)\."


def _lacking_part(shapes: Shapes, kind: Kind) -> str | None:
    """What a file is that has a UNet of this kind, but lacks another part."""
    has_vae = any(key.startswith(VAE_KEY) for key in shapes)
    has_text = all(any(key.startswith(encoder.key) for key in shapes) for encoder in kind.encoders)
    if has_vae and has_text:
        return None
    if has_vae:
        return f"a {kind.name} without its text encoder"
    if has_text:
        return f"a {kind.name} without its VAE"
    return "a UNet alone, without text encoder and VAE"


def _stranger(shapes: Shapes) -> str:
    if name := _named(STRANGERS, shapes):
        return name
    only_vae = all(key.startswith(VAE_KEY) for key in shapes)
    return "a VAE alone" if shapes and only_vae else UNKNOWN


def other_pipeline(name: str) -> str | None:
    """What a folder is that names this class of diffusers for its pipeline; None if it may be ours."""
    return next((told for pattern, told in OTHER_CLASSES.items() if re.search(pattern, name)), None)


def other_parts(unet: Mapping[str, Any], scheduler: Mapping[str, Any], vae: Mapping[str, Any]) -> str | None:
    """What a folder is with parts of these configurations; None if they may be ours."""
    name = str(scheduler.get("_class_name"))
    for pattern, told in OTHER_SCHEDULERS.items():
        if re.search(pattern, name):
            return told
    if vae.get("latents_mean"):
        return "a model whose VAE has means of its own (Playground 2.5)"
    depths = unet.get("transformer_layers_per_block")
    if unet.get("cross_attention_dim") == XL.text_width and depths not in (None, XL_DEPTHS):
        return DISTILLED.get(
            tuple(depths[1:]) if isinstance(depths, list) else (), "a distilled or altered XL"
        )
    return next((told for key, told in OTHER_SETTINGS.items() if unet.get(key) is not None), None)
