"""Encoding the dataset with the base's VAE and text encoder, each thing once."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaman.common.cache import Store, key_of
from megaman.common.console import Exit, UserError
from megaman.data.buckets import Crop
from megaman.model.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class EncodedDataset:
    """What training needs of N pictures and their captions, all on the training device.

    means, stds: the VAE's posterior of each crop, (C,h,w) float32, already scaled; text (T,L,D): hidden
    states, row 0 of the empty caption; crop_rows, text_rows, class_rows: for each of the N, the rows of its
    crops, of its caption's variants, and of its captions that name something else instead of the character.
    """

    means: list[Tensor]
    stds: list[Tensor]
    text: Tensor
    crop_rows: list[list[int]]
    text_rows: list[list[int]]
    class_rows: list[list[int]]

    def __len__(self) -> int:
        return len(self.crop_rows)

    def shape_of(self, index: int) -> torch.Size:
        """The latents' shape (C,h,w) of one of the N: the same for all its crops."""
        return self.means[self.crop_rows[index][0]].shape


def encode(
    crops: Sequence[Sequence[Crop]],
    captions: Sequence[Sequence[str]],
    base: StableDiffusion,
    store: Store,
    class_captions: Sequence[Sequence[str]] = (),
) -> EncodedDataset:
    """Encodes the pictures' crops and captions with the base's VAE and text encoder, equal ones once; reads
    what the store has.

    For each of N pictures: its crops, its caption's variants, its class captions.
    UserError (exit 5) on a non-finite latent.
    """
    device, scaling = base.unet.device, base.vae.config.scaling_factor
    vae, reader = _weights_digest(base.vae), _weights_digest(base.text_encoder)

    def latents_of(crop: Crop) -> dict[str, Tensor]:
        return store.tensors(key_of("latents", vae, crop.key), lambda: _posterior(crop, base))

    def text_of(caption: str) -> dict[str, Tensor]:
        ids = base.tokenizer(caption).input_ids
        return store.tensors(
            key_of("text", reader, ids), lambda: {"states": base.embed([caption])[0].float().cpu()}
        )

    latents, crop_rows = _each_once(crops, lambda crop: crop.key, latents_of)
    text, text_rows = _each_once([[""], *captions, *class_captions], str, text_of)
    return EncodedDataset(
        [(entry["mean"] * scaling).to(device) for entry in latents],
        [(entry["std"] * scaling).to(device) for entry in latents],
        torch.stack([entry["states"] for entry in text]).to(device, base.unet.dtype),
        crop_rows,
        text_rows[1 : 1 + len(captions)],
        text_rows[1 + len(captions) :],
    )


def _posterior(crop: Crop, base: StableDiffusion) -> dict[str, Tensor]:
    with torch.no_grad():
        latent = base.vae.encode(crop.pixels()[None].to(base.vae.device, torch.float32)).latent_dist
    made = {"mean": latent.mean[0].cpu(), "std": latent.std[0].cpu()}
    if not all(tensor.isfinite().all() for tensor in made.values()):
        raise UserError(
            f"the VAE makes non-finite latents of {crop.path}; remove it or use another base model",
            Exit.NUMBERS,
        )
    return made


def _weights_digest(module: Any) -> str:
    """Of every bit that decides what a model of diffusers or transformers computes: weights, precision,
    config.
    """
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    fixed = {name: value for name, value in config.items() if name[0] != "_" and "version" not in name}
    total = hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(raw.numpy())
    return total.hexdigest()


def _each_once(
    groups: Iterable[Iterable[Any]], key: Callable[[Any], str], encoder: Callable[[Any], Any]
) -> tuple[list[Any], list[list[int]]]:
    """Encodes each distinct item once; also returns, per group, the row of each item."""
    rows: dict[str, int] = {}
    encodings: list[Any] = []
    order: list[list[int]] = []
    for group in groups:
        order.append([])
        for item in group:
            if key(item) not in rows:
                rows[key(item)] = len(encodings)
                encodings.append(encoder(item))
            order[-1].append(rows[key(item)])
    return encodings, order
