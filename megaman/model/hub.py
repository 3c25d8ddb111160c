"""Why a base model or an adapter can't be had, in one sentence: what lies there, what the hub answers."""

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from megaman.common.console import MODEL, UserError

PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
_WEIGHTS = ("unet", "vae", "text_encoder")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # whose classes a model may name
_OFFLINE = {
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectError",
    "ConnectionError",
    "ConnectTimeout",
    "NetworkError",
}
_HUB_FAULTS: dict[tuple[str | int, ...], str] = {  # by the exceptions' names and the hub's answers
    ("GatedRepoError", 403): "this base model is gated. Accept its licence on its page, then log in with `hf "
    "auth login`.",
    ("EntryNotFoundError", "RemoteEntryNotFoundError"): "the hub has it, but not as a diffusers model. Check "
    "--pretrained_model_name, or try --preset demo.",
    ("RepositoryNotFoundError", "HFValidationError", 401, 404): "the hub knows no such model, or keeps it "
    "private. Check --pretrained_model_name, or try --preset demo.",
    (429, 500, 502, 503, 504): "the hub is too busy to answer. Try again later, or name a local folder.",
}


def check_folder_or_file(source: Path) -> None:
    """Refuses a path that can't be a base before diffusers takes it for a hub id."""
    if source.is_dir():
        index = source / "model_index.json"
        if not index.is_file():
            raise UserError(
                f"{source}: not a diffusers model folder (no model_index.json). Name one, a .safetensors "
                "checkpoint or a hub id.",
                MODEL,
            )
        if '"StableDiffusionXL' in index.read_text(encoding="utf-8", errors="replace"):
            raise UserError(
                f"{source}: a Stable Diffusion XL model; this tool trains Stable Diffusion 1.x.", MODEL
            )
        _refuse_code(source)
    elif not source.exists():
        raise UserError(
            f"{source}: no such base model folder or file. Check --pretrained_model_name (or "
            "--base_model), or try --preset demo.",
            MODEL,
        )
    elif source.suffix != ".safetensors":
        raise UserError(
            f"{source}: only .safetensors checkpoints are read; pickle files (.ckpt, .bin, .pt) can run "
            "code. Convert it first.",
            MODEL,
        )


def _refuse_code(source: Path) -> None:
    """UserError (exit 4) if a diffusers folder brings program code along, or weights only as pickles. The
    libraries would refuse or ignore both; saying so beats their errors.
    """
    try:
        index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
        named = {key: value for key, value in index.items() if isinstance(value, list)}
        own = [f"model_index.json: {key}" for key, value in named.items() if value[0] not in _LIBRARIES]
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{source}: its model_index.json is damaged. Copy the model again.", MODEL) from error
    for config in source.glob("*/*config.json"):
        if "auto_map" in config.read_text(encoding="utf-8", errors="replace"):
            own.append(f"{config.parent.name}/{config.name}: auto_map")
    if own:
        raise UserError(
            f"{source}: wants to run code of its own ({own[0]}), which is never loaded. Remove that entry, "
            "or name another base model.",
            MODEL,
        )
    for part in _WEIGHTS:
        names = sorted((source / part).glob("*"), key=lambda path: path.suffix != ".safetensors")
        if names and names[0].suffix != ".safetensors" and any(n.suffix in PICKLE_SUFFIXES for n in names):
            raise UserError(
                f"{source / part}: only .safetensors weights are read; pickle files (.bin, .ckpt, .pt) can "
                "run code. Convert the model first.",
                MODEL,
            )


def explanation(name: str, source: Path | str, error: Exception) -> str:
    """One sentence for what diffusers or the hub raised: gated, missing, offline, half there or damaged."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(link).__name__ for link in chain}
    statuses = {getattr(getattr(link, "response", None), "status_code", 0) for link in chain}
    text = " ".join(str(error).split())[:200]
    is_offline = bool(kinds & _OFFLINE)
    if isinstance(source, Path) and source.is_file() and is_offline:
        return (
            f"{name}: a single file takes its configuration from the hub once, and the hub can't be "
            "reached. Connect, name a diffusers folder, or try --preset demo."
        )
    if isinstance(source, Path):
        return (
            f"{source}: this base model can't be loaded ({text}). Is it complete, and a Stable "
            "Diffusion 1.x in safetensors?"
        )
    told = next((told for faults, told in _HUB_FAULTS.items() if (kinds | statuses) & set(faults)), None)
    if told is None and "`safetensors` weights" in text:
        told = "this base model is only there as pickle files, which can run code. Name one in safetensors."
    if told is None and (lacking := _lacking_parts(name)):
        told = (
            f"only a part of this base model is on this machine (the weights of {', '.join(lacking)} are "
            f"missing). Connect and run this again, or `hf download {name}`: what is there is kept."
        )
    if told is None and is_offline:
        told = (
            "the hub can't be reached and this base model is not on this machine. Connect, name a local "
            "folder, or try --preset demo."
        )
    return (
        f"{name}: {told or f'this base model cannot be loaded ({text}). Try again, or name a local folder.'}"
    )


def _lacking_parts(name: str) -> list[str]:
    """The parts without weights of a model that the hub's cache holds; none if it holds nothing of it."""
    try:
        index = try_to_load_from_cache(name, "model_index.json")
    except HFValidationError:
        return []
    if not isinstance(index, str):
        return []
    folders = [(part, Path(index).parent / part) for part in _WEIGHTS]
    return [part for part, folder in folders if not any(f.is_file() for f in folder.glob("*.safetensors"))]
