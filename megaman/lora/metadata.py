"""What an adapter tells about itself to other tools and to people: the metadata inside its file, its model
card, A1111's sidecar and preview. Nothing here names a path or the user.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from megaman.common.files import LEGACY_AT, LEGACY_SIZE, replacing, with_metadata, write_text
from megaman.common.html import render
from megaman.common.kinds import SD1, UNET, V_PREDICTION, kind_of_width
from megaman.config.train import EMBEDDED
from megaman.lora.adapter import STRENGTH, Adapter
from megaman.lora.formats import first_layer, kind_of

NAME = "megaman_lora"
THUMBNAIL_PX = 256
PICTURE = {"card": "README.md", "sidecar": f"{NAME}.json", "preview": f"{NAME}.preview.png"}
_OF_PICTURES = ("ss_dataset_dirs", "ss_tag_frequency", "ss_bucket_info")
HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x" + "0" * 64}


# ---------------------------------------------------------------- inside the file


def our_metadata(adapter: Adapter, ours: str, kind: str) -> dict[str, str]:
    """The metadata of a file that generate_megaman.py reads: base, trigger, size, guidance, configuration.

    ours, kind: our key there, and in it the one that says the base's kind where its width does not.
    """
    told = {key: value for key, value in adapter.metadata.items() if key not in ("dataset", "hashes", kind)}
    if kind_of(adapter) is not SD1 and kind_of_width(told.get("text_width")) is None:
        told[kind] = kind_of(adapter).folder
    return {"format": "pt", ours: json.dumps(told, sort_keys=True)}


def kohya_metadata(adapter: Adapter, preview: Path | None = None) -> dict[str, str]:
    """What A1111, Forge, ComfyUI's info nodes and Civitai show. All values are strings."""
    known = adapter.metadata
    values = _network(adapter) | _training(known) | _data(known) | _modelspec(known) | known.get("hashes", {})
    if preview is not None:
        values["modelspec.thumbnail"] = thumbnail(preview)
    return {key: str(value) for key, value in values.items() if value is not None}


def _network(adapter: Adapter) -> dict[str, Any]:
    layer = first_layer(adapter)
    arguments: dict[str, Any] = {}
    if any(name.endswith(("conv1", "conv2", "conv_shortcut")) for _, name in adapter.layers):
        arguments |= {"conv_dim": layer.rank, "conv_alpha": layer.alpha}
    if adapter.is_dora:
        arguments |= {"algo": "locon", "dora_wd": "True", "wd_on_output": "True"}
    return {
        "ss_output_name": NAME,
        "ss_network_module": "lycoris.kohya" if adapter.is_dora else "networks.lora",
        "ss_network_dim": layer.rank,
        "ss_network_alpha": layer.alpha,
        "ss_network_args": json.dumps(arguments) if arguments else None,
    }


def _training(known: Mapping[str, Any]) -> dict[str, Any]:
    settings, side = known.get("config", {}), known.get("resolution")
    names = {
        "ss_learning_rate": "learning_rate",
        "ss_unet_lr": "learning_rate",
        "ss_lr_scheduler": "lr_scheduler",
        "ss_lr_warmup_steps": "lr_warmup_steps",
        "ss_seed": "seed",
        "ss_noise_offset": "noise_offset",
        "ss_min_snr_gamma": "snr_gamma",
        "ss_max_grad_norm": "max_grad_norm",
        "ss_caption_dropout_rate": "caption_dropout",
        "ss_network_dropout": "lora_dropout",
        "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
        "ss_gradient_checkpointing": "gradient_checkpointing",
        "ss_max_train_steps": "max_train_steps",
        "ss_mixed_precision": "mixed_precision",
        "ss_batch_size_per_device": "train_batch_size",
        "ss_shuffle_caption": "shuffle_tags",
        "ss_keep_tokens": "keep_tags",
        "ss_flip_aug": "flip",
    }
    values = {shown: settings.get(name) for shown, name in names.items()}
    kind = kind_of_width(known.get("text_width"))  # other tools know no relative of the embedded base
    if kind is not None:
        version = kind.called(known.get("prediction_type"))[0]
        values |= {"ss_base_model_version": version, "ss_v2": version.startswith("sd_v2")}
    return values | {
        "ss_sd_model_name": known.get("base"),
        "ss_text_encoder_lr": settings.get("text_encoder_lr") or None,  # 0: they are not trained
        "ss_v_parameterization": True if known.get("prediction_type") == V_PREDICTION else None,
        "ss_zero_terminal_snr": True if known.get("zero_snr") else None,
        "ss_clip_skip": _text_layer(known),
        "ss_resolution": f"({side}, {side})" if side else None,
        "ss_steps": known.get("steps"),
        "ss_optimizer": settings.get("optimizer", "adamw"),
        "ss_trigger_words": known.get("trigger"),
        "ss_training_comment": "trained by megaman_lora.py; its configuration stands in the field megaman",
    }


def _text_layer(known: Mapping[str, Any]) -> int:
    """The layer of the text encoder that is read, counted from the end: 1 is the last."""
    return -(kind_of_width(known.get("text_width")) or SD1).encoders[0].layer


def _data(known: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures, as JSON objects: A1111 walks their items."""
    facts = known.get("dataset")
    if facts is None:
        return {}
    return {
        "ss_num_train_images": sum(f["n_repeats"] * f["img_count"] for f in facts["folders"].values()),
        "ss_dataset_dirs": json.dumps(facts["folders"], ensure_ascii=False),
        "ss_tag_frequency": json.dumps(facts["tags"], ensure_ascii=False),
        "ss_bucket_info": json.dumps({"buckets": facts["buckets"]}),
        "ss_masked_loss": True if facts.get("masked") else None,
    }


def facts_in(header: Mapping[str, str]) -> dict[str, Any]:
    """What `kohya_metadata` has written of the pictures and of the base's file, as an adapter's metadata has
    it; nothing of a file that another tool has made.
    """
    read = {key: json.loads(header.get(key, "{}")) for key in _OF_PICTURES}
    folders, tags, sizes = (read[key] for key in _OF_PICTURES)
    hashes = {key: header[key] for key in ("ss_sd_model_hash", "ss_new_sd_model_hash") if key in header}
    if not (folders and tags and sizes):
        return {"hashes": hashes}
    return {"hashes": hashes, "dataset": {"folders": folders, "tags": tags, "buckets": sizes["buckets"]}}


def _modelspec(known: Mapping[str, Any]) -> dict[str, Any]:
    side, trigger = known.get("resolution"), known.get("trigger")
    kind = kind_of_width(known.get("text_width"))
    prediction = known.get("prediction_type")
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": None if kind is None else f"{kind.called(prediction)[1]}/lora",
        "modelspec.implementation": (kind or SD1).implementation,
        "modelspec.title": NAME,
        "modelspec.description": f"A LoRA of {trigger} on {known.get('base')}" if trigger else None,
        "modelspec.resolution": f"{side}x{side}" if side else None,
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": f"begin the prompt with: {trigger}" if trigger else None,
        "modelspec.tags": trigger,
        "modelspec.prediction_type": "v" if prediction == V_PREDICTION else prediction,
        "modelspec.encoder_layer": _text_layer(known),
    }


def thumbnail(picture: Path) -> str:
    """A small JPEG of the picture as a data URL."""
    with Image.open(picture) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_hashes(file: bytes) -> bytes:
    """The same safetensors file with the hashes of HASHES filled in: of everything behind the header, and of
    the old web UIs' stretch. They are as long as what held their place, so nothing moves.
    """
    digest = hashlib.sha256(file[8 + int.from_bytes(file[:8], "little") :]).hexdigest()
    legacy = hashlib.sha256(file[LEGACY_AT : LEGACY_AT + LEGACY_SIZE]).hexdigest()[:8]
    hashes = {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}
    return with_metadata(file, hashes)


# ---------------------------------------------------------------- beside the file


def write_companions(adapter: Adapter, folder: Path, preview: Path | None) -> list[Path]:
    """The model card, A1111's sidecar and, if a picture was drawn, its preview."""
    known = adapter.metadata
    trigger = known.get("trigger", "")
    kind = kind_of_width(known.get("text_width"))
    sidecar = {
        "description": f"{NAME}: {trigger}, trained on {known.get('base')}",
        "sd version": "Unknown" if kind is None else kind.badge,
        "activation text": trigger,
        "preferred weight": known.get(STRENGTH, 1.0),
        "negative text": "",
        "notes": f"rank {first_layer(adapter).rank}, {known.get('steps')} steps",
    }
    card, beside, picture = (folder / PICTURE[file] for file in ("card", "sidecar", "preview"))
    write_text(beside, json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    write_text(card, model_card(adapter, has_preview=preview is not None))
    if preview is None:
        return [beside, card]
    with replacing(picture) as partial:
        partial.write_bytes(preview.read_bytes())
    return [beside, card, picture]


def _counts(adapter: Adapter) -> str:
    """How many modules of each part are changed; nothing for the UNet alone."""
    components = adapter.components
    if components == (UNET,):
        return ""
    shown = {part: "UNet" if part == UNET else part for part in components}
    return ", ".join(f"{shown[part]} {len(adapter.only(part).layers)}" for part in components)


def model_card(adapter: Adapter, *, has_preview: bool) -> str:
    """README.md of the adapter's folder, in the Hugging Face hub's form."""
    known = adapter.metadata
    layer = first_layer(adapter)
    trigger = re.sub(r"[\s`|<>]+", " ", known.get("trigger", "")).strip()
    base = re.sub(r"[\s`|<>\"\\]+", " ", known.get("base") or "its base model")
    names = ("learning_rate", "lr_scheduler", "max_train_steps", "resolution", "lora_targets", "seed")
    settings = {name: known.get("config", {}).get(name) for name in names}
    return (
        render(
            "model_card.md.j2",
            trigger=trigger,
            base=base,
            is_on_hub="/" in base and base != EMBEDDED,
            is_dora=adapter.is_dora,
            modules=len(adapter.layers),
            parts=_counts(adapter),
            text_parts=[part for part in adapter.components if part != UNET],
            pipeline="StableDiffusionPipeline" if kind_of(adapter) is SD1 else "DiffusionPipeline",
            rank=layer.rank,
            alpha=f"{layer.alpha:g}",
            settings={name: value for name, value in settings.items() if value is not None},
            preview=PICTURE["preview"] if has_preview else None,
            strength=known.get(STRENGTH),
        )
        + "\n"
    )
