"""Adapter files of any tool, read by their keys: PEFT's, kohya's and diffusers' layouts, old and new, and
LDM's names. What can't be placed is refused: a key that is passed over is strength that is lost.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaman.common.console import Exit, UserError, is_text, say
from megaman.common.kinds import KINDS, PARTS, UNET, Kind, kind_of_width
from megaman.lora.adapter import STRENGTH, Adapter, Component, Key, LoraLayer, check_finite, underscored
from megaman.lora.formats import foreign_kind, split_key

ADAPTER_FILE = "adapter.safetensors"  # of a checkpoint
KOHYA_FILE = "megaman_lora.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DRAWN_WITH = "--lora_path"  # the flag that names the adapter to draw with
OURS = "megaman"  # our key in a file's metadata: JSON of trigger, base, resolution and configuration
KIND = "kind"  # in it: the folder of the base's kind, where its width does not tell
_DIFFUSERS_STRENGTH = "lora_adapter_metadata"  # diffusers' key there
_TEXT_PARTS = PARTS[1:]


def read_adapter(path: Path, flag: str = DRAWN_WITH) -> Adapter:
    """The adapter in a folder (PEFT's pair first) or in a .safetensors file of any of the three layouts.

    UserError (exit 4) with the reason if there is none. flag: how the user names another.
    """
    file = _file_of(path, flag)
    adapter = read_file(file, file.with_name(PEFT_CONFIG))
    if not (path.is_dir() and file.name == PEFT_FILE):
        return adapter
    layers = dict(adapter.layers)
    for part in _TEXT_PARTS:  # PEFT's users keep each in a folder of its own
        beside = file.parent / part / PEFT_FILE
        if beside.is_file():
            layers |= read_file(beside, beside.with_name(PEFT_CONFIG)).layers
    return replace(adapter, layers=layers, kind=_kind_in(layers, adapter.metadata))


def read_file(file: Path, peft_config: Path) -> Adapter:
    """The adapter in one file; peft_config: where the strength of a file in PEFT's layout stands."""
    tensors, header = _load(file)
    if kind := foreign_kind(tensors):
        raise UserError(f"{file}: {kind}", Exit.MODEL)
    is_peft = any(key.startswith("base_model.model.") for key in tensors)
    strengths = _peft_strength(peft_config, file) if is_peft else _diffusers_strengths(file, header)
    layers = _grouped(tensors, strengths, file)
    if not layers:
        reason = "holds no LoRA keys of kohya, diffusers or PEFT; is it a LoRA for Stable Diffusion?"
        raise UserError(f"{file}: {reason}", Exit.MODEL)
    if is_peft and file.parent.name in _TEXT_PARTS:
        layers = _moved(layers, file.parent.name)
    known = _known(header, file)
    adapter = Adapter(layers, known, _kind_in(layers, known))
    check_finite(adapter, str(file), Exit.MODEL)
    if not is_peft and not header.keys() & {OURS, _DIFFUSERS_STRENGTH} and _lacks_strength(tensors):
        _note_strength(file)
    return adapter


def _moved(layers: Mapping[Key, LoraLayer], part: Component) -> dict[Key, LoraLayer]:
    """The same with the text encoder's in this part: PEFT's keys don't tell which encoder it is."""
    return {(part if home != UNET else home, name): layer for (home, name), layer in layers.items()}


def _kind_in(layers: Mapping[Key, LoraLayer], known: Mapping[str, Any]) -> Kind | None:
    """The kind of the bases that the layers are for, by what our metadata says, else by the width of the text
    that the UNet reads, else by a part that only one kind has. None: nothing tells.
    """
    said = [kind for kind in KINDS if kind.folder == known.get(KIND)]
    widths = [layer.down.shape[1] for key, layer in layers.items() if key[0] == UNET and _reads_text(key[1])]
    by_width = [kind_of_width(width) for width in (known.get("text_width"), *widths)]
    parts = {part for part, _ in layers}
    by_part = [kind for kind in KINDS if not parts <= set().union(*(k.parts for k in KINDS if k is not kind))]
    return next((kind for kind in (*said, *by_width, *by_part) if kind is not None), None)


def _reads_text(name: str) -> bool:
    return re.search(r"attn2.to_[kv]$", name) is not None


def _lacks_strength(tensors: Iterable[str]) -> bool:
    """Whether keys of diffusers' layout come without any alpha."""
    keys = list(tensors)
    is_diffusers = any(
        re.match(r"(unet|text_encoder(_2)?|down_blocks|mid_block|up_blocks)\.", key) for key in keys
    )
    return is_diffusers and not any(key.endswith(".alpha") for key in keys)


@cache
def _note_strength(file: Path) -> None:
    """Said once a file: training reads an --init_lora more than once."""
    say(
        f"note: {file}: names no alpha, so it is taken as alpha = rank. If it was trained with another, its "
        "true strength is --lora_scale alpha/rank"
    )


def _is_text(text: str) -> bool:
    return len(text) < 10_000 and is_text(text)  # as training takes it


_KNOWN: dict[
    str, tuple[type | tuple[type, ...], Callable[[Any], bool]]
] = {  # what generation takes over, and what it may be
    "base": (str, _is_text),
    "trigger": (str, _is_text),
    "resolution": (int, lambda side: 1 <= side <= 8192),
    KIND: (str, lambda folder: folder in [kind.folder for kind in KINDS]),
    STRENGTH: ((int, float), lambda strength: 0 < strength < math.inf),
    "guidance_scale": ((int, float), lambda scale: 0 <= scale < math.inf),  # JSON writes 7.0 as 7 at times
}


def _is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _known(header: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What our metadata tells; empty for a file that is not ours. UserError if it was tampered with."""
    try:
        known = json.loads(header.get(OURS, "{}"))
        if not isinstance(known, dict):
            raise ValueError("no names and values")
        for name, (kind, is_sound) in _KNOWN.items():
            if name in known and not (_is_a(known[name], kind) and is_sound(known[name])):
                raise ValueError(name)
    except (ValueError, RecursionError) as error:
        reason = f"its metadata is damaged ({str(error)[:100]}). Copy or train it again."
        raise UserError(f"{file}: {reason}", Exit.MODEL) from error
    return known


def _another(flag: str) -> str:
    """What to do where there is no adapter."""
    train_first = "Train first (python megaman_lora.py --preset demo), or name one"
    return f"{train_first if flag == DRAWN_WITH else 'Name another'} with {flag}."


def _file_of(path: Path, flag: str) -> Path:
    if path.is_dir():
        return _file_in(path, flag)
    if not path.exists():
        raise UserError(f"{path}: no such adapter. {_another(flag)}", Exit.MODEL)
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: only .safetensors adapters are read; pickle files (.bin, .ckpt, .pt) can run code. "
            "Convert it first.",
            Exit.MODEL,
        )
    return path


def _file_in(folder: Path, flag: str) -> Path:
    """The adapter of a folder: under one of the names that tools give it, else its only .safetensors file."""
    found = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    names = (PEFT_FILE, KOHYA_FILE, DIFFUSERS_FILE, ADAPTER_FILE)
    known = [folder / name for name in names if folder / name in found]
    if known or len(found) == 1:
        return [*known, *found][0]
    if found:
        listed = ", ".join(file.name for file in found[:5])
        raise UserError(
            f"{folder}: holds {len(found)} adapters ({listed}); name the file you want.", Exit.MODEL
        )
    none = f"no adapter in this folder ({PEFT_FILE} or {KOHYA_FILE})"
    raise UserError(f"{folder}: {none}. {_another(flag)}", Exit.MODEL)


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        file.open("rb").close()  # safetensors calls a file missing that may not be read
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except PermissionError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{file}: not a whole safetensors file ({reason}). Copy or train it again.", Exit.MODEL
        ) from error


# ---------------------------------------------------------------- strengths


@dataclass(frozen=True)
class _Strengths:
    """alpha of each module of a layout that does not write it beside the tensors.

    Fields as in PEFT's LoraConfig.
    """

    alpha: float | None = None  # None: as large as the rank
    is_rslora: bool = False
    is_dora: bool = False
    patterns: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str, rank: int) -> float:
        """The plain alpha (that of alpha / rank) of a module."""
        names = (name, name.removeprefix("text_model."))  # the second as in the part that it was made from
        patterns = ((re.compile(rf"(.*\.)?({key})$"), alpha) for key, alpha in self.patterns.items())
        matching = (alpha for pattern, alpha in patterns if any(map(pattern.match, names)))
        alpha = next(matching, rank if self.alpha is None else self.alpha)
        return float(alpha) * (math.sqrt(rank) if self.is_rslora else 1.0)


_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def _peft_strength(config: Path, file: Path) -> dict[str, _Strengths]:
    """What adapter_config.json beside a PEFT file says."""
    try:
        strength = _strengths(json.loads(config.read_text(encoding="utf-8")))
    except _DAMAGE as error:
        raise _unknown_strength(f"{file}: its {PEFT_CONFIG} is", error) from error
    return dict.fromkeys(PARTS, strength)


def _diffusers_strengths(file: Path, header: Mapping[str, str]) -> dict[str, _Strengths]:
    """By component: what diffusers' metadata inside the file says."""
    try:
        settings = json.loads(header.get(_DIFFUSERS_STRENGTH, "{}"))
        by_component: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            component, _, name = key.partition(".")
            by_component.setdefault(component, {})[name] = value
        return {component: _strengths(values) for component, values in by_component.items()}
    except _DAMAGE as error:
        raise _unknown_strength(f"{file}: its metadata is", error) from error


def _unknown_strength(what: str, error: Exception) -> UserError:
    reason = f"missing or damaged ({type(error).__name__}), so the adapter's strength is unknown."
    return UserError(f"{what} {reason} Copy it again.", Exit.MODEL)


def _strengths(settings: Mapping[str, Any]) -> _Strengths:
    patterns = {key: float(alpha) for key, alpha in dict(settings.get("alpha_pattern") or {}).items()}
    for name in patterns:  # libraries write plain names; a repetition could keep the matching busy for ever
        if not re.fullmatch(r"[\w.^$|]*", name):
            raise ValueError(name)
    flags = (bool(settings.get("use_rslora")), bool(settings.get("use_dora")))
    return _Strengths(float(settings["lora_alpha"]), *flags, patterns)


# ---------------------------------------------------------------- layers


def _grouped(
    tensors: Mapping[str, Tensor], strengths: Mapping[str, _Strengths], file: Path
) -> dict[Key, LoraLayer]:
    """Layers from keys of any layout.

    A key that no layout has, or half a pair, is an error: nothing is dropped in silence.
    """
    parts: dict[Key, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        place = split_key(key)
        if place is None or place[1] in parts.get(place[0], {}):
            strange.append(key)
        else:
            parts.setdefault(place[0], {})[place[1]] = tensor
    wholes = ({"down", "up"}, {"difference"})
    halves = [name for (_, name), part in parts.items() if not any(whole <= part.keys() for whole in wholes)]
    plain = [(part, re.sub(r"_to_out_0$", "_to_out", underscored(name))) for part, name in parts]
    times = Counter(plain)
    twins = [name for place, (_, name) in zip(plain, parts, strict=True) if times[place] > 1]
    if parts and (misfits := strange + halves + twins):
        raise UserError(
            f"{file}: {len(misfits)} of its keys can't be placed, such as {misfits[0][:100]!r}; this kind of "
            "adapter is not supported.",
            Exit.MODEL,
        )
    return {
        key: _layer(key[1], part, strengths.get(key[0], _Strengths()), file)
        for key, part in parts.items()
        if "difference" not in part or part["difference"].any()  # ComfyUI writes those that are zero too
    }


def _layer(name: str, part: Mapping[str, Tensor], strengths: _Strengths, file: Path) -> LoraLayer:
    if any(tensor.is_complex() for tensor in part.values()):
        raise UserError(f"{file}: {name} holds complex numbers, which no LoRA does.", Exit.MODEL)
    if "difference" in part:
        return _vector(name, part, file)
    down, up = part["down"].float(), part["up"].float()
    is_pair = {down.ndim, up.ndim} <= {2, 4} and up.shape[1] == down.shape[0]
    if not is_pair or 0 in (*down.shape, *up.shape) or up.shape[2:].numel() != 1:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise UserError(f"{file}: {name} has shapes {shapes}, which make no pair.", Exit.MODEL)
    up = up.reshape(*up.shape[:2], *[1] * (down.ndim - 2))  # of a convolution, LyCORIS's DyLoRA has it flat
    if "alpha" in part and part["alpha"].numel() != 1:
        raise UserError(
            f"{file}: {name} has {part['alpha'].numel()} alphas; one is its strength.", Exit.MODEL
        )
    alpha = part["alpha"].item() if "alpha" in part else strengths.of(name, down.shape[0])
    return LoraLayer(down, up, float(alpha), _magnitude_of(name, part, strengths, file))


def _vector(name: str, part: Mapping[str, Tensor], file: Path) -> LoraLayer:
    """What is added to a bias or to a norm's weight, as the pair of rank 1 that it is."""
    difference = part["difference"].float()
    if difference.ndim != 1 or part.keys() != {"difference"}:
        reason = "holds whole differences of weights (LyCORIS's full, ComfyUI's full_diff), not LoRAs of them"
        raise UserError(f"{file}: {reason}; extract a LoRA from it with their tool.", Exit.MODEL)
    return LoraLayer(difference.new_ones(1, 1), difference[:, None], 1.0)


def _magnitude_of(name: str, part: Mapping[str, Tensor], strengths: _Strengths, file: Path) -> Tensor | None:
    """DoRA's magnitude as LoraLayer wants it. kohya's shape tells their axis; PEFT's are always one a row."""
    rows = part["up"].shape[0]
    columns = part["down"].shape[1]
    tail = [1] * (part["down"].ndim - 2)
    if "magnitude" in part and part["magnitude"].numel() == rows:
        return part["magnitude"].float().reshape(rows, 1, *tail)
    scale = part.get("dora_scale")
    if scale is not None and scale.numel() == rows and scale.shape[:1] == (rows,):
        return scale.float().reshape(rows, 1, *tail)
    if scale is not None and scale.numel() == columns and scale.shape[:2] == (1, columns):
        return scale.float().reshape(1, columns, *tail)
    lengths = part.get("magnitude", scale)
    if lengths is None and not strengths.is_dora:
        return None
    found = "gone" if lengths is None else f"of shape {tuple(lengths.shape)}"
    raise UserError(
        f"{file}: {name} is DoRA's, and its lengths are {found}; the file is damaged.", Exit.MODEL
    )
