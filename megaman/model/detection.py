"""What a single file holds: a kind of Stable Diffusion that is trained and drawn with, or something else."""

import re
from collections.abc import Mapping

from megaman.common.kinds import SD1, Kind

Shapes = Mapping[str, tuple[int, ...]]  # of a file's tensors, by their keys

UNET = "model.diffusion_model."
FIRST, LAST = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"
OTHER_INPUTS = {
    9: "an inpainting model",
    8: "InstructPix2Pix",
    5: "a depth model",
    7: "an upscaler",
}  # channels that a UNet reads, where those to draw from noise have 4
TEXT_WIDTHS = {768: SD1}
OTHER_WIDTHS = {
    1024: "Stable Diffusion 2.x",
    1280: "Stable Diffusion XL's refiner",
    2048: "Stable Diffusion XL",
}
STRANGERS = {
    r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.|single_transformer_blocks\.": "Flux",
    r"\.lora_(up|down|A|B)\b|^lora_": "a LoRA, which belongs to --lora_path or --init_lora",
    r"^control_model\.|controlnet_cond_embedding|input_hint_block": "a ControlNet",
    r"^(emb_params|string_to_param\b.*|clip_[lg])$": "an embedding (textual inversion)",
    r"^(encoder|decoder)\.(down|up|mid|conv_in|down_blocks|up_blocks)\b": "a VAE alone",
    r"^text_model\.": "a text encoder alone",
    r"^(conv_in|down_blocks)\.": "a UNet alone, in diffusers' names",
}  # by a pattern of keys; for files without a UNet of Stable Diffusion's


def kind_of_file(shapes: Shapes) -> Kind | str:
    """The kind of a single file with these tensors; for one that is none of ours, what it is, in the user's
    words: "an inpainting model".
    """
    if FIRST not in shapes:
        return _stranger(shapes)
    channels, features = shapes[FIRST][1], shapes.get(LAST, (0, 0))[1]
    width = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), 0)
    if channels in OTHER_INPUTS:
        return OTHER_INPUTS[channels]
    if features in (0, 256) or width not in TEXT_WIDTHS:
        return OTHER_WIDTHS.get(width, "no Stable Diffusion that is known here")
    if not any(key.startswith("cond_stage_model.") for key in shapes):
        return "a UNet alone, without text encoder and VAE"
    if not any(key.startswith("first_stage_model.") for key in shapes):
        return "a model without its VAE"
    return TEXT_WIDTHS[width]


def _stranger(shapes: Shapes) -> str:
    names = "\n".join(shapes)
    found = (name for pattern, name in STRANGERS.items() if re.search(pattern, names, re.MULTILINE))
    if name := next(found, None):
        return name
    only_vae = all(key.startswith("first_stage_model.") for key in shapes)
    return "a VAE alone" if shapes and only_vae else "no Stable Diffusion that is known here"
