"""A picture to draw and what is known of it when it is drawn, in the PNG itself and in metadata.jsonl."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL.Image import Image
from PIL.Image import open as open_image
from PIL.PngImagePlugin import PngInfo

from megaman.errors import say
from megaman.files import replacing, write_text

METADATA_FILE = "metadata.jsonl"
SAMPLER_NAMES = {
    "dpm++": "DPM++ 2M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "ddim": "DDIM",
    "unipc": "UniPC",
}  # as A1111 spells them


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

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What pictures drawn in one batch must share."""
        size = (self.width, self.height)
        return (self.lora_scale, size, self.num_inference_steps, self.guidance_scale, self.scheduler)


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


def infotext(record: ImageRecord) -> str:
    """The settings as A1111 writes them, so that its PNG Info, ComfyUI and Civitai read them."""
    name = re.sub(r"[^\w.-]", "_", record.adapter)
    settings = {
        "Steps": record.num_inference_steps,
        "Sampler": SAMPLER_NAMES[record.scheduler],
        "CFG scale": record.guidance_scale,
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model": re.sub(r"[,:\n]", "_", record.base_model),
        "RNG": "CPU",
        "Lora hashes": f'"{name}: {record.adapter_hash}"',
    }
    line = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return (
        f"{record.prompt} <lora:{name}:{record.lora_scale:g}>\nNegative prompt: "
        f"{record.negative_prompt}\n{line}"
    )


def save_picture(image: Image, record: ImageRecord, folder: Path, *, described: bool) -> None:
    """A PNG, complete or absent, with A1111's `parameters` and our whole record."""
    info = PngInfo()
    if described:
        info.add_text("parameters", infotext(record))
        info.add_text("megaman", json.dumps(asdict(record), ensure_ascii=False))
    with replacing(folder / record.file) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def strip_metadata(path: Path) -> None:
    """Rewrites a PNG without its texts, if it has any; the pixels stay."""
    with open_image(path) as image:
        if not image.text:
            return
        image.load()
        with replacing(path) as partial:
            image.save(partial, format="PNG", pnginfo=PngInfo())


def read_records(folder: Path) -> list[ImageRecord]:
    """The records of metadata.jsonl whose pictures are there.

    A damaged line is said, and loses only its own.
    """
    path = folder / METADATA_FILE
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line:
            continue
        try:
            record = ImageRecord(**json.loads(line))
            if (folder / Path(record.file).name).is_file():
                records.append(record)
        except (ValueError, TypeError):
            say(f"note: {path}, line {number} is damaged; its picture is drawn again or leaves the gallery")
    return records


def write_records(folder: Path, records: Sequence[ImageRecord]) -> None:
    """metadata.jsonl, whole."""
    lines = (json.dumps(asdict(record), ensure_ascii=False) for record in records)
    write_text(folder / METADATA_FILE, "".join(f"{line}\n" for line in lines))
