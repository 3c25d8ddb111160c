"""What is looked at while it trains: the loss on pictures that are kept out, and sample pictures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray

from megaman.common.cache import Store, key_of
from megaman.common.console import UserError, is_out_of_memory, listed, one_line, say
from megaman.common.output_folder import RunFolder
from megaman.common.signals import StopRequest
from megaman.config.train import TrainConfig
from megaman.data.held_out import held_out_of
from megaman.model.compute import digits_of
from megaman.model.drawing import as_settings, draw, pipeline_of
from megaman.model.stable_diffusion import StableDiffusion
from megaman.model.text import Text
from megaman.model.weights import remembered_digest

TIMESTEPS = (200, 400, 600, 800)  # of 1000, where the loss is measured: kohya's own


def held_out(digests: Sequence[str], names: Sequence[str], share: float, seed: int) -> frozenset[int]:
    """The indices of the pictures to keep out, as `held_out_of` chooses them, which is said.

    digests, names: of every picture's content, and of its file.
    """
    chosen = held_out_of(digests, share, seed)
    if chosen:
        shown = listed(one_line(names[index]) for index in sorted(chosen))
        say(f"validation: {len(chosen)} kept out of the training (--validation_split): {shown}")
    return chosen


@dataclass
class BestCheckpoint:
    """The checkpoint with the smallest loss on the pictures that are kept out. Part of every checkpoint."""

    step: int | None = None
    loss: float | None = None
    latest: tuple[int, float] | None = None  # step and loss of the last measurement

    def note_measured(self, step: int, loss: float) -> None:
        """The loss after `step` steps."""
        self.latest = step, loss

    def note_saved(self, step: int) -> None:
        """A checkpoint is made after `step` steps."""
        if self.latest is None or self.latest[0] != step:
            return
        if self.loss is None or self.latest[1] < self.loss:
            self.step, self.loss = self.latest

    def report_line(self, run: RunFolder, total: int) -> str | None:
        """Where the adapter was better than it is at the end, if anywhere."""
        if self.step is None or self.step >= total:
            return None
        folder = run.checkpoint(self.step)
        return f"note: the smallest validation loss, {self.loss:.4f}, was at step {self.step}; see {folder}"


# ---------------------------------------------------------------- sample pictures

SAMPLE_STEPS = 20  # denoising steps of a preview


@dataclass(frozen=True)
class Look:
    """How previews are drawn."""

    side_px: int
    guidance_scale: float
    seed: int


def draw_previews(base: StableDiffusion, text: Text, look: Look, step: int, stop: StopRequest) -> list[Image]:
    """A picture each of text[1:], always from the same noise; none when somebody wants to stop, or (it is
    said) when memory runs out.

    text: 1+P texts, row 0 the empty caption. UserError (exit 5) with the step on numbers
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


RECIPE = 2  # raised whenever previews are drawn in another way, which changes a digit


def key_of_base_previews(weights: str, base: StableDiffusion, text: Text, look: Look, kernels: str) -> str:
    """The key in the store of what `draw_previews` makes of a base without an adapter: all that decides a
    digit of it.

    weights: a digest of the UNet's and the VAE's. kernels: what the user has chosen of them.
    """
    states = [each.float().cpu().numpy().tobytes() for each in (text.states, text.pooled) if each is not None]
    precision = (base.unet.dtype, json.dumps(dict(base.scheduler.config), sort_keys=True, default=str))
    digits = digits_of(base.device)
    return key_of("previews", RECIPE, SAMPLE_STEPS, weights, *states, look, *precision, kernels, digits)


def first_drawn_with(base: StableDiffusion, cfg: TrainConfig, store: Store) -> str | None:
    """A digest of the weights that the samples at step 0 are drawn with; None where an adapter has a part in
    them already. B = 0 has none; a DoRA's lengths are rounded. store: remembers digests.
    """
    if cfg.init_lora is not None or cfg.use_dora:
        return None
    parts = {"unet": base.unet, "vae": base.vae}
    return key_of(*(remembered_digest(part, name, base.origin, store) for name, part in parts.items()))


def kept_previews(key: str, store: Store, drawn: Callable[[], list[Image]]) -> list[Image]:
    """The pictures that `drawn` returns, made only if the store hasn't got them yet."""

    def tensors() -> dict[str, torch.Tensor]:
        return {f"{number:03}": torch.from_numpy(np.array(image)) for number, image in enumerate(drawn())}

    kept = store.tensors(key, tensors, is_counted=False)
    return [fromarray(kept[name].numpy()) for name in sorted(kept)]


def _draw(base: StableDiffusion, text: Text, look: Look, stop: StopRequest) -> list[Image]:
    pipeline = pipeline_of(base)
    images: list[Image] = []

    def hurry(pipeline: Any, _: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = bool(stop)  # diffusers' own way to leave out the steps that are left
        return kwargs

    for i in range(1, len(text)):
        images += draw(
            base, pipeline, **as_settings(text[i : i + 1], text[:1]),
            num_inference_steps=SAMPLE_STEPS, guidance_scale=look.guidance_scale, height=look.side_px,
            width=look.side_px, generators=[torch.Generator().manual_seed(look.seed + i)],
            callback_on_step_end=hurry,
        )  # fmt: skip
    return images
