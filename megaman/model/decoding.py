"""Pictures out of latents, which a card decodes beside whatever it computes next."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from megaman.model.memory import GIB, LARGEST_SHARE, card_gib
from megaman.model.stable_diffusion import StableDiffusion

GIB_A_MEGAPIXEL = 4.9  # that the VAE takes for a picture of 1024 x 1024, float32


@dataclass(frozen=True)
class Decoded:
    """A picture that a card may still be at work on."""

    pixels: Tensor  # (H,W,3) uint8, on the CPU as soon as it is done
    is_whole: Tensor  # (), bool, likewise: whether all its numbers were finite
    done: torch.cuda.Event | None  # None where nothing is waited for

    def picture(self) -> Image.Image | None:
        """The picture, RGB, waited for; None if its numbers overflowed."""
        if self.done is not None:
            self.done.synchronize()
        return Image.fromarray(self.pixels.numpy()) if self.is_whole else None


def decode(base: StableDiffusion, latents: Tensor) -> list[Decoded]:
    """The pictures of latents (B,C,h,w), in the stream that is current. They are decoded one at a time, which
    halves the peak memory; a card is not waited for.
    """
    with base.at_work("vae"), torch.no_grad():
        return [_decode(base, latent) for latent in latents.split(1)]


def _decode(base: StableDiffusion, latent: Tensor) -> Decoded:
    """The picture of a latent (1,C,h,w)."""
    scaled = latent.to(base.device, torch.float32) / base.vae.config.scaling_factor
    pixels = base.vae.decode(scaled, return_dict=False)[0][0]
    rounded = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    is_card = base.device.type == "cuda"
    made = (rounded.permute(1, 2, 0), pixels.isfinite().all())
    shown, is_whole = (each.to("cpu", non_blocking=is_card) for each in made)
    return Decoded(
        shown, is_whole, torch.cuda.current_stream(base.device).record_event() if is_card else None
    )


class Decoder:
    """Decodes batch after batch: on a card that has room for it, in a stream of its own, so that the next
    batch is drawn meanwhile. The pictures are the same either way.
    """

    def __init__(self, base: StableDiffusion) -> None:
        """base: with its parts on their device."""
        self.base = base
        self.stream = torch.cuda.Stream(base.device) if base.device.type == "cuda" else None
        self.most_px = 0  # of a picture for which there was room beside the drawing

    def start(self, latents: Tensor) -> list[Decoded]:
        """The pictures of latents (B,C,h,w) that were computed in the current stream."""
        if self.stream is None or not self._has_room(latents.shape[-2] * latents.shape[-1]):
            return decode(self.base, latents)
        self.stream.wait_stream(torch.cuda.current_stream(self.base.device))
        latents.record_stream(self.stream)  # their memory is not given away while they are read
        with torch.cuda.stream(self.stream):
            return decode(self.base, latents)

    def _has_room(self, cells: int) -> bool:
        """Whether latents of so many cells can be decoded beside the drawing. Once they could, they can."""
        if "vae" not in self.base.placed or self.base.is_crowded:
            return False  # it would be moved away while it is at work
        pixels = cells * self.base.stride**2
        if pixels > self.most_px and has_room(self.base.device, pixels):
            self.most_px = pixels
        return pixels <= self.most_px


# ---------------------------------------------------------------- room


def is_crowded(base: StableDiffusion, pixels: int) -> bool:
    """Whether the card is too small for all of the base's parts at once and a picture of so many pixels."""
    card = card_gib(base.device)
    parts = (base.vae, *base.parts.values())
    size = sum(each.numel() * each.element_size() for part in parts for each in part.parameters())
    return card is not None and size / GIB + GIB_A_MEGAPIXEL * pixels / 2**20 > LARGEST_SHARE * card


def has_room(card: torch.device, pixels: int) -> bool:
    """Whether a picture of so many pixels can be decoded beside all that the card holds now."""
    free, total = torch.cuda.mem_get_info(card)
    return GIB_A_MEGAPIXEL * GIB * pixels / 2**20 < free - (1 - LARGEST_SHARE) * total
