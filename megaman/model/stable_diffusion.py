"""The frozen Stable Diffusion under the adapter: where it comes from, what it is made of. Knows diffusers."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download, try_to_load_from_cache
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from megaman.common.console import MODEL, NUMBERS, UserError, say
from megaman.config.train import EMBEDDED
from megaman.model.hub import PICKLE_SUFFIXES, check_folder_or_file, explanation

EMBEDDED_FOLDER = Path(__file__).parents[1] / "tiny_sd"
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"
}  # deleted from the hub in September 2024

SAMPLERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
}


@dataclass
class BaseModel:
    """A Stable Diffusion's parts. Sizes are asked from the parts' configs, never assumed."""

    name: str  # a hub id, or the name of a folder or file without its path
    unet: UNet2DConditionModel
    vae: AutoencoderKL  # always float32: half precision overflows in some VAEs
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler

    @property
    def stride(self) -> int:
        """Pixels a latent cell: 8 for Stable Diffusion 1.5."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def cell_px(self) -> int:
        """The sides of a picture must be multiples of it: the UNet halves the latents so often."""
        return self.stride * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of weights that every finetuning changes and no LoRA of ours does."""
        total = hashlib.sha256()
        for weight in (self.unet.conv_in.weight, self.unet.conv_out.weight, self.vae.decoder.conv_in.weight):
            total.update(weight.detach().to("cpu").half().contiguous().numpy().tobytes())
        return total.hexdigest()[:12]

    @property
    def native_resolution(self) -> int:
        """The side in pixels that the UNet was trained for."""
        return self.unet.config.sample_size * self.stride

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The text encoder's hidden states, (N,77,D), in the UNet's precision.

        Longer texts are cut at the tokenizer's length.
        """
        if self.text_encoder is None:
            raise RuntimeError("the text encoder was freed")
        ids = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            return self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state.to(self.unet.dtype)

    def free_encoders(self) -> None:
        """Drops the text encoder and moves the VAE off the accelerator: neither takes part in a training
        step.
        """
        self.text_encoder = None
        self.vae.to("cpu")
        if self.unet.device.type == "cuda":
            torch.cuda.empty_cache()


def canonical_name(name: str) -> str:
    """The base's name as an adapter may carry it: a hub id, or the last part of a path."""
    if name == EMBEDDED or Path(name).resolve() == EMBEDDED_FOLDER:
        return EMBEDDED
    return Path(name).expanduser().resolve().name if is_local(name) else MOVED.get(name, name)


def is_local(name: str) -> bool:
    """Whether the name is meant as a path and not as a hub id.

    (`owner/model` is a hub id unless such a folder exists.)
    """
    path = Path(name).expanduser()
    written_as_path = path.is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1
    return path.exists() or written_as_path or path.suffix in (".safetensors", *PICKLE_SUFFIXES)


def cell_of(name: str) -> int:
    """A base's cell_px before it is loaded; Stable Diffusion's 64 where its configuration is not at hand."""
    try:
        halvings = [
            len(json.loads(_at_hand(name, f"{part}/config.json").read_bytes())["block_out_channels"]) - 1
            for part in ("vae", "unet")
        ]
    except (OSError, ValueError, KeyError):
        return 64
    return 2 ** sum(halvings)


def tokenizer_of(name: str) -> CLIPTokenizer:
    """A base's tokenizer before it is loaded; the embedded base's, cut from the same table, where it is not
    at hand.
    """
    for file in ("tokenizer/vocab.json", "tokenizer/tokenizer.json"):
        with contextlib.suppress(OSError, ValueError):
            return CLIPTokenizer.from_pretrained(_at_hand(name, file).parent)
    return CLIPTokenizer.from_pretrained(EMBEDDED_FOLDER / "tokenizer")


def _at_hand(name: str, file: str) -> Path:
    """A file of a base that lies on this disk. FileNotFoundError if it doesn't."""
    if canonical_name(name) == EMBEDDED:
        return EMBEDDED_FOLDER / file
    if is_local(name):
        found = Path(name).expanduser() / file
    else:
        found = try_to_load_from_cache(MOVED.get(name, name), file)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        raise FileNotFoundError(file)
    return Path(found)


def load_base(name: str, *, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """The frozen base from the embedded folder, a diffusers folder, a single .safetensors file or the hub.

    UserError (exit 4) if it can't.
    """
    pipeline = _load_pipeline(name, dtype)
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    _check_kind(name, pipeline)
    for part, precision in ((unet, dtype), (vae, torch.float32), (text_encoder, dtype)):
        part.requires_grad_(False).eval().to(device, precision)
    if device.type == "cpu" and dtype == torch.bfloat16:
        unet.to(memory_format=torch.channels_last)  # bfloat16 is several times slower without it
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return BaseModel(canonical_name(name), unet, vae, text_encoder, pipeline.tokenizer, scheduler)


def _check_kind(name: str, pipeline: StableDiffusionPipeline) -> None:
    """UserError (exit 4) unless the parts fit each other as Stable Diffusion 1.x's do."""
    unet, latents = pipeline.unet.config, pipeline.vae.config.latent_channels
    reason = None
    if unet.in_channels != latents:
        reason = f"its UNet takes {unet.in_channels} channels, not {latents} (an inpainting model?)"
    elif unet.addition_embed_type is not None:
        reason = "its UNet wants more than text (Stable Diffusion XL?)"
    elif unet.cross_attention_dim != pipeline.text_encoder.config.hidden_size:
        reason = f"its UNet reads text {unet.cross_attention_dim} wide, its text encoder makes another"
    if reason is not None:
        raise UserError(f"{name}: not a Stable Diffusion 1.x: {reason}.", MODEL)


def _load_pipeline(name: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    diffusers_logging.disable_progress_bar()  # of loading only: the bars of a download stay
    transformers_logging.disable_progress_bar()
    if name in MOVED:
        say(f"base: {name} was deleted from the hub; its successor {MOVED[name]} is used.")
        name = MOVED[name]
    source: Path | str = Path(name).expanduser() if is_local(name) else name
    if canonical_name(name) == EMBEDDED:
        source = EMBEDDED_FOLDER
    if isinstance(source, Path):
        check_folder_or_file(source)
    kwargs = {"safety_checker": None, "use_safetensors": True}
    try:
        if isinstance(source, Path) and source.is_file():
            kwargs |= {"torch_dtype": torch.float32}  # of all parts, or the VAE would be rounded on the way
            return StableDiffusionPipeline.from_single_file(str(source), **kwargs)
        kwargs |= {"torch_dtype": {"vae": torch.float32, "default": dtype}, "feature_extractor": None}
        return StableDiffusionPipeline.from_pretrained(str(source), requires_safety_checker=False, **kwargs)
    except Exception as error:  # diffusers, the hub, safetensors and tokenizers raise what they like
        raise UserError(explanation(name, source, error), MODEL) from error


def pipeline_of(base: BaseModel, scheduler: str = "dpm++") -> StableDiffusionPipeline:
    """A pipeline of the base's own parts that draws with the sampler dpm++, euler, euler_a, ddim or unipc."""
    sampler = SAMPLERS[scheduler].from_config(base.scheduler.config)
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=sampler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


OVERFLOW = (
    "a picture came out as NaN: numbers overflowed. Use --mixed_precision no (or bf16), or a lower "
    "--lora_scale."
)


def draw(base: BaseModel, pipeline: StableDiffusionPipeline, **settings: Any) -> list[Image.Image]:
    """The pictures of one batch, as `attempt` makes them. UserError (exit 5) on non-finite numbers."""
    pictures = attempt(base, pipeline, **settings)
    if None in pictures:
        raise UserError(OVERFLOW, NUMBERS)
    return pictures


def attempt(base: BaseModel, pipeline: StableDiffusionPipeline, **settings: Any) -> list[Image.Image | None]:
    """The pictures of one batch, RGB; None where numbers overflowed, which leaves the others as they are.
    settings: the pipeline's own. Latents are decoded one at a time, which halves the peak memory.
    """
    latents = pipeline(output_type="latent", **settings).images
    pictures: list[Image.Image | None] = []
    with torch.no_grad():
        for latent in latents.split(1):
            scaled = latent.to(base.vae.device, torch.float32) / base.vae.config.scaling_factor
            pixels = base.vae.decode(scaled, return_dict=False)[0][0]
            if not pixels.isfinite().all():
                pictures.append(None)
                continue
            rounded = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
            pictures.append(Image.fromarray(rounded.permute(1, 2, 0).numpy()))
    return pictures


def fetched_adapter(name: str) -> Path:
    """The local path of an adapter: the path itself, or the folder that a hub id was fetched into.

    UserError (exit 4) if the hub has none.
    """
    path = Path(name).expanduser()
    if is_local(name) or name.count("/") != 1:
        return path
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*adapter_config.json"]))
    except Exception as error:  # the hub, its HTTP library and what a proxy answers raise what they like
        raise UserError(
            explanation(name, name, error)
            .replace("base model", "adapter")
            .replace("--pretrained_model_name", "--lora_path"),
            MODEL,
        ) from error
    if not any(path.is_file() for path in folder.glob("*.safetensors")):
        raise UserError(
            f"{name}: no .safetensors adapter there, or it was not wholly downloaded. Connect and run this "
            "again, or name another with --lora_path.",
            MODEL,
        )
    return folder
