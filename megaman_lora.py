"""Teaches Stable Diffusion a character from 15-100 pictures: trains a LoRA and writes it for every tool.

    python megaman_lora.py --preset demo                       # the embedded base and our own pictures; no
    GPU, no network
    python megaman_lora.py --data_dir ./megaman_images         # Stable Diffusion 1.5 and yours

What a step does is a function of (seed, position): position is the index in one endless stream of examples.
It fixes the picture, the
noise, the timestep and the dropped caption; the learning rate is a function of the step.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megaman import errors, files
from megaman.errors import UserError, say
from megaman.flags import parse_flags
from megaman.lazy import Lazy
from megaman.stream import Place, Stream, generator_of, seed_dropout, shares_of

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import CLIPTokenizer

    from megaman.base import BaseModel
    from megaman.cache import Encoded, Store
    from megaman.report import Report
    from megaman.watch import Watch
else:
    torch, accelerate = Lazy("torch"), Lazy("accelerate")
adapters, base_models, buckets, cache, captions, card = (
    Lazy(f"megaman.{room}") for room in ("adapters", "base", "buckets", "cache", "captions", "card")
)
checkpoints, forms, pictures, report, survey, watch = (
    Lazy(f"megaman.{room}") for room in ("checkpoints", "forms", "pictures", "report", "survey", "watch")
)

# ---------------------------------------------------------------- configuration

STARTER_IMAGES = "megaman/starter_images"
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "pretrained_model_name": "megaman/tiny_sd",
        "data_dir": STARTER_IMAGES,
        "resolution": 64,
        "mixed_precision": "no",
        "lora_rank": 16,
        "lora_alpha": 32,
        "learning_rate": 1.2e-3,
        "caption_dropout": 0.1,
        "preserve_weight": 4.0,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 400,
        "save_steps": 200,
        "validation_steps": 200,
        "validation_guidance_scale": 4.5,
        "validation_prompt": [
            "mega man, standing, facing right, sky background",
            "mega man, running, facing left, sand background",
            "mega man, arms raised, mint background",
            "a red wizard with a staff, white background",
        ],
    },
    "starter": {"lora_rank": 4, "lora_alpha": 16, "learning_rate": 1e-4, "max_train_steps": 1000},
    "quality": {"lora_rank": 8, "lora_alpha": 32, "learning_rate": 5e-5, "max_train_steps": 2000},
    "pro": {"lora_rank": 16, "lora_alpha": 64, "learning_rate": 2e-5, "max_train_steps": 3000},
}


def _flag(default: Any, text: str) -> Any:
    """A field with its help text; a mutable default is copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DataFlags:
    """Model and data."""

    _argument_group_name = "model and data"
    pretrained_model_name: str = _flag(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "base model: hub id, diffusers folder or .safetensors file",
    )
    data_dir: str = _flag("./megaman_images", "folder of pictures and .txt captions")
    output_dir: str = _flag("./megaman_lora_output", "where everything goes")
    resolution: int = _flag(512, "side of the training square in pixels")
    crop: Literal["bucket", "center", "random"] = _flag(
        "bucket", "keep each picture's shape (buckets of the square's area), or cut squares"
    )
    flip: bool = _flag(False, "also show pictures mirrored; not for a character whose sides differ")
    trigger: str = _flag(
        "mega man", "word that calls the character; begins every caption made from a file name"
    )
    caption_dropout: float = _flag(0.05, "share of examples that train with the empty caption")
    shuffle_tags: bool = _flag(False, "vary the order of a caption's comma-separated tags")
    keep_tags: int = _flag(1, "tags at the front that --shuffle_tags leaves in place")
    cache_dir: str | None = _flag(
        None, "where latents and text embeddings are kept between runs; the user's cache folder if not given"
    )
    strict: bool = _flag(False, "a file that must be skipped is an error")


@dataclass(frozen=True)
class AdapterFlags:
    """The LoRA."""

    _argument_group_name = "adapter"
    lora_rank: int = _flag(
        8, "rank of the update: 4-16; higher learns more detail, and more of your pictures' accidents"
    )
    lora_alpha: float = _flag(32, "strength: the update is scaled by alpha / rank")
    lora_targets: Literal["attention", "attention+ff", "linear", "conv"] = _flag(
        "attention", "what it changes: attention; its feed-forward too; all linear; the resnets too"
    )
    lora_dropout: float = _flag(0.0, "share of the update's inputs that each example trains without")
    use_dora: bool = _flag(False, "DoRA: also learn the length of each row of the weights; slower")
    use_rslora: bool = _flag(False, "rsLoRA: scale the update by alpha / sqrt(rank)")
    init_lora: str | None = _flag(
        None, "adapter file or folder of any tool to go on from; rank, alpha, targets and DoRA are its own"
    )


@dataclass(frozen=True)
class OptimisationFlags:
    """How it learns."""

    _argument_group_name = "optimisation"
    learning_rate: float = _flag(1e-4, "peak learning rate")
    lr_scheduler: Literal["cosine", "constant", "linear", "polynomial", "cosine_with_restarts"] = _flag(
        "cosine", "course of the rate after the warm-up"
    )
    lr_warmup_steps: int | None = _flag(None, "steps of linear warm-up; 5 %% of the run if not given")
    train_batch_size: int = _flag(1, "pictures at a time, on each device")
    gradient_accumulation_steps: int = _flag(4, "batches a step")
    max_train_steps: int = _flag(1500, "optimizer steps in all")
    num_train_epochs: int | None = _flag(None, "passes over the pictures, instead of --max_train_steps")
    weight_decay: float = _flag(0.01, "AdamW's weight decay")
    max_grad_norm: float = _flag(1.0, "gradients are clipped to this norm")
    snr_gamma: float = _flag(5.0, "min-SNR loss weighting; 0 = off")
    preserve_weight: float = _flag(
        0.0, "how strongly the rest of the base's world is kept; 0 = off; the demo takes 4"
    )
    preserve_class: list[str] = _flag(
        ["robot"], "what the character is one of: the words to keep as they are"
    )
    seed: int = _flag(42, "decides every random choice; 0 is a seed")


@dataclass(frozen=True)
class PrecisionFlags:
    """Precision and memory."""

    _argument_group_name = "precision and memory"
    mixed_precision: Literal["fp16", "bf16", "no"] = _flag(
        "fp16", "precision of the frozen base; the LoRA is always float32"
    )
    gradient_checkpointing: bool = _flag(False, "recompute activations: less memory, about a third slower")


@dataclass(frozen=True)
class RunFlags:
    """The run."""

    _argument_group_name = "run"
    save_steps: int = _flag(250, "steps between checkpoints")
    checkpoints_total_limit: int = _flag(
        3, "checkpoints that keep their optimizer state; the small adapters all stay"
    )
    validation_steps: int = _flag(100, "steps between sample pictures; step 0 shows the base")
    validation_prompt: list[str] = _flag(
        ["mega man, blue robot, helmet, game character, high quality"], "prompts of the sample pictures"
    )
    validation_guidance_scale: float = _flag(7.5, "guidance of the sample pictures; generation takes it over")
    report_to: Literal["tensorboard", "none"] = _flag("tensorboard", "where to log besides metrics.jsonl")
    logging_dir: str | None = _flag(None, "TensorBoard's folder; OUTPUT/logs if not given")
    dry_run: bool = _flag(False, "show what would be trained on, as dataset.html too, and stop")
    preset: Literal["demo", "starter", "quality", "pro"] | None = field(
        default=None, metadata={"help": "a whole configuration; flags override it"}
    )
    config: str | None = _flag(
        None, "configuration file (.json, .toml, .yaml), such as an earlier run's training_config.json"
    )


@dataclass(frozen=True)
class TrainConfig(RunFlags, PrecisionFlags, OptimisationFlags, AdapterFlags, DataFlags):
    """Every setting of a run. Resolved once, never changed."""

    def __post_init__(self) -> None:
        for name in (
            "resolution",
            "lora_rank",
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "save_steps",
            "validation_steps",
            "checkpoints_total_limit",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lora_alpha", "learning_rate", "max_grad_norm"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        for name in ("weight_decay", "snr_gamma", "preserve_weight", "seed", "validation_guidance_scale"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        _require(self.seed < 2**63, "seed", self.seed, "below 2^63")
        _require(self.keep_tags >= 0, "keep_tags", self.keep_tags, "0 or more")
        _require(
            self.shuffle_tags or self.keep_tags == 1, "keep_tags", self.keep_tags, "given with --shuffle_tags"
        )
        _require(0 <= self.caption_dropout <= 1, "caption_dropout", self.caption_dropout, "between 0 and 1")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "0 or more and below 1")
        _require(
            self.lr_warmup_steps is None or self.lr_warmup_steps >= 0,
            "lr_warmup_steps",
            self.lr_warmup_steps,
            "0 or more",
        )
        _require(
            self.num_train_epochs is None or self.num_train_epochs >= 1,
            "num_train_epochs",
            self.num_train_epochs,
            "at least 1",
        )
        _require(bool(self.trigger.strip()), "trigger", self.trigger, "a word or more")
        _require(
            self.preserve_weight > 0 or self.preserve_class == OptimisationFlags().preserve_class,
            "preserve_class",
            " ".join(self.preserve_class),
            "given together with --preserve_weight above 0",
        )


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"--{name} {value}: must be {wanted}", errors.USAGE)


def read_config(argv: Sequence[str]) -> tuple[TrainConfig, set[str]]:
    """The configuration that the command line asks for, and the names of the settings that the user chose."""
    groups = (DataFlags, AdapterFlags, OptimisationFlags, PrecisionFlags, RunFlags)
    values, chosen = parse_flags(
        groups,
        argv,
        description=__doc__.split("\n")[0],
        presets=PRESETS,
        either_or=frozenset({"max_train_steps", "num_train_epochs"}),
    )
    if values["data_dir"] == STARTER_IMAGES and not Path(STARTER_IMAGES).is_dir():
        values["data_dir"] = str(Path(__file__).parent / STARTER_IMAGES)  # wherever the command is run from
    if values["init_lora"] is not None:
        values |= forms.fitted(values, chosen)
    return TrainConfig(**values), chosen


def plan(cfg: TrainConfig, steps_an_epoch: int) -> TrainConfig:
    """The configuration with everything that was left open decided: steps from epochs, the warm-up."""
    steps = cfg.max_train_steps
    if cfg.num_train_epochs is not None:
        steps = cfg.num_train_epochs * steps_an_epoch
    warmup = round(0.05 * steps) if cfg.lr_warmup_steps is None else cfg.lr_warmup_steps
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
        self.captions = captions.read_captions(self.paths, self.folder, self.settings.trigger)
        self.repeats = [captions.repeats_of(path, self.folder) for path in self.paths]
        offered = buckets.buckets_of(self.settings.resolution, cell_px, self.settings.crop)
        self.buckets = [buckets.bucket_for(fact.size, offered) for fact in self.facts]

    def __len__(self) -> int:
        return len(self.paths)

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


def stream_of(dataset: MegaManDataset, step_size: int) -> Stream:
    """The dataset's stream."""
    members: dict[buckets.Bucket, list[int]] = {}
    for index, (bucket, repeats) in enumerate(zip(dataset.buckets, dataset.repeats, strict=True)):
        members.setdefault(bucket, []).extend([index] * repeats)
    return Stream(tuple(tuple(members[bucket]) for bucket in sorted(members)), step_size, dataset.seed)


# ---------------------------------------------------------------- LoRA injection


def inject_lora(unet: UNet2DConditionModel, cfg: TrainConfig) -> list[torch.nn.Parameter]:
    """Wraps the UNet's modules through PEFT and returns the trainable parameters, float32.

    B = 0, so that training starts at the base itself; A ~ N(0, 1/rank), the same numbers on every device.
    With --init_lora both are the file's.
    """
    start = forms.start_of(asdict(cfg))
    settings = forms.lora_config(asdict(cfg), unet, start)
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
        noises.append(torch.randn(shape, generator=generator))
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

RECORD = "training_config.json"  # also the mark that an output folder is ours
SAMPLE_STEPS = 20  # of the preview pictures
SKIPS_IN_A_ROW = 20  # fp16's scaler skips a step now and then; after so many nothing is learned any more


def new_accelerator(device: torch.device, dtype: torch.dtype) -> Accelerator:
    """accelerate's view of this process.

    Only fp16 asks anything of it: a gradient scaler. The base is in half precision already, so no
    autocast.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs

    AcceleratorState._reset_state()  # a program may train twice, in another precision
    return accelerate.Accelerator(
        mixed_precision="fp16" if dtype == torch.float16 else "no",
        cpu=device.type == "cpu",
        kwargs_handlers=[AutocastKwargs(enabled=False)],
    )


def describe_run(cfg: TrainConfig, base: BaseModel, told: Report) -> dict[str, Any]:
    """What the adapter's files tell about their making; no path and no name of the user."""
    return {
        "base": base.name,
        "resolution": cfg.resolution,
        "trigger": cfg.trigger,
        "guidance_scale": cfg.validation_guidance_scale,
        "steps": cfg.max_train_steps,
        "text_width": base.unet.config.cross_attention_dim,
        "prediction_type": base.scheduler.config.prediction_type,
        "config": card.public_settings(asdict(cfg)) | {"pretrained_model_name": base.name},
        "dataset": card.dataset_facts(told),
        "hashes": card.model_hashes(Path(cfg.pretrained_model_name).expanduser()),
    }


def prepare_output(cfg: TrainConfig) -> Path:
    """An empty output folder; an earlier run is moved aside."""
    output = Path(cfg.output_dir)
    aside = files.moved_aside(output)
    if aside is not None:
        say(f"output: {output} held an earlier run; it is kept as {output.with_name(aside.name)}")
    output.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in asdict(cfg).items() if key not in ("preset", "config")}
    files.write_text(output / RECORD, json.dumps(settings, indent=2) + "\n")
    return output


def every(step: int, interval: int, total: int) -> bool:
    """Whether something that happens each `interval` steps, and at the end, happens after this many steps."""
    return step % interval == 0 or step == total


def open_store(cfg: TrainConfig) -> Store:
    """The cache folder that the user named, or the platform's."""
    return cache.Store(Path(cfg.cache_dir) if cfg.cache_dir else cache.default_folder())


def open_dataset(cfg: TrainConfig) -> MegaManDataset:
    """The pictures to train on. UserError (exit 3) if there are none, or if one is skipped under --strict."""
    cell_px = base_models.cell_of(cfg.pretrained_model_name)
    tokenizer = base_models.tokenizer_of(cfg.pretrained_model_name)
    store = open_store(cfg)
    dataset = MegaManDataset(cfg.data_dir, tokenizer, cfg, cell_px=cell_px, seed=cfg.seed, store=store)
    reasons = "".join(f"\n  {file.path}: {file.reason}" for file in dataset.skipped)
    if len(dataset) == 0:
        raise UserError(
            f"{cfg.data_dir}: no usable pictures (JPG, PNG, BMP or WebP). Add some, or try --preset "
            f"demo.{reasons}",
            errors.DATA,
        )
    if cfg.strict and dataset.skipped:
        raise UserError(f"{cfg.data_dir}: --strict, and these files can't be used:{reasons}", errors.DATA)
    return dataset


def report_of(dataset: MegaManDataset) -> Report:
    """What the user should know of the dataset."""
    rows = [
        report.Row(
            path.relative_to(dataset.folder).as_posix(),
            dataset.facts[i],
            dataset.captions[i],
            dataset.buckets[i],
            dataset.repeats[i],
            len(dataset.tokenizer(dataset.captions[i].text).input_ids) - 2,
        )
        for i, path in enumerate(dataset.paths)
    ]
    return report.Report(dataset.folder, dataset.settings.trigger, rows, dataset.skipped)


def describe_plan(cfg: TrainConfig, stream: Stream) -> str:
    """The arithmetic of the run, in a line."""
    return (
        f"plan: {cfg.max_train_steps} steps of {stream.step_size} pictures = "
        f"{cfg.max_train_steps / stream.steps_an_epoch:.1f} epochs of {len(stream)}; rank {cfg.lora_rank}, "
        f"alpha {cfg.lora_alpha:g}, learning rate {cfg.learning_rate:g}"
    )


def check_sizes(dataset: MegaManDataset, base: BaseModel) -> None:
    """UserError (exit 2) unless the UNet can halve the latents as often as it must."""
    cell, resolution = base.cell_px, dataset.settings.resolution
    if resolution % cell or any(b.width % cell or b.height % cell for b in dataset.buckets):
        raise UserError(
            f"--resolution {resolution}: {base.name} needs a multiple of {cell}; "
            f"{max(cell, resolution // cell * cell)} is near",
            errors.USAGE,
        )


def encode(cfg: TrainConfig, dataset: MegaManDataset, base: BaseModel) -> Encoded:
    """The dataset in the base's terms, from the cache where it was encoded before."""
    store = open_store(cfg)
    views = [dataset.views(index) for index in range(len(dataset))]
    texts = [dataset.texts(index) for index in range(len(dataset))]
    classes = cfg.preserve_class if cfg.preserve_weight else []
    plain = [caption.text for caption in dataset.captions]
    named = [captions.renamed(plain, cfg.trigger, name) for name in classes]
    encoded = cache.encode(views, texts, base, store, list(zip(*named, strict=True)))
    say(f"cache: {store.hits} of {store.hits + store.misses} encodings were there ({store.folder})")
    store.prune()
    return encoded


def set_learning_rate(optimizer: Optimizer, rate: float) -> float:
    """Sets the rate of every group; returns it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def count_skips(skips: int, skipped: bool, step: int) -> int:
    """Steps that the fp16 scaler has skipped in a row. UserError (exit 5) when it no longer recovers."""
    skips = skips + 1 if skipped else 0
    if skips >= SKIPS_IN_A_ROW:
        raise UserError(
            f"{skips} steps in a row overflowed in fp16 (up to step {step + 1}); lower --learning_rate, "
            "or use --mixed_precision bf16 or no",
            errors.NUMBERS,
        )
    return skips


def new_watch(cfg: TrainConfig, stream: Stream, *, enabled: bool) -> Watch:
    """The run's metrics and samples; silent in all processes but the first."""
    output = Path(cfg.output_dir)
    logging_dir = Path(cfg.logging_dir or output / "logs") if cfg.report_to == "tensorboard" else None
    pictures_each = len(stream) / stream.steps_an_epoch
    return watch.Watch(output, cfg.max_train_steps, pictures_each, logging_dir=logging_dir, enabled=enabled)


@dataclass(frozen=True)
class Run:
    """What a run holds once it is set up."""

    cfg: TrainConfig  # with everything decided
    accelerator: Accelerator
    base: BaseModel  # its UNet carries the adapter
    stream: Stream
    encoded: Encoded
    validation_text: Tensor  # (1+P,L,D): the empty caption's states, then the validation prompts'
    unet: torch.nn.Module  # base.unet as accelerate has prepared it
    trainable: list[torch.nn.Parameter]
    optimizer: Optimizer
    watch: Watch
    output: Path
    about: dict[str, Any]  # what the adapter's files tell about their making


def set_up(cfg: TrainConfig) -> Run:
    """Everything before the first step, what is quick and may fail before what is slow."""
    device = base_models.pick_device()
    dtype = base_models.pick_dtype(cfg.mixed_precision, device)
    accelerator = new_accelerator(device, dtype)
    processes, output = accelerator.num_processes, Path(cfg.output_dir)

    dataset = open_dataset(cfg)
    stream = stream_of(dataset, pictures_a_step(cfg, processes))
    cfg, told = plan(cfg, stream.steps_an_epoch), report_of(dataset)
    for line in [*told.lines(), describe_plan(cfg, stream)]:
        say(line)
    files.check_output(output, RECORD, Path(cfg.data_dir))

    base = base_models.load_base(cfg.pretrained_model_name, device=accelerator.device, dtype=dtype)
    check_sizes(dataset, base)
    with accelerator.main_process_first():  # the others then find everything in the cache
        encoded = encode(cfg, dataset, base)
    validation_text = base.embed(["", *cfg.validation_prompt])
    base.free_encoders()

    trainable = inject_lora(base.unet, cfg)
    if cfg.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trainable, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    unet, optimizer = accelerator.prepare(base.unet.train(), optimizer)
    count, precision = sum(p.numel() for p in trainable), str(dtype).removeprefix("torch.")
    several = f", {processes} processes" if processes > 1 else ""
    say(f"training: {count:,} parameters on {accelerator.device}, the base in {precision}{several}")

    if accelerator.is_main_process:
        prepare_output(cfg)
        told.write(output)
    watcher = new_watch(cfg, stream, enabled=accelerator.is_main_process)
    about = describe_run(cfg, base, told)
    return Run(
        cfg, accelerator, base, stream, encoded, validation_text, unet, trainable, optimizer, watcher, output,
        about,
    )  # fmt: skip


def save_state(run: Run, step: int) -> None:
    """A checkpoint after `step` steps, written by the first process."""
    if run.accelerator.is_main_process:
        adapter = adapters.adapter_of(run.base.unet, run.about | {"steps": step})
        keep = run.cfg.checkpoints_total_limit
        checkpoints.save_checkpoint(run.output / "checkpoints", step, adapter, run.optimizer, keep=keep)


def show_samples(run: Run, step: int) -> None:
    """One picture a validation prompt, always from the same noise, drawn by the first process."""
    if not run.accelerator.is_main_process:
        return
    cfg, unet, text = run.cfg, run.base.unet, run.validation_text
    wrapper = unet.__dict__.pop("forward", None)  # accelerate's, under fp16: its float32 would be fed back
    pipeline = base_models.pipeline_of(run.base)
    run.base.vae.to(unet.device)
    unet.eval()
    images = []
    for i in range(1, len(text)):
        images += base_models.draw(
            run.base,
            pipeline,
            prompt_embeds=text[i : i + 1],
            negative_prompt_embeds=text[:1],
            num_inference_steps=SAMPLE_STEPS,
            guidance_scale=cfg.validation_guidance_scale,
            height=cfg.resolution,
            width=cfg.resolution,
            generator=torch.Generator().manual_seed(cfg.seed + i),
        )
    unet.train()
    if wrapper is not None:
        unet.forward = wrapper
    if unet.device.type == "cuda":
        run.base.vae.to("cpu")
    run.watch.show_samples(step, cfg.validation_prompt, images)


def finish(run: Run) -> Path:
    """Writes lora_weights/ and closes everything."""
    weights = run.output / "lora_weights"
    if run.accelerator.is_main_process:
        unet, samples = run.base.unet, sorted(run.output.glob("samples/step-*/01.png"))
        preview = samples[-1] if samples else None
        adapters.write_adapter(adapters.adapter_of(unet, run.about), weights, live=unet, preview=preview)
    run.watch.close()
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return weights


def train(cfg: TrainConfig) -> Path:
    """Trains one adapter and returns its folder lora_weights/. UserError with the exit code when it can't."""
    run = set_up(cfg)
    cfg, accelerator, unet, scheduler = run.cfg, run.accelerator, run.unet, run.base.scheduler
    rank, processes = accelerator.process_index, accelerator.num_processes
    show_samples(run, 0)
    skips = 0
    for step in range(cfg.max_train_steps):
        rate = set_learning_rate(run.optimizer, lr_at(step, cfg))
        places, sums = run.stream.at(step), []
        shares = shares_of(places, rank, processes, cfg.train_batch_size)
        for number, share in enumerate(shares, 1):
            with contextlib.nullcontext() if number == len(shares) else accelerator.no_sync(unet):
                draw = draw_inputs(share or places[:1], run.encoded, cfg, scheduler)
                weight = processes / run.stream.step_size if share else 0.0  # a short step weighs by its size
                seed_dropout(cfg.seed, (share or places)[0].position)
                losses, strayed = losses_of(unet, draw, scheduler, cfg)
                accelerator.backward(weight * (losses.sum() + cfg.preserve_weight * strayed.sum()))
            sums.append(losses.detach().sum() * bool(share))
        grad_norm = accelerator.clip_grad_norm_(run.trainable, cfg.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        loss = accelerator.reduce(torch.stack(sums).sum(), "sum") / len(places)
        skips = count_skips(skips, accelerator.optimizer_step_was_skipped, step)
        run.watch.record(step, loss, grad_norm, rate)

        done = step + 1
        if every(done, cfg.save_steps, cfg.max_train_steps):
            save_state(run, done)  # before the preview, which may run out of memory
        if every(done, cfg.validation_steps, cfg.max_train_steps):
            show_samples(run, done)
    return finish(run)


# ---------------------------------------------------------------- the command

GUIDE = Path(__file__).parent / "megaman" / "templates" / "megaman_images.md"


def first_contact(cfg: TrainConfig, chosen: set[str]) -> bool:
    """Whether this is somebody's first start: no data folder was named, and the default one is missing or
    empty. It is made, with its guide.
    """
    folder = Path(cfg.data_dir)
    if "data_dir" in chosen or cfg.preset == "demo" or (folder.is_dir() and pictures.find_pictures(folder)):
        return False
    guide = folder / "README.md"
    if not guide.exists():
        files.write_text(guide, GUIDE.read_text(encoding="utf-8"))
    say(
        f"{folder} is ready: put 15-100 pictures there, each with a caption in a .txt file of the same "
        f"name ({guide} tells more), and run this again."
    )
    say("To see it work first, without a GPU or a network: python megaman_lora.py --preset demo")
    return True


def show_dataset(cfg: TrainConfig) -> None:
    """--dry_run: the report, on the terminal and as a page."""
    dataset, output = open_dataset(cfg), Path(cfg.output_dir)
    stream, told = stream_of(dataset, pictures_a_step(cfg, 1)), report_of(dataset)
    for line in [*told.lines(), describe_plan(plan(cfg, stream.steps_an_epoch), stream)]:
        say(line)
    files.check_output(output, RECORD, Path(cfg.data_dir))
    say(f"dry run: nothing was trained. {told.write(output)} shows every picture and its caption")
    if told.offer_captions(output / "captions"):
        say(
            f"captions made from names lie in {output / 'captions'}: edit them and copy them to your pictures"
        )


def main() -> None:
    """The command line."""
    base_models.quiet_libraries()
    cfg, chosen = read_config(sys.argv[1:])
    if first_contact(cfg, chosen):
        return
    if cfg.dry_run:
        return show_dataset(cfg)
    weights = train(cfg)
    say(f"done: {weights} (PEFT), {weights / 'megaman_lora.safetensors'} (A1111, Forge, ComfyUI, kohya)")
    say(
        "next: python "
        f"generate_megaman.py{'' if cfg.output_dir == DataFlags.output_dir else f' --lora_path {weights}'}"
    )


if __name__ == "__main__":
    errors.run(main)
