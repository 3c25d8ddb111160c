"""An adapter's tensors under every tool's names.

Layouts (module `down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`):
    PEFT       base_model.model.<dotted>.lora_A.weight, .lora_B.weight    alpha in adapter_config.json
    kohya      lora_unet_<underscored>.lora_down.weight, .lora_up.weight  .alpha, a scalar a module
    diffusers  unet.<dotted>.lora_A.weight, .lora_B.weight                alpha in the file's metadata
    LDM        diffusion_model.<dotted>, the UNet's own names of before diffusers; only read
In kohya's of Stable Diffusion XL, LDM's names are underscored: all tools know those, and not all diffusers'.
A text encoder is lora_te (XL: lora_te1, lora_te2), text_encoder. or text_encoder_2.; PEFT gives it a folder.
DoRA's magnitudes: .lora_magnitude_vector (PEFT, diffusers; PEFT's shapes), .dora_scale (kohya; one a row).
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megaman.common.console import Exit, UserError
from megaman.common.kinds import SD1, UNET, Kind
from megaman.lora.adapter import Adapter, Component, Key, LoraLayer, underscored
from megaman.lora.names import canonical, ldm_name, live_name

_LENGTHS = "lora_magnitude_vector"


def kind_of(adapter: Adapter) -> Kind:
    """The kind whose names its files get: Stable Diffusion 1.x's are everybody's, where it is not known."""
    return adapter.kind or SD1


def peft_tensors(part: Adapter) -> dict[str, Tensor]:
    """PEFT's keys, float32, of an adapter of one part: they do not tell which."""
    kind = kind_of(part)
    return _dotted(part, lambda component, name: f"base_model.model.{live_name(component, name, kind)}")


def diffusers_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """diffusers' keys, float32. Of text encoders transformers reads them, which wants .weight behind DoRA's
    lengths.
    """
    tensors = _dotted(adapter, lambda component, name: f"{component}.{name}")
    return {
        f"{key}.weight" if key.endswith(_LENGTHS) and not key.startswith(f"{UNET}.") else key: tensor
        for key, tensor in tensors.items()
    }


def _dotted(adapter: Adapter, called: Callable[[Component, str], str]) -> dict[str, Tensor]:
    tensors = {}
    for key, layer in adapter.layers.items():
        name = called(*key)
        tensors[f"{name}.lora_A.weight"] = layer.down.float().contiguous()
        tensors[f"{name}.lora_B.weight"] = layer.up.float().contiguous()
        if layer.magnitude is not None:
            tensors[f"{name}.{_LENGTHS}"] = _as_pefts(layer.magnitude)
    return tensors


def _as_pefts(magnitude: Tensor) -> Tensor:
    """(out,1) -> (out,); (out,1,1,1) -> (1,out,1,1)."""
    lengths = magnitude.float()
    return (lengths.flatten() if lengths.ndim == 2 else lengths.transpose(0, 1)).contiguous()


def kohya_name(component: Component, name: str, kind: Kind) -> str:
    """A module as kohya's files of the kind name it."""
    if component != UNET:
        return f"{kind.encoder(component).prefix}_{underscored(name)}"
    return f"lora_unet_{underscored(ldm_name(name, kind) if kind.has_ldm_names else name)}"


def kohya_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """kohya's keys, float16, with each module's true alpha. DoRA's magnitudes stay float32: they are near 1,
    so a rounding there is as large as what was learned.

    UserError (exit 5) on a number that float16 can't hold.
    """
    tensors = {}
    for (component, name), layer in adapter.layers.items():
        key = kohya_name(component, name, kind_of(adapter))
        layer = layer.balanced()
        tensors[f"{key}.lora_down.weight"] = layer.down.half().contiguous()
        tensors[f"{key}.lora_up.weight"] = layer.up.half().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            tensors[f"{key}.dora_scale"] = layer.magnitude.float().contiguous()
        if not all(tensors[f"{key}.lora_{part}.weight"].isfinite().all() for part in ("down", "up")):
            raise UserError(
                f"{name}: its numbers are too large for float16; lower --learning_rate", Exit.NUMBERS
            )
    return tensors


def first_layer(adapter: Adapter) -> LoraLayer:
    """One of the adapter's layers, for its rank and alpha: what we train has the same in all."""
    return next(iter(adapter.layers.values()))


def peft_config(part: Adapter) -> dict[str, Any]:
    """adapter_config.json of an adapter of one part: the fields that PEFT needs; it fills the others with its
    defaults. rsLoRA is told as the alpha that it comes to, which every version of PEFT reads alike.
    """
    layer = first_layer(part)
    kind = kind_of(part)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "use_dora": part.is_dora,
        "target_modules": sorted(live_name(*key, kind) for key in part.layers),
        "base_model_name_or_path": part.metadata.get("base"),
    }


def diffusers_metadata(adapter: Adapter) -> dict[str, str]:
    """The strength of a file in diffusers' layout, as its loader expects it."""
    wanted = ("r", "lora_alpha", "use_dora", "target_modules")
    told: dict[str, Any] = {}
    for component in adapter.components:
        config = peft_config(adapter.only(component))
        told |= {f"{component}.{name}": config[name] for name in wanted}
    return {"lora_adapter_metadata": json.dumps(told)}


# ---------------------------------------------------------------- whose key is it?
_PARTS = {
    r"\.lora_down\.weight": "down",  # kohya
    r"\.lora_up\.weight": "up",
    r"\.alpha": "alpha",
    r"\.dora_scale": "dora_scale",
    r"\.lora_A\.weight": "down",  # PEFT, and diffusers since 0.2x
    r"\.lora_B\.weight": "up",
    r"\.lora_magnitude_vector(\.weight)?": "magnitude",
    r"\.lora\.down\.weight": "down",  # diffusers
    r"\.lora\.up\.weight": "up",
    r"_lora\.down\.weight": "down",  # diffusers' attention processors
    r"_lora\.up\.weight": "up",
    r"\.lora_linear_layer\.down\.weight": "down",  # diffusers' text encoders
    r"\.lora_linear_layer\.up\.weight": "up",
    r"\.diff": "difference",  # ComfyUI's, of a norm
    r"\.diff_b": "bias",
    r"\.w_norm": "difference",  # LyCORIS's
    r"\.b_norm": "bias",
}
_HOMES: dict[str, Component] = {
    r"base_model\.model\.(?=(text_model\.)?encoder\.layers\.|text_projection\.)": "text_encoder",
    r"base_model\.model\.": "unet",
    r"lora_unet[._]": "unet",
    r"lora_te1?[._]": "text_encoder",
    r"lora_te2[._]": "text_encoder_2",
    r"unet\.": "unet",
    r"text_encoder\.": "text_encoder",
    r"text_encoder_2\.": "text_encoder_2",
    r"(model\.)?diffusion_model\.": "unet",  # ComfyUI, OneTrainer's COMFY
    r"(text_encoders\.)?clip_[lh]\.(transformer\.)?": "text_encoder",
    r"(text_encoders\.)?clip_g\.(transformer\.)?": "text_encoder_2",
    r"cond_stage_model\.transformer\.": "text_encoder",  # as in a checkpoint of LDM's
    r"conditioner\.embedders\.0\.transformer\.": "text_encoder",
    r"(?=(down_blocks|mid_block|up_blocks)\.)": "unet",  # of the first trainers: nothing before the module
    r"(?=(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.)": "unet",  # so OneTrainer
}


def split_key(key: str) -> tuple[Key, str] | None:
    """The module, as an Adapter's keys name it, and the part of it that a key names; None if it is no LoRA's.
    A text encoder in PEFT's layout counts as the first.
    """
    key = re.sub(r"\.default(?=\.weight$|$)", "", key)  # PEFT's own dictionary, saved as it was
    home = next((home for home in _HOMES if re.match(home, key)), None)
    part = next((part for part in _PARTS if re.search(f"{part}$", key)), None)
    if home is None or part is None:
        return None
    component, kind = _HOMES[home], _PARTS[part]
    name = re.sub(f"{part}$", "", re.sub(f"^{home}", "", key)).replace(".processor.", ".")
    name = re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", name)
    name = canonical(component, name)
    if kind == "bias":
        return (component, f"{name}.bias" if "." in name else f"{name}_bias"), "difference"
    return (component, name), kind


# ---------------------------------------------------------------- files of other kinds
_ADAPTER = "is {}, which is not read; take a LoRA, LoCon or DoRA, or draw with it in A1111, Forge or ComfyUI."
_BASE = "is {}; here only those of Stable Diffusion 1.x, 2.x and XL can be used."
_THING = "is {} and no LoRA; name a LoRA's file."
_FOREIGN = {
    r"\.hada_[wt]\d": _ADAPTER.format("a LoHa"),
    r"\.lokr_[wt]\d": _ADAPTER.format("a LoKr"),
    r"(oft_blocks|oft_diag|oft_R)\b|^oft_": _ADAPTER.format("an OFT (kohya's, LyCORIS's diag-OFT or BOFT)"),
    r"\.([ab][12]|bm)\.weight$": _ADAPTER.format("a GLoRA"),
    r"\.on_input$|\.ia3_l\b": _ADAPTER.format("an (IA)^3"),
    r"\.lora_mid\.weight$": _ADAPTER.format("a LoCon with a core between its factors (use_tucker, use_cp)"),
    r"\bvera_lambda_": _ADAPTER.format("a VeRA"),
    r"\.(lambda|[pq])_layer\b": _ADAPTER.format("a T-LoRA"),
    r"^bundle_emb\.": "holds an embedding beside its LoRA (OneTrainer's bundle), which is not read; save the "
    "LoRA without it.",
    r"^(lllite_|control_model\.|controlnet_|input_hint_block\.)|\.lllite_": _THING.format("a ControlNet"),
    r"^(ip_adapter|image_proj)\.": _THING.format("an IP-Adapter"),
    r"^(emb_params|string_to_param\b.*|clip_[lg]|<.*>)$": _THING.format("an embedding (textual inversion)"),
    r"double_blocks|single_blocks|single_transformer_blocks": _BASE.format("a LoRA for Flux"),
    r"joint_blocks|lora_te3_|\bt5xxl\b|^(lora_)?transformer[._]": _BASE.format(
        "a LoRA for Stable Diffusion 3, Flux or another transformer"
    ),
    r"^(model\.diffusion_model|\w+_stage_model|conditioner)\.(?!.*lora[._]).*\.(weight|bias)$": (
        "is a whole model and no LoRA; name it with --base_model, and a LoRA's file here."
    ),
    r"^(conv_in|conv_out|(down_blocks|encoder|decoder)\.(?!.*lora).*)\.(weight|bias)$": _THING.format(
        "a model of its own (UNet, VAE or text encoder)"
    ),
}


def foreign_kind(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, and what to do; None if it may be a LoRA for Stable Diffusion."""
    names = "\n".join(keys)
    found = (told for pattern, told in _FOREIGN.items() if re.search(pattern, names, re.MULTILINE))
    return next(found, None)
