"""Draws with a trained LoRA and writes an HTML gallery.

    python generate_megaman.py                                          # the adapter trained last
    python generate_megaman.py --prompts "mega man, running" --num_images_per_prompt 4

A picture is decided by its job alone (prompt, seed, size, settings, adapter, base), so a repeated or
interrupted run keeps what is finished.
"""

import sys

from megaman.common import console as errors
from megaman.common import files
from megaman.common import html as pages
from megaman.common import signals as stopping
from megaman.common.console import UserError, quiet_libraries, say
from megaman.config.generate import BUILT_IN_PROMPTS, NEGATIVE, TRIGGER, GenerateConfig, read_config
from megaman.generation import records

if "torch" not in sys.modules:  # a program that has loaded it hears what it wants to hear
    quiet_libraries()
if __name__ == "__main__":  # what needs no torch is answered before it loads, which takes seconds
    stopping.end_quietly()
    with errors.reported():
        CONFIG = read_config(sys.argv[1:])
        pages.answer_gallery_only(CONFIG)

import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tqdm import tqdm

from megaman.generation.candidates import Source, base_of, recorded, sources_of
from megaman.generation.prompts import Prompt, read_prompts_file
from megaman.generation.records import ImageRecord, Job
from megaman.lora import merge
from megaman.lora.merge import MergedAdapter
from megaman.lora.save import Adapter
from megaman.model import compute as devices
from megaman.model import memory
from megaman.model import stable_diffusion as base_models
from megaman.model.stable_diffusion import BaseModel

NAMED = 5  # pictures that an error's line names
GUIDANCE = 7.5  # where neither the user nor the adapter says another

# ---------------------------------------------------------------- prompts to jobs


def settled(cfg: GenerateConfig, adapter: Adapter, base: BaseModel) -> GenerateConfig:
    """The configuration with size, guidance and negative prompt decided: where the user is silent, those of
    the training. The embedded base knows no words like "blurry": they would only disturb it.
    """
    known = adapter.metadata
    side = known.get("resolution", base.native_resolution)
    side = max(1, round(side / base.cell_px)) * base.cell_px  # an adapter may be trained on other sizes
    usual = "" if base.name == base_models.EMBEDDED else NEGATIVE
    return replace(
        cfg,
        negative_prompt=usual if cfg.negative_prompt is None else cfg.negative_prompt,
        width=side if cfg.width is None else cfg.width,
        height=side if cfg.height is None else cfg.height,
        guidance_scale=known.get("guidance_scale", GUIDANCE)
        if cfg.guidance_scale is None
        else cfg.guidance_scale,
    )


def read_prompts(cfg: GenerateConfig, trigger: str) -> list[Prompt]:
    """The prompts of the flags, then those of the file; ours, with the adapter's trigger, if there are
    none.
    """
    prompts: list[Prompt] = [(prompt, {}) for prompt in cfg.prompts or ()]
    if cfg.prompts_file is not None:
        prompts += read_prompts_file(Path(cfg.prompts_file))
    return prompts or [(prompt.replace(TRIGGER, trigger), {}) for prompt in BUILT_IN_PROMPTS]


def make_jobs(cfg: GenerateConfig, prompts: Sequence[Prompt]) -> list[Job]:
    """Every picture of the run in the gallery's order: prompt by prompt, seed by seed, strength by
    strength; with --compare_base the base's 0 comes first.
    """
    shared = (
        "negative_prompt",
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "scheduler",
        "width",
        "height",
    )
    common = {name: getattr(cfg, name) for name in shared}
    scales = [0.0, *cfg.lora_scale] if cfg.compare_base else cfg.lora_scale
    jobs = []
    for prompt, own in prompts:
        settings = common | own
        first = settings.pop("seed")
        for seed in range(first, first + cfg.num_images_per_prompt):
            jobs += [Job(prompt=prompt, seed=seed, lora_scale=scale, **settings) for scale in scales]
    return list(dict.fromkeys(jobs))


def job_hash(job: Job, adapter_hash: str, base_hash: str, precision: str) -> str:
    """Names everything that decides the picture's pixels."""
    facts = json.dumps([asdict(job), adapter_hash, base_hash, precision], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def file_name(job: Job, digest: str) -> str:
    """A safe, short, speaking name; the prompt never decides a folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower())[:40].strip("-") or "picture"
    return (
        f"{slug}-{job.seed}-{digest[:12]}.png"  # 48 bits: thousands of prompts without a letter share a slug
    )


def batches(jobs: Sequence[Job], batch_size: int | None, device_type: str) -> Iterator[list[Job]]:
    """Jobs that can be drawn together, in order; pictures of one strength before the next, since changing
    it rewrites weights.
    """
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.batch_key, []).append(job)
    for group in sorted(groups.values(), key=lambda group: group[0].lora_scale):
        pixels = group[0].pixels
        room = (
            2**20 if device_type == "cuda" else 2**17
        )  # four pictures of 512 px on a card, eight of 128 else
        size = max(1, min(16, room // pixels)) if batch_size is None else batch_size
        yield from (group[i : i + size] for i in range(0, len(group), size))


# ---------------------------------------------------------------- pipeline and adapter


@dataclass(frozen=True)
class Task:
    """A job and the adapter that draws it."""

    job: Job
    source: Source
    digest: str  # job_hash


def make_tasks(jobs: Sequence[Job], sources: Sequence[Source], base_hash: str, precision: str) -> list[Task]:
    """Every job with every adapter. The base alone is the same under each, so the chosen one draws it."""
    return [
        Task(job, source, job_hash(job, source.digest, base_hash, precision))
        for job, source in itertools.product(jobs, sources)
        if source.is_chosen or job.lora_scale != 0
    ]


def check_fit(sources: Sequence[Source], base: BaseModel, cfg: GenerateConfig, lora_path: Path) -> None:
    """UserError (exit 4) unless every adapter belongs into the base; says what will be loaded."""
    for source in sources:
        merged = merge.MergedAdapter(source.adapter, base.unet, base.text_encoder)
    counts, strengths = merged.counts, ", ".join(f"{scale:g}" for scale in cfg.lora_scale)
    say(
        f"adapter: loaded {counts['unet']} UNet and {counts['text_encoder']} text-encoder modules, scale "
        f"{strengths} ({lora_path})"
    )
    if cfg.compare_checkpoints:
        say(f"checkpoints: {', '.join(source.name for source in sources)}")


def check_jobs(jobs: Sequence[Job], base: BaseModel) -> None:
    """UserError (exit 2) unless the base can draw every size, in that many steps."""
    cell = base.cell_px
    limit = base.scheduler.config.num_train_timesteps // 2  # samplers space their steps over the schedule
    for job in jobs:
        if job.width % cell or job.height % cell:
            reason = f"width and height must be multiples of {cell} for {base.name}"
            raise UserError(f"{job.width} x {job.height}: {reason}", errors.USAGE)
        if job.num_inference_steps > limit:
            raise UserError(
                f"{job.num_inference_steps} steps: {base.name} takes at most {limit}", errors.USAGE
            )


def note_long_prompts(jobs: Sequence[Job], base: BaseModel) -> None:
    """Says which prompts lose their end: the text encoder reads 75 tokens."""
    room = base.tokenizer.model_max_length - 2
    for prompt in dict.fromkeys(job.prompt for job in jobs):
        count = len(base.tokenizer(prompt, add_special_tokens=False).input_ids)
        if count > room:
            say(f"note: a prompt of {count} tokens is cut after {room}: {prompt[:60]!r}…")


def render(batch: Sequence[Job], base: BaseModel, merged: MergedAdapter) -> list[Image | None]:
    """The pictures of one batch; None for one whose numbers overflowed. Each has a generator of its own, so
    its neighbours don't matter.
    """
    job = batch[0]
    merged.set_scale(job.lora_scale)
    pipeline = base_models.pipeline_of(base, job.scheduler)
    return base_models.attempt(
        base,
        pipeline,
        prompt=[job.prompt for job in batch],
        negative_prompt=[job.negative_prompt for job in batch],
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        width=job.width,
        height=job.height,
        generator=[torch.Generator().manual_seed(job.seed) for job in batch],
    )


# ---------------------------------------------------------------- the command


def generate(cfg: GenerateConfig) -> Path:
    """Draws everything that is not drawn yet and returns the gallery's page."""
    if cfg.gallery_only:
        return pages.rebuild(Path(cfg.output_dir))
    lora_path = base_models.fetched_adapter(cfg.lora_path)
    sources = sources_of(cfg.lora_path, lora_path, with_checkpoints=cfg.compare_checkpoints)
    adapter = next(source.adapter for source in sources if source.is_chosen)
    prompts = read_prompts(cfg, adapter.metadata.get("trigger", TRIGGER))
    output = Path(cfg.output_dir)
    records.check_folder(output)
    files.check_apart("output_dir", cfg.output_dir, recorded(lora_path, "data_dir"))
    files.check_unused(output)
    files.check_writable(output)

    memory.keep_freed_memory()
    device = devices.pick_device(cfg.device)
    dtype = devices.pick_dtype(cfg.mixed_precision, device)
    base = base_models.load_base(base_of(adapter, lora_path, cfg.base_model), device=device, dtype=dtype)
    check_fit(sources, base, cfg, lora_path)
    about = {
        "base_model": base.name,
        "trigger": adapter.metadata.get("trigger", TRIGGER),
        "precision": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    cfg = settled(cfg, adapter, base)
    jobs = make_jobs(cfg, prompts)
    check_jobs(jobs, base)
    note_long_prompts(jobs, base)
    tasks = make_tasks(jobs, sources, base.digest, about["precision"])
    with closing(files.OutputLock(output).sign()):
        return draw_missing(tasks, cfg, base, about)


def draw_missing(tasks: Sequence[Task], cfg: GenerateConfig, base: BaseModel, about: dict[str, Any]) -> Path:
    """Draws the tasks whose pictures are not in the output folder; the page grows with every batch. UserError
    (exit 5), when all others are drawn, that names those whose numbers overflowed.
    """
    output = Path(cfg.output_dir)
    earlier = {record.job: record for record in records.read_records(output)}
    finished = {task.digest: earlier.pop(task.digest) for task in tasks if task.digest in earlier}
    missing = [task for task in tasks if task.digest not in finished]
    if cfg.no_metadata:
        for record in finished.values():
            records.strip_metadata(output / record.file)
    say(
        f"pictures: {len(missing)} to draw, {len(finished)} already there; {base.name} on "
        f"{base.unet.device}, {about['precision']}"
    )

    def show() -> None:
        drawn = (finished[task.digest] for task in tasks if task.digest in finished)
        pages.show_all(output, [*drawn, *earlier.values()])

    bar = tqdm(total=len(missing), desc="drawing", unit="picture", dynamic_ncols=True, disable=None)
    with bar, ExitStack() as at_the_end:
        at_the_end.callback(show)  # however it ends: what is drawn is shown
        for batch in drawn_batches(missing, cfg.batch_size, base):
            for task, image, seconds in [drawing for drawing in batch if drawing[1] is not None]:
                own = {"adapter": task.source.name, "adapter_hash": task.source.digest}
                record = record_of(task.job, task.digest, about | own, seconds)
                records.save_picture(image, record, output, described=not cfg.no_metadata)
                finished[task.digest] = record
            show()
            bar.update(len(batch))
    refuse_overflown([task.job for task in missing if task.digest not in finished])
    return output / records.PAGE


def drawn_batches(
    tasks: Sequence[Task], batch_size: int | None, base: BaseModel
) -> Iterator[list[tuple[Task, Image | None, float]]]:
    """The pictures batch by batch, one adapter after the other; None for one whose numbers overflowed. With
    the seconds that each took.
    """
    room = memory.Fewer()
    by_source: dict[str, dict[Job, Task]] = {}
    for task in tasks:
        by_source.setdefault(task.source.digest, {})[task.job] = task
    for wanted in by_source.values():
        adapter = next(iter(wanted.values())).source.adapter
        merged = merge.MergedAdapter(adapter, base.unet, base.text_encoder)
        for batch in batches(list(wanted), batch_size, base.unet.device.type):
            started = time.monotonic()
            images = room.drawn(
                batch, lambda part, merged=merged: render(part, base, merged), batch[0].pixels
            )
            seconds = round((time.monotonic() - started) / len(batch), 3)
            yield [(wanted[job], image, seconds) for job, image in zip(batch, images, strict=True)]
        merged.set_scale(0)  # the next adapter goes into the base's own weights


def refuse_overflown(jobs: Sequence[Job]) -> None:
    """UserError (exit 5) that names the jobs, if there are any."""
    if jobs:
        named = "; ".join(f"{job.prompt[:40]!r} (seed {job.seed})" for job in jobs[:NAMED])
        more = f" and {len(jobs) - NAMED} more" if len(jobs) > NAMED else ""
        raise UserError(f"{len(jobs)} not drawn: {named}{more}: {base_models.OVERFLOW}", errors.NUMBERS)


def record_of(job: Job, digest: str, about: dict[str, Any], seconds: float) -> ImageRecord:
    """The picture's line of metadata.jsonl."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return ImageRecord(
        file=file_name(job, digest), job=digest, created=created, seconds=seconds, **asdict(job), **about
    )


def main(cfg: GenerateConfig) -> None:
    """The command: pictures and their gallery."""
    say(f"done: open {generate(cfg)} in a browser")


if __name__ == "__main__":
    with errors.reported():
        main(CONFIG)
