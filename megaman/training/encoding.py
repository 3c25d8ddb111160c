"""Encoding the dataset with the base's VAE and text encoder, each thing once."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaman.common.cache import Store, key_of
from megaman.common.console import Exit, UserError
from megaman.data.buckets import Crop
from megaman.model.stable_diffusion import StableDiffusion
from megaman.model.text import Text

CHUNKS = "chunks of 75 tokens that are read of captions"  # one of a run's origins


@dataclass(frozen=True)
class EncodedDataset:
    """What training needs of N pictures and their captions, all on the training device.

    means, stds: the VAE's posterior of each crop, (C,h,w) float32, already scaled; sizes (V,6) float32: what
    each crop's picture measures, see Crop; text: T captions as the base reads them, row 0 the empty one; ids
    (T,C,77): their tokens, in chunks, on the CPU; crop_rows, text_rows, class_rows: for each of the N, the
    rows of its crops, of its caption's variants, and of its captions that name something else instead of the
    character.
    """

    means: list[Tensor]
    stds: list[Tensor]
    sizes: Tensor
    text: Text
    ids: Tensor
    crop_rows: list[list[int]]
    text_rows: list[list[int]]
    class_rows: list[list[int]]

    def __len__(self) -> int:
        return len(self.crop_rows)

    @property
    def device(self) -> torch.device:
        """Where everything but the ids lies."""
        return self.sizes.device

    @property
    def origins(self) -> dict[str, Any]:
        """What a resume must find unchanged beside the pictures: None where it is as it always was."""
        chunks = self.ids.shape[1]
        return {CHUNKS: chunks if chunks > 1 else None}

    def kept_for(self, trains_text: bool) -> "EncodedDataset":
        """The same; where captions are read anew in each step, what was encoded of them waits on the CPU."""
        return replace(self, text=self.text.to("cpu")) if trains_text else self

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
    """Encodes the pictures' crops and captions with the base's VAE and text encoders, equal ones once, first
    the captions; reads what the store has.

    For each of N pictures: its crops, its caption's variants, its class captions.
    UserError (exit 5) on a non-finite latent.
    """
    all_texts, text_rows = _each_once([[""], *captions, *class_captions], str)
    ids = base.ids_of(all_texts)
    text = _encoded_texts(all_texts, ids.shape[1], base, store)
    views, crop_rows = _each_once(crops, lambda crop: crop.key)
    vae = _weights_digest(base.vae)
    scaling = base.vae.config.scaling_factor
    latents = [
        store.tensors(key_of("latents", vae, crop.key), partial(_posterior, crop, base)) for crop in views
    ]
    return EncodedDataset(
        [(entry["mean"] * scaling).to(base.device) for entry in latents],
        [(entry["std"] * scaling).to(base.device) for entry in latents],
        torch.tensor([crop.sizes for crop in views], dtype=torch.float32, device=base.device),
        text,
        ids,
        crop_rows,
        text_rows[1 : 1 + len(captions)],
        text_rows[1 + len(captions) :],
    )


def _encoded_texts(texts: Sequence[str], chunks: int, base: StableDiffusion, store: Store) -> Text:
    """The texts as the base reads them, each in its own number of chunks, filled up with empty ones."""
    digests = [_weights_digest(encoder) for encoder in base.encoders.values()]
    rows = []
    for text in texts:
        own = base.ids_of([text])
        key = key_of("text", *digests, own.tolist())
        rows.append(store.tensors(key, partial(_read, text, base)))
    empty = rows[0]["states"]  # of one chunk
    states = [
        torch.cat([row["states"], *[empty] * (chunks - len(row["states"]) // len(empty))]) for row in rows
    ]
    pooled = torch.stack([row["pooled"] for row in rows]) if "pooled" in rows[0] else None
    return Text(torch.stack(states), pooled).to(base.device, base.unet.dtype)


def _read(caption: str, base: StableDiffusion) -> dict[str, Tensor]:
    """One text's, float32 on the CPU: states (L,D), pooled (P,) where the base reads it."""
    base.place(*base.encoders)
    text = base.embed([caption])
    pooled = {} if text.pooled is None else {"pooled": text.pooled[0].float().cpu()}
    return {"states": text.states[0].float().cpu(), **pooled}


class CaptionReader:
    """How captions are read while it trains: as they were encoded, or anew by encoders in training."""

    def __init__(self, encoded: EncodedDataset, base: StableDiffusion, trained_until: int) -> None:
        """trained_until: the step (counted from 0) from which on the encoders stay as they are; 0: they never
        learn.
        """
        self.encoded, self.base = encoded, base
        self.trained_until = trained_until
        self.settled: Text | None = None if trained_until else encoded.text

    def for_step(self, step: int, rows: list[int]) -> Text:
        """Captions for a step: with gradients as long as the encoders learn, from then on read once."""
        if self.settled is None and step >= self.trained_until:
            for encoder in self.base.encoders.values():
                encoder.eval()  # what is read once is read without dropout
            self.settled = Text.cat([self.base.embed_ids(ids[None]) for ids in self.encoded.ids])
        return self.now(rows) if self.settled is None else self.settled[rows]

    def now(self, rows: list[int]) -> Text:
        """Captions as the encoders read them at this moment."""
        if not self.trained_until:
            return self.encoded.text[rows]
        return self.base.read(self.encoded.ids[rows])


def _posterior(crop: Crop, base: StableDiffusion) -> dict[str, Tensor]:
    base.place("vae")
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
    groups: Iterable[Iterable[Any]], key: Callable[[Any], str]
) -> tuple[list[Any], list[list[int]]]:
    """Each distinct item once; and, per group, the row of each item among these."""
    rows: dict[str, int] = {}
    items: list[Any] = []
    order: list[list[int]] = []
    for group in groups:
        order.append([])
        for item in group:
            if key(item) not in rows:
                rows[key(item)] = len(items)
                items.append(item)
            order[-1].append(rows[key(item)])
    return items, order
