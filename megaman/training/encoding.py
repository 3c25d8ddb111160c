"""Encoding the dataset with the base's VAE and text encoder, each thing once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from megaman.common.cache import Store, key_of
from megaman.common.console import Exit, UserError
from megaman.data.buckets import Crop
from megaman.model.compute import failing_together, said_by_all
from megaman.model.memory import BatchLimit
from megaman.model.stable_diffusion import StableDiffusion
from megaman.model.text import Text
from megaman.model.weights import remembered_digest

BATCH_PX = 2**20  # encoded at a time on a card, which must hold a picture of 1024 x 1024 anyway
BATCH_TEXTS = 32
Entry = dict[str, Tensor]  # of the store
CHUNKS = "chunks of 75 tokens that are read of captions"  # one of a run's origins
SIDES = "left and right in captions of mirrored pictures"  # another


@dataclass(frozen=True)
class EncodedDataset:
    """What training needs of N pictures and their captions, all on the training device.

    means, stds: the VAE's posterior of each crop, (C,h,w) float32, already scaled; sizes (V,6) float32: what
    each crop's picture measures, see Crop; text: T captions as the base reads them, row 0 the empty one; ids
    (T,C,77): their tokens, in chunks, on the CPU; crop_rows, text_rows, class_rows: for each of the N, the
    rows of its crops, of its caption's variants, and of its captions that name something else instead of the
    character; masks: how much each cell of a crop counts, (1,h,w) float32, 1 in the mean, and 0 all over
    where nothing does; None where no picture has a mask; mirrored: the rows of the mirrored crops, and
    of_mirrored: of each caption that names a side, its row and the row of what it says of such a crop.
    """

    means: list[Tensor]
    stds: list[Tensor]
    sizes: Tensor
    text: Text
    ids: Tensor
    crop_rows: list[list[int]]
    text_rows: list[list[int]]
    class_rows: list[list[int]]
    masks: list[Tensor] | None = None
    mirrored: frozenset[int] = frozenset()
    of_mirrored: Mapping[int, int] = field(default_factory=dict)

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
        return {
            CHUNKS: chunks if chunks > 1 else None,
            SIDES: "change places" if self.of_mirrored else None,
        }

    def told_of(self, crop_row: int, text_row: int) -> int:
        """The row of what a caption says of a crop: another one's, if that is mirrored and the caption names
        a side.
        """
        return self.of_mirrored.get(text_row, text_row) if crop_row in self.mirrored else text_row

    def kept_for(self, trains_text: bool) -> "EncodedDataset":
        """The same; where captions are read anew in each step, what was encoded of them waits on the CPU."""
        return replace(self, text=self.text.to("cpu")) if trains_text else self

    def shape_of(self, index: int) -> torch.Size:
        """The latents' shape (C,h,w) of one of the N: the same for all its crops."""
        return self.means[self.crop_rows[index][0]].shape


@dataclass(frozen=True)
class Captions:
    """What is said of N pictures: the wordings of each one's caption, and its captions that name something
    else instead of the character. mirrored: what a text says of the mirrored picture.
    """

    wordings: Sequence[Sequence[str]]
    of_classes: Sequence[Sequence[str]] = ()
    mirrored: Callable[[str], str] = str


def encode(
    crops: Sequence[Sequence[Crop]],
    captions: Captions,
    base: StableDiffusion,
    store: Store,
    accelerator: Accelerator | None = None,
) -> EncodedDataset:
    """Encodes the pictures' crops and captions with the base's VAE and text encoders, equal ones once, first
    the captions; reads what the store has. The processes of an accelerator share the work.

    crops: of each of N pictures.
    UserError (exit 5) on a non-finite latent, (exit 6) where memory is too small for one picture.
    """
    views, crop_rows = _each_once(crops, lambda crop: crop.key)
    mirrored_views = frozenset(row for row, crop in enumerate(views) if crop.is_mirrored)
    said = [[""], *captions.wordings, *captions.of_classes]
    said_of_mirrored = [map(captions.mirrored, group) for group in said] if mirrored_views else []
    all_texts, rows = _each_once([*said, *said_of_mirrored], str)
    text_rows, rows_of_mirrored = rows[: len(said)], rows[len(said) :]
    pairs = zip(chain(*text_rows), chain(*rows_of_mirrored), strict=False)  # none, where none is mirrored
    ids = base.ids_of(all_texts)
    texts = _text_batches(all_texts, base, store)
    pictures = _picture_batches(views, base, store)
    found = _entries(texts, pictures, store, accelerator)
    latents = _in_order(pictures, found)
    scaling = base.vae.config.scaling_factor
    return EncodedDataset(
        [(entry["mean"] * scaling).to(base.device) for entry in latents],
        [(entry["std"] * scaling).to(base.device) for entry in latents],
        torch.tensor([crop.sizes for crop in views], dtype=torch.float32, device=base.device),
        _text_of(_in_order(texts, found), ids.shape[1], base),
        ids,
        crop_rows,
        text_rows[1 : 1 + len(captions.wordings)],
        text_rows[1 + len(captions.wordings) :],
        _masks_of(latents, base.device),
        mirrored_views,
        {row: other for row, other in pairs if other != row},
    )


def _masks_of(entries: Sequence[Entry], device: torch.device) -> list[Tensor] | None:
    """How much each cell counts: a picture of which little counts teaches as much as any other, so that the
    losses keep their size. Of less than one cell it teaches less, down to nothing.
    """
    if not any("mask" in entry for entry in entries):
        return None
    masks = [entry.get("mask", torch.ones_like(entry["mean"][:1])) for entry in entries]
    return [(mask * (mask.numel() / mask.sum().clamp(min=1))).to(device) for mask in masks]


def _text_of(entries: Sequence[Entry], chunks: int, base: StableDiffusion) -> Text:
    """The texts as the base reads them, each in its own number of chunks, filled up with empty ones."""
    empty = entries[0]["states"]  # of one chunk
    states = [
        torch.cat([entry["states"], *[empty] * (chunks - len(entry["states"]) // len(empty))])
        for entry in entries
    ]
    pooled = torch.stack([entry["pooled"] for entry in entries]) if "pooled" in entries[0] else None
    return Text(torch.stack(states), pooled).to(base.device, base.unet.dtype)


# ---------------------------------------------------------------- batches
@dataclass(frozen=True)
class Batch:
    """Pictures of one size, or texts of one length, that are encoded together.

    A card's last digits depend on how many it computes at once. So batches are cut from all that a dataset
    holds, whatever the store has of it and whoever encodes them. On a CPU each picture, each text is alone:
    there the digits depend on it too, and several at once are no faster.
    """

    rows: Sequence[int]  # of its members, among all
    keys: Sequence[str]
    encode: Callable[[], list[Entry]]

    def entries(self, store: Store, *, is_counted: bool) -> dict[str, Entry]:
        """What is kept of each, by its key. All are encoded if the store lacks one."""
        made = cache(self.encode)

        def member(place: int) -> Entry:
            return made()[place]

        return {
            key: store.tensors(key, partial(member, place), is_counted=is_counted)
            for place, key in enumerate(self.keys)
        }


def at_once(device: torch.device, on_card: int) -> int:
    """How many of one size are encoded together. on_card: where there is a card."""
    return max(1, on_card) if device.type == "cuda" else 1


def _cut(sizes: Sequence[Any], most: Callable[[Any], int]) -> list[list[int]]:
    """The rows of equal sizes together, in their order, in parts of at most so many."""
    rows_of: dict[Any, list[int]] = {}
    for row, size in enumerate(sizes):
        rows_of.setdefault(size, []).append(row)
    parts = []
    for size, rows in rows_of.items():
        parts += [rows[start : start + most(size)] for start in range(0, len(rows), most(size))]
    return parts


def _text_batches(texts: Sequence[str], base: StableDiffusion, store: Store) -> list[Batch]:
    encoders = base.encoders.items()
    digests = [remembered_digest(encoder, part, base.origin, store) for part, encoder in encoders]
    ids = [base.ids_of([text]) for text in texts]
    keys = [key_of("text", *digests, own.tolist()) for own in ids]
    parts = _cut([own.shape[1] for own in ids], lambda _: at_once(base.device, BATCH_TEXTS))
    return [
        Batch(rows, [keys[row] for row in rows], partial(_read, [texts[row] for row in rows], base))
        for rows in parts
    ]


def _read(captions: Sequence[str], base: StableDiffusion) -> list[Entry]:
    """Of each text of a batch, float32 on the CPU: states (L,D), pooled (P,) where the base reads it."""
    base.place(*base.encoders)
    text = base.embed(captions).to("cpu", torch.float32)
    entries = [{"states": states} for states in text.states]
    if text.pooled is not None:
        entries = [entry | {"pooled": pooled} for entry, pooled in zip(entries, text.pooled, strict=True)]
    return entries


def _picture_batches(views: Sequence[Crop], base: StableDiffusion, store: Store) -> list[Batch]:
    vae = remembered_digest(base.vae, "vae", base.origin, store)
    keys = [key_of("latents", vae, crop.key) for crop in views]
    limit = BatchLimit("take a smaller --resolution. What was encoded is kept.")
    parts = _cut(
        [crop.bucket for crop in views],
        lambda size: at_once(base.device, BATCH_PX // (size.width * size.height)),
    )
    return [
        Batch(
            rows, [keys[row] for row in rows], partial(_posteriors, [views[row] for row in rows], base, limit)
        )
        for rows in parts
    ]


def _posteriors(crops: Sequence[Crop], base: StableDiffusion, limit: BatchLimit) -> list[Entry]:
    """Of each crop of a batch, float32 on the CPU: mean and std (C,h,w), and mask (1,h,w) where it has one.
    With fewer at a time where memory runs out.
    """
    base.place("vae")
    size = crops[0].bucket
    return limit.drawn(crops, partial(_encoded, base), size.width * size.height)


def _encoded(base: StableDiffusion, crops: Sequence[Crop]) -> list[Entry]:
    pixels = torch.stack([crop.pixels() for crop in crops])
    with torch.no_grad():
        latent = base.vae.encode(pixels.to(base.vae.device, torch.float32)).latent_dist
    means, stds = latent.mean.cpu(), latent.std.cpu()
    for crop, *tensors in zip(crops, means, stds, strict=True):
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UserError(
                f"the VAE makes non-finite latents of {crop.path}; remove it or use another base model",
                Exit.NUMBERS,
            )
    masks = [crop.counting((means.shape[2], means.shape[3])) for crop in crops]
    return [
        {"mean": mean, "std": std} | ({} if mask is None else {"mask": mask})
        for mean, std, mask in zip(means, stds, masks, strict=True)
    ]


def _entries(
    texts: Sequence[Batch], pictures: Sequence[Batch], store: Store, accelerator: Accelerator | None
) -> dict[str, Entry]:
    """What is kept of all, by key. Of several processes each encodes its share and takes from the store what
    the others have put there; what they couldn't put there it encodes too.

    The store counts what all of them found, and what they missed.
    """
    rank, processes = (
        (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    )
    found: dict[str, Entry] = {}
    with failing_together(accelerator):
        for batch in (*texts[rank::processes], *pictures[rank::processes]):  # each moves parts once
            found |= batch.entries(store, is_counted=True)
    counts = said_by_all((store.hits, store.misses), accelerator)
    store.hits, store.misses = (sum(each) for each in zip(*counts, strict=True))
    for batch in (*texts, *pictures):
        if not found.keys() >= set(batch.keys):
            found |= batch.entries(store, is_counted=False)
    return found


def _in_order(batches: Sequence[Batch], found: Mapping[str, Entry]) -> list[Entry]:
    """What is kept of each, as they came before they were put into batches."""
    keys = {row: key for batch in batches for row, key in zip(batch.rows, batch.keys, strict=True)}
    return [found[keys[row]] for row in range(len(keys))]


# ---------------------------------------------------------------- captions in a step
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
