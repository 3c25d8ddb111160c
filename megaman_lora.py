"""Teaches Stable Diffusion a character from 15-100 pictures: trains a LoRA and writes it for every tool.

    python megaman_lora.py --preset demo               # the embedded base, our pictures: no GPU, no network
    python megaman_lora.py --data_dir ./megaman_images # Stable Diffusion 1.5 and yours

What a step does is a function of (seed, position): position is the index in one endless stream of examples.
It fixes the picture, the noise, the timestep and the dropped caption; the learning rate is a function of the
step. So a run that is stopped goes on to the very bits of one that was not.
"""

import sys

from megaman.common import console as errors
from megaman.common import files
from megaman.common import signals as stopping
from megaman.common.console import UserError, quiet_libraries, say, shell_quoted
from megaman.config.train import DataFlags, TrainConfig, read_config, recorded
from megaman.data import welcome

if "torch" not in sys.modules:  # a program that has loaded it hears what it wants to hear
    quiet_libraries()
if __name__ == "__main__":  # what needs no torch is answered before it loads, which takes seconds
    stopping.end_quietly()
    with errors.reported():
        CONFIG, CHOSEN = read_config(sys.argv[1:])
        welcome.answer_first_start(CONFIG, CHOSEN)

import math
import random
from collections.abc import Collection, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import CLIPTokenizer

from megaman.common import cache
from megaman.common.cache import Encoded, Store
from megaman.data import buckets, captions, pictures, report
from megaman.data import scan as survey
from megaman.data.report import Report
from megaman.lora import injection as forms
from megaman.lora import metadata as card
from megaman.lora import save as adapters
from megaman.model import compute as devices
from megaman.model import fast, memory
from megaman.model import stable_diffusion as base_models
from megaman.model.memory import Room
from megaman.model.stable_diffusion import BaseModel
from megaman.training import average as averages
from megaman.training import (
    checkpoints,
    previews,
    validation,
)
from megaman.training import (
    optim as optimizers,
)
from megaman.training import (
    resume as runs,
)
from megaman.training import (
    tracker as watch,
)
from megaman.training.average import Average
from megaman.training.checkpoints import Progress
from megaman.training.sampler import Place, Stream, generator_of, seed_dropout, shares_of
from megaman.training.tracker import Watch

# ---------------------------------------------------------------- configuration


def settle(cfg: TrainConfig, chosen: Collection[str] = ()) -> TrainConfig:
    """The configuration with what --init_lora decides: rank, alpha, targets and DoRA are the adapter's.

    chosen: the user's own settings. UserError (exit 2) if one of them is another than the adapter's.
    """
    return cfg if cfg.init_lora is None else replace(cfg, **forms.fitted(cfg, chosen))


def plan(cfg: TrainConfig, steps_an_epoch: int, progress: Progress | None = None) -> TrainConfig:
    """The configuration with everything that was left open decided: steps from epochs, the warm-up. A run
    that goes on keeps its warm-up, however its total changes.
    """
    steps, warmup = cfg.max_train_steps, cfg.lr_warmup_steps
    if cfg.num_train_epochs is not None:
        steps = cfg.num_train_epochs * steps_an_epoch
    if warmup is None:
        warmup = round(0.05 * steps) if progress is None else progress.settings["lr_warmup_steps"]
    return replace(cfg, max_train_steps=steps, num_train_epochs=None, lr_warmup_steps=warmup)


def pictures_a_step(cfg: TrainConfig, processes: int) -> int:
    """The effective batch."""
    return cfg.train_batch_size * cfg.gradient_accumulation_steps * processes


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


VARIANTS = 4  # of a picture's random crop and of its shuffled caption: encoded once, drawn per position


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
        self.folder, self.tokenizer, self.seed = Path(data_dir), tokenizer, seed
        self.settings = settings or DataFlags()
        self.facts, self.skipped = survey.survey(self.folder, store or cache.Store(None))
        self.paths = [fact.path for fact in self.facts]
        bad = [f"{file} (--strict: mend it or remove it)" for file in self.skipped if self.settings.strict]
        self.captions = captions.read_captions(self.paths, self.folder, self.settings.trigger, bad)
        self.repeats = [captions.repeats_of(path, self.folder) for path in self.paths]
        offered = buckets.buckets_of(self.settings.resolution, cell_px, self.settings.crop)
        self.buckets = [buckets.bucket_for(fact.size, offered) for fact in self.facts]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """Of all that training sees of the folder, in its order; the files' names don't count."""
        rows = zip(self.facts, self.buckets, self.repeats, self.captions, strict=True)
        seen = (f"{fact.digest} {bucket} {repeats} {caption.text}" for fact, bucket, repeats, caption in rows)
        return f"{len(self)} with sum {cache.key_of(*seen)[:12]}"

    def __getitem__(self, index: int) -> Example:
        caption = self.captions[index].text
        ids = None if self.tokenizer is None else self._ids(caption)
        return Example(self.paths[index], caption, self.views(index)[0].pixels(), ids)

    def _ids(self, caption: str) -> Tensor:
        kwargs = {"padding": "max_length", "max_length": self.tokenizer.model_max_length, "truncation": True}
        return self.tokenizer(caption, return_tensors="pt", **kwargs).input_ids[0]

    def views(self, index: int) -> list[cache.View]:
        """The ways in which a picture is shown: crops where they are random, mirrored or not."""
        random_crop = self.settings.crop == "random"
        count = VARIANTS if random_crop else 1 + self.settings.flip
        return [self._view(index, variant, random_crop=random_crop) for variant in range(count)]

    def _view(self, index: int, variant: int, *, random_crop: bool) -> cache.View:
        fact, bucket = self.facts[index], self.buckets[index]
        mirrored, at = self.settings.flip and variant % 2 == 1, buckets.CENTRE
        if random_crop:
            at = tuple(torch.rand(2, generator=generator_of(self.seed, fact.digest, variant)).tolist())

        def pixels() -> Tensor:
            return buckets.fitted(pictures.load_image(fact.path), bucket, at, mirrored=mirrored)

        return cache.View(cache.key_of(fact.digest, bucket, at, mirrored), pixels, str(fact.path))

    def texts(self, index: int) -> list[str]:
        """The wordings of a picture's caption: several where its tags are shuffled."""
        text, rng = self.captions[index].text, random.Random(f"{self.seed}/{self.facts[index].digest}")
        if not self.settings.shuffle_tags:
            return [text]
        return captions.variants(text, VARIANTS, keep_tags=self.settings.keep_tags, rng=rng)


def stream_of(dataset: MegaManDataset, step_size: int, without: frozenset[int] = frozenset()) -> Stream:
    """The dataset's stream, without some of its pictures."""
    members: dict[buckets.Bucket, list[int]] = {}
    for index, (bucket, repeats) in enumerate(zip(dataset.buckets, dataset.repeats, strict=True)):
        if index not in without:
            members.setdefault(bucket, []).extend([index] * repeats)
    return Stream(tuple(tuple(members[bucket]) for bucket in sorted(members)), step_size, dataset.seed)


# ---------------------------------------------------------------- LoRA injection


def inject_lora(unet: UNet2DConditionModel, cfg: TrainConfig) -> list[torch.nn.Parameter]:
    """Wraps the UNet's modules through PEFT and returns the trainable parameters, float32.

    B = 0, so that training starts at the base itself; A ~ N(0, 1/rank), the same numbers on every device.
    With --init_lora both are the file's.
    """
    start = forms.start_of(cfg)
    settings = forms.lora_config(cfg, unet, start)
    unet.add_adapter(settings, adapter_name=adapters.ADAPTER_NAME)
    for number, module in enumerate(adapters.lora_modules(unet).values()):
        down = module.lora_A[adapters.ADAPTER_NAME].weight
        drawn = torch.randn(down.shape, generator=generator_of(cfg.seed, "lora", number)) / cfg.lora_rank
        down.data = drawn.to(down.device)
        up = module.lora_B[adapters.ADAPTER_NAME].weight
        up.data = torch.zeros_like(up, dtype=torch.float32)  # half precision would lose updates of 1e-4
    forms.begin(unet, start)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


# ---------------------------------------------------------------- objective

PRESERVE_EVERY = 4  # one example in four is also asked for the class: enough to hold it, and half as slow


@dataclass(frozen=True)
class Draw:
    """The inputs of one micro-batch, on the training device.

    latents, noise (B,C,h,w); timesteps (B,); text (B,L,D); class_text (K,L,D): the states of captions that
    name the class instead of the character, for the examples class_of (K,); K may be 0.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensor
    class_text: Tensor
    class_of: Tensor


def draw_inputs(
    places: Sequence[Place], encoded: Encoded, cfg: TrainConfig, scheduler: DDPMScheduler
) -> Draw:
    """What stands at these places: a view of the picture, its latents sampled anew from their posterior,
    noise, timestep, a wording of the caption or no caption.
    """
    view_rows, spreads, noises, timesteps, text_rows, class_rows = [], [], [], [], [], {}
    for position, index in places:
        generator = generator_of(cfg.seed, "example", position)

        def one_of(rows: list[int], generator: torch.Generator = generator) -> int:
            return rows[torch.randint(0, len(rows), (), generator=generator).item()]

        shape = encoded.shape_of(index)
        spreads.append(torch.randn(shape, generator=generator))
        noises.append(noise_of(shape, cfg.noise_offset, generator))
        timesteps.append(torch.randint(0, scheduler.config.num_train_timesteps, (), generator=generator))
        dropped = torch.rand((), generator=generator).item() < cfg.caption_dropout
        view, text = one_of(encoded.view_rows[index]), one_of(encoded.text_rows[index])
        view_rows.append(view)
        text_rows.append(0 if dropped else text)
        if cfg.preserve_weight and position % PRESERVE_EVERY == 0:
            class_rows[len(view_rows) - 1] = one_of(encoded.class_rows[index])
    device = encoded.text.device
    means, stds = (torch.stack([part[row] for row in view_rows]) for part in (encoded.means, encoded.stds))
    return Draw(
        means + stds * torch.stack(spreads).to(device),
        torch.stack(noises).to(device),
        torch.stack(timesteps).to(device),
        encoded.text[text_rows],
        encoded.text[list(class_rows.values())],
        torch.tensor(list(class_rows), dtype=torch.long, device=device),
    )


def noise_of(shape: Sequence[int], offset: float, generator: torch.Generator) -> Tensor:
    """Noise for latents (C,h,w); an offset moves the mean of each channel too. Guttenberg 2023."""
    noise = torch.randn(shape, generator=generator)
    return noise + offset * torch.randn((shape[0], 1, 1), generator=generator) if offset else noise


def fixed_draw(encoded: Encoded, index: int, timesteps: Sequence[int]) -> Draw:
    """A picture at these timesteps, always under the same noise, with its first caption: to measure on."""
    count, device = len(timesteps), encoded.text.device
    noise = torch.randn((count, *encoded.shape_of(index)), generator=generator_of(0, "held out", index))
    text = encoded.text[encoded.text_rows[index][0]].expand(count, -1, -1)
    return Draw(
        encoded.means[encoded.view_rows[index][0]].expand(count, -1, -1, -1),
        noise.to(device),
        torch.tensor(timesteps, device=device),
        text,
        text[:0],
        torch.tensor([], dtype=torch.long, device=device),
    )


def denoising_losses(unet: torch.nn.Module, draw: Draw, scheduler: DDPMScheduler, snr_gamma: float) -> Tensor:
    """The weighted squared error of each example, (B,) float32."""
    noisy = scheduler.add_noise(draw.latents, draw.noise, draw.timesteps)
    predicted = _predicted(unet, noisy, draw.timesteps, draw.text)
    errors = (predicted - _target(draw, scheduler)).square().mean(dim=(1, 2, 3))
    return errors * min_snr_weights(draw.timesteps, scheduler, snr_gamma)


def preserving_losses(
    unet: torch.nn.Module, draw: Draw, scheduler: DDPMScheduler, snr_gamma: float
) -> tuple[Tensor, Tensor]:
    """The same errors (B,), and how far the UNet strays from the base where captions name the class, (K,).

    Both from one pass of B + K examples: the same noisy latents under both captions. What the class looks
    like is asked of the base itself, with the adapter switched off, so no pictures of it are needed.
    """
    noisy = scheduler.add_noise(draw.latents, draw.noise, draw.timesteps)
    class_noisy, class_timesteps = noisy[draw.class_of], draw.timesteps[draw.class_of]
    plain = accelerate.utils.extract_model_from_parallel(unet)
    plain.disable_adapters()
    with torch.no_grad():
        kept = _predicted(plain, class_noisy, class_timesteps, draw.class_text)
    plain.enable_adapters()
    text, timesteps = torch.cat([draw.text, draw.class_text]), torch.cat([draw.timesteps, class_timesteps])
    predicted = _predicted(unet, torch.cat([noisy, class_noisy]), timesteps, text)
    errors = (predicted - torch.cat([_target(draw, scheduler), kept])).square().mean(dim=(1, 2, 3))
    errors = errors * min_snr_weights(timesteps, scheduler, snr_gamma)
    return errors[: len(noisy)], errors[len(noisy) :]


def losses_of(
    unet: torch.nn.Module, draw: Draw, scheduler: DDPMScheduler, cfg: TrainConfig
) -> tuple[Tensor, Tensor]:
    """What is minimised: the errors (B,), and how far the class strays, (K,); K may be 0."""
    if len(draw.class_of):
        return preserving_losses(unet, draw, scheduler, cfg.snr_gamma)
    losses = denoising_losses(unet, draw, scheduler, cfg.snr_gamma)
    return losses, losses[:0]


def _predicted(unet: torch.nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    return unet(noisy.to(text.dtype), timesteps, text, return_dict=False)[0].float()


def _target(draw: Draw, scheduler: DDPMScheduler) -> Tensor:
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(draw.latents, draw.noise, draw.timesteps)
    return draw.noise


def min_snr_weights(timesteps: Tensor, scheduler: DDPMScheduler, snr_gamma: float) -> Tensor:
    """The weight of each example's error, (B,). Hang et al. 2023, equation 7; gamma 0 = all alike."""
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    if snr_gamma == 0:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    return snr.clamp(max=snr_gamma) / (snr + 1 if v_prediction else snr)


def lr_at(step: int, cfg: TrainConfig) -> float:
    """The learning rate of a step (counted from 0): linear warm-up, then the schedule down to zero.

    Restarts: three cosines; polynomial: squared.
    """
    warmup = cfg.lr_warmup_steps
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, cfg.max_train_steps - warmup)
    factor = {
        "constant": lambda: 1.0,
        "linear": lambda: 1 - progress,
        "polynomial": lambda: (1 - progress) ** 2,
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * progress)),
        "cosine_with_restarts": lambda: 0.5 * (1 + math.cos(math.pi * (3 * progress % 1))),
    }
    return cfg.learning_rate * factor[cfg.lr_scheduler]()


# ---------------------------------------------------------------- the run


def every(step: int, interval: int, total: int) -> bool:
    """Whether something that happens each `interval` steps, and at the end, happens after this many steps."""
    return step % interval == 0 or step == total


def open_store(cfg: TrainConfig) -> Store:
    """The cache folder that the user named, or the platform's."""
    return cache.Store(Path(cfg.cache_dir) if cfg.cache_dir else cache.default_folder())


def open_dataset(cfg: TrainConfig) -> MegaManDataset:
    """The pictures to train on. UserError (exit 3) if there are none, or if one is skipped under --strict."""
    for flag in ("output_dir", "cache_dir", "logging_dir"):
        files.check_apart(flag, getattr(cfg, flag), cfg.data_dir)
    cell_px = base_models.cell_of(cfg.pretrained_model_name)
    tokenizer = base_models.tokenizer_of(cfg.pretrained_model_name)
    store = open_store(cfg)
    dataset = MegaManDataset(cfg.data_dir, tokenizer, cfg, cell_px=cell_px, seed=cfg.seed, store=store)
    if len(dataset) == 0:
        none = f"{cfg.data_dir}: no usable pictures (JPG, PNG, BMP or WebP). Add some, or try --preset demo."
        raise UserError("\n  ".join([none, *map(str, dataset.skipped)]), errors.DATA)
    return dataset


@dataclass
class Run:
    """What a run holds once it is set up."""

    cfg: TrainConfig  # with everything decided
    accelerator: Accelerator
    base: BaseModel  # its UNet carries the adapter
    stream: Stream
    encoded: Encoded
    validation_text: Tensor  # (1+P,L,D): the empty caption's states, then the validation prompts'
    unet: torch.nn.Module  # base.unet as accelerate has prepared it
    optimizer: Optimizer
    origins: dict[str, Any]  # fingerprints of pictures, captions and base
    progress: Progress | None  # where it goes on
    room: Room  # how much of a step fits into memory
    told: Report  # of the pictures
    held_out: Sequence[int]  # those that it never trains on
    best: validation.Best  # the checkpoint with the smallest loss on them

    @property
    def output(self) -> Path:
        """Where everything goes."""
        return Path(self.cfg.output_dir)

    @property
    def start(self) -> int:
        """Steps that an earlier command has done."""
        return 0 if self.progress is None else self.progress.step

    @cached_property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The adapter's parameters, float32."""
        return list(checkpoints.trained(self.base.unet).values())

    @property
    def description(self) -> dict[str, Any]:
        """What the adapter's files tell."""
        return card.description(self.cfg, self.base, self.told)

    @cached_property
    def average(self) -> Average:
        """What is shown and written."""
        return averages.Average(checkpoints.trained(self.base.unet), self.cfg.ema_decay)

    @cached_property
    def watch(self) -> Watch:
        """The run's metrics and samples; silent in all processes but the first."""
        cfg, stream = self.cfg, self.stream
        tensorboard = (
            Path(cfg.logging_dir or self.output / "logs") if cfg.report_to == "tensorboard" else None
        )
        steps, names = range(self.start, cfg.max_train_steps), [row.name for row in self.told.rows]
        each, first = len(stream) / stream.steps_an_epoch, self.accelerator.is_main_process
        return watch.Watch(self.output, steps, names, each, logging_dir=tensorboard, enabled=first)


def set_up(cfg: TrainConfig) -> Run:
    """Everything before the first step, what is quick and may fail before what is slow. Writes nothing."""
    memory.keep_freed_memory()
    device = devices.pick_device()
    dtype = devices.pick_dtype(cfg.mixed_precision, device)
    accelerator = devices.new_accelerator(device, dtype)
    fast.check(cfg.attention, cfg.compile, accelerator.device)
    progress = runs.progress_of(cfg.resume_from_checkpoint, Path(cfg.output_dir))

    with accelerator.main_process_first():  # the others then find what it has seen in the cache
        dataset = open_dataset(cfg)
    kept_out = validation.held_out(dataset, cfg.validation_split, cfg.seed)
    stream = stream_of(dataset, pictures_a_step(cfg, accelerator.num_processes), kept_out)
    cfg, told = plan(cfg, stream.steps_an_epoch, progress), report.report_of(dataset)
    for line in [*told.lines(), report.describe_plan(cfg, stream)]:
        say(line)
    origins = {"the pictures": dataset.fingerprint, "pictures a step": stream.step_size}
    if progress is not None:
        runs.check_resume(progress, cfg, origins)
    files.check_output(Path(cfg.output_dir), Path(cfg.data_dir))

    base = base_models.load_base(cfg.pretrained_model_name, device=accelerator.device, dtype=dtype)
    buckets.check_sizes(dataset.buckets, cfg.resolution, base.cell_px, base.name)
    origins["the base model's weights"] = base.digest
    if progress is not None:
        runs.check_resume(progress, cfg, origins)
    with accelerator.main_process_first():
        classes = cfg.preserve_class if cfg.preserve_weight else []
        encoded = cache.encode_dataset(dataset, base, open_store(cfg), classes)
    validation_text = base.embed(["", *cfg.validation_prompt])
    base.free_encoders()

    parameters = inject_lora(base.unet, cfg)
    optimizer = optimizers.optimizer_of(cfg.optimizer, parameters, cfg.learning_rate, cfg.weight_decay)
    fast.speed_up(base.unet, cfg.attention, cfg.compile)
    unet, optimizer = accelerator.prepare(base.unet.train(), optimizer)
    room = memory.Room(cfg.train_batch_size, cfg.gradient_checkpointing)
    run = Run(
        cfg, accelerator, base, stream, encoded, validation_text, unet, optimizer,
        origins, progress, room, told, sorted(kept_out), validation.Best(),
    )  # fmt: skip
    take_up(run)
    return run


def take_up(run: Run) -> None:
    """Puts the checkpoint's state in place, if the run goes on from one, and says what is trained where."""
    accelerator, precision = run.accelerator, str(run.base.unet.dtype).removeprefix("torch.")
    count, processes = sum(p.numel() for p in run.trainable), accelerator.num_processes
    several = f", {processes} processes" if processes > 1 else ""
    say(f"training: {count:,} parameters on {accelerator.device}, the base in {precision}{several}")
    average = run.average  # begins where the adapter stands
    if run.progress is not None:
        tensors = average.restored(run.progress.tensors)
        checkpoints.restore(run.base.unet, run.optimizer, tensors)
        run.room = memory.Room.of(run.progress.run)
        run.best = validation.Best(**run.progress.run["best"])
        if accelerator.scaler is not None and run.progress.run["scaler"]:
            accelerator.scaler.load_state_dict(run.progress.run["scaler"])
        say(f"resuming: at step {run.start} of {run.cfg.max_train_steps}, from {run.progress.path}")
    make_room(run)


def make_room(run: Run) -> None:
    """Begins the step anew, in the room there is."""
    run.optimizer.zero_grad()
    if run.room.checkpointing or run.cfg.gradient_checkpointing:
        run.base.unet.enable_gradient_checkpointing()


def save_state(run: Run, step: int) -> None:
    """A checkpoint after `step` steps, written by the first process."""
    run.watch.check()  # nothing that isn't finite is saved
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        facts = {"scaler": scaler and scaler.state_dict(), "best": asdict(run.best.saved(step))}
        facts |= run.room.facts()
        tensors = checkpoints.tensors_of(run.base.unet, run.optimizer) | run.average.tensors()
        progress = checkpoints.Progress(
            step, asdict(run.cfg), run.origins, facts, torch.get_num_threads(), tensors
        )
        with run.average.shown():
            adapter = adapters.adapter_of(run.base.unet, run.description | {"steps": step})
        folder, keep = run.output / runs.CHECKPOINTS, run.cfg.checkpoints_total_limit
        checkpoints.save_checkpoint(folder, progress, adapter, keep=keep, best=run.best.step)


def validate(run: Run, step: int) -> None:
    """Measures the plain loss on the pictures that are kept out, the adapter as it is shown."""
    if run.held_out and run.accelerator.is_main_process:
        unet = run.base.unet.eval()
        with torch.no_grad(), run.average.shown():
            places = ((index, [time]) for index in run.held_out for time in validation.TIMESTEPS)
            draws = (fixed_draw(run.encoded, *place) for place in places)  # one at a time: memory is scarce
            losses = [denoising_losses(unet, draw, run.base.scheduler, snr_gamma=0) for draw in draws]
        unet.train()
        run.best.latest = step, torch.cat(losses).mean().item()
        run.watch.record_validation(*run.best.latest)


def show_samples(run: Run, step: int, stop: stopping.StopRequest) -> None:
    """One picture a validation prompt, always from the same noise, drawn by the first process."""
    if run.accelerator.is_main_process:
        cfg = run.cfg
        look = previews.Look(cfg.resolution, cfg.validation_guidance_scale, cfg.seed)
        with run.average.shown():
            images = previews.draw_previews(run.base, run.validation_text, look, step, stop)
        if images:
            run.watch.show_samples(step, cfg.validation_prompt, images)


def finish(run: Run) -> Path:
    """Writes lora_weights/ and closes everything."""
    weights = run.output / "lora_weights"
    if run.accelerator.is_main_process:
        unet, preview = run.base.unet, run.watch.latest_sample()
        with run.average.shown():
            adapter = adapters.adapter_of(unet, run.description)
            adapters.write_adapter(adapter, weights, live=unet, preview=preview)
        run.best.tell(run.cfg.max_train_steps, run.output / runs.CHECKPOINTS)
    run.watch.close()
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return weights


Examples = list[tuple[Sequence[Place], "Tensor"]]  # the shares of a step, and each one's losses (B,)


def accumulate(run: Run, places: Sequence[Place]) -> Examples:
    """Adds up the gradients of a step, share by share."""
    accelerator, scheduler, cfg = run.accelerator, run.base.scheduler, run.cfg
    processes = accelerator.num_processes
    examples, shares = [], shares_of(places, accelerator.process_index, processes, run.room.batch)
    for number, share in enumerate(shares, 1):
        with nullcontext() if number == len(shares) else accelerator.no_sync(run.unet):
            draw = draw_inputs(share or places[:1], run.encoded, cfg, scheduler)
            weight = processes / run.stream.step_size if share else 0.0  # a short step weighs by its size
            if cfg.lora_dropout:
                seed_dropout(cfg.seed, (share or places)[0].position)
            losses, strayed = losses_of(run.unet, draw, scheduler, cfg)
            accelerator.backward(weight * (losses.sum() + cfg.preserve_weight * strayed.sum()))
        examples.append((share, losses.detach()[: len(share)]))
    return examples


def fitted(run: Run, places: Sequence[Place], step: int) -> Examples:
    """The same, with less at a time where memory runs out. Several processes would wait for each other."""
    if run.accelerator.num_processes > 1:
        return accumulate(run, places)
    return memory.within(run.room, lambda: accumulate(run, places), lambda: make_room(run), step)


def mean_loss(run: Run, examples: Examples, places: Sequence[Place]) -> Tensor:
    """Over all examples of a step, on all processes."""
    total = torch.stack([losses.sum() for _, losses in examples]).sum()
    return run.accelerator.reduce(total, "sum") / len(places)


def train(cfg: TrainConfig) -> Path:
    """Trains one adapter and returns its folder lora_weights/. UserError with the exit code when it can't."""
    run = set_up(cfg)
    cfg, accelerator, total = run.cfg, run.accelerator, run.cfg.max_train_steps
    writes = accelerator.is_main_process
    with runs.ready(run.output, recorded(cfg), run.progress, writes=writes) as stop, closing(run.watch):
        if run.start == 0:
            if writes:
                run.told.write(run.output)
            validate(run, 0)
        if every(run.start, cfg.validation_steps, total) and not run.watch.has_samples(run.start):
            show_samples(run, run.start, stop)  # of the base, or those that a stopped run still owes
        for step in range(run.start, total):
            rate = optimizers.set_learning_rate(run.optimizer, lr_at(step, cfg))
            places = run.stream.at(step)
            examples = fitted(run, places, step)
            grad_norm = accelerator.clip_grad_norm_(run.trainable, cfg.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.average.update(step)
            loss, skipped = mean_loss(run, examples, places), accelerator.optimizer_step_was_skipped
            run.watch.record(watch.Step(step, loss, grad_norm, rate, skipped, examples))

            done = step + 1
            stopped = devices.is_agreed(bool(stop), accelerator)
            if every(done, cfg.validation_steps, total) or every(done, cfg.save_steps, total):
                validate(run, done)
            if stopped or every(done, cfg.save_steps, total):
                save_state(run, done)  # before the preview, which may run out of memory
            if stopped:
                stop.obey(
                    f"stopped at step {done} of {total}, saved. Go on with: {runs.resume_command(run.output)}"
                )
            if every(done, cfg.validation_steps, total):
                show_samples(run, done, stop)
        return finish(run)


# ---------------------------------------------------------------- the command


def show_dataset(cfg: TrainConfig) -> None:
    """--dry_run: the report, on the terminal and as a page."""
    dataset, output = open_dataset(cfg), Path(cfg.output_dir)
    kept_out = validation.held_out(dataset, cfg.validation_split, cfg.seed)
    stream, told = stream_of(dataset, pictures_a_step(cfg, 1), kept_out), report.report_of(dataset)
    for line in [*told.lines(), report.describe_plan(plan(cfg, stream.steps_an_epoch), stream)]:
        say(line)
    files.check_output(output, Path(cfg.data_dir))
    if files.holds_run(output):
        output = output / "dry_run"  # a run's files stay as they are
    say(f"dry run: nothing was trained. {told.write(output)} shows every picture and its caption")
    for line in told.offer_captions(output / "captions"):
        say(line)


def main(cfg: TrainConfig, chosen: Collection[str]) -> None:
    """The command: a dry run or a training, and what to do next."""
    cfg = settle(cfg, chosen)
    if cfg.dry_run:
        return show_dataset(cfg)
    weights = train(cfg)
    say(f"done: {weights} (PEFT), {weights / 'megaman_lora.safetensors'} (A1111, Forge, ComfyUI, kohya)")
    place = "" if cfg.output_dir == DataFlags.output_dir else f" --lora_path {shell_quoted(str(weights))}"
    say(f"next: python generate_megaman.py{place}")


if __name__ == "__main__":
    with errors.reported():
        main(CONFIG, CHOSEN)
