"""The settings of a training run, their presets, and what may be done with each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from megaman.common.files import is_within
from megaman.common.kinds import CHUNK, SD1
from megaman.config.elsewhere import ELSEWHERE
from megaman.config.parser import (
    LARGEST_SEED,
    PRECISIONS,
    Parsed,
    check_numbers,
    facts_of,
    flag,
    parse_flags,
    require,
)

DESCRIPTION = (
    "Teaches Stable Diffusion a character from 15-100 pictures: trains a LoRA and writes it for every tool."
)

EMBEDDED = "megaman/tiny_sd"  # the base that ships with the code
STARTER_IMAGES = "megaman/starter_images"
CropMode = Literal["bucket", "center", "random"]
Targets = Literal["attention", "attention+ff", "linear", "conv"]
OptimizerName = Literal["adamw", "adamw8bit", "prodigy", "adafactor"]
Attention = Literal["auto", "sdpa", "xformers"]
PredictionType = Literal["auto", "epsilon", "v_prediction"]
EITHER_OR = frozenset({"max_train_steps", "num_train_epochs", "max_minutes"})  # how long a run is
PROJECT = Path(__file__).parents[2]
LEAST_SCORE = 0.05  # of a tag that is remembered; no threshold is lower
RECORD = "training_config.json"  # where a run keeps its settings
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "pretrained_model_name": EMBEDDED,
        "data_dir": STARTER_IMAGES,
        "resolution": 64,
        "flip": True,
        "mixed_precision": "no",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_targets": "linear",
        "learning_rate": 2e-3,
        "caption_dropout": 0.0,  # the empty caption is kept, not taught
        "preserve_weight": 4.0,
        "preserve_class": [
            *("robot", "red knight", "orange robot", "purple wizard", "yellow astronaut", "green ninja", ""),
        ],
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 440,
        "save_steps": 220,
        "validation_steps": 220,
        "validation_split": 0.0,
        "validation_guidance_scale": 3.0,
        "validation_prompt": [
            "mega man, standing, facing right, sky background",
            "mega man, running, facing left, sand background",
            "mega man, arms raised, facing right, mint background",
            "mega man, crouching, facing left, black background",
            "a red wizard with a staff, jumping, facing right, white background",
        ],
    },
    "starter": {"lora_rank": 4, "lora_alpha": 16, "learning_rate": 1e-4, "max_train_steps": 1000},
    "quality": {"lora_rank": 8, "lora_alpha": 32, "learning_rate": 5e-5, "max_train_steps": 2000},
    "pro": {"lora_rank": 16, "lora_alpha": 64, "learning_rate": 2e-5, "max_train_steps": 3000},
}


@dataclass(frozen=True)
class DataFlags:
    """Model and data."""

    title: ClassVar[str] = "model and data"
    pretrained_model_name: str = flag(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "base model: hub id, diffusers folder or .safetensors file",
        is_path=True,
        published="name",
        is_free=True,
    )
    prediction_type: PredictionType = flag(
        "auto", "what the base predicts, where you know better than what is found out of it", before="auto"
    )
    data_dir: str = flag(
        "./megaman_images", "folder of pictures and .txt captions", is_path=True, is_free=True
    )
    output_dir: str = flag("./megaman_lora_output", "where everything goes", is_path=True, is_free=True)
    resolution: int | None = flag(
        None,
        "side of the training square in pixels; the base's own (512, XL 1024) if not given",
        least=1,
        is_square=True,
    )
    crop: CropMode = flag(
        "bucket", "keep each picture's shape (buckets of the square's area), or cut squares"
    )
    flip: bool = flag(False, "also mirror pictures and captions; not for a character whose sides differ")
    alpha_mask: bool = flag(
        False,
        "no loss where a picture is transparent, as where NAME.mask.png beside it is black",
        before=False,
    )
    trigger: str = flag(
        "mega man", "word that calls the character; begins every caption made from a file name"
    )
    caption_dropout: float = flag(
        0.05, "share of examples that train with the empty caption", least=0, most=1
    )
    shuffle_tags: bool = flag(False, "vary the order of a caption's comma-separated tags")
    keep_tags: int = flag(1, "tags at the front that --shuffle_tags leaves in place", least=0)
    max_tokens: int = flag(
        225,
        "longest caption in tokens: chunks of 75, as the web UIs make them; what is beyond is not read",
        least=CHUNK,
        multiple_of=CHUNK,
        published="never",
        is_free=True,
        before=CHUNK,
    )
    cache_dir: str | None = flag(
        None,
        "where latents and text embeddings are kept between runs; the user's cache folder if not given",
        is_path=True,
        is_free=True,
    )
    strict: bool = flag(False, "a file that must be skipped is an error", is_free=True)

    @property
    def side_px(self) -> int:
        """The side of the training square; Stable Diffusion 1.x's where neither user nor base has said it."""
        return self.resolution or SD1.resolution


@dataclass(frozen=True)
class AdapterFlags:
    """The LoRA."""

    title: ClassVar[str] = "adapter"
    lora_rank: int = flag(
        8,
        "rank of the update: 4-16; higher learns more detail, and more of your pictures' accidents",
        least=1,
    )
    lora_alpha: float = flag(32, "strength: the update is scaled by alpha / rank", above=0)
    lora_targets: Targets = flag(
        "attention", "what it changes: attention; its feed-forward too; all linear; the resnets too"
    )
    lora_dropout: float = flag(
        0.0, "share of the update's inputs that each example trains without", least=0, below=1
    )
    use_dora: bool = flag(False, "DoRA: also learn the length of each row of the weights; slower")
    use_rslora: bool = flag(False, "rsLoRA: scale the update by alpha / sqrt(rank)")
    init_lora: str | None = flag(
        None,
        "adapter file or folder of any tool to go on from; rank, alpha, targets and DoRA are its own",
        is_path=True,
        published="name",
    )


@dataclass(frozen=True)
class OptimisationFlags:
    """How it learns."""

    title: ClassVar[str] = "optimisation"
    learning_rate: float = flag(1e-4, "peak learning rate", above=0)
    text_encoder_lr: float = flag(
        0.0,
        "peak learning rate of the text encoders' LoRA; 0 = only the UNet is trained",
        least=0,
        before=0.0,
    )
    text_encoder_stop: float = flag(
        1.0,
        "share of the run after which the text encoders stay as they are",
        above=0,
        most=1,
        before=1.0,
    )
    lr_scheduler: Literal["cosine", "constant", "linear", "polynomial", "cosine_with_restarts"] = flag(
        "cosine",
        "course of the rate after the warm-up",
        spellings={"constant_with_warmup": "constant", "cosine_annealing": "cosine"},
    )
    lr_warmup_steps: int | None = flag(
        None,
        "steps of linear warm-up; 5 %% of the run if not given",
        least=0,
        remark="steps, no share of them; left out, it is 5 % of the run",
    )
    train_batch_size: int = flag(1, "pictures at a time, on each device", least=1)
    gradient_accumulation_steps: int = flag(4, "batches a step", least=1)
    max_train_steps: int = flag(1500, "optimizer steps in all", least=1, is_free=True)
    num_train_epochs: int | None = flag(
        None, "passes over the pictures, instead of --max_train_steps", least=1, is_free=True
    )
    max_minutes: float | None = flag(
        None,
        "as many steps as fit into this time, instead of --max_train_steps; the whole command counts",
        above=0,
        is_free=True,
        published="never",
    )
    earlier_total: list[int] | None = flag(
        None,
        "STEP TOTAL: up to this step the rate is that of a run of so many steps, as --max_minutes found out",
        least=1,
        is_free=True,
        published="never",
    )
    optimizer: OptimizerName = flag(
        "adamw",
        "adamw8bit and prodigy need a package of their own",
        spellings={"adamw_8bit": "adamw8bit", "8bit_adam": "adamw8bit"},
    )
    weight_decay: float = flag(0.01, "how fast the adapter shrinks where nothing holds it", least=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", above=0)
    snr_gamma: float | None = flag(
        None, "min-SNR loss weighting; 5, and 0 (off) for bases of v prediction, if not given", least=0
    )
    noise_offset: float = flag(
        0.0, "strength of noise alike over a whole picture: darker darks; 0 = off", least=0
    )
    ema_decay: float = flag(
        0.0, "also keep a moving average of the LoRA and write that; 0 = off", least=0, below=1
    )
    preserve_weight: float = flag(
        0.0, "how strongly the rest of the base's world is kept; 0 = off; the demo takes 4", least=0
    )
    preserve_class: list[str] = flag(
        ["robot"],
        "what the character is one of, and what else there is: the words to keep as they are; an empty one "
        "is the empty caption, which guidance subtracts",
    )
    seed: int = flag(42, "decides every random choice; 0 is a seed", least=0, below=LARGEST_SEED)


@dataclass(frozen=True)
class PrecisionFlags:
    """Precision and memory."""

    title: ClassVar[str] = "precision and memory"
    mixed_precision: Literal["fp16", "bf16", "no"] = flag(
        "fp16", "precision of the frozen base; the LoRA is always float32", spellings=PRECISIONS
    )
    base_weights: Literal["full", "int8"] = flag(
        "full", "how the frozen UNet is kept: int8 takes half the memory of half precision", before="full"
    )
    gradient_checkpointing: bool = flag(
        False,
        "recompute activations: as few as your card needs, or all where its size is unknown; a step takes up "
        "to twice as long",
        is_free=True,
    )
    attention: Attention = flag(
        "auto",
        "attention kernels: sdpa is torch's own, auto has others for bf16 on AMD; xformers wants NVIDIA",
    )
    compile: bool = flag(
        False, "compile the UNet's blocks: a wait at first; equal to rounding, also after a resume"
    )
    cuda_graph: bool = flag(
        False, "record a step once and replay it as one CUDA graph: no waiting for Python between kernels"
    )


@dataclass(frozen=True)
class RunFlags:
    """The run."""

    title: ClassVar[str] = "run"
    save_steps: int = flag(250, "steps between checkpoints", least=1, is_free=True)
    checkpoints_total_limit: int = flag(
        3, "checkpoints that keep their optimizer state; the small adapters all stay", least=1, is_free=True
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "go on from OUTPUT's newest whole checkpoint (latest), or a run's folder, or a folder step-…",
        is_path=True,
        is_of_one_command=True,
    )
    validation_steps: int = flag(
        100, "steps between sample pictures; step 0 shows the base", least=1, is_free=True
    )
    validation_prompt: list[str] = flag(
        ["mega man, blue robot, helmet, game character, high quality"],
        "prompts of the sample pictures",
        is_free=True,
    )
    validation_split: float = flag(
        0.1,
        "share of the pictures that is kept out, to measure the loss on; 0 = off; of fewer than 15 none",
        least=0,
        most=0.5,
    )
    validation_guidance_scale: float = flag(
        7.5, "guidance of the sample pictures; generation takes it over", least=0, is_free=True
    )
    report_to: Literal["tensorboard", "none"] = flag(
        "tensorboard", "where to log besides metrics.jsonl", is_free=True
    )
    logging_dir: str | None = flag(
        None, "TensorBoard's folder; OUTPUT/logs if not given", is_path=True, is_free=True
    )
    adopt: str | None = flag(
        None,
        "make a checkpoint of OUTPUT the adapter: step-000900, latest or its folder; :0.8 behind it is the "
        "strength to draw with",
        is_path=True,
        is_of_one_command=True,
    )
    dry_run: bool = flag(
        False, "show what would be trained on, as dataset.html too, and stop", is_of_one_command=True
    )
    report: str | None = flag(
        None, "a run's folder: make its page, index.html, anew and stop", is_path=True, is_of_one_command=True
    )
    preset: Literal["demo", "starter", "quality", "pro"] | None = flag(
        None, "a whole configuration; flags override it", is_of_one_command=True
    )
    config: str | None = flag(
        None,
        "settings (.json, .toml, .yaml), such as an earlier run's training_config.json",
        is_path=True,
        is_of_one_command=True,
    )


@dataclass(frozen=True)
class CaptionFlags:
    """Captions from the pictures."""

    title: ClassVar[str] = "captions from the pictures, with --dry_run"
    caption_with: str | None = flag(
        None,
        "tagger or captioner that writes a caption for each picture without one: hub id or folder",
        is_path=True,
        is_of_one_command=True,
    )
    caption_threshold: float = flag(
        0.35, "how sure a tagger must be of a tag", least=LEAST_SCORE, below=1, is_of_one_command=True
    )
    caption_without: str | None = flag(
        None, "tags that no made caption gets, comma-separated", is_of_one_command=True
    )
    prune_tags: bool = flag(
        False,
        "leave out tags on more than 90 %% of the pictures: the trigger learns what they name",
        is_of_one_command=True,
    )
    write_captions: bool = flag(
        False,
        "put OUTPUT/captions beside the pictures that have none; nothing is overwritten",
        is_of_one_command=True,
    )


def set_for_tags(flags: CaptionFlags) -> list[str]:
    """The names of the flags that choose among tags, where they are not at their defaults."""
    names = ("caption_threshold", "caption_without", "prune_tags")
    return [name for name in names if getattr(flags, name) != getattr(CaptionFlags(), name)]


def check_captions(flags: CaptionFlags, *, is_dry: bool) -> None:
    """UserError (exit 2) where a flag is given that means nothing here. is_dry: with --dry_run."""
    made = flags.caption_with is not None
    with_dry_run = f"--caption_with {flags.caption_with}: captions are made with --dry_run; add it"
    require(is_dry or not made, with_dry_run)
    require(is_dry or not flags.write_captions, "--write_captions: must be given with --dry_run")
    for name in set_for_tags(flags) if not made else ():
        require(False, f"--{name}: must be given with --caption_with, whose tags it chooses")


@dataclass(frozen=True)
class TrainConfig(CaptionFlags, RunFlags, PrecisionFlags, OptimisationFlags, AdapterFlags, DataFlags):
    """Every setting of a run. Resolved once, never changed."""

    def __post_init__(self) -> None:
        check_numbers(self)
        require(bool(self.trigger.strip()), f"--trigger {self.trigger}: must be a word or more")
        within = self.cache_dir is not None and is_within(self.cache_dir, self.output_dir)
        aside = "must not lie in --output_dir, which a later run moves aside"
        require(not within, f"--cache_dir {self.cache_dir}: {aside}")
        whole = self.base_weights == "full" or not self.use_dora
        require(whole, "--base_weights int8: a DoRA needs the base's own weights; leave one of the two out")
        varies = self.shuffle_tags or self.keep_tags == 1
        require(varies, f"--keep_tags {self.keep_tags}: must be given with --shuffle_tags")
        reads = self.text_encoder_lr > 0 or self.text_encoder_stop == 1
        require(reads, f"--text_encoder_stop {self.text_encoder_stop}: must be given with --text_encoder_lr")
        is_one = self.optimizer != "prodigy" or self.text_encoder_lr in (0, self.learning_rate)
        alike = "--optimizer prodigy finds one rate for all; give the same as --learning_rate"
        require(is_one, f"--text_encoder_lr {self.text_encoder_lr}: {alike}")
        preserves = self.preserve_weight > 0 or self.preserve_class == OptimisationFlags().preserve_class
        words = " ".join(self.preserve_class)
        together = "must be given together with --preserve_weight above 0"
        require(preserves, f"--preserve_class {words}: {together}")
        check_captions(self, is_dry=self.dry_run)
        earlier = self.earlier_total or [0, 0]
        is_pair = len(earlier) == 2 and earlier[0] <= earlier[-1]
        require(is_pair, f"--earlier_total {self.earlier_total}: must be two numbers, a step and a total")


FACTS = facts_of(TrainConfig)


def read_config(argv: Sequence[str]) -> tuple[TrainConfig, set[str]]:
    """The configuration that the command line asks for, and the names of the settings that the user chose."""
    values, given, in_file = parsed = parse_flags(
        (DataFlags, AdapterFlags, OptimisationFlags, PrecisionFlags, RunFlags, CaptionFlags),
        argv,
        description=DESCRIPTION,
        presets=PRESETS,
        either_or=EITHER_OR,
        elsewhere=ELSEWHERE,
    )
    strange = ", --".join(sorted(given - {"adopt", "output_dir", "config"}))
    require(not (values["adopt"] and strange), f"--adopt trains nothing: leave --{strange} out")
    if not values["preserve_weight"] and "preserve_class" not in _beside("preserve_weight", parsed):
        values["preserve_class"] = OptimisationFlags().preserve_class  # the preset's went with its weight
    if given & EITHER_OR and "earlier_total" not in given:
        values["earlier_total"] = None  # it belongs to the total that is overruled
    if values["resume_from_checkpoint"] and "output_dir" not in given and _goes_on_beside(values, in_file):
        beside = Path(values["config"]).parent
        if beside.resolve() != Path(values["output_dir"]).resolve():
            values["output_dir"] = str(beside)
    if values["data_dir"] == STARTER_IMAGES and not Path(STARTER_IMAGES).is_dir():
        values["data_dir"] = str(PROJECT / STARTER_IMAGES)  # wherever the command is run from
    return TrainConfig(**values), parsed.chosen


def _beside(name: str, parsed: Parsed) -> set[str]:
    """The settings that the user chose where he chose this one, or above it."""
    return parsed.given if name in parsed.given else parsed.chosen


def _goes_on_beside(values: Mapping[str, Any], in_file: set[str]) -> bool:
    """Whether the configuration file is a run's own record, so that a resume means the run in whose folder it
    lies, which may have been moved or renamed since.
    """
    always = {
        name
        for name, facts in FACTS.items()
        if not facts.is_of_one_command and values[name] is not None and facts.before is None
    } - EITHER_OR
    return values["config"] is not None and Path(values["config"]).name == RECORD and in_file >= always
