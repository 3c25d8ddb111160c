"""What the gallery tells of its pictures: their settings, the command that draws one again, and which of them
belong side by side.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megaman.common.console import Exit, UserError, say
from megaman.common.files import followed, path_from, write_text
from megaman.common.html import render, script_of
from megaman.common.kinds import CHUNK
from megaman.common.output_folder import CHECKPOINTS, GALLERY_PAGE, WEIGHTS, OutputLock
from megaman.config.generate import GenerateConfig
from megaman.config.train import DataFlags
from megaman.generation.records import (
    PLAIN,
    ImageRecord,
    check_folder,
    find_records,
    holds_gallery,
    write_records,
)
from megaman.model.prompt_syntax import has_weights

RUN = DataFlags.output_dir  # where an adapter usually lies
CHECKPOINT = re.compile(r"step-0{0,5}(\d{1,12})")
UNSAFE_TO_PASTE = re.compile(
    r'[\x00-\x1f\x7f-\x9f"$`\\%!\u201c-\u201f]'
)  # some shell or terminal acts on it in quotes
PRECISIONS = {"float16": "fp16", "bfloat16": "bf16"}
SCENE = (
    *("prompt", "negative_prompt", "seed", "width", "height", "num_inference_steps", "guidance_scale"),
    *("scheduler", "base_model", "precision", "max_tokens", "words"),
)


@dataclass(frozen=True)
class Scene:
    """Pictures that only the adapter and its strength tell apart."""

    pictures: tuple[ImageRecord, ...]

    @property
    def base(self) -> list[ImageRecord]:
        """The pictures drawn with the base alone (strength 0)."""
        return [picture for picture in self.pictures if picture.lora_scale == 0]

    @property
    def adapters(self) -> dict[str, str]:
        """Hash -> name of every adapter, in order of appearance; two of one name are told apart."""
        names = {picture.adapter_hash: picture.adapter for picture in self.pictures if picture.lora_scale}
        count = Counter(names.values())
        return {
            digest: f"{name} ({digest[:6]})" if count[name] > 1 else name for digest, name in names.items()
        }

    @property
    def scales(self) -> list[float]:
        """Every strength but the base's 0, ascending."""
        return sorted({picture.lora_scale for picture in self.pictures} - {0})

    @property
    def layout(self) -> str:
        """grid (adapters down, strengths across), strip or single."""
        if len(self.adapters) > 1 and len(self.scales) > 1:
            return "grid"
        return "strip" if len(self.pictures) > 1 else "single"

    @property
    def strip(self) -> list[ImageRecord]:
        """A strip's pictures from left to right: by strength, or the base and then adapter by adapter."""
        if len(self.adapters) > 1:
            return [*self.base, *(picture for picture in self.pictures if picture.lora_scale)]
        return sorted(self.pictures, key=lambda picture: picture.lora_scale)

    def cell(self, adapter_hash: str, scale: float) -> list[ImageRecord]:
        """The grid's pictures in one place."""
        place = (adapter_hash, scale)
        return [picture for picture in self.pictures if (picture.adapter_hash, picture.lora_scale) == place]


def sections(records: Sequence[ImageRecord]) -> list[tuple[str | None, list[Scene]]]:
    """A prompt with several scenes has a section of its own; neighbours with one each share one (None)."""
    by_prompt: dict[str, dict[tuple[Any, ...], list[ImageRecord]]] = {}
    for record in records:
        scene = tuple(getattr(record, name) for name in SCENE)
        by_prompt.setdefault(record.prompt, {}).setdefault(scene, []).append(record)
    found: list[tuple[str | None, list[Scene]]] = []
    for prompt, scenes in by_prompt.items():
        made = [Scene(tuple(pictures)) for pictures in scenes.values()]
        if len(made) > 1:
            found.append((prompt, made))
        elif found and found[-1][0] is None:
            found[-1][1].extend(made)
        else:
            found.append((None, made))
    return found


def newest(records: Sequence[ImageRecord]) -> ImageRecord:
    """The picture that tells what was drawn with last; of a comparison in one second, no checkpoint's."""
    last = max(record.created for record in records)
    drawn = [record for record in records if record.created == last]
    return next((record for record in drawn if not CHECKPOINT.fullmatch(record.adapter)), drawn[0])


def adapter_text(name: str) -> tuple[str, str]:
    """An adapter's name as a text to translate and what stands in it."""
    checkpoint = CHECKPOINT.fullmatch(name)
    return ("step {n}", checkpoint[1]) if checkpoint else ("{n}", name)


def facts(record: ImageRecord, folder: Path = Path()) -> dict[str, Any]:
    """What the page of a gallery's folder knows of a picture, under the names it shows."""
    return {
        "Prompt": record.prompt,
        "Negative prompt": record.negative_prompt,
        "Seed": str(record.seed),  # JavaScript's numbers end at 2^53
        "Size": f"{record.width} × {record.height}",
        "Steps": record.num_inference_steps,
        "Guidance": record.guidance_scale,
        "Sampler": record.scheduler,
        "LoRA strength": record.lora_scale,
        "Adapter": f"{record.adapter} ({record.adapter_hash})",
        "Base": record.base_model,
        "Precision": record.precision,
        "Seconds": record.seconds,
        "Made": record.created,
        "File": record.file,
        "Job": record.job,
        "Command": command(record, folder),
    }


def command(record: ImageRecord, folder: Path = Path()) -> str:
    """What draws the picture of a gallery's folder again, with this adapter and no other; in the quotes that
    POSIX shells, PowerShell and cmd have in common. Nothing if its texts hold what one of them, or a
    terminal, would act on inside of those.

    The places of adapter and base are seen from where the page is made. A picture that lost its line of
    metadata.jsonl knows names alone: then they are the usual ones.
    """
    on_hub = record.base_model if re.fullmatch(r"[^/\\]+/[^/\\]+", record.base_model) else None
    flags = {
        "lora_path": _seen_from_here(folder, record.adapter_path) or _usual_place(record.adapter),
        "adapter_hash": record.adapter_hash,
        "base_model": _seen_from_here(folder, record.base_path) or on_hub,
        "prompts": record.prompt,
        "negative_prompt": record.negative_prompt,
        **_how_read(record),
        "seed": record.seed,
        "width": record.width,
        "height": record.height,
        "num_inference_steps": record.num_inference_steps,
        "guidance_scale": record.guidance_scale,
        "scheduler": record.scheduler,
        "lora_scale": record.lora_scale,
        "mixed_precision": PRECISIONS.get(record.precision, "no"),
    }
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    if any(map(UNSAFE_TO_PASTE.search, words)):
        return ""
    quoted = [word if re.fullmatch(r"[\w=+-]+", word, re.ASCII) else f'"{word}"' for word in words]
    return " ".join(["python", "generate_megaman.py", *quoted])


def _how_read(record: ImageRecord) -> dict[str, Any]:
    """The flags by which its texts are read as they were, where they may be read otherwise without them."""
    texts = (record.prompt, record.negative_prompt)
    flags: dict[str, Any] = {}
    if any(len(text.encode()) > CHUNK for text in texts):  # a token is a byte or more
        flags["max_tokens"] = record.max_tokens
    if record.words == PLAIN and any(map(has_weights, texts)):
        flags["prompt_weights"] = "off"
    return flags


def _seen_from_here(folder: Path, place: str) -> str | None:
    """A place that is known from a folder, from where we are; None if it isn't known."""
    return path_from(Path(), folder / place) or None if place else None


def _usual_place(adapter: str) -> str:
    if adapter == "megaman_lora":
        return f"{RUN}/{WEIGHTS}"
    return f"{RUN}/{CHECKPOINTS}/{adapter}" if CHECKPOINT.fullmatch(adapter) else adapter


# ---------------------------------------------------------------- the page


def render_gallery(drawn: Sequence[ImageRecord], folder: Path = Path()) -> str:
    """The page of a gallery's folder, its pictures in the order given. Works without JavaScript as a plain
    page of pictures.
    """
    answers = {"sections": sections, "newest": newest, "adapter_text": adapter_text}
    return render(
        "gallery.html.j2",
        records=drawn,
        script=script_of("gallery.js"),
        facts=partial(facts, folder=folder),
        **answers,
    )


def answer_gallery_only(cfg: GenerateConfig) -> None:
    """Makes the gallery anew and ends the program, if that is all that is asked."""
    if cfg.gallery_only:
        say(f"done: open {rebuild(Path(cfg.output_dir))} in a browser")
        sys.exit(Exit.OK)


def rebuild(output: Path) -> Path:
    """Makes the gallery anew of the pictures that are there. UserError (exit 7) if there never were any."""
    if not holds_gallery(output):  # perhaps a folder of the user's
        reason = "holds no pictures of ours to show; draw some first, or name their folder with --output_dir"
        raise UserError(f"{output}: {reason}", Exit.STATE)
    check_folder(output)
    with closing(OutputLock(output).sign()):
        found = find_records(output)
        show_all(output, found)
    say(f"pictures: {len(found)}")
    return output / GALLERY_PAGE


def show(output: Path, drawn: Sequence[ImageRecord]) -> None:
    """Writes the gallery's page."""
    write_text(followed(output / GALLERY_PAGE), render_gallery(drawn, output))


def show_all(output: Path, drawn: Sequence[ImageRecord]) -> None:
    """Writes metadata.jsonl and the gallery's page."""
    write_records(output, drawn)
    show(output, drawn)
