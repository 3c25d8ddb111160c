"""Pictures out of latents, which a card decodes beside the drawing of the next ones; what room that takes."""

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
            self.done.synchronize()  # of this picture alone: the card goes on
        return Image.fromarray(self.pixels.numpy()) if self.is_whole else None


def _decode(base: StableDiffusion, latent: Tensor) -> Decoded:
    """The picture of a latent (1,C,h,w)."""
    scaled = latent.to(base.device, torch.float32) / base.vae.config.scaling_factor
    pixels = base.vae.decode(scaled, return_dict=False)[0][0]
    rounded = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    is_whole = pixels.isfinite().all()
    if base.device.type != "cuda":
        return Decoded(rounded.cpu(), is_whole.cpu(), None)
    shown, told = (each.to("cpu", non_blocking=True) for each in (rounded, is_whole))
    # who waits for it sleeps: the thread that feeds the card needs its core
    done = torch.cuda.Event(blocking=True)
    done.record(torch.cuda.current_stream(base.device))
    return Decoded(shown, told, done)


def decode(base: StableDiffusion, latents: Tensor) -> list[Decoded]:
    """The pictures of latents (B,C,h,w), by the current stream. They are decoded one at a time, which halves
    the peak memory; a card is waited for only if the VAE must come and go.
    """
    with base.at_work("vae"), torch.no_grad():
        return [_decode(base, latent) for latent in latents.split(1)]


# ---------------------------------------------------------------- room


def is_crowded(base: StableDiffusion, pixels: int) -> bool:
    """Whether the card is too small for all of the base's parts at once and a picture of so many pixels."""
    card = card_gib(base.device)
    parts = (base.vae, *base.parts.values())
    size = sum(each.numel() * each.element_size() for part in parts for each in part.parameters())
    return card is not None and size / GIB + GIB_A_MEGAPIXEL * pixels / 2**20 > LARGEST_SHARE * card


def _has_room(card: torch.device, pixels: int) -> bool:
    """Whether a picture of so many pixels can be decoded beside the most that this process has held yet."""
    free, total = torch.cuda.mem_get_info(card)
    # what it has given back, and will take again
    usual = torch.cuda.max_memory_allocated(card) - torch.cuda.memory_reserved(card)
    return GIB_A_MEGAPIXEL * GIB * pixels / 2**20 < free - usual - (1 - LARGEST_SHARE) * total


class Decoder:
    """Decodes batch after batch: on a card that has room for it, in a stream of its own, so that the next
    batch is drawn meanwhile. The pictures are the same either way.
    """

    def __init__(self, base: StableDiffusion) -> None:
        """base: whose parts stay where they are until it is closed, if the card is not crowded."""
        self.base = base
        self.stream = torch.cuda.Stream(base.device) if base.device.type == "cuda" else None
        self.most_px = 0  # of a picture for which there was room

    def start(self, latents: Tensor) -> list[Decoded]:
        """The pictures of latents (B,C,h,w), which the current stream may still be at work on."""
        if not self._is_beside(latents.shape[-2] * latents.shape[-1] * self.base.stride**2):
            return decode(self.base, latents)
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream(self.base.device))
        latents.record_stream(self.stream)  # their memory is not given away while they are read
        with torch.cuda.stream(self.stream):
            return decode(self.base, latents)

    def _is_beside(self, pixels: int) -> bool:
        """Whether a picture of so many pixels is decoded beside the drawing. If one was, the next are."""
        # a VAE that comes and goes would be moved while it is at work
        if self.stream is None or self.base.is_crowded or "vae" not in self.base.placed:
            return False
        if pixels > self.most_px and _has_room(self.base.device, pixels):
            self.most_px = pixels
        self.base.is_roomy = pixels <= self.most_px
        return self.base.is_roomy

    def gives_way(self) -> bool:
        """Whether pictures were decoded beside the drawing, which ends here: it wants the memory."""
        was_beside = self.base.is_roomy
        self.close()
        self.stream = None
        return was_beside

    def close(self) -> None:
        """Gives back the memory that only the stream could use; a card is waited for."""
        self.base.is_roomy = False
        self.base.place(*self.base.placed)
