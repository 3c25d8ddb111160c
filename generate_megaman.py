"""Draws with a trained LoRA and writes an HTML gallery.

    python generate_megaman.py                                          # the adapter trained last
    python generate_megaman.py --prompts "mega man, running" --num_images_per_prompt 4

A picture is decided by its job alone (prompt, seed, size, settings, adapter, base), so a repeated or
interrupted run keeps what is finished.
"""

import gc
import sys

if sys.version_info < (3, 11):  # noqa: UP036  before an import fails in words of its own
    sys.exit(f"error: Python {sys.version.split()[0]} is too old; run this with Python 3.11 or newer")

from megaman.common import console, signals
from megaman.common.console import UserError, quiet_libraries, say

if __name__ == "__main__":
    sys.excepthook = console.name_missing_library  # the imports below need what may not be installed

from megaman.config.generate import BUILT_IN_PROMPTS, NEGATIVE, TRIGGER, GenerateConfig, read_config
from megaman.generation import gallery, records

if "torch" not in sys.modules:  # a program that has loaded it hears what it wants to hear
    quiet_libraries()
if __name__ == "__main__":  # what needs no torch is answered before it loads, which takes seconds
    signals.end_quietly()
    with console.reported():
        CONFIG = read_config(sys.argv[1:])
        gallery.answer_gallery_only(CONFIG)
    gc.disable()  # a fifth of the time that the imports below take is a search for garbage among modules

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from megaman.common.files import path_from
from megaman.common.kinds import CHUNK, UNET
from megaman.common.output_folder import (
    GALLERY_PAGE,
    OutputLock,
    adapter_in,
    check_apart,
    check_unused,
    check_writable,
)
from megaman.config.train import EMBEDDED
from megaman.generation.candidates import (
    Candidate,
    base_of,
    candidates_of,
    check_hash,
    has_checkpoints,
    path_in_record,
    trained_as,
)
from megaman.generation.comparison import Task, prompts_for
from megaman.generation.prompts import Prompt, plain_prompts, read_prompts_file, texts_of
from megaman.generation.recommendation import gather, recommend
from megaman.generation.records import PLAIN, WEIGHTED, Job, job_hash, record_of
from megaman.generation.saving import Laps, Seldom, beside
from megaman.kernels import attention, convolutions, heap, products
from megaman.lora.adapter import STRENGTH, Adapter
from megaman.lora.merge import MergedAdapter
from megaman.model import compute, decoding, drawing, memory, stable_diffusion
from megaman.model.decoding import Decoded, Decoder
from megaman.model.hub import canonical_name, download_adapter, is_local
from megaman.model.prompt_syntax import has_weights, notes_on_syntax, without_lora_tags
from megaman.model.stable_diffusion import StableDiffusion
from megaman.model.text import notes_on_length

if __name__ == "__main__":
    gc.freeze()  # modules stay
    gc.enable()

GUIDANCE = 7.5  # where neither the user nor the adapter says another
PIXELS_AT_ONCE = {"cuda": 2**20}  # four pictures of 512 px on a card
PIXELS_AT_ONCE_ELSEWHERE = 2**17  # eight of 128
LARGEST_BATCH = 16

# ---------------------------------------------------------------- prompts to jobs


def resolve(cfg: GenerateConfig, adapter: Adapter, base: StableDiffusion) -> GenerateConfig:
    """The configuration with size, guidance, strength and negative prompt decided: where the user is silent,
    those of the training. The embedded base knows no words like "blurry": they would only disturb it; and it
    is quick enough to show beside each of our own prompts what it draws without the adapter.
    """
    known = adapter.metadata
    side = known.get("resolution", base.native_resolution)
    side = max(1, round(side / base.cell_px)) * base.cell_px  # an adapter may be trained on other sizes
    is_embedded = base.name == EMBEDDED
    usual = "" if is_embedded else NEGATIVE
    is_asked = (
        cfg.prompts or cfg.prompts_file is not None or cfg.lora_scale is not None or cfg.compare_checkpoints
    )
    return replace(
        cfg,
        compare_base=is_embedded and not is_asked if cfg.compare_base is None else cfg.compare_base,
        negative_prompt=usual if cfg.negative_prompt is None else cfg.negative_prompt,
        lora_scale=[float(known.get(STRENGTH, 1))] if cfg.lora_scale is None else cfg.lora_scale,
        width=side if cfg.width is None else cfg.width,
        height=side if cfg.height is None else cfg.height,
        guidance_scale=known.get("guidance_scale", GUIDANCE)
        if cfg.guidance_scale is None
        else cfg.guidance_scale,
    )


def own_prompts(cfg: GenerateConfig) -> list[Prompt]:
    """The user's prompts: those of the flags, then those of the file."""
    prompts = [Prompt(prompt) for prompt in cfg.prompts or ()]
    return prompts + (read_prompts_file(Path(cfg.prompts_file)) if cfg.prompts_file is not None else [])


def read_prompts(cfg: GenerateConfig, trigger: str) -> list[Prompt]:
    """The user's prompts; ours, with the adapter's trigger, if there are none."""
    return own_prompts(cfg) or [Prompt(prompt.replace(TRIGGER, trigger)) for prompt in BUILT_IN_PROMPTS]


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
    strengths = cfg.lora_scale or [1.0]
    scales = [0.0, *strengths] if cfg.compare_base or cfg.recommend else strengths
    jobs = []
    for prompt in prompts:
        settings = {**common, **prompt.settings}
        first = settings.pop("seed")
        for seed in range(first, first + cfg.num_images_per_prompt):
            jobs += [Job(prompt=prompt.text, seed=seed, lora_scale=scale, **settings) for scale in scales]
    return list(dict.fromkeys(jobs))


def as_read(job: Job, base: StableDiffusion) -> Job:
    """The job with how the base reads its texts: in how many chunks, and whether brackets weigh words."""
    texts = [job.prompt, job.negative_prompt]
    is_weighted = base.reads_weights and any(map(has_weights, texts))
    chunks = base.ids_of(texts).shape[1]
    return replace(job, max_tokens=CHUNK * chunks, words=WEIGHTED if is_weighted else PLAIN)


def group_into_batches(jobs: Sequence[Job], batch_size: int | None, device_type: str) -> Iterator[list[Job]]:
    """Jobs that can be drawn together, in order; pictures of one strength before the next, since changing it
    rewrites weights.
    """
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.batch_key, []).append(job)
    pixels_at_once = PIXELS_AT_ONCE.get(device_type, PIXELS_AT_ONCE_ELSEWHERE)
    for group in sorted(groups.values(), key=lambda group: group[0].lora_scale):
        fitting = max(1, min(LARGEST_BATCH, pixels_at_once // group[0].pixels))
        size = fitting if batch_size is None else batch_size
        yield from (group[i : i + size] for i in range(0, len(group), size))


# ---------------------------------------------------------------- tasks


class Drawn(NamedTuple):
    """What became of a task."""

    task: Task
    decoded: Decoded
    started_s: float  # when its batch was, by the clock


def make_tasks(
    jobs: Sequence[Job], candidates: Sequence[Candidate], base_hash: str, precision: str
) -> list[Task]:
    """Every job with every adapter. The base alone is the same under each, so the chosen one draws it."""
    return [
        Task(job, candidate, job_hash(job, candidate.digest, base_hash, precision))
        for job, candidate in itertools.product(jobs, candidates)
        if candidate.is_chosen or job.lora_scale != 0
    ]


def check_adapters_fit(candidates: Sequence[Candidate], base: StableDiffusion) -> str:
    """UserError (exit 4) unless every adapter belongs into the base. How many modules the chosen one changes,
    in words.
    """
    counts: dict[str, int] = {}
    for candidate in candidates:
        merged = MergedAdapter(candidate.adapter, base.parts, base.kind)
        if candidate.is_chosen:
            counts = merged.counts
    of_text = sum(count for part, count in counts.items() if part != UNET)
    return f"{counts[UNET]} UNet and {of_text} text-encoder modules"


def notes_on_cuts(jobs: Sequence[Job], base: StableDiffusion) -> list[str]:
    """A line for each text whose end is not read."""
    texts = [text for job in jobs for text in (job.prompt, job.negative_prompt)]
    return notes_on_length(base.tokenizer, texts, base.max_chunks, weights_are_read=base.reads_weights)


def check_jobs(jobs: Sequence[Job], base: StableDiffusion) -> None:
    """UserError (exit 2) unless the base can draw every size, in that many steps."""
    limit = base.scheduler.config.num_train_timesteps // 2  # samplers space their steps over the schedule
    for job in jobs:
        width, height = base.nearest_px(job.width), base.nearest_px(job.height)
        if (width, height) != (job.width, job.height):
            reason = f"{base.name} draws multiples of {base.stride}; {width} x {height} is the nearest"
            raise UserError(f"{job.width} x {job.height}: {reason}", console.Exit.USAGE)
        if job.num_inference_steps > limit:
            raise UserError(
                f"{job.num_inference_steps} steps: {base.name} takes at most {limit}", console.Exit.USAGE
            )


def render(
    batch: Sequence[Job], base: StableDiffusion, merged: MergedAdapter, decoder: Decoder
) -> list[Decoded]:
    """The pictures of one batch. Each has a generator of its own, so its neighbours don't matter."""
    job = batch[0]
    merged.set_scale(job.lora_scale)
    latents = drawing.draw_latents(
        base,
        drawing.pipeline_of(base, job.scheduler),
        **drawing.words(base, [job.prompt for job in batch], [job.negative_prompt for job in batch]),
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        width=job.width,
        height=job.height,
        generators=[torch.Generator().manual_seed(job.seed) for job in batch],
    )
    return decoder.start(latents)


# ---------------------------------------------------------------- drawing


def draw_batch(
    batch: Sequence[Job],
    base: StableDiffusion,
    merged: MergedAdapter,
    decoder: Decoder,
    limit: memory.BatchLimit,
) -> list[Decoded]:
    """The pictures of a batch, in as many parts as the memory asks for."""
    return limit.drawn(batch, lambda part: render(part, base, merged, decoder), batch[0].pixels)


def draw_batches(
    tasks: Sequence[Task], batch_size: int | None, base: StableDiffusion
) -> Iterator[list[Drawn]]:
    """The pictures batch by batch, one adapter after the other."""
    by_adapter: dict[str, dict[Job, Task]] = {}
    for task in tasks:
        by_adapter.setdefault(task.candidate.digest, {})[task.job] = task
    with closing(Decoder(base)) as decoder:
        limit = memory.BatchLimit(gives_way=decoder.gives_way)
        for wanted in by_adapter.values():
            adapter = next(iter(wanted.values())).candidate.adapter
            merged = MergedAdapter(adapter, base.parts, base.kind)
            for batch in group_into_batches(list(wanted), batch_size, base.device.type):
                started_s = time.monotonic()
                drawn = draw_batch(batch, base, merged, decoder, limit)
                yield [Drawn(wanted[job], each, started_s) for job, each in zip(batch, drawn, strict=True)]
            merged.set_scale(0)  # the next adapter goes into the base's own weights


def save_batch(
    batch: Sequence[Drawn], cfg: GenerateConfig, about: dict[str, Any], laps: Laps
) -> Iterator[records.ImageRecord]:
    """Saves a batch's pictures, once a card is done with them all, but for those that overflowed; gives each
    record as soon as its picture is safe.
    """
    output = Path(cfg.output_dir)
    images = [each.decoded.picture() for each in batch]
    seconds = round(laps.end(batch[0].started_s) / len(batch), 3)
    for each, image in zip(batch, images, strict=True):
        if image is not None:
            facts = about | each.task.candidate.facts(output)
            record = record_of(each.task.job, each.task.digest, facts, seconds)
            records.save_picture(image, record, output, described=not cfg.no_metadata)
            yield record


def raise_if_overflowed(jobs: Sequence[Job]) -> None:
    """UserError (exit 5) that names the jobs, if there are any."""
    if jobs:
        named = "; ".join(f"{job.prompt[:40]!r} (seed {job.seed})" for job in jobs[: console.NAMED])
        more = f" and {len(jobs) - console.NAMED} more" if len(jobs) > console.NAMED else ""
        raise UserError(f"{len(jobs)} not drawn: {named}{more}: {drawing.OVERFLOW}", console.Exit.NUMBERS)


def draw_missing(
    tasks: Sequence[Task], cfg: GenerateConfig, base: StableDiffusion, about: dict[str, Any]
) -> list[Job]:
    """Draws the tasks whose pictures are not in the output folder, and saves each batch while the next one is
    drawn; the page grows meanwhile. Those whose numbers overflowed.
    """
    output = Path(cfg.output_dir)
    earlier = {record.job: record for record in records.read_records(output)}
    finished = {task.digest: earlier.pop(task.digest) for task in tasks if task.digest in earlier}
    missing = [task for task in tasks if task.digest not in finished]
    for task in missing:
        records.check_place(output / records.file_name(task.job, task.digest))
    if cfg.no_metadata:
        for record in finished.values():
            records.strip_metadata(output / record.file)
    say(
        f"pictures: {len(missing)} to draw, {len(finished)} already there; {base.name} on "
        f"{base.device}, {about['precision']}"
    )

    def known() -> list[records.ImageRecord]:
        return [*(finished[task.digest] for task in tasks if task.digest in finished), *earlier.values()]

    page = Seldom(lambda: gallery.show(output, known()))
    laps = Laps()

    def keep(batch: Sequence[Drawn]) -> None:
        for record in save_batch(batch, cfg, about, laps):
            finished[record.job] = record
        records.write_records(output, known())
        page.do()

    bar = tqdm(total=len(missing), desc="drawing", unit="picture", dynamic_ncols=True, disable=None)
    with bar, beside(at_the_end=lambda: gallery.show_all(output, known())) as do:
        for batch in draw_batches(missing, cfg.batch_size, base):
            do(partial(keep, batch))
            bar.update(len(batch))
    return [task.job for task in missing if task.digest not in finished]


# ---------------------------------------------------------------- the command


def generate(cfg: GenerateConfig) -> Path:
    """Draws everything that is not drawn yet and returns the gallery's page."""
    output = Path(cfg.output_dir)
    if cfg.gallery_only:
        return gallery.rebuild(output)
    lora_path = adapter_in(download_adapter(cfg.lora_path))
    compares = cfg.compare_checkpoints or (cfg.recommend and has_checkpoints(lora_path))
    candidates = candidates_of(cfg.lora_path, lora_path, with_checkpoints=compares)
    chosen = next(candidate for candidate in candidates if candidate.is_chosen)
    check_hash(chosen, cfg.adapter_hash)
    adapter = chosen.adapter
    trigger = adapter.metadata.get("trigger", TRIGGER)
    asked = prompts_for(own_prompts(cfg), adapter) if cfg.recommend else read_prompts(cfg, trigger)
    prompts = plain_prompts(asked)
    texts = texts_of(asked, cfg.negative_prompt)
    notes = notes_on_syntax(texts, weights_are_read=cfg.prompt_weights)
    cfg = replace(cfg, negative_prompt=cfg.negative_prompt and without_lora_tags(cfg.negative_prompt))
    check_output_folder(output, lora_path)

    heap.keep_freed_memory()
    device = compute.pick_device(cfg.device)
    dtype = compute.pick_dtype(cfg.mixed_precision, device)
    name = base_of(adapter, lora_path, cfg.base_model)
    base = load_base(name, adapter, cfg, device, dtype)
    cfg = resolve(cfg, adapter, base)
    strengths = ", ".join(f"{scale:g}" for scale in cfg.lora_scale or ())
    say(f"adapter: loaded {check_adapters_fit(candidates, base)}, scale {strengths} ({lora_path})")
    if compares:
        say(f"checkpoints: {', '.join(candidate.name for candidate in candidates)}")
    about = facts_of_run(output, base, name, trigger)
    jobs = [as_read(job, base) for job in make_jobs(cfg, prompts)]
    check_jobs(jobs, base)
    base.is_crowded = decoding.is_crowded(base, max(job.pixels for job in jobs))
    base.place(*(() if base.is_crowded else ("vae", *base.parts)))
    for line in [*notes, *notes_on_cuts(jobs, base)]:
        say(line)
    tasks = make_tasks(jobs, candidates, base.digest, about["precision"])
    evidence = gather(tasks, cfg, lora_path, adapter, base) if cfg.recommend else None
    with closing(OutputLock(output).sign()):
        overflowed = draw_missing(tasks, cfg, base, about)
        if evidence is not None:
            return recommend(tasks, cfg, base, evidence)
    raise_if_overflowed(overflowed)
    return output / GALLERY_PAGE


def facts_of_run(output: Path, base: StableDiffusion, name: str, trigger: str) -> dict[str, Any]:
    """What the records of all pictures in `output` say alike. name: the base's as it was loaded."""
    return {
        "base_model": base.name,
        "base_path": path_from(output, Path(name).expanduser()) if is_local(name) else "",
        "trigger": trigger,
        "precision": str(base.unet.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def load_base(
    name: str, adapter: Adapter, cfg: GenerateConfig, device: torch.device, dtype: torch.dtype
) -> StableDiffusion:
    """The base to draw with, not on its device yet. UserError (exit 4) if it can't be loaded."""
    is_own = canonical_name(name) == adapter.metadata.get("base")
    wanted = trained_as(adapter) if is_own else "auto"
    base = stable_diffusion.load_base(name, device=device, dtype=dtype, flag="--base_model", wanted=wanted)
    base.max_chunks = cfg.max_tokens // CHUNK
    base.reads_weights = cfg.prompt_weights
    if device.type == "cpu":
        for part in base.parts.values():
            products.take_over(part)
        attention.take_over(base.unet)
        convolutions.take_over(base.unet)
    return base


def check_output_folder(output: Path, lora_path: Path) -> None:
    """UserError unless pictures may go there: by what lies in the folder, outside the pictures that were
    trained on, and with room.
    """
    records.check_folder(output)
    check_apart("output_dir", str(output), path_in_record(lora_path, "data_dir"))
    check_unused(output)
    check_writable(output)


def main(cfg: GenerateConfig) -> None:
    """The command: pictures and their gallery."""
    say(f"done: open {generate(cfg)} in a browser")


if __name__ == "__main__":
    with console.reported():
        main(CONFIG)
