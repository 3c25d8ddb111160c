"""The frozen Stable Diffusion under the adapter: where it comes from, what it is made of. Knows diffusers."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from megaman.common.console import Exit, UserError, say
from megaman.common.kinds import SD1
from megaman.config.train import EMBEDDED
from megaman.model.detection import OTHER_INPUTS, OTHER_WIDTHS
from megaman.model.hub import (
    BASE_FLAG,
    EMBEDDED_FOLDER,
    MOVED,
    NO_SAFETENSORS,
    VARIANT,
    canonical_name,
    check_folder_or_file,
    hub_id_of,
    is_local,
    is_variant_alone,
    local_file,
    why_not_loaded,
)
from megaman.model.single_file import kind_in, load_file
from megaman.model.tokenizer import clip_tokenizer


@dataclass
class StableDiffusion:
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
        """The sides of training sizes are multiples of it: the UNet halves the latents so often."""
        return self.stride * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def nearest_px(self, side: int) -> int:
        """The side nearest to this one that can be drawn: the UNet pads what it can't halve evenly, so every
        multiple of the stride.
        """
        return max(1, round(side / self.stride)) * self.stride

    @property
    def digest(self) -> str:
        """A fingerprint of the base: of three layers that any finetune changes and our LoRAs never touch."""
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

    def notes_on_length(self, texts: Iterable[str]) -> list[str]:
        """A line for each distinct text whose end the text encoder does not read."""
        most = self.tokenizer.model_max_length - 2
        counts = {text: len(self.tokenizer(text, add_special_tokens=False).input_ids) for text in texts}
        longer = {text: count for text, count in counts.items() if count > most}
        return [
            f"note: a prompt of {count} tokens is cut after {most}: {text[:60]!r}…"
            for text, count in longer.items()
        ]

    def free_encoders(self) -> None:
        """Drops the text encoder and moves the VAE off the accelerator: neither takes part in a training
        step.
        """
        self.text_encoder = None
        self.vae.to("cpu")
        if self.unet.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base before it is loaded."""

    cell_px: int  # see StableDiffusion
    tokenizer: CLIPTokenizer


def peek(name: str) -> BaseFacts:
    """What this base is, as far as this disk tells; Stable Diffusion 1.x where its configuration is not here
    yet. UserError (exit 4) that names what a single file is, if it is none of ours.
    """
    file = Path(name).expanduser()
    if is_local(name) and file.suffix == ".safetensors" and file.is_file():
        return BaseFacts(_cell_px(kind_in(file).config), clip_tokenizer())
    try:
        cell_px = _cell_px(local_file(name, "unet/config.json").parents[1])
    except (OSError, ValueError, KeyError):
        cell_px = _cell_px(SD1.config)
    for part in ("tokenizer/vocab.json", "tokenizer/tokenizer.json"):
        with contextlib.suppress(OSError, ValueError):
            return BaseFacts(cell_px, CLIPTokenizer.from_pretrained(local_file(name, part).parent))
    return BaseFacts(cell_px, clip_tokenizer())


def _cell_px(folder: Path) -> int:
    """The cell of a base by the configurations in its folder."""
    halvings = [
        len(json.loads((folder / part / "config.json").read_bytes())["block_out_channels"]) - 1
        for part in ("vae", "unet")
    ]
    return 2 ** sum(halvings)


def load_base(
    name: str, *, device: torch.device, dtype: torch.dtype, flag: str = BASE_FLAG
) -> StableDiffusion:
    """The frozen base from the embedded folder, a diffusers folder, a single .safetensors file or the hub.

    UserError (exit 4) if it can't. flag: how the user names another.
    """
    pipeline = _load_pipeline(name, dtype, flag)
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    _check_kind(name, pipeline)
    for part, precision in ((unet, dtype), (vae, torch.float32), (text_encoder, dtype)):
        part.requires_grad_(False).eval().to(device, precision)
    if device.type == "cpu" and dtype == torch.bfloat16:
        unet.to(memory_format=torch.channels_last)  # bfloat16 is several times slower without it
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return StableDiffusion(canonical_name(name), unet, vae, text_encoder, pipeline.tokenizer, scheduler)


def _check_kind(name: str, pipeline: StableDiffusionPipeline) -> None:
    """UserError (exit 4) unless the parts fit each other as Stable Diffusion 1.x's do."""
    unet, latents = pipeline.unet.config, pipeline.vae.config.latent_channels
    reason = None
    if unet.in_channels != latents:
        what = OTHER_INPUTS.get(unet.in_channels, "a UNet for other latents")
        reason = f"it is {what}: its UNet takes {unet.in_channels} channels, not {latents}"
    elif unet.cross_attention_dim in OTHER_WIDTHS:
        reason = f"it is {OTHER_WIDTHS[unet.cross_attention_dim]}, which this tool does not train"
    elif unet.addition_embed_type is not None:
        reason = "its UNet wants more than text (Stable Diffusion XL?)"
    elif unet.cross_attention_dim != pipeline.text_encoder.config.hidden_size:
        reason = f"its UNet reads text {unet.cross_attention_dim} wide, its text encoder makes another"
    if reason is not None:
        raise UserError(f"{name}: not a Stable Diffusion 1.x: {reason}.", Exit.MODEL)


SAFE: dict[str, Any] = {"safety_checker": None, "use_safetensors": True}  # no pickle is ever loaded


def _download(name: str) -> Path:
    """The folder in the hub's cache that holds the model, fetched where it isn't there: as the fp16 variant
    if a part has no other weights in safetensors.
    """
    settings = SAFE | {"feature_extractor": None}
    try:
        return Path(StableDiffusionPipeline.download(name, **settings))
    except OSError as error:
        if NO_SAFETENSORS not in str(error):
            raise
        return Path(StableDiffusionPipeline.download(name, variant=VARIANT, **settings))


def _variant_parts(folder: Path) -> dict[str, nn.Module]:
    """The parts whose weights lie in the folder as the fp16 variant alone, by name. diffusers itself, asked
    for the variant, would prefer it to the full weights of other parts.
    """
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    return {
        part: kind.from_pretrained(folder / part, variant=VARIANT, use_safetensors=True)
        for part, kind in kinds.items()
        if is_variant_alone(folder / part)
    }


def _load_pipeline(name: str, dtype: torch.dtype, flag: str) -> StableDiffusionPipeline:
    diffusers_logging.disable_progress_bar()  # of loading only: the bars of a download stay
    transformers_logging.disable_progress_bar()
    if name in MOVED:
        say(f"base: {name} was deleted from the hub; its successor {MOVED[name]} is used.")
        name = MOVED[name]
    source: Path | str = Path(name).expanduser() if is_local(name) else hub_id_of(name)
    if canonical_name(name) == EMBEDDED:
        source = EMBEDDED_FOLDER
    kind = None
    if isinstance(source, Path):
        check_folder_or_file(source, flag)
        kind = kind_in(source) if source.is_file() else None
    try:
        if isinstance(source, Path) and kind is not None:
            return load_file(source, kind, dtype)
        folder = source if isinstance(source, Path) else _download(source)
        return StableDiffusionPipeline.from_pretrained(
            str(folder),
            torch_dtype={"vae": torch.float32, "default": dtype},
            feature_extractor=None,
            requires_safety_checker=False,
            **SAFE,
            **_variant_parts(folder),
        )
    except Exception as error:  # diffusers, the hub, safetensors and tokenizers raise what they like
        raise UserError(why_not_loaded(name, source, error, flag=flag), Exit.MODEL) from error
