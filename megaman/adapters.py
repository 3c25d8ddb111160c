"""LoRA adapters in every tool's layout: key names, alpha, metadata, writing, reading, merging. Knows what
each tool calls a module.

Layouts (module `down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`; A is "down", B is "up", and B @
A * alpha / rank is added to the weight):
    PEFT       base_model.model.<dotted>.lora_A.weight, .lora_B.weight      alpha in adapter_config.json
    kohya      lora_unet_<underscored>.lora_down.weight, .lora_up.weight    .alpha, a scalar a module
    diffusers  unet.<dotted>.lora_A.weight or .lora.down.weight, …          alpha in the file's metadata, else
    rank
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megaman.errors import MODEL, NUMBERS, UserError
from megaman.files import replacing, save_tensors, write_text

if TYPE_CHECKING:
    pass

ADAPTER_NAME = "default"  # PEFT's own name for the only adapter
KOHYA_FILE = "megaman_lora.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
CHECKPOINT_FILE = "adapter.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OURS = "megaman"  # our key in a file's metadata: JSON of trigger, base, resolution and configuration
Component = Literal["unet", "text_encoder"]


def underscored(name: str) -> str:
    """A module's path as kohya writes it."""
    return name.replace(".", "_")


@dataclass(frozen=True)
class LoraLayer:
    """One module's update. down (r,in) or (r,in,kh,kw); up (out,r) or (out,r,1,1)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """What the layer adds to its module's weight at strength 1, float32: (out,in) or (out,in,kh,kw)."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * (self.alpha / self.rank)).reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Adapter:
    """A LoRA apart from any model.

    Layers are keyed by component and module path; files that only say underscores keep them.
    """

    layers: Mapping[tuple[Component, str], LoraLayer]
    metadata: Mapping[str, Any] = field(
        default_factory=dict
    )  # what we know of it: trigger, base, resolution, configuration

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that name these weights, whatever file they came from."""
        total = hashlib.sha256()
        for (component, name), layer in sorted(
            self.layers.items(), key=lambda item: (item[0][0], underscored(item[0][1]))
        ):
            total.update(f"{component} {underscored(name)} {layer.alpha:.6g}".encode())
            total.update(
                layer.down.half().contiguous().numpy().tobytes()
                + layer.up.half().contiguous().numpy().tobytes()
            )
        return total.hexdigest()[:12]


# ---------------------------------------------------------------- from the live model


def lora_modules(unet: nn.Module) -> dict[str, nn.Module]:
    """The modules that PEFT has wrapped, by their path in the plain model."""
    return {
        name: module for name, module in unet.named_modules() if ADAPTER_NAME in getattr(module, "lora_A", {})
    }


def adapter_of(unet: nn.Module, metadata: Mapping[str, Any] | None = None) -> Adapter:
    """A float32 copy, on the CPU, of the adapter that is being trained.

    The real alpha is scaling x rank, rsLoRA's too.
    """
    layers: dict[tuple[Component, str], LoraLayer] = {}
    for name, module in lora_modules(unet).items():
        down, up = (
            getattr(module, part)[ADAPTER_NAME].weight.detach().float().cpu().clone()
            for part in ("lora_A", "lora_B")
        )
        layers["unet", name] = LoraLayer(down, up, float(module.scaling[ADAPTER_NAME]) * down.shape[0])
    adapter = Adapter(layers, metadata or {})
    _check_finite(adapter, "the adapter in training", NUMBERS)
    return adapter


# ---------------------------------------------------------------- writing


def write_adapter(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes lora_weights/: the PEFT pair in float32, and the kohya layout in float16 under both of its
    names. UserError if a number isn't finite.
    """
    pair, kohya, same = folder / PEFT_FILE, folder / KOHYA_FILE, folder / DIFFUSERS_FILE
    write_text(folder / PEFT_CONFIG, json.dumps(_peft_config(adapter), indent=2, sort_keys=True) + "\n")
    save_tensors(peft_tensors(adapter), pair, _our_metadata(adapter))  # without its strength it is of no use
    write_kohya(adapter, kohya)
    with replacing(same) as partial:
        partial.write_bytes(kohya.read_bytes())
    return [pair, folder / PEFT_CONFIG, kohya, same]


def write_kohya(adapter: Adapter, path: Path) -> None:
    """One file in kohya's layout, float16."""
    save_tensors(kohya_tensors(adapter), path, _our_metadata(adapter) | _kohya_metadata(adapter))


def _our_metadata(adapter: Adapter) -> dict[str, str]:
    return {"format": "pt", OURS: json.dumps(adapter.metadata, sort_keys=True)}


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's keys, float32."""
    tensors = {}
    for (_, name), layer in adapter.layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down.float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up.float().contiguous()
    return tensors


def kohya_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """kohya's keys, float16, with each module's true alpha.

    UserError (exit 5) on a number that float16 can't hold.
    """
    tensors = {}
    for (_, name), layer in adapter.layers.items():
        key = f"lora_unet_{underscored(name)}"
        tensors[f"{key}.lora_down.weight"] = layer.down.half().contiguous()
        tensors[f"{key}.lora_up.weight"] = layer.up.half().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
        if not all(tensors[f"{key}.lora_{part}.weight"].isfinite().all() for part in ("down", "up")):
            raise UserError(f"{name}: its numbers are too large for float16; lower --learning_rate", NUMBERS)
    return tensors


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json: the fields that PEFT needs; it fills the others with its defaults."""
    layer = next(iter(adapter.layers.values()))
    targets = sorted(name for _, name in adapter.layers)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "target_modules": targets,
        "base_model_name_or_path": adapter.metadata.get("base"),
    }


def _kohya_metadata(adapter: Adapter) -> dict[str, str]:
    """What A1111, Forge, ComfyUI's info nodes and Civitai show. All values are strings."""
    layer = next(iter(adapter.layers.values()))
    known = adapter.metadata
    side, settings = known.get("resolution"), known.get("config", {})
    text = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": layer.rank,
        "ss_network_alpha": layer.alpha,
        "ss_output_name": "megaman_lora",
        "ss_sd_model_name": known.get("base"),
        "ss_resolution": f"({side}, {side})",
        "ss_steps": known.get("steps"),
        "ss_learning_rate": settings.get("learning_rate"),
        "ss_seed": settings.get("seed"),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "megaman_lora",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.trigger_phrase": known.get("trigger"),
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": known.get("prediction_type"),
    }
    if (
        known.get("text_width") == 768
    ):  # Stable Diffusion 1.x; other tools know no relative of the embedded base
        text |= {
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "modelspec.architecture": "stable-diffusion-v1/lora",
        }
    return {key: str(value) for key, value in text.items() if value is not None}


# ---------------------------------------------------------------- reading


def read_adapter(path: Path) -> Adapter:
    """The adapter in a folder (PEFT's pair first) or in a .safetensors file of any of the three layouts.

    UserError (exit 4) with the reason if there is none.
    """
    file = _file_of(path)
    tensors, header = _load(file)
    layers = _grouped(tensors, _strengths_of(file, header), file)
    if not layers:
        raise UserError(
            f"{file}: holds no LoRA keys of kohya, diffusers or PEFT; is it a LoRA for Stable Diffusion?",
            MODEL,
        )
    adapter = Adapter(layers, _known(header, file))
    _check_finite(adapter, str(file), MODEL)
    if not any(layer.alpha and layer.down.any() and layer.up.any() for layer in layers.values()):
        raise UserError(f"{file}: changes nothing: every update or alpha is 0. Train it longer.", MODEL)
    return adapter


def _known(header: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What our metadata tells; empty for a file that is not ours. UserError if it was tampered with."""
    try:
        known = json.loads(header.get(OURS, "{}"))
        if not isinstance(known, dict):
            raise ValueError("no names and values")
        for name, (kind, is_sound) in _KNOWN.items():
            if name in known and not (isinstance(known[name], kind) and is_sound(known[name])):
                raise ValueError(name)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: its metadata is damaged ({str(error)[:100]}). Copy or train it again.", MODEL
        ) from error
    return known


def _is_text(text: str) -> bool:
    return len(text) < 1000 and not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text)


_KNOWN = {  # what generation takes over, and what it may be
    "base": (str, _is_text),
    "trigger": (str, _is_text),
    "resolution": (int, lambda side: 1 <= side <= 8192),
    "guidance_scale": (float, lambda scale: 0 <= scale < math.inf),
}


def _file_of(path: Path) -> Path:
    if path.is_dir():
        for name in (PEFT_FILE, KOHYA_FILE, DIFFUSERS_FILE, CHECKPOINT_FILE):
            if (path / name).is_file():
                return path / name
        raise UserError(
            f"{path}: no adapter in this folder ({PEFT_FILE} or {KOHYA_FILE}). Train first: python "
            "megaman_lora.py --preset demo",
            MODEL,
        )
    if not path.exists():
        raise UserError(
            f"{path}: no such adapter. Train first (python megaman_lora.py --preset demo), or name one "
            "with --lora_path.",
            MODEL,
        )
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: only .safetensors adapters are read; pickle files (.bin, .ckpt, .pt) can run code. "
            "Convert it first.",
            MODEL,
        )
    return path


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({' '.join(str(error).split())[:100]}). Copy or train "
            "it again.",
            MODEL,
        ) from error


@dataclass(frozen=True)
class _Strengths:
    """alpha of each module of a layout that does not write it beside the tensors.

    Fields as in PEFT's LoraConfig.
    """

    alpha: float | None = None  # None: as large as the rank
    is_rslora: bool = False
    patterns: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str, rank: int) -> float:
        """The plain alpha (that of alpha / rank) of a module."""
        matching = (alpha for key, alpha in self.patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        alpha = next(matching, rank if self.alpha is None else self.alpha)
        return float(alpha) * (math.sqrt(rank) if self.is_rslora else 1.0)


def _strengths_of(file: Path, header: Mapping[str, str]) -> dict[str, _Strengths]:
    """By component: what adapter_config.json beside a PEFT file says, or diffusers' metadata inside the
    file.
    """
    peft_config = file.with_name(PEFT_CONFIG)
    try:
        if file.name == PEFT_FILE:
            return {"unet": _strengths(json.loads(peft_config.read_text(encoding="utf-8")))}
        settings = json.loads(header.get("lora_adapter_metadata", "{}"))
        components = {key.split(".")[0] for key in settings}
        return {
            component: _strengths(
                {
                    key.partition(".")[2]: value
                    for key, value in settings.items()
                    if key.startswith(f"{component}.")
                }
            )
            for component in components
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        where = peft_config if file.name == PEFT_FILE else file
        raise UserError(
            f"{where}: missing or damaged ({type(error).__name__}), so the adapter's strength is unknown. "
            "Copy it again.",
            MODEL,
        ) from error


def _strengths(settings: Mapping[str, Any]) -> _Strengths:
    patterns = {name: float(alpha) for name, alpha in dict(settings.get("alpha_pattern") or {}).items()}
    for name in patterns:  # libraries write plain names; a repetition could keep the matching busy for ever
        if not re.fullmatch(r"[\w.^$|]*", name):
            raise ValueError(name)
    return _Strengths(float(settings["lora_alpha"]), bool(settings.get("use_rslora")), patterns)


_SUFFIXES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
_PREFIXES = {
    "base_model.model.": "unet",
    "lora_unet_": "unet",
    "unet.": "unet",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
    "text_encoder.": "text_encoder",
}


def _grouped(
    tensors: Mapping[str, Tensor], strengths: Mapping[str, _Strengths], file: Path
) -> dict[tuple[Component, str], LoraLayer]:
    """Layers from keys of any layout.

    A key that no layout has, or half a pair, is an error: nothing is dropped in silence.
    """
    parts: dict[tuple[Component, str], dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if prefix is None or suffix is None:
            strange.append(key)
            continue
        name = key.removeprefix(prefix).removesuffix(suffix).replace(".processor.", ".")
        parts.setdefault((_PREFIXES[prefix], name), {})[_SUFFIXES[suffix]] = tensor
    halves = [name for (_, name), part in parts.items() if not {"down", "up"} <= part.keys()]
    if parts and (strange or halves):
        raise UserError(
            f"{file}: {len(strange) + len(halves)} of its keys can't be placed, such as "
            f"{(strange + halves)[0][:100]!r}; this kind of adapter is not supported.",
            MODEL,
        )
    return {
        key: _layer(key[1], part, strengths.get(key[0], _Strengths()), file) for key, part in parts.items()
    }


def _layer(name: str, part: Mapping[str, Tensor], strengths: _Strengths, file: Path) -> LoraLayer:
    if any(tensor.is_complex() for tensor in part.values()):
        raise UserError(f"{file}: {name} holds complex numbers, which no LoRA does.", MODEL)
    down, up = (part[half] if part[half].itemsize > 1 else part[half].float() for half in ("down", "up"))
    is_pair = down.ndim in (2, 4) and up.ndim == down.ndim and up.shape[1] == down.shape[0]
    if not is_pair or 0 in (*down.shape, *up.shape) or up.shape[2:].numel() != 1:
        raise UserError(
            f"{file}: {name} has shapes {tuple(down.shape)} and {tuple(up.shape)}, which make no pair.", MODEL
        )
    if "alpha" in part and part["alpha"].numel() != 1:
        raise UserError(f"{file}: {name} has {part['alpha'].numel()} alphas; one is its strength.", MODEL)
    alpha = part["alpha"].item() if "alpha" in part else strengths.of(name, down.shape[0])
    return LoraLayer(down, up, float(alpha))


def _check_finite(adapter: Adapter, where: str, exit_code: int) -> None:
    for (_, name), layer in adapter.layers.items():
        if not (layer.down.isfinite().all() and layer.up.isfinite().all() and math.isfinite(layer.alpha)):
            raise UserError(
                f"{where}: {name} holds NaN or infinite numbers; it would draw black pictures. Train "
                "again with a lower --learning_rate.",
                exit_code,
            )
