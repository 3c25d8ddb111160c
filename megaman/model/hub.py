"""Names of models and where they lie: paths, the hub, its cache; and why one can't be had, in a sentence."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import get_session, get_token, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from megaman.common.console import Exit, UserError
from megaman.common.files import legacy_hash, sha256_of
from megaman.config.train import EMBEDDED

PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
VARIANT = "fp16"  # the spelling in which half precision is published, beside the full weights or alone
FULL_WEIGHTS, VARIANT_WEIGHTS = (
    re.compile(rf"(diffusion_pytorch_)?model{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    for variant in ("", rf"\.{VARIANT}")
)  # of a part, whole or in shards
EMBEDDED_FOLDER = Path(__file__).parents[1] / "tiny_sd"


MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"
}  # deleted from the hub in September 2024
PATIENCE_S = 10  # with the hub, for a few kilobytes
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
ADDRESS = re.compile(r"https?://.*")
HUB_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)"
    r"/([\w.-]+)/([\w.-]+?)(?:\.git)?(/[^?#]*)?(?:[?#].*)?"
)  # owner, model, a page of it


def hub_id_of(name: str) -> str:
    """The hub id that is meant: of a page's address its owner/model, of a moved model its new name. UserError
    (exit 4) on an address of anything else.
    """
    page = HUB_PAGE.fullmatch(name)
    if page is None:
        if ADDRESS.fullmatch(name):
            reason = "an address of another site than the Hugging Face hub"
            raise UserError(f"{name}: {reason}; download the file and name its path.", Exit.MODEL)
        return MOVED.get(name, name)
    owner, model, within = page.groups()
    if owner in ("datasets", "spaces"):
        raise UserError(f"{name}: a page of the hub's {owner}, not of a model.", Exit.MODEL)
    if re.match("/(resolve|blob)/", within or ""):
        whole = f"or name the whole model, {owner}/{model}"
        raise UserError(f"{name}: a single file; download it and name its path, {whole}.", Exit.MODEL)
    return MOVED.get(f"{owner}/{model}", f"{owner}/{model}")


def canonical_name(name: str) -> str:
    """The base's name as an adapter may carry it: a hub id, or the last part of a path."""
    if name == EMBEDDED or Path(name).resolve() == EMBEDDED_FOLDER:
        return EMBEDDED
    return Path(name).expanduser().resolve().name if is_local(name) else hub_id_of(name)


def is_local(name: str) -> bool:
    """Whether the name is meant as a path and not as a hub id.

    (`owner/model` is a hub id unless such a folder exists.)
    """
    path = Path(name).expanduser()
    if ADDRESS.fullmatch(name) or (HUB_PAGE.fullmatch(name) and not path.exists()):
        return False
    written_as_path = path.is_absolute() or name.startswith((".", "~")) or not HUB_ID.fullmatch(name)
    return path.exists() or written_as_path or path.suffix in (".safetensors", *PICKLE_SUFFIXES)


def local_file(name: str, file: str) -> Path:
    """A file of a base that lies on this disk. FileNotFoundError if it doesn't."""
    if canonical_name(name) == EMBEDDED:
        return EMBEDDED_FOLDER / file
    if is_local(name):
        found = Path(name).expanduser() / file
    else:
        cached = try_to_load_from_cache(hub_id_of(name), file)
        found = Path(cached if isinstance(cached, str) else "")  # None, or the hub's word that it lacks it
    if not found.is_file():
        raise FileNotFoundError(file)
    return found


def small_json(name: str, file: str) -> dict[str, Any]:
    """A configuration of a base, from this disk or from the hub, which is asked once. FileNotFoundError if
    neither has it; ValueError if it is damaged.
    """
    try:
        return json.loads(local_file(name, file).read_bytes())
    except FileNotFoundError:
        if is_local(name):
            raise
    try:
        token = get_token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        answer = get_session().get(hf_hub_url(hub_id_of(name), file), headers=headers, timeout=PATIENCE_S)
        answer.raise_for_status()
    except Exception as error:  # the hub and its HTTP library raise what they like; loading says why
        raise FileNotFoundError(file) from error
    return json.loads(answer.content)


def is_variant_alone(part: Path) -> bool:
    """Whether the folder of a model's part holds its weights as the fp16 variant and in no other way that is
    read.
    """
    names = [path.name for path in part.glob("*.safetensors")]
    return any(map(VARIANT_WEIGHTS.fullmatch, names)) and not any(map(FULL_WEIGHTS.fullmatch, names))


# ---------------------------------------------------------------- why one can't be had
_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # whose classes a model may name
_OFFLINE = {
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectError",
    "ConnectionError",
    "ConnectTimeout",
    "NetworkError",
}
_GATED = {"GatedRepoError", 403}
_ELSEWHERE = {"EntryNotFoundError", "RemoteEntryNotFoundError"}
_UNKNOWN = {"RepositoryNotFoundError", "HFValidationError", 401, 404}
NO_SAFETENSORS = "`safetensors` weights"  # in diffusers' words for a hub that has no others than pickles
_BUSY = {429, 500, 502, 503, 504}
BASE_FLAG = "--pretrained_model_name"


def _demo_of(flag: str) -> str:
    """The way on that only training has: drawing takes the base that its adapter was trained on."""
    return ", or try --preset demo" if flag == BASE_FLAG else ""


def check_folder_or_file(source: Path, flag: str = BASE_FLAG) -> None:
    """Refuses a path that can't be a base before diffusers takes it for a hub id. flag: how the user names
    another.
    """
    if source.is_dir():
        index = source / "model_index.json"
        if not index.is_file():
            raise UserError(
                f"{source}: not a diffusers model folder (no model_index.json). Name one, a .safetensors "
                "checkpoint or a hub id.",
                Exit.MODEL,
            )
        _refuse_code(source)
    elif not source.exists():
        raise UserError(
            f"{source}: no such base model folder or file. Check {flag}{_demo_of(flag)}.",
            Exit.MODEL,
        )
    elif source.suffix != ".safetensors":
        raise UserError(
            f"{source}: only .safetensors checkpoints are read; pickle files (.ckpt, .bin, .pt) can run "
            "code. Convert it first.",
            Exit.MODEL,
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
        raise UserError(
            f"{source}: its model_index.json is damaged. Copy the model again.", Exit.MODEL
        ) from error
    for config in source.glob("*/*config.json"):
        if "auto_map" in config.read_text(encoding="utf-8", errors="replace"):
            own.append(f"{config.parent.name}/{config.name}: auto_map")
    if own:
        raise UserError(
            f"{source}: wants to run code of its own ({own[0]}), which is never loaded. Remove that entry, "
            "or name another base model.",
            Exit.MODEL,
        )
    for part in _WEIGHTS:
        names = sorted((source / part).glob("*"), key=lambda path: path.suffix != ".safetensors")
        if names and names[0].suffix != ".safetensors" and any(n.suffix in PICKLE_SUFFIXES for n in names):
            raise UserError(
                f"{source / part}: only .safetensors weights are read; pickle files (.bin, .ckpt, .pt) can "
                "run code. Convert the model first.",
                Exit.MODEL,
            )


def why_not_loaded(
    name: str, source: Path | str, error: Exception, what: str = "base model", flag: str = BASE_FLAG
) -> str:
    """One sentence for what diffusers or the hub raised: gated, missing, offline, half there or damaged.

    what, flag: the thing that was asked for, and how the user names another.
    """
    found = _facts_of(error)
    text = " ".join(str(error).split())[:200]
    is_offline = bool(found & _OFFLINE)
    if isinstance(source, Path):
        return _why_not_read(source, text, what)
    lacking = ", ".join(_lacking_parts(name))
    path = Path(name)
    is_near = path.parent.is_dir() and path.parent != Path()  # perhaps no hub id was meant
    holds_none = f"{path.parent} holds no {path.name}" if is_near else f"there is no {path.parent} here"
    as_path = f"Taken as a path: {holds_none}. " if is_near or what == "adapter" else ""
    another = f"{as_path}Check {flag}{_demo_of(flag)}."
    refused = "the hub refuses: your token has expired or may not read this, or there is no such model."
    reasons = (
        (
            found & _GATED,
            f"this {what} is gated. Accept its licence on its page, then log in with `hf auth login`.",
        ),
        (found & _ELSEWHERE, f"the hub has it, but not as a diffusers model. {another}"),
        (401 in found and get_token() is not None, f"{refused} Log in anew with `hf auth login`. {another}"),
        (found & _UNKNOWN, f"the hub knows no such model, or keeps it private. {another}"),
        (found & _BUSY, "the hub is too busy to answer. Try again later, or name a local folder."),
        (
            NO_SAFETENSORS in text,
            f"this {what} is only there as pickle files, which can run code. Name one in safetensors.",
        ),
        (
            lacking,
            f"only a part of this {what} is on this machine (the weights of {lacking} are missing). Connect "
            f"and run this again, or `hf download {name}`: what is there is kept.",
        ),
        (
            is_offline,
            f"the hub can't be reached and this {what} is not on this machine. {as_path}Connect, or name a "
            f"local folder{_demo_of(flag)}.",
        ),
        (True, f"this {what} cannot be loaded ({text}). Try again, or name a local folder."),
    )
    return f"{name}: {next(words for applies, words in reasons if applies)}"


def _why_not_read(source: Path, text: str, what: str) -> str:
    complete = "Is it complete, and a Stable Diffusion 1.x, 2.x or XL in safetensors?"
    return f"{source}: this {what} can't be loaded ({text}). {complete}"


def _facts_of(error: Exception) -> set[str | int]:
    """The names of the exceptions that led to this one, and what a server answered."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    answers = {getattr(getattr(link, "response", None), "status_code", 0) for link in chain}
    return answers | {type(link).__name__ for link in chain}


def _lacking_parts(name: str) -> list[str]:
    """The parts without weights of a model that the hub's cache holds; none if it holds nothing of it."""
    try:
        index = try_to_load_from_cache(name, "model_index.json")
    except HFValidationError:
        return []
    if not isinstance(index, str):
        return []
    named = Path(index).read_text(encoding="utf-8", errors="replace")
    folders = [(part, Path(index).parent / part) for part in _WEIGHTS if f'"{part}"' in named]
    return [part for part, folder in folders if not any(f.is_file() for f in folder.glob("*.safetensors"))]


def fetched(name: str, files: Sequence[str], what: str, flag: str) -> Path:
    """The local folder of a hub id's files of these names (`*.json`), of which it may lack some. UserError
    (exit 4) if the hub has no such model or can't be asked. what, flag: as for `why_not_loaded`.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub, its HTTP library and what a proxy answers raise what they like
        raise UserError(why_not_loaded(name, name, error, what=what, flag=flag), Exit.MODEL) from error


def download_adapter(name: str) -> Path:
    """The local path of an adapter: the path itself, or the folder that a hub id was fetched into.

    UserError (exit 4) if the hub has none.
    """
    path = Path(name).expanduser()
    name = hub_id_of(name)
    if is_local(name) or name.count("/") != 1:
        return path
    folder = fetched(name, ["*.safetensors", "*adapter_config.json"], what="adapter", flag="--lora_path")
    if not any(path.is_file() for path in folder.glob("*.safetensors")):
        raise UserError(
            f"{name}: no .safetensors adapter there, or it was not wholly downloaded. Connect and run this "
            "again, or name another with --lora_path.",
            Exit.MODEL,
        )
    return folder


@cache
def model_hashes(path: Path) -> dict[str, str]:
    """The two hashes by which web UIs know a checkpoint file; none of a folder or a hub id."""
    if not path.is_file():
        return {}
    return {"ss_sd_model_hash": legacy_hash(path), "ss_new_sd_model_hash": sha256_of(path)}
