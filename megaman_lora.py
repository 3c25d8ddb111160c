"""Teaches Stable Diffusion a character from 15-100 pictures: trains a LoRA and writes it for every tool.

    python megaman_lora.py --preset demo               # the embedded base, our pictures: no GPU, no network
    python megaman_lora.py --data_dir ./megaman_images # Stable Diffusion 1.5 and yours

What a step does is a function of (seed, position): position is the index in one endless stream of examples.
It fixes the picture, the noise, the timestep and the dropped caption; the learning rate is a function of the
step. So a run that is stopped goes on to the very bits of one that was not.
"""

import gc
import sys

if sys.version_info < (3, 11):  # noqa: UP036  before an import fails in words of its own
    sys.exit(f"error: Python {sys.version.split()[0]} is too old; run this with Python 3.11 or newer")

from megaman.common import clock, console, signals
from megaman.common.console import UserError, quiet_libraries, say

if __name__ == "__main__":
    sys.excepthook = console.name_missing_library  # the imports below need what may not be installed

from megaman.config.record import published, recorded
from megaman.config.train import DataFlags, TrainConfig, read_config
from megaman.data import first_start
from megaman.training import run_page

if "torch" not in sys.modules:  # a program that has loaded it hears what it wants to hear
    quiet_libraries()
if __name__ == "__main__":  # what needs no torch is answered before it loads, which takes seconds
    clock.start()
    signals.end_quietly()
    with console.reported():
        CONFIG, CHOSEN = read_config(sys.argv[1:])
        run_page.answer_report(CONFIG, CHOSEN)
        first_start.answer_first_start(CONFIG, CHOSEN)
    gc.disable()  # a fifth of the time that the imports below take is a search for garbage among modules

import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import CLIPTokenizer

from megaman.common.cache import Store, default_folder, key_of
from megaman.common.kinds import CHUNK, V_PREDICTION
from megaman.common.output_folder import CAPTIONS, RunFolder, check_apart, check_output, holds_run
from megaman.data import buckets, captions, scan
from megaman.data.buckets import Bucket, Crop
from megaman.data.folder import look_into
from megaman.data.report import Report, TrainedPicture, dataset_facts
from megaman.kernels import attention, convolutions, heap, onednn, products
from megaman.lora import fused, init_lora, injection, strength
from megaman.model import compute, decoding, footprint, memory, stable_diffusion
from megaman.model.hub import model_hashes
from megaman.model.int8 import store_in_int8
from megaman.model.memory import MemoryPlan
from megaman.model.prompt_syntax import notes_on_syntax, without_lora_tags
from megaman.model.recompute import recompute
from megaman.model.stable_diffusion import BaseFacts, StableDiffusion
from megaman.model.text import Text, notes_on_length
from megaman.training import adoption, checkpoints, encoding, objective, pace, resume, validation
from megaman.training.captioning import with_captions_from_pictures
from megaman.training.checkpoints import Checkpoint
from megaman.training.encoding import CaptionReader, EncodedDataset
from megaman.training.optim import EMA
from megaman.training.pace import Pace
from megaman.training.sampler import Position, Sampler, generator_of, micro_batches, seed_dropout
from megaman.training.schedule import (
    describe_plan,
    pictures_a_step,
    plan,
    rates_at,
    text_encoder_stop_at,
)
from megaman.training.step import Step, at_rest, prepared
from megaman.training.tracker import SilentTracker, StepResult, Tracker
from megaman.training.validation import BestCheckpoint

if __name__ == "__main__":
    gc.freeze()  # modules stay
    gc.enable()


def with_init_lora(cfg: TrainConfig, chosen: Collection[str] = ()) -> TrainConfig:
    """The configuration with what --init_lora decides: rank, alpha, targets and DoRA are the adapter's.

    chosen: the user's own settings. UserError if one of them is another than the adapter's (exit 2).
    """
    if cfg.init_lora is None:
        return cfg
    init = init_lora.read_init_lora(cfg.init_lora, init_lora.parts_of(cfg))
    init_lora.check_form(init, cfg, chosen)
    return replace(cfg, **init.settings(cfg.use_rslora))


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Example:
    """One picture and its caption.

    pixels (3,side,side) in [-1, 1]; ids (77,), None where the dataset has no tokenizer.
    """

    path: Path
    caption: str
    pixels: Tensor
    ids: Tensor | None


SNR_GAMMA = 5.0  # Hang et al. 2023
VARIANTS = 4  # encoded per picture, of random crops and of shuffled captions; each step picks one


class MegaManDataset:
    """The pictures and captions of a folder.

    Works without a model: `MegaManDataset("./megaman_images", None)`.
    """

    def __init__(
        self,
        data_dir: str | Path,
        tokenizer: CLIPTokenizer | None,
        settings: DataFlags | None = None,
        *,
        cell_px: int = 64,
        seed: int = 42,
        store: Store | None = None,
    ) -> None:
        """Looks at every file once. cell_px: the sides of all training sizes are multiples of it.

        Unreadable pictures go to `skipped`; UserError (exit 3) on a missing folder or unreadable captions.
        """
        self.folder = Path(data_dir)
        self.tokenizer = tokenizer
        self.seed = seed
        self.settings = settings or DataFlags()
        self.listing = look_into(self.folder)
        self.scanned, self.skipped = scan.scan(
            self.listing, store or Store(None), reads_alpha=self.settings.alpha_mask
        )
        self.paths = [picture.path for picture in self.scanned]
        self.captions = captions.read_captions(self.paths, self.folder, self.settings, self.skipped)
        self.repeats = [captions.repeats_of(path, self.folder) for path in self.paths]
        offered = buckets.buckets_of(self.settings.side_px, cell_px, self.settings.crop)
        self.buckets = [buckets.bucket_for(picture.size, offered) for picture in self.scanned]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """Changes when anything that training sees changes (pixels, masks, sizes, repeats, captions, order);
        file names don't matter.
        """
        rows = zip(self.scanned, self.buckets, self.repeats, self.captions, strict=True)
        seen = (
            f"{picture.seen} {bucket} {count} {caption.whole}" for picture, bucket, count, caption in rows
        )
        return f"{len(self)} with sum {key_of(*seen)[:12]}"

    def __getitem__(self, index: int) -> Example:
        caption = self.captions[index].text
        return Example(self.paths[index], caption, self.crops(index)[0].pixels(), self._ids(caption))

    def _ids(self, caption: str) -> Tensor | None:
        if self.tokenizer is None:
            return None
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            caption, return_tensors="pt", padding="max_length", max_length=length, truncation=True
        )
        return ids.input_ids[0]

    def crops(self, index: int) -> list[Crop]:
        """The ways in which a picture is shown: windows where they are random, mirrored or not."""
        is_random = self.settings.crop == "random"
        count = VARIANTS if is_random else 1 + self.settings.flip
        return [self._crop(index, variant, is_random) for variant in range(count)]

    def _crop(self, index: int, variant: int, is_random: bool) -> Crop:
        picture = self.scanned[index]
        is_mirrored = self.settings.flip and variant % 2 == 1
        at = buckets.CENTRE
        if is_random:
            left, top = torch.rand(2, generator=generator_of(self.seed, picture.digest, variant)).tolist()
            at = (left, top)
        path, digest, size, mask = picture.path, picture.digest, picture.size, picture.mask
        return Crop(path, digest, self.buckets[index], at, is_mirrored, size, mask)

    def texts(self, index: int) -> list[str]:
        """The wordings of a picture's caption: those of its file; several of each where tags are shuffled."""
        wordings = self.captions[index].wordings
        if not self.settings.shuffle_tags:
            return list(wordings)
        rng = random.Random(f"{self.seed}/{self.scanned[index].digest}")
        return captions.variants(wordings, VARIANTS, keep_tags=self.settings.keep_tags, rng=rng)

    def mirrored(self, text: str) -> str:
        """What a caption says of its picture mirrored."""
        return captions.mirrored(text, self.settings.trigger)

    def class_texts(self, classes: Sequence[str]) -> list[tuple[str, ...]]:
        """For each picture, its caption with every one of these names in the trigger's place."""
        plain = [caption.text for caption in self.captions]
        trigger = self.settings.trigger
        wordings = [captions.with_trigger_replaced(plain, trigger, name) for name in classes]
        return list(zip(*wordings, strict=True))


def sampler_of(dataset: MegaManDataset, step_size: int, without: frozenset[int] = frozenset()) -> Sampler:
    """The order in which the dataset's pictures are trained on, without some of them."""
    members: dict[Bucket, list[int]] = {}
    for index, (bucket, repeats) in enumerate(zip(dataset.buckets, dataset.repeats, strict=True)):
        if index not in without:
            members.setdefault(bucket, []).extend([index] * repeats)
    return Sampler(tuple(tuple(members[bucket]) for bucket in sorted(members)), step_size, dataset.seed)


def report_of(dataset: MegaManDataset) -> Report:
    """What the user should know of a dataset with a tokenizer."""
    tokenizer = dataset.tokenizer
    if tokenizer is None:
        raise ValueError("a report counts tokens: give the dataset a tokenizer")
    pictures = [
        TrainedPicture(
            path.relative_to(dataset.folder).as_posix(),
            dataset.scanned[i],
            dataset.captions[i],
            dataset.buckets[i],
            dataset.repeats[i],
            max(len(tokenizer(text).input_ids) - 2 for text in dataset.captions[i].wordings),
        )
        for i, path in enumerate(dataset.paths)
    ]
    return Report(dataset.listing, dataset.settings, pictures, dataset.skipped)


# ---------------------------------------------------------------- the run


def every(step: int, interval: int, total: int) -> bool:
    """True at step 0, after every `interval` steps, and after the last."""
    return step % interval == 0 or step == total


def open_store(cfg: TrainConfig) -> Store:
    """The cache folder that the user named, or the platform's."""
    return Store(Path(cfg.cache_dir) if cfg.cache_dir else default_folder())


def open_dataset(cfg: TrainConfig, facts: BaseFacts) -> MegaManDataset:
    """The pictures to train on. UserError (exit 3) if there are none, or if one is skipped under --strict.

    facts: what is known of the base.
    """
    for flag in ("output_dir", "cache_dir", "logging_dir"):
        check_apart(flag, getattr(cfg, flag), cfg.data_dir)
    dataset = MegaManDataset(
        cfg.data_dir, facts.tokenizer, cfg, cell_px=facts.cell_px, seed=cfg.seed, store=open_store(cfg)
    )
    if len(dataset) == 0:
        none = f"{cfg.data_dir}: no usable pictures (JPG, PNG, WebP, …). Add some, or try --preset demo."
        why = (*map(str, dataset.skipped), *dataset.listing.left_out_lines)
        raise UserError([none, *(f"  {each}" for each in why)], console.Exit.DATA)
    return dataset


@dataclass(frozen=True)
class TrainingSet:
    """The pictures of a run: those that it trains on, in their order, and those that it never sees."""

    dataset: MegaManDataset
    report: Report
    held_out: frozenset[int]  # the loss on them tells when the others are learned by heart
    sampler: Sampler


def open_training_set(
    cfg: TrainConfig, processes: int, checkpoint: Checkpoint | None = None
) -> tuple[TrainingSet, TrainConfig]:
    """The pictures, looked at and put in order, and the settings with what follows from them and from the
    base; both are told. UserError as `open_dataset` raises it.
    """
    facts = stable_diffusion.peek(cfg.pretrained_model_name)
    cfg = replace(cfg, resolution=cfg.resolution or facts.resolution)
    dataset = open_dataset(cfg, facts)
    digests = [picture.digest for picture in dataset.scanned]
    names = [path.relative_to(dataset.folder).as_posix() for path in dataset.paths]
    held_out = validation.held_out(digests, names, cfg.validation_split, cfg.seed)
    sampler = sampler_of(dataset, pictures_a_step(cfg, processes), held_out)
    report = report_of(dataset)
    cfg = plan(cfg, sampler, checkpoint)
    for line in [*report.lines(), *describe_plan(cfg, sampler)]:
        say(line)
    return TrainingSet(dataset, report, held_out, sampler), cfg


def describe_adapter(cfg: TrainConfig, base: StableDiffusion, report: Report) -> dict[str, Any]:
    """What the run writes into the adapter's metadata; no path and no name of the user."""
    return {
        "base": base.name,
        "resolution": cfg.resolution,
        "trigger": cfg.trigger,
        "guidance_scale": cfg.validation_guidance_scale,
        "steps": cfg.max_train_steps,
        "text_width": base.unet.config.cross_attention_dim,
        "prediction_type": base.prediction_type,
        **({"zero_snr": True} if base.has_zero_snr else {}),
        "config": published(cfg) | {"pretrained_model_name": base.name},
        "dataset": dataset_facts(report),
        "hashes": model_hashes(Path(cfg.pretrained_model_name)),
    }


@dataclass
class Run:
    """What a run holds once it is set up."""

    cfg: TrainConfig  # with everything decided
    accelerator: Accelerator
    base: StableDiffusion  # its parts carry the adapter: the UNet, and the text encoders if they are trained
    data: TrainingSet
    encoded: EncodedDataset
    captions: CaptionReader
    validation_ids: Tensor  # (1+P,C,77): tokens of the empty caption, then of the validation prompts
    validation_text: Text  # what the base reads in them
    step: Step  # how a step is computed
    ema: EMA  # what previews draw and files hold
    origins: dict[str, Any]  # fingerprints of pictures, captions and base
    checkpoint: Checkpoint | None  # that the run resumes from
    memory: MemoryPlan
    drawn_with: str | None  # the weights of the base, where the first previews are the base's own
    best: BestCheckpoint = field(default_factory=BestCheckpoint)  # the smallest loss on what is held out
    pace: Pace = field(default_factory=Pace)  # how long things take

    @property
    def folder(self) -> RunFolder:
        """Where everything goes."""
        return RunFolder(Path(self.cfg.output_dir))

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The adapter's parameters, float32."""
        return self.step.trainable

    @property
    def optimizer(self) -> Optimizer:
        """As accelerate has prepared it."""
        return self.step.optimizer

    @property
    def start(self) -> int:
        """Steps that an earlier command has done."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def description(self) -> dict[str, Any]:
        """What the run writes into the adapter's metadata."""
        return describe_adapter(self.cfg, self.base, self.data.report)


def set_up(cfg: TrainConfig) -> Run:
    """Everything before the first step, what is quick and may fail before what is slow. Writes nothing."""
    heap.keep_freed_memory()
    accelerator, dtype = compute.start(cfg.mixed_precision)
    compute.try_out(cfg.attention, cfg.compile, accelerator.device)
    checkpoint = resume.checkpoint_of(cfg.resume_from_checkpoint, RunFolder(Path(cfg.output_dir)))
    init = init_lora.init_of(cfg)
    with accelerator.main_process_first():  # the others then find what it has seen in the cache
        data, cfg = open_training_set(cfg, accelerator.num_processes, checkpoint)
    origins = {resume.PICTURES: data.dataset.fingerprint, **data.sampler.origins}
    resume.check_resume(checkpoint, cfg, origins)
    check_output(Path(cfg.output_dir), Path(cfg.data_dir))

    base, cfg = load_base(cfg, accelerator.device, dtype)
    buckets.check_sizes(data.dataset.buckets, cfg.side_px, base.cell_px, base.name)
    origins |= base.origins
    resume.check_resume(checkpoint, cfg, origins)
    encoded = encode_dataset(data.dataset, base, cfg, accelerator).kept_for(cfg.text_encoder_lr > 0)
    origins |= encoded.origins
    resume.check_resume(checkpoint, cfg, origins)
    validation_ids = base.ids_of(["", *map(without_lora_tags, cfg.validation_prompt)])
    is_first = accelerator.is_main_process and not checkpoint and not cfg.max_minutes  # which times one
    drawn_with = validation.first_drawn_with(base, cfg, open_store(cfg)) if is_first else None
    validation_text = place_for_training(base, cfg, validation_ids)
    injection.inject(base.parts, cfg, base.kind, partial(generator_of, cfg.seed), init)
    trainable = checkpoints.trained(base.parts)
    step = prepared(base, trainable, cfg, accelerator)
    run = Run(
        cfg=cfg,
        accelerator=accelerator,
        base=base,
        data=data,
        encoded=encoded,
        captions=CaptionReader(encoded, base, text_encoder_stop_at(cfg) if cfg.text_encoder_lr else 0),
        validation_ids=validation_ids,
        validation_text=validation_text,
        step=step,
        ema=EMA(trainable, cfg.ema_decay),
        origins=origins,
        checkpoint=checkpoint,
        memory=MemoryPlan(cfg.train_batch_size),
        drawn_with=drawn_with,
    )
    speed_up(run)
    return run


def speed_up(run: Run) -> None:
    """Puts faster ways of computing the same in place, where they fit: of the LoRA layers, and, on a CPU, of
    the frozen ones: linear layers of float32 by the kind of CPU, attention of bfloat16, convolutions of few
    cells, others as the largest picture shows.
    """
    if run.cfg.compile:
        return  # what is compiled is fused by the compiler
    is_on_cpu = run.accelerator.device.type == "cpu"
    for part in run.base.parts.values():
        fused.fuse(part)
        if is_on_cpu:
            products.take_over(part)
    if is_on_cpu and run.cfg.attention == "auto":
        attention.take_over(run.base.unet)
    if is_on_cpu and not run.cfg.use_dora:  # which views its convolutions' factors in torch's order
        convolutions.take_over(run.base.unet)
        times = validation.TIMESTEPS[:1] * run.memory.batch
        index = max(range(len(run.encoded)), key=lambda each: run.encoded.shape_of(each).numel())
        batch = objective.validation_batch(run.encoded, index, times, run.captions.now)
        unet = run.base.unet
        example = partial(objective.predictions, unet, batch, run.base.scheduler)
        onednn.lay_out(unet, example, fused.layers_read(unet), run.accelerator.num_processes)


def load_base(
    cfg: TrainConfig, device: torch.device, dtype: torch.dtype
) -> tuple[StableDiffusion, TrainConfig]:
    """The base that the settings name, and the settings with what it decides where the user is silent.
    UserError (exit 4) if it can't be loaded.
    """
    name, wanted = cfg.pretrained_model_name, cfg.prediction_type
    base = stable_diffusion.load_base(name, device=device, dtype=dtype, wanted=wanted)
    base.max_chunks = cfg.max_tokens // CHUNK
    # min-SNR blinds v prediction to high noise, where composition and blacks are learned
    usual = 0.0 if base.prediction_type == V_PREDICTION else SNR_GAMMA
    return base, replace(cfg, snr_gamma=usual if cfg.snr_gamma is None else cfg.snr_gamma)


def place_for_training(base: StableDiffusion, cfg: TrainConfig, validation_ids: Tensor) -> Text:
    """Reads the validation prompts' tokens, and leaves on the device what a step needs."""
    base.place(*base.encoders)
    text = base.embed_ids(validation_ids)
    if not cfg.text_encoder_lr:
        base.drop_encoders()
    if cfg.base_weights == "int8":
        store_in_int8(base.unet)
    base.is_crowded = decoding.is_crowded(base, cfg.side_px**2)
    base.place(*base.parts)
    return text


def encode_dataset(
    dataset: MegaManDataset, base: StableDiffusion, cfg: TrainConfig, accelerator: Accelerator
) -> EncodedDataset:
    """The dataset as latents and text states, from the cache where it was encoded before. Several processes
    share the work.
    """
    store = open_store(cfg)
    crops = [dataset.crops(index) for index in range(len(dataset))]
    texts = [dataset.texts(index) for index in range(len(dataset))]
    class_texts = dataset.class_texts(cfg.preserve_class if cfg.preserve_weight else [])
    said = encoding.Captions(texts, class_texts, dataset.mirrored)
    encoded = encoding.encode(crops, said, base, store, accelerator)
    say(f"cache: {store.hits} of {store.hits + store.misses} encodings were there ({store.folder})")
    store.prune()
    return encoded


def begin(run: Run) -> None:
    """Says what is trained where, and puts the checkpoint's state in place, if the run goes on from one."""
    precision = str(run.base.unet.dtype).removeprefix("torch.")
    count = sum(parameter.numel() for parameter in run.trainable.values())
    processes = run.accelerator.num_processes
    several = f", {processes} processes" if processes > 1 else ""
    say(f"training: {count:,} parameters on {run.accelerator.device}, the base in {precision}{several}")
    prompts = run.cfg.validation_prompt
    plain = [without_lora_tags(prompt) for prompt in prompts]
    cuts = notes_on_length(run.base.tokenizer, plain, run.base.max_chunks)
    for line in (*notes_on_syntax(prompts), *cuts):
        say(line)
    if run.checkpoint is not None:
        restore_checkpoint(run, run.checkpoint)
        say(f"resuming: at step {run.start} of {run.cfg.max_train_steps}, from {run.checkpoint.path}")
    plan_memory(run)
    apply_memory_plan(run)
    heap.give_back()  # what encoding and measuring took


def restore_checkpoint(run: Run, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's state in place: adapter, average, optimizer, scaler, and what the run had found
    out.
    """
    resume.tell_of_rounding(checkpoint, compute.digits_of(run.accelerator.device))
    tensors = run.ema.take_from(checkpoint.tensors)
    checkpoints.restore(run.trainable, run.optimizer, tensors)
    run.memory = MemoryPlan.of(checkpoint.run)
    run.best = BestCheckpoint(**checkpoint.run["best"])
    run.pace = Pace.of(checkpoint.run, run.pace.began)
    scaler = run.accelerator.scaler
    if scaler is not None and checkpoint.run["scaler"]:
        scaler.load_state_dict(checkpoint.run["scaler"])


def plan_memory(run: Run) -> None:
    """Tells what memory the run takes, and takes the least time for it, if --gradient_checkpointing says so
    and no earlier command has found out what fits.
    """
    chunks = run.encoded.ids.shape[1]
    estimate = footprint.estimate_of(run.base, run.trainable.values(), run.cfg, run.memory.batch, chunks)
    card = compute.smallest(memory.card_gib(run.accelerator.device), run.accelerator)
    if run.cfg.gradient_checkpointing and run.memory.recomputed == "nothing":
        run.memory.recomputed = "all" if estimate is None else estimate.level_for(card)
    if estimate is not None:
        say(estimate.line(card, run.memory.recomputed))


def apply_memory_plan(run: Run) -> None:
    """Clears the gradients and applies the memory plan."""
    run.step.clear()
    recompute(run.base.unet, run.memory.recomputed, run.base.encoders.values())


def tracker_of(run: Run) -> SilentTracker:
    """The run's metrics and samples; silent in all processes but the first."""
    steps = range(run.start, run.cfg.max_train_steps)
    names = [picture.name for picture in run.data.report.pictures]
    if not run.accelerator.is_main_process:
        return SilentTracker(steps, names)
    wanted = run.cfg.report_to == "tensorboard"
    logging_dir = Path(run.cfg.logging_dir or run.folder.logs) if wanted else None
    size, prompts = run.data.sampler.step_size, run.cfg.validation_prompt
    return Tracker(run.folder, steps, names, size, logging_dir=logging_dir, prompts=prompts)


@pace.timed
def save_checkpoint(run: Run, tracker: SilentTracker, step: int) -> None:
    """A checkpoint after `step` steps, written by the first process."""
    tracker.check()  # nothing that isn't finite is saved
    if run.accelerator.is_main_process:
        run.best.note_saved(step)
        scaler = run.accelerator.scaler
        facts = {
            "digits": compute.digits_of(run.accelerator.device),
            "scaler": None if scaler is None else scaler.state_dict(),
            "best": asdict(run.best),
            **run.memory.facts(),
            **run.pace.facts(run.cfg),
        }
        tensors = checkpoints.tensors_of(run.trainable, run.optimizer) | run.ema.tensors()
        threads = torch.get_num_threads()
        checkpoint = Checkpoint(step, asdict(run.cfg), run.origins, facts, threads, tensors)
        with run.ema.swapped_in():
            adapter = injection.adapter_of(run.base.parts, run.base.kind, run.description | {"steps": step})
            strengths = strength.strengths_of(run.base.parts)
        keep = run.cfg.checkpoints_total_limit
        checkpoints.save_checkpoint(
            run.folder.checkpoints, checkpoint, adapter, keep=keep, best=run.best.step
        )
        tracker.record_strengths(step, *strengths)


@pace.timed
def validate(run: Run, tracker: SilentTracker, step: int) -> None:
    """Measures the plain loss on the pictures that are held out, with the moving average, if there is one."""
    if run.data.held_out and run.accelerator.is_main_process:
        unet, encoded, read = run.base.unet, run.encoded, run.captions.now
        with torch.no_grad(), run.ema.swapped_in(), at_rest(run.base.parts):
            moments = product(sorted(run.data.held_out), validation.TIMESTEPS)  # one at a time: memory
            batches = (objective.validation_batch(encoded, index, [at], read) for index, at in moments)
            losses = [
                objective.denoising_losses(unet, batch, run.base.scheduler, snr_gamma=0) for batch in batches
            ]
        loss = torch.cat(losses).mean().item()
        run.best.note_measured(step, loss)
        tracker.record_validation(step, loss)


@pace.timed
def draw_samples(run: Run, tracker: SilentTracker, step: int, stop: signals.StopRequest) -> None:
    """One picture a validation prompt, always from the same noise, drawn by the first process."""
    if run.accelerator.is_main_process:
        cfg = run.cfg
        look = validation.Look(cfg.side_px, cfg.validation_guidance_scale, cfg.seed)

        def drawn() -> list[Image]:
            with run.ema.swapped_in(), at_rest(run.base.parts):
                text = run.base.embed_ids(run.validation_ids) if run.base.encoders else run.validation_text
                return validation.draw_previews(run.base, text, look, step, stop)

        if step == 0 and run.drawn_with is not None:
            kernels = (
                f"{cfg.attention} {cfg.compile} {cfg.base_weights} {cfg.lora_targets} {cfg.lora_dropout}"
            )
            key = validation.key_of_base_previews(
                run.drawn_with, run.base, run.validation_text, look, kernels
            )
            images = validation.kept_previews(key, open_store(cfg), drawn)
        else:
            images = drawn()
        heap.give_back()
        if images:
            tracker.show_samples(step, cfg.validation_prompt, images)


def finish(run: Run, tracker: SilentTracker) -> Path:
    """Writes lora_weights/ and closes tracker and accelerator."""
    weights = run.folder.weights
    if run.accelerator.is_main_process:
        with run.ema.swapped_in():
            adapter = injection.adapter_of(run.base.parts, run.base.kind, run.description)
            shown = tracker.latest_sample()
            adoption.write_at_the_end(run.folder, adapter, run.start, live=run.base.parts, preview=shown)
        better = run.best.report_line(run.folder, run.cfg.max_train_steps)
        if better is not None:
            say(better)
    tracker.close()
    compute.end(run.accelerator)
    return weights


# ---------------------------------------------------------------- the loop


Parts = list[tuple[Sequence[Position], Tensor]]  # of a step, each with its losses (B,)


@dataclass(frozen=True)
class StepLosses:
    """What a step's examples cost: the parts that this process computed, and the mean over all examples, on
    all processes.
    """

    parts: Parts
    mean: Tensor


def forward_backward(run: Run, positions: Sequence[Position], step: int) -> StepLosses:
    """Forward, loss and backward of a step's examples, in parts that fit into memory: the gradients add up,
    over all processes too.

    With less at a time where memory runs out, in all processes if in one.
    """
    accelerator = run.accelerator

    def attempt() -> tuple[Parts, list[Tensor], Tensor | None]:
        parts = accumulate(run, positions, step)
        total = torch.stack([losses.sum() for _, losses in parts]).sum()
        gradients = [each.grad for each in run.trainable.values() if each.grad is not None]
        shared = [*gradients, total]
        return parts, shared, compute.side_by_side(shared, accelerator)

    def shrink() -> None:
        run.memory.shrink(step, footprint.levels_of(run.base, run.cfg))
        apply_memory_plan(run)

    is_agreed = partial(compute.is_agreed, accelerator=accelerator)
    parts, shared, row = memory.retry_with_less_memory(attempt, shrink, is_agreed)
    compute.add_up(shared, row)
    return StepLosses(parts, shared[-1] / len(positions))


def accumulate(run: Run, positions: Sequence[Position], step: int) -> Parts:
    """One pass over this process's parts of a step, of which it has at least one."""
    cfg, accelerator = run.cfg, run.accelerator
    text_of = partial(run.captions.for_step, step)
    shares = micro_batches(positions, accelerator.process_index, accelerator.num_processes, run.memory.batch)
    parts = []
    for share in filter(None, shares):  # a process may go without in the last one
        if cfg.lora_dropout:
            seed_dropout(cfg.seed, share[0].number)
        batch = objective.make_batch(share, run.encoded, cfg, run.base.scheduler, text_of)
        parts.append((share, run.step.backward(batch, 1 / len(positions))))
    return parts


def try_step(run: Run) -> None:
    """Computes the first step and forgets it, to see how long that takes."""
    forward_backward(run, run.data.sampler.batch(run.start), run.start).mean.item()  # waits for the device
    run.step.clear()


def train(cfg: TrainConfig) -> Path:
    """Trains one adapter and returns its folder lora_weights/. UserError with the exit code when it can't."""
    run = set_up(cfg)
    begin(run)
    cfg, accelerator, total = run.cfg, run.accelerator, run.cfg.max_train_steps
    is_main = accelerator.is_main_process
    claim = resume.claimed(run.folder, recorded(cfg), run.checkpoint, is_main=is_main)
    with claim as stop, closing(tracker_of(run)) as tracker:
        if run.start == 0:
            if is_main:
                run.data.report.write(run.folder.path)
                tracker.record_dataset(run.data.report.summary | {"held out": len(run.data.held_out)})
            validate(run, tracker, 0)
        if every(run.start, cfg.validation_steps, total) and not tracker.has_samples(run.start):
            draw_samples(run, tracker, run.start, stop)  # of the base, or those that a stopped run still owes
        for step in pace.steps(run, tracker, partial(try_step, run)):
            total = run.cfg.max_train_steps  # which the clock may have decided
            rates = rates_at(step, run.cfg)
            positions = run.data.sampler.batch(step)  # a function of the step
            losses = forward_backward(run, positions, step)
            grad_norm, skipped = run.step.update(rates)
            run.ema.update(step)
            tracker.record(StepResult(step, losses.mean, grad_norm, rates, skipped, losses.parts))

            done = step + 1
            is_stopped = compute.is_agreed(bool(stop), accelerator)  # several processes wait for each other
            if every(done, cfg.validation_steps, total) or every(done, cfg.save_steps, total):
                validate(run, tracker, done)
            if is_stopped or every(done, cfg.save_steps, total):
                save_checkpoint(run, tracker, done)  # before the preview, which may run out of memory
            if is_stopped:
                how = run.folder.resume_command
                stop.obey(f"stopped at step {done} of {total}, saved. Go on with: {how}")
            if every(done, cfg.validation_steps, total):
                draw_samples(run, tracker, done, stop)
        return finish(run, tracker)


# ---------------------------------------------------------------- the command


def show_dataset(cfg: TrainConfig) -> None:
    """--dry_run: the report, on the terminal and as a page."""
    data, cfg = open_training_set(cfg, processes=1)
    output = Path(cfg.output_dir)
    check_output(output, Path(cfg.data_dir))
    if holds_run(output):
        output = output / "dry_run"  # a run's files stay as they are
    report = with_captions_from_pictures(data.report, cfg, open_store(cfg), data.dataset.tokenizer)
    say(f"dry run: nothing was trained. {report.write(output)} shows every picture and its caption")
    earlier = Path(cfg.output_dir, CAPTIONS)  # made before the run, perhaps edited
    folder = earlier if earlier.is_dir() else output / CAPTIONS
    copies_only = cfg.write_captions and cfg.caption_with is None  # what somebody has read, not names
    offered = [] if copies_only else report.offer_captions(folder)
    copied = report.copy_captions(folder) if cfg.write_captions else []
    for line in (*offered, *copied):
        say(line)


def main(cfg: TrainConfig, chosen: Collection[str]) -> None:
    """The command: a dry run or a training, and what to do next."""
    run_page.answer_report(cfg, chosen)
    if cfg.adopt is not None:
        return adoption.adopt(cfg)
    cfg = with_init_lora(cfg, chosen)
    if cfg.dry_run:
        return show_dataset(cfg)
    weights = train(cfg)
    say(f"done: {weights} (PEFT), {weights / 'megaman_lora.safetensors'} (A1111, Forge, ComfyUI, kohya)")
    say(f"next: {run_page.draw_command(RunFolder(Path(cfg.output_dir)))}")


if __name__ == "__main__":
    with console.reported():
        main(CONFIG, CHOSEN)
