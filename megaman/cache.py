"""Latents and text embeddings, made once.

A picture or caption that occurs twice is encoded once: the key is the content.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaman.base import BaseModel
from megaman.errors import NUMBERS, UserError


@dataclass(frozen=True)
class Encoded:
    """What training needs of N pictures and captions, all on the training device.

    means, stds (P,C,h,w) float32: the VAE's posterior, already scaled; text (T,L,D): hidden states, row 0 of
    the empty caption; picture_rows, text_rows (N,): where each example's are; class_rows (N,K): where its
    captions are that name something else instead of the character.
    """

    means: Tensor
    stds: Tensor
    text: Tensor
    picture_rows: Tensor
    text_rows: Tensor
    class_rows: Tensor

    def __len__(self) -> int:
        return len(self.picture_rows)


@torch.no_grad()
def encode(
    pictures: Iterable[Tensor],
    captions: Sequence[str],
    base: BaseModel,
    class_captions: Sequence[Sequence[str]] = (),
) -> Encoded:
    """Runs the VAE and the text encoder over everything. pictures: (3,H,W) in [-1, 1], one at a time;
    class_captions: K lists of as many captions.

    UserError (exit 5) on a non-finite latent.
    """
    device = base.unet.device

    def posterior(picture: Tensor) -> tuple[Tensor, Tensor]:
        latent = base.vae.encode(picture[None].to(base.vae.device, torch.float32)).latent_dist
        return latent.mean[0] * base.vae.config.scaling_factor, latent.std[0] * base.vae.config.scaling_factor

    latents, picture_rows = _each_once(
        pictures, posterior, lambda picture: hashlib.sha256(picture.numpy().tobytes()).digest()
    )
    columns = ["", *captions, *(caption for captions in class_captions for caption in captions)]
    text, rows = _each_once(columns, lambda caption: base.embed([caption])[0], str)
    means, stds = (torch.stack(part).to(device) for part in zip(*latents, strict=True))
    bad = [
        i
        for i, row in enumerate(picture_rows)
        if not (means[row].isfinite().all() and stds[row].isfinite().all())
    ]
    if bad:
        raise UserError(
            f"the VAE makes non-finite latents of picture {bad[0] + 1} ({captions[bad[0]]!r}); remove it "
            "or use another base model",
            NUMBERS,
        )
    text_rows = torch.tensor(rows[1:]).view(1 + len(class_captions), len(captions)).T
    return Encoded(
        means,
        stds,
        torch.stack(text).to(device),
        torch.tensor(picture_rows),
        text_rows[:, 0],
        text_rows[:, 1:],
    )


def _each_once(
    items: Iterable[Any], encoder: Callable[[Any], Any], key_of: Callable[[Any], Hashable]
) -> tuple[list[Any], list[int]]:
    """The encodings of the distinct items, and for every item the row of its own."""
    rows: dict[Hashable, int] = {}
    encodings: list[Any] = []
    order: list[int] = []
    for item in items:
        key = key_of(item)
        if key not in rows:
            rows[key] = len(encodings)
            encodings.append(encoder(item))
        order.append(rows[key])
    return encodings, order
