"""Prompts and captions as the UNet reads them: their tokens in chunks, as the web UIs cut them, and what the
text encoders make of these.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from megaman.common.kinds import Kind
from megaman.model.prompt_syntax import BREAK, Piece, weights_of

COMMA = ",</w>"  # in CLIP's table
BACKTRACK = 20  # tokens at a full chunk's end among which a comma ends it: A1111's comma_padding_backtrack
SHOWN = 60  # characters of a text that a line repeats
Token = tuple[int, float]  # its id, and what it weighs


@dataclass(frozen=True, eq=False)
class Text:
    """N texts as a UNet reads them. L is 77 tokens a chunk."""

    states: Tensor  # (N,L,D)
    pooled: Tensor | None = None  # (N,P), of kinds whose UNet also reads the whole text as one vector

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | list[int] | Tensor) -> "Text":
        return Text(self.states[rows], None if self.pooled is None else self.pooled[rows])

    @property
    def device(self) -> torch.device:
        """Where the states lie."""
        return self.states.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the states."""
        return self.states.dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Text":
        """The same on a device, in a precision: this one's, if none is given."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Text(self.states.to(device, dtype), pooled)

    def detach(self) -> "Text":
        """The same, of which no gradient reaches the encoders."""
        return Text(self.states.detach(), None if self.pooled is None else self.pooled.detach())

    def expand(self, count: int) -> "Text":
        """One text as so many equal ones, without copying it."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return Text(self.states.expand(count, -1, -1), pooled)

    @staticmethod
    def cat(texts: Sequence["Text"]) -> "Text":
        """All of them in one, in their order. Their L must be equal (at_least of ids_of sees to that)."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return Text(torch.cat([text.states for text in texts]), torch.cat(pooled) if pooled else None)


# ---------------------------------------------------------------- tokens
def chunks_of(tokenizer: CLIPTokenizer, text: str, most: int) -> list[list[int]]:
    """The ids of a text without beginning and end, in chunks of the 75 that CLIP reads at a time. A text that
    goes on behind a full chunk is cut after the last comma among that chunk's last 20 tokens, as A1111 does,
    but not where a comma follows.

    most: chunks that are kept; of 1 there is no comma to look for. An empty text is one empty chunk.
    """
    return [[token for token, _ in chunk] for chunk in _chunks_of(tokenizer, [(text, 1.0)], most)]


def ids_of(tokenizer: CLIPTokenizer, texts: Sequence[str], most: int, at_least: int = 1) -> Tensor:
    """What the text encoders are given: (N,C,77) int64, each chunk with its beginning and end, padded with
    the tokenizer's own pad. C is that of the longest text, from at_least to most; shorter ones end in empty
    chunks.
    """
    chunks = [_chunks_of(tokenizer, [(text, 1.0)], most) for text in texts]
    return _filled(tokenizer, chunks, at_least)[0]


def weighted_ids_of(
    tokenizer: CLIPTokenizer, texts: Sequence[str], most: int, at_least: int = 1
) -> tuple[Tensor, Tensor]:
    """What the text encoders are given of prompts in A1111's syntax: ids as of ids_of, and what each token
    weighs, (N,C,77) float32; 1 for beginnings, ends and pads. BREAK begins a new chunk. Pieces of different
    weights are tokenised apart, as there.
    """
    chunks = [_chunks_of(tokenizer, weights_of(text), most) for text in texts]
    return _filled(tokenizer, chunks, at_least)


def notes_on_length(
    tokenizer: CLIPTokenizer, texts: Iterable[str], most: int, *, weights_are_read: bool = False
) -> list[str]:
    """A line for each distinct text whose end the text encoders do not read, for it needs more chunks than
    most.
    """
    notes = []
    for text in dict.fromkeys(texts):
        pieces = weights_of(text) if weights_are_read else [(text, 1.0)]
        count, read = (sum(map(len, _chunks_of(tokenizer, pieces, chunks))) for chunks in (sys.maxsize, most))
        if count > read:
            notes.append(f"note: a prompt of {count} tokens is cut after {read}: {text[:SHOWN]!r}…")
    return notes


def _chunks_of(tokenizer: CLIPTokenizer, pieces: Sequence[Piece], most: int) -> list[list[Token]]:
    """The tokens of a text's pieces, with their weights, in at most so many chunks."""
    stretches: list[list[Token]] = [[]]
    for words, weight in pieces:
        if (words, weight) == BREAK:
            stretches.append([])
            continue
        tokens = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
        stretches[-1] += [(token, weight) for token in tokens]
    if len(stretches) > 1 and not stretches[-1]:  # a BREAK at the end begins nothing
        stretches.pop()
    size = tokenizer.model_max_length - 2
    comma = tokenizer.convert_tokens_to_ids(COMMA) if most > 1 else None
    chunks = [chunk for stretch in stretches for chunk in _cut(stretch, size, comma)]
    return chunks[:most]


def _cut(tokens: Sequence[Token], size: int, comma: int | None) -> list[list[Token]]:
    """The tokens in chunks of this size or, where a comma ends them, up to 20 less."""
    chunks = []
    rest = list(tokens)
    while len(rest) > size:
        end = size
        if rest[size][0] != comma:
            ends = [i + 1 for i in range(max(0, size - BACKTRACK), size) if rest[i][0] == comma]
            end = max(ends, default=size)
        chunks.append(rest[:end])
        rest = rest[end:]
    return [*chunks, rest]


def _filled(
    tokenizer: CLIPTokenizer, texts: Sequence[Sequence[Sequence[Token]]], at_least: int
) -> tuple[Tensor, Tensor]:
    """The chunks of all texts as one tensor of ids and one of weights, (N,C,77)."""
    shape = (len(texts), max([at_least, *map(len, texts)]), tokenizer.model_max_length)
    ids = torch.full(shape, tokenizer.pad_token_id)
    weights = torch.ones(shape)
    end_id = tokenizer.eos_token_id
    ids[..., 0] = tokenizer.bos_token_id
    ids[..., 1] = end_id
    for row, chunks in enumerate(texts):
        for place, chunk in enumerate(chunks):
            end = len(chunk) + 1
            ids[row, place, 1 : end + 1] = torch.tensor([*(token for token, _ in chunk), end_id])
            weights[row, place, 1:end] = torch.tensor([weight for _, weight in chunk])
    return ids, weights


def padded_as(ids: Tensor, end_id: int, pad_id: int) -> Tensor:
    """The same ids with another pad: behind the first end in the last axis everything is pad_id. OpenCLIP
    pads with 0, "!" within a word; a tokenizer that holds it for a special token cuts "wow!" otherwise.
    """
    ends = ids == end_id
    is_behind = ends.cumsum(-1) - ends.long() > 0
    return torch.where(is_behind, pad_id, ids)


# ---------------------------------------------------------------- states
def read(ids: Tensor, encoders: Mapping[str, nn.Module], kind: Kind, tokenizer: CLIPTokenizer) -> Text:
    """The text that a kind's encoders, by their parts' names, make of ids (N,C,77), with gradients and in the
    encoders' own precision. The chunks follow one another along the tokens, (N,C*77,D); the encoders' states
    stand side by side in D; pooled is the first chunk's.
    """
    states = []
    pooled = None
    for encoder in kind.encoders:
        module = encoders[encoder.part]
        own = ids.to(next(module.parameters()).device)
        if encoder.pads_with is not None:
            pad_id = tokenizer.convert_tokens_to_ids(encoder.pads_with)
            own = padded_as(own, tokenizer.eos_token_id, pad_id)
        out = module(own.flatten(0, 1), output_hidden_states=encoder.layer != -1)
        layer = out.last_hidden_state if encoder.layer == -1 else out.hidden_states[encoder.layer]
        states.append(layer.unflatten(0, ids.shape[:2]).flatten(1, 2))
        if encoder.has_pooled:
            pooled = out.text_embeds.unflatten(0, ids.shape[:2])[:, 0]
    return Text(torch.cat(states, -1) if len(states) > 1 else states[0], pooled)


def widths_of(encoders: Mapping[str, CLIPTextModel], kind: Kind) -> list[int]:
    """How wide the encoders' states are that `read` puts side by side."""
    return [encoders[encoder.part].config.hidden_size for encoder in kind.encoders]


def weighted(text: Text, weights: Tensor, widths: Sequence[int] | None = None) -> Text:
    """The text with each token's state times its weight, (N,C,77), and then the mean of each chunk brought
    back to what it was; pooled as it is. widths: widths_of the encoders, for each one's states have a mean of
    their own; D alone, if not given.

    A1111 takes the mean over all prompts of a batch; of each text's chunk it does not depend on a picture's
    neighbours. A chunk whose weights are all 1 stays to the bit.
    """
    if bool((weights == 1).all()):
        return text
    chunks = text.states.unflatten(1, weights.shape[1:]).float()
    factors = weights.to(text.device, torch.float32).unsqueeze(-1)
    parts = [
        _with_its_mean(part * factors, part) for part in chunks.split(list(widths or chunks.shape[-1:]), -1)
    ]
    return replace(text, states=torch.cat(parts, -1).flatten(1, 2).to(text.dtype))


def _with_its_mean(changed: Tensor, original: Tensor) -> Tensor:
    """The changed states (N,C,77,D) times what makes each chunk's mean the original's; as they are where no
    factor does.
    """
    factor = original.mean((-2, -1), keepdim=True) / changed.mean((-2, -1), keepdim=True)
    return changed * torch.where(factor.isfinite(), factor, 1.0)
