"""Pictures from a base: its pipeline, the samplers, what they begin with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Generator, Tensor

from megaman.common.console import Exit, UserError
from megaman.common.kinds import UNET
from megaman.model.decoding import decode
from megaman.model.read_once import text_read_once
from megaman.model.stable_diffusion import StableDiffusion, of_kind
from megaman.model.text import Text

SAMPLERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
}


GUIDANCE_RESCALE = 0.7  # for bases whose schedule ends in noise alone. Lin et al. 2023


def pipeline_of(base: StableDiffusion, scheduler: str = "dpm++") -> DiffusionPipeline:
    """A pipeline of the base's UNet and VAE that draws with the sampler dpm++, euler, euler_a, ddim or unipc;
    texts it is given as `words` reads them.
    """
    parts = {
        "vae": base.vae,
        "unet": base.unet,
        "scheduler": SAMPLERS[scheduler].from_config(base.scheduler.config),
    }
    beside = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = of_kind(base.kind, parts | beside)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def words(
    base: StableDiffusion, prompts: Sequence[str], negatives: Sequence[str]
) -> Mapping[str, Tensor | None]:
    """Prompts and what to keep away from, as a pipeline takes them: equally long."""
    longest = max(base.ids_of(texts).shape[1] for texts in (prompts, negatives))
    with base.at_work(*base.encoders):
        return as_settings(*(base.embed(texts, longest) for texts in (prompts, negatives)))


def as_settings(text: Text, negative: Text) -> Mapping[str, Tensor | None]:
    """Texts and what to keep away from, (B,L,D) each, as a pipeline takes them."""
    settings = {"prompt_embeds": text.states, "negative_prompt_embeds": negative.states}
    if text.pooled is None:
        return settings
    return settings | {
        "pooled_prompt_embeds": text.pooled,
        "negative_pooled_prompt_embeds": negative.pooled,
    }


def noise_of(base: StableDiffusion, width: int, height: int, generators: Sequence[Generator]) -> Tensor:
    """What a picture of each generator begins with, (B,C,h,w) on the CPU. The pipeline would draw the same,
    but for sizes that are no multiples of 8, which it refuses whatever the base's stride.
    """
    shape = (1, base.unet.config.in_channels, height // base.stride, width // base.stride)
    return torch.cat(
        [torch.randn(shape, generator=generator, dtype=base.unet.dtype) for generator in generators]
    )


def draw_latents(
    base: StableDiffusion,
    pipeline: DiffusionPipeline,
    *,
    width: int,
    height: int,
    generators: Sequence[Generator],
    **settings: Any,
) -> Tensor:
    """The latents of one batch, (B,C,h,w) on the base's device; a card may still be at work on them.

    width, height: pixels, multiples of the base's stride. generators: one a picture, on the CPU. settings:
    the pipeline's own.
    """
    noise = noise_of(base, width, height, generators)
    if base.kind.has_sizes:
        settings |= dict.fromkeys(("original_size", "target_size"), (height, width))
    if base.has_zero_snr:
        settings["guidance_rescale"] = GUIDANCE_RESCALE
    settings |= {"latents": noise, "generator": list(generators), "output_type": "latent"}
    with base.at_work(UNET), text_read_once(base.unet):
        return pipeline(**settings).images


def draw_or_none(
    base: StableDiffusion, pipeline: DiffusionPipeline, **settings: Any
) -> list[Image.Image | None]:
    """The pictures of one batch, RGB, by the settings of `draw_latents`; None where numbers overflowed, which
    leaves the others as they are.
    """
    return [each.picture() for each in decode(base, draw_latents(base, pipeline, **settings))]


OVERFLOW = (
    "a picture came out as NaN: numbers overflowed. Use --mixed_precision no (or bf16), or a lower "
    "--lora_scale."
)


def draw(base: StableDiffusion, pipeline: DiffusionPipeline, **settings: Any) -> list[Image.Image]:
    """The pictures of one batch, as `draw_or_none` makes them. UserError (exit 5) on non-finite numbers."""
    pictures = draw_or_none(base, pipeline, **settings)
    whole = [picture for picture in pictures if picture is not None]
    if len(whole) < len(pictures):
        raise UserError(OVERFLOW, Exit.NUMBERS)
    return whole
