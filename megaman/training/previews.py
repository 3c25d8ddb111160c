"""The sample pictures of a run: what its adapter draws in the middle of the training."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from megaman.common.console import UserError, is_out_of_memory, say
from megaman.common.signals import StopRequest
from megaman.model.stable_diffusion import BaseModel, draw, pipeline_of

STEPS = 20  # denoising steps of a preview


@dataclass(frozen=True)
class Look:
    """How previews are drawn."""

    side_px: int
    guidance_scale: float
    seed: int


def draw_previews(base: BaseModel, text: Tensor, look: Look, step: int, stop: StopRequest) -> list[Image]:
    """A picture each of text[1:], always from the same noise; none when somebody wants to stop, or (it is
    said) when memory runs out.

    text (1+P,L,D): hidden states, row 0 of the empty caption. UserError (exit 5) with the step on numbers
    that aren't finite.
    """
    try:
        images = [] if stop else _draw(base, text, look, stop)
    except UserError as error:
        raise UserError(f"the preview at step {step}: {error}", error.exit_code) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say(f"note: no preview at step {step}: not enough memory for it; the training goes on")
        return []
    return [] if stop else images


def _draw(base: BaseModel, text: Tensor, look: Look, stop: StopRequest) -> list[Image]:
    unet, pipeline, images = base.unet, pipeline_of(base), []

    def hurry(pipeline: Any, _: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = bool(stop)  # diffusers' own way to leave out the steps that are left
        return kwargs

    wrapper = unet.__dict__.pop("forward", None)  # accelerate's, under fp16: its float32 would be fed back
    base.vae.to(unet.device)
    unet.eval()
    try:
        for i in range(1, len(text)):
            images += draw(
                base, pipeline, prompt_embeds=text[i : i + 1], negative_prompt_embeds=text[:1],
                num_inference_steps=STEPS, guidance_scale=look.guidance_scale, height=look.side_px,
                width=look.side_px, generator=torch.Generator().manual_seed(look.seed + i),
                callback_on_step_end=hurry,
            )  # fmt: skip
    finally:
        unet.train()
        if wrapper is not None:
            unet.forward = wrapper
        if unet.device.type == "cuda":
            base.vae.to("cpu")
    return images
