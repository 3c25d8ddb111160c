"""A job, and the record that it leaves: in the PNG itself and in metadata.jsonl."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from os import SEEK_END
from pathlib import Path
from typing import Any, get_type_hints

from PIL.Image import DecompressionBombError, Image
from PIL.Image import open as open_image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from megaman.common.console import Exit, UserError, say
from megaman.common.files import followed, replacing, write_text
from megaman.common.html import check_page, is_page, is_page_of_run
from megaman.common.kinds import CHUNK
from megaman.common.output_folder import GALLERY_PAGE, holds_files, holds_run, is_signed

METADATA_FILE = "metadata.jsonl"
A1111_TEXT, OUR_TEXT = "parameters", "megaman"  # of a PNG
OUR_TEXTS = {A1111_TEXT, OUR_TEXT}
FOREIGN = "file_name"  # what data sets call a picture's file
PATHS = frozenset({"adapter_path", "base_path"})  # never in a picture: it is shown to others
BESIDE_PICTURES = PATHS | {"extra"}
TOLD = frozenset({"prompt", "seed", "file", "job", "adapter_hash"})  # in every record
LARGEST = 1e300  # of a record's numbers: no browser reads NaN or infinity
FILE_NAME = re.compile(r"[a-z0-9-]+\.png")  # of every picture
PNG_BEGINS, PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
SAMPLER_NAMES = {
    "dpm++": "DPM++ 2M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "ddim": "DDIM",
    "unipc": "UniPC",
}  # as A1111 spells them


PLAIN, WEIGHTED = "plain", "weighted"
USUAL = {"max_tokens": CHUNK, "words": PLAIN}


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    lora_scale: float
    max_tokens: int = field(default=CHUNK, kw_only=True)  # as many chunks as its texts were read in
    words: str = field(default=PLAIN, kw_only=True)  # or WEIGHTED: the texts' brackets say what words weigh

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What pictures drawn in one batch must share."""
        shape = (self.width, self.height, self.max_tokens)
        return (self.lora_scale, shape, self.num_inference_steps, self.guidance_scale, self.scheduler)


@dataclass(frozen=True)
class ImageRecord(Job):
    """Everything about one generated picture: its job, a line of metadata.jsonl, a card of the gallery."""

    file: str  # beside the page
    adapter: str  # file or folder name
    adapter_hash: str
    base_model: str
    trigger: str
    precision: str
    job: str  # the hash of all that decides the pixels
    created: str  # ISO 8601, UTC
    seconds: float  # its share of the batch's time
    versions: Mapping[str, str]
    lora_file: str = ""  # the adapter's file as web UIs name it, "" where they can read none
    lora_hash: str = ""  # and their hash of it, AutoV3
    adapter_path: str = ""  # from the gallery's folder; "" on the hub, or where nobody noted it
    base_path: str = ""  # likewise
    extra: Mapping[str, Any] = field(default_factory=dict)  # what the user has added to its line


FIELDS = frozenset(each.name for each in fields(ImageRecord)) - {"extra"}


def told_of(job: Job) -> dict[str, Any]:
    """A job's or a record's fields but those in which all pictures once were alike, and this one is."""
    told = {each.name: getattr(job, each.name) for each in fields(job)}  # asdict copies, six times as slow
    return {name: value for name, value in told.items() if name not in USUAL or value != USUAL[name]}


def job_hash(job: Job, adapter_hash: str, base_hash: str, precision: str) -> str:
    """A hash of everything that decides a picture's pixels."""
    facts = json.dumps([told_of(job), adapter_hash, base_hash, precision], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def file_name(job: Job, digest: str) -> str:
    """A safe, short, speaking name; the prompt never decides a folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower())[:40].strip("-") or "picture"
    return f"{slug}-{job.seed}-{digest[:12]}.png"  # 48 bits: many prompts without a letter share a slug


def record_of(job: Job, digest: str, about: Mapping[str, Any], seconds: float) -> ImageRecord:
    """The picture's line of metadata.jsonl, made now. about: the other fields, by name."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return ImageRecord(
        file=file_name(job, digest), job=digest, created=created, seconds=seconds, **asdict(job), **about
    )


def _plain(text: str) -> str:
    """A prompt that can't be taken for settings: A1111 and others look for "Negative prompt:" and "Steps:" at
    the beginning of a line. A space before the colon leaves the words (and CLIP's tokens) as they are.
    """
    return re.sub(r"(Negative prompt|Steps):", r"\1 :", text)


def infotext(record: ImageRecord) -> str:
    """The settings as A1111 writes them, so that its PNG Info, ComfyUI and Civitai read them: prompt,
    negative prompt, all else on the last line. Nothing that a prompt holds can pass for a setting.
    """
    name = re.sub(r'[<>:",\\\x00-\x1f]', "_", record.lora_file)  # what would end the name
    settings = {
        "Steps": record.num_inference_steps,
        "Sampler": SAMPLER_NAMES[record.scheduler],
        "CFG scale": record.guidance_scale,
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model": re.sub(r"[^\w ./-]", "_", record.base_model),
        "RNG": "CPU",
    }
    prompt = _plain(record.prompt)
    if name and record.lora_scale:
        settings["Lora hashes"] = f'"{name}: {record.lora_hash}"'
        prompt += f" <lora:{name}:{record.lora_scale:g}>"
    line = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"{prompt}\nNegative prompt: {_plain(record.negative_prompt)}\n{line}"


def save_picture(image: Image, record: ImageRecord, folder: Path, *, described: bool) -> None:
    """A PNG, complete or absent, with A1111's `parameters` and our record, its paths left out."""
    info = PngInfo()
    if described:
        info.add_text(A1111_TEXT, infotext(record))
        told = {name: value for name, value in told_of(record).items() if name not in BESIDE_PICTURES}
        info.add_text(OUR_TEXT, json.dumps(told, ensure_ascii=False))
    with replacing(folder / record.file) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def check_place(path: Path) -> None:
    """UserError (exit 7) if something else than a picture lies where one of ours is to be written."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file() or not _may_be_ours(path):
        raise UserError(f"{path}: is no picture of ours. Move it, or name another --output_dir.", Exit.STATE)


def _may_be_ours(path: Path) -> bool:
    """Whether a file of the name that only our pictures have begins as they do, or holds nothing."""
    with path.open("rb") as file:
        beginning = file.read(len(PNG_BEGINS))
    return PNG_BEGINS.startswith(beginning)


def strip_metadata(path: Path) -> None:
    """Rewrites a PNG without our texts, if it has any; the pixels and others' texts stay."""
    with open_image(path) as image:
        texts = image.text if isinstance(image, PngImageFile) else {}
        if not texts.keys() & OUR_TEXTS:
            return
        image.load()
        info = PngInfo()
        for key in texts.keys() - OUR_TEXTS:
            info.add_text(key, texts[key])
        with replacing(path) as partial:
            image.save(partial, format="PNG", pnginfo=info)


def read_records(folder: Path) -> list[ImageRecord]:
    """The records of metadata.jsonl whose pictures are there.

    A damaged line is said, and loses only its own.
    """
    path = folder / METADATA_FILE
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        try:
            found += [_record(json.loads(line))] if line else []
        except (ValueError, TypeError, RecursionError):
            say(f"note: {path}, line {number} is damaged; its picture is drawn again or leaves the gallery")
    return [record for record in found if _is_whole(folder / record.file)]


def find_records(folder: Path) -> list[ImageRecord]:
    """The records of every picture that is there: those of metadata.jsonl in its order, then what pictures
    that it lacks tell themselves, the newest first. Says which tell nothing.
    """
    known = {record.job: record for record in read_records(folder)}
    listed = {record.file for record in known.values()}
    unlisted = [path for path in sorted(folder.glob("*.png")) if path.name not in listed]
    told = {path: _told_by(path) for path in unlisted}
    found = [record for record in told.values() if record is not None]
    found.sort(key=lambda record: record.created, reverse=True)
    for record in found:
        known.setdefault(record.job, record)
    if silent := [path.name for path, record in told.items() if record is None]:
        more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
        say(f"note: {silent[0]}{more}: no settings of ours in it, or no name of ours; not in the gallery")
    return list(known.values())


def _told_by(path: Path) -> ImageRecord | None:
    """The record that a PNG carries, under the name that it has now; None if there is none."""
    try:
        with warnings.catch_warnings(action="error"), open_image(path, formats=["PNG"]) as image:
            told = json.loads(image.info[OUR_TEXT]) | dict.fromkeys(PATHS, "")  # it may be anybody's
            record = _record(told | {"file": path.name})
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, RecursionError):
        return None
    except (Warning, DecompressionBombError):  # Pillow has doubts that no picture of ours gives it
        return None
    return record if _is_whole(path) else None


def _record(facts: Any) -> ImageRecord:
    """The record that a line tells. ValueError or TypeError unless it is one of ours: the gallery counts with
    its numbers, and its file is read and rewritten, so it must lie in the folder.
    """
    if not isinstance(facts, dict):
        raise TypeError("no names and values")
    own = {name: value for name, value in facts.items() if name in FIELDS}
    record = ImageRecord(**own, extra={name: facts[name] for name in facts.keys() - FIELDS})
    for name, kind in get_type_hints(ImageRecord).items():
        kinds: Any = {float: (int, float), Mapping[str, str]: dict, Mapping[str, Any]: dict}.get(kind, kind)
        if not isinstance(getattr(record, name), kinds) or isinstance(getattr(record, name), bool):
            raise TypeError(name)
        if kind is float and not abs(getattr(record, name)) < LARGEST:  # NaN is not less either
            raise ValueError(name)
    if not FILE_NAME.fullmatch(record.file) or record.scheduler not in SAMPLER_NAMES:
        raise ValueError(record.file)
    json.dumps(facts, ensure_ascii=False).encode()  # half a character can't be written again
    return record


def _is_whole(path: Path) -> bool:
    """Whether the picture is there, from a PNG's first bytes to its last."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(PNG_BEGINS)) == PNG_BEGINS
            file.seek(-len(PNG_ENDS), SEEK_END)
            return begins and file.read() == PNG_ENDS
    except OSError:  # not there, or shorter than that
        return False


def is_metadata(path: Path) -> bool:
    """Whether metadata.jsonl is ours: one of its lines is a picture's record, or it is empty. Data sets have
    files of that name too.
    """
    keys = _keys_in(path)
    return not keys or (any(each >= TOLD for each in keys) and not any(FOREIGN in each for each in keys))


def _keys_in(path: Path) -> list[set[str]]:
    """The names in each line of metadata.jsonl."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    return [_keys_of(line) for line in lines if line.strip()]


def _keys_of(line: str) -> set[str]:
    """The names in a JSON object; none in anything else."""
    try:
        facts = json.loads(line)
    except (ValueError, RecursionError):
        return set()
    return set(facts) if isinstance(facts, dict) else set()


def check_folder(folder: Path) -> None:
    """UserError (exit 7) if pictures of ours must not go to `folder`, by what lies there: others' files
    without a gallery, a run of the training, another file in the place of one of ours. Makes nothing.
    """
    metadata = folder / METADATA_FILE
    reason = None
    if holds_run(folder) or is_page_of_run(folder / GALLERY_PAGE):
        reason = "holds a training run, whose files stay by themselves"
    elif metadata.is_file() and not is_metadata(metadata):
        reason = f"its {METADATA_FILE} is not ours"
    elif holds_files(folder) and not holds_gallery(folder):
        reason = "holds files that no run of ours made"
    if reason is not None:
        raise UserError(f"{folder}: {reason}. Name another --output_dir.", Exit.STATE)
    check_page(folder / GALLERY_PAGE)


def holds_gallery(folder: Path) -> bool:
    """Whether pictures of ours were drawn into `folder`, or begun to be."""
    if is_signed(folder) or is_page(folder / GALLERY_PAGE):
        return True
    metadata = folder / METADATA_FILE
    listed = metadata.is_file() and is_metadata(metadata) and bool(_keys_in(metadata))
    return listed or any(map(_told_by, folder.glob("*.png")))


def write_records(folder: Path, records: Sequence[ImageRecord]) -> None:
    """Writes metadata.jsonl, whole or not at all."""
    told = ({name: value for name, value in told_of(each).items() if name != "extra"} for each in records)
    lines = (
        json.dumps(facts | dict(record.extra), ensure_ascii=False)
        for facts, record in zip(told, records, strict=True)
    )
    write_text(followed(folder / METADATA_FILE), "".join(f"{line}\n" for line in lines))
