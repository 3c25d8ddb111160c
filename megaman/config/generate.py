"""The settings of a drawing run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megaman.common.console import Exit, check_text
from megaman.common.kinds import CHUNK
from megaman.config.parser import LARGEST_SEED, PRECISIONS, check_numbers, flag, parse_flags, require

DESCRIPTION = "Draws with a trained LoRA and writes an HTML gallery."

Sampler = Literal["dpm++", "euler", "euler_a", "ddim", "unipc"]
SAMPLERS = {
    **dict.fromkeys(("dpmpp_2m", "dpm++_2m", "k_dpmpp_2m", "dpmsolver++", "dpm_solver++"), "dpm++"),
    "k_euler": "euler",
    **dict.fromkeys(("euler_ancestral", "k_euler_a", "k_euler_ancestral"), "euler_a"),
    **dict.fromkeys(("uni_pc", "unipc_multistep"), "unipc"),
}  # as web UIs, kohya and ComfyUI spell them
TRIGGER = "mega man"  # of the built-in prompts; an adapter's own trigger takes its place
NEGATIVE = "blurry, low quality, distorted, deformed"
LARGEST_SIDE = 8192  # pixels; the attention of a larger picture fits no machine
_FITTED = "leave it out: memory is fitted by itself, or by --batch_size"
ELSEWHERE = {
    **dict.fromkeys(("steps", "num_steps", "ddim_steps", "sampling_steps"), "--num_inference_steps"),
    **dict.fromkeys(("cfg_scale", "cfg", "scale", "guidance"), "--guidance_scale"),
    **dict.fromkeys(("lora", "lora_weights", "network_weights", "adapter", "adapter_path"), "--lora_path"),
    "network_module": "leave it out: --lora_path is all that it takes",
    **dict.fromkeys(("network_mul", "strength", "weight", "lora_weight", "multiplier"), "--lora_scale"),
    **dict.fromkeys(("ckpt", "model", "sd_model", "pretrained_model_name", "checkpoint"), "--base_model"),
    "pretrained_model_name_or_path": "--base_model",
    **dict.fromkeys(("sampler", "sampler_name", "sampling_method"), "--scheduler"),
    **dict.fromkeys(("outdir", "out_dir", "output", "save_dir"), "--output_dir"),
    **dict.fromkeys(("from_file", "prompt_file"), "--prompts_file"),
    "prompt": "--prompts",
    **dict.fromkeys(("negative", "uc", "n_prompt", "neg_prompt"), "--negative_prompt"),
    **dict.fromkeys(("images_per_prompt", "n_iter", "n_samples", "num_images"), "--num_images_per_prompt"),
    "batch_count": "--num_images_per_prompt",
    **dict.fromkeys(("W", "w"), "--width"),
    **dict.fromkeys(("H", "h"), "--height"),
    **dict.fromkeys(("resolution", "size", "image_size"), "--width and --height"),
    "fp16": "--mixed_precision fp16",
    "bf16": "--mixed_precision bf16",
    **dict.fromkeys(("precision", "dtype"), "--mixed_precision"),
    **dict.fromkeys(
        ("xformers", "sdpa", "enable_xformers_memory_efficient_attention"),
        "leave it out: the attention's kernels are chosen by themselves",
    ),
    **dict.fromkeys(("lowram", "lowvram", "medvram", "opt_channelslast", "vae_batch_size"), _FITTED),
    **dict.fromkeys(("max_embeddings_multiples", "max_token_length"), "--max_tokens"),
    "no_prompt_weights": "--prompt_weights off",
    "clip_skip": "leave it out: the text encoder is read to its end",
}  # what kohya, diffusers, web UIs and others call it
BUILT_IN_PROMPTS = (
    "mega man, standing, facing right, sky background",
    "mega man, running, facing left, sand background",
    "mega man, jumping, facing right, mint background",
    "mega man, arms raised, facing left, rose background",
    "mega man, crouching, facing right, violet background",
    "mega man, running, facing right, black background, pixel art",
    "mega man, jumping, facing left, white background, flat",
    "mega man, crouching, facing left, gray background, pixel art",
    "mega man, blue robot, helmet, game character, high quality",
    "a red wizard with a staff, arms raised, facing right, mint background",  # a friend, who stays himself
)


RECOMMENDED_FROM: dict[str, Any] = {
    "lora_scale": [0.5, 0.75, 1.0, 1.25],
    "num_images_per_prompt": 2,  # of one seed nobody can tell what is the prompt's and what the seed's
}  # what --recommend draws where the user says nothing


@dataclass(frozen=True)
class AdapterFlags:
    """What to draw with."""

    title: ClassVar[str] = "adapter and base"
    lora_path: str = flag(
        "./megaman_lora_output/lora_weights",
        "adapter: a folder, a .safetensors file or a hub id",
        is_path=True,
    )
    adapter_hash: str | None = flag(
        None, "refuse any other adapter than the one of this hash, as copied commands do"
    )
    base_model: str | None = flag(None, "base model; the one named in the adapter if not given", is_path=True)
    lora_scale: list[float] | None = flag(
        None,
        "strength of the adapter; several draw a strip, 0 is the base alone; 1, or what --adopt has chosen, "
        "if not given",
    )
    compare_base: bool | None = flag(
        None,
        "also draw every picture with strength 0: base and LoRA side by side; by itself with the embedded "
        "base where no prompt, strength or checkpoint is asked for",
    )
    compare_checkpoints: bool = flag(
        False, "also draw every picture with each checkpoint of the adapter's run"
    )
    recommend: bool = flag(
        False, "draw base, checkpoints and strengths, measure them, and say which to take: recommend.html"
    )
    judge: str | None = flag(
        None,
        "CLIP image model (hub id, folder) to look at --recommend's pictures; the base's UNet if not given",
        is_path=True,
    )


@dataclass(frozen=True)
class PromptFlags:
    """What to draw."""

    title: ClassVar[str] = "prompts"
    prompts: list[str] | None = flag(None, "one prompt or more; ten of ours if none is given")
    prompts_file: str | None = flag(
        None,
        "a prompt a line; # comments; per line --n negative --w width --h height --d seed --s steps --l "
        "guidance",
        is_path=True,
    )
    negative_prompt: str | None = flag(
        None, f'what to keep away from; "{NEGATIVE}" if not given, nothing with the embedded base'
    )
    max_tokens: int = flag(
        225,
        "longest prompt in tokens: chunks of 75, as the web UIs make them; what is beyond is not read",
        least=CHUNK,
        multiple_of=CHUNK,
    )
    prompt_weights: bool = flag(True, "read A1111's (word:1.3), [word] and BREAK; off: they are plain words")
    num_images_per_prompt: int = flag(1, "pictures a prompt; their seeds count up from --seed", least=1)
    seed: int = flag(42, "seed of each prompt's first picture; 0 is a seed", least=0, below=LARGEST_SEED)


@dataclass(frozen=True)
class DrawingFlags:
    """How to draw."""

    title: ClassVar[str] = "drawing"
    num_inference_steps: int = flag(25, "denoising steps", least=1)
    guidance_scale: float | None = flag(
        None,
        "how strictly to follow the prompt; what the adapter was previewed with, 7.5, if not given",
        least=0,
    )
    height: int | None = flag(
        None, "pixels; the training resolution if not given", least=1, most=LARGEST_SIDE
    )
    width: int | None = flag(None, "pixels; the training resolution if not given", least=1, most=LARGEST_SIDE)
    scheduler: Sampler = flag("dpm++", "sampler", spellings=SAMPLERS)
    batch_size: int | None = flag(None, "pictures at a time; fitted to device and size if not given", least=1)
    device: str = flag("auto", "cuda, mps, cpu or auto")
    mixed_precision: Literal["auto", "fp16", "bf16", "no"] = flag(
        "auto",
        "precision of the model; auto is fp16 on an NVIDIA card, else float32",
        spellings=PRECISIONS,
    )


@dataclass(frozen=True)
class OutputFlags:
    """What is written."""

    title: ClassVar[str] = "output"
    output_dir: str = flag("./generated_megaman", "folder of the pictures and index.html", is_path=True)
    no_metadata: bool = flag(False, "write no settings into the PNGs")
    gallery_only: bool = flag(False, "draw nothing; make index.html anew of the pictures that are there")


@dataclass(frozen=True)
class GenerateConfig(OutputFlags, DrawingFlags, PromptFlags, AdapterFlags):
    """Every setting of a run."""

    def __post_init__(self) -> None:
        check_numbers(self)
        judged = "--judge looks at the pictures of --recommend: give both, or leave it out"
        require(self.recommend or self.judge is None, judged)
        for name in ("compare_base", "compare_checkpoints", "recommend"):
            alone = f"--{name}: --lora_scale 0 draws the base alone; give a strength to compare"
            require(self.lora_scale is None or any(self.lora_scale) or not getattr(self, name), alone)
        is_hash = re.fullmatch(r"[0-9A-Fa-f]{6,12}", self.adapter_hash or "0" * 12) is not None
        wanted = "must be 6 to 12 hexadecimal digits, as the gallery shows them behind an adapter's name"
        require(is_hash, f"--adapter_hash {self.adapter_hash}: {wanted}")
        for prompt in self.prompts or ():
            require(bool(prompt.strip()), "--prompts: one of them is empty")
            check_text(prompt, "--prompts", Exit.USAGE)
        check_text(self.negative_prompt or "", "--negative_prompt", Exit.USAGE)


def read_config(argv: Sequence[str]) -> GenerateConfig:
    """The configuration that a command line asks for."""
    groups = (AdapterFlags, PromptFlags, DrawingFlags, OutputFlags)
    parsed = parse_flags(groups, argv, description=DESCRIPTION, elsewhere=ELSEWHERE)
    values = parsed.values
    if values["recommend"]:
        values |= {name: wish for name, wish in RECOMMENDED_FROM.items() if name not in parsed.chosen}
    beside = ", --".join(sorted(parsed.chosen - {"gallery_only", "output_dir"}))
    require(not (values["gallery_only"] and beside), f"--gallery_only draws nothing: leave --{beside} out")
    return GenerateConfig(**values)
