"""Pictures from a base: its pipeline, the samplers, the decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Generator, Tensor

from megaman.common.console import Exit, UserError
from megaman.model.stable_diffusion import StableDiffusion

SAMPLERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
}


def pipeline_of(base: StableDiffusion, scheduler: str = "dpm++") -> StableDiffusionPipeline:
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


def draw(base: StableDiffusion, pipeline: StableDiffusionPipeline, **settings: Any) -> list[Image.Image]:
    """The pictures of one batch, as `draw_or_none` makes them. UserError (exit 5) on non-finite numbers."""
    pictures = draw_or_none(base, pipeline, **settings)
    whole = [picture for picture in pictures if picture is not None]
    if len(whole) < len(pictures):
        raise UserError(OVERFLOW, Exit.NUMBERS)
    return whole


def noise_of(base: StableDiffusion, width: int, height: int, generators: Sequence[Generator]) -> Tensor:
    """What a picture of each generator begins with, (B,C,h,w) on the CPU. The pipeline would draw the same,
    but for sizes that are no multiples of 8, which it refuses whatever the base's stride.
    """
    shape = (1, base.unet.config.in_channels, height // base.stride, width // base.stride)
    return torch.cat(
        [torch.randn(shape, generator=generator, dtype=base.unet.dtype) for generator in generators]
    )


def draw_or_none(
    base: StableDiffusion,
    pipeline: StableDiffusionPipeline,
    *,
    width: int,
    height: int,
    generators: Sequence[Generator],
    **settings: Any,
) -> list[Image.Image | None]:
    """The pictures of one batch, RGB; None where numbers overflowed, which leaves the others as they are.
    Latents are decoded one at a time, which halves the peak memory.

    width, height: pixels, multiples of the base's stride. generators: one a picture, on the CPU. settings:
    the pipeline's own.
    """
    noise = noise_of(base, width, height, generators)
    settings |= {"latents": noise, "generator": list(generators), "output_type": "latent"}
    latents = pipeline(**settings).images
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
