"""What pictures look like in numbers: the VAE's latents, and the UNet's own middle or a CLIP image model.
Knows torch; what the numbers mean is measures.py's affair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from megaman.common.console import Exit, UserError
from megaman.common.kinds import UNET
from megaman.generation.measures import Tone, colours_of, tone_of
from megaman.model.memory import BatchLimit
from megaman.model.stable_diffusion import StableDiffusion, conditions

GRID = 16  # rows and columns of latents that are compared: 32 px of 512, 4 px of the embedded base's 64
NOISE_AT = 0.1  # of the schedule: little noise, as in the last steps of a drawing
SEED = 1  # of that noise, the same for every picture
PIXELS_AT_ONCE = 2**18  # one picture of 512 px, 64 of the embedded base's

Row = tuple[np.ndarray, np.ndarray, np.ndarray, Tone]  # of one picture: latents, looks, colours, tone
Look = Callable[[Tensor], Tensor]  # a judge's features (B,D) of pixels (B,3,H,W) in [-1, 1]


@dataclass(frozen=True)
class Picture:
    """A picture that is read when its turn comes."""

    size: tuple[int, int]  # height and width in pixels
    pixels: Callable[[], Tensor]  # (3,H,W) float32 in [-1, 1]


@dataclass(frozen=True)
class Features:
    """What N pictures look like, float32."""

    latents: np.ndarray  # (N,D), which tell one and the same picture from another
    looks: np.ndarray  # (N,E), which tell what is shown
    colours: np.ndarray  # (N,F), in which colours
    tones: list[Tone]


def pixels_of(image: Image.Image) -> Tensor:
    """A picture as (3,H,W) float32 in [-1, 1]."""
    array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1)


def features_of(pictures: Sequence[Picture], base: StableDiffusion, look: Look | None) -> Features:
    """What pictures look like, those of one size in a batch. The base must be without an adapter. look: a
    judge's; None: the UNet's middle.

    UserError (exit 5) on numbers that aren't finite, (exit 6) where memory is too small for one picture.
    """
    limit = BatchLimit()
    rows: dict[int, Row] = {}
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, picture in enumerate(pictures):
        by_size.setdefault(picture.size, []).append(i)

    def measured(batch: Sequence[int]) -> list[Row]:
        pixels = torch.stack([pictures[i].pixels() for i in batch])
        latents = latents_of(pixels, base)
        looks = middle_of(latents, base) if look is None else look(pixels)
        small = functional.adaptive_avg_pool2d(latents, GRID).flatten(1).cpu().numpy()
        shown = ((pixels + 1) * 127.5).round().byte().movedim(1, -1).numpy()
        colours, tones = [colours_of(each) for each in shown], [tone_of(each) for each in shown]
        return list(zip(small, looks.float().cpu().numpy(), colours, tones, strict=True))

    for (height, width), members in by_size.items():
        most = max(1, PIXELS_AT_ONCE // (height * width))
        for start in range(0, len(members), most):
            batch = members[start : start + most]
            rows |= dict(zip(batch, limit.drawn(batch, measured, height * width), strict=True))
    ordered = [rows[i] for i in range(len(pictures))]
    latents, looks, colours = (np.stack(each) for each in zip(*(row[:3] for row in ordered), strict=True))
    if not (np.isfinite(latents).all() and np.isfinite(looks).all()):
        reason = "the pictures' features are not finite in this precision; use --mixed_precision no (or bf16)"
        raise UserError(reason, Exit.NUMBERS)
    return Features(latents, looks, colours, [row[-1] for row in ordered])


@torch.no_grad()
def latents_of(pixels: Tensor, base: StableDiffusion) -> Tensor:
    """The VAE's means of pictures (B,3,H,W), scaled: (B,C,h,w) float32 on the base's device."""
    with base.at_work("vae"):
        mean = base.vae.encode(pixels.to(base.device, torch.float32)).latent_dist.mean
    return mean * base.vae.config.scaling_factor


@torch.no_grad()
def middle_of(latents: Tensor, base: StableDiffusion) -> Tensor:
    """The UNet's middle activations of slightly noisy latents (B,C,h,w) under the empty caption, mean and
    deviation over the picture of each: (B,2*D).
    """
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(SEED))
    at = round(NOISE_AT * base.scheduler.config.num_train_timesteps)
    times = torch.full((len(latents),), at, device=base.device)
    noisy = base.scheduler.add_noise(latents, noise.to(latents).expand_as(latents), times)
    with base.at_work(*base.encoders):
        text = base.embed([""])[[0] * len(latents)]
    side = (latents.shape[-2] * base.stride, latents.shape[-1] * base.stride)
    sizes = torch.tensor([[*side, 0, 0, *side]] * len(latents), dtype=torch.float32, device=base.device)
    found: list[Tensor] = []

    def keep(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    middle = base.unet.down_blocks[-1] if base.unet.mid_block is None else base.unet.mid_block
    handle = middle.register_forward_hook(keep)
    try:
        with base.at_work(UNET):
            base.unet(noisy.to(base.unet.dtype), times, text.states, **conditions(text, sizes))
    finally:
        handle.remove()
    cells = found[0].float().flatten(2)
    return torch.cat([cells.mean(dim=2), cells.std(dim=2, correction=0)], dim=1)
