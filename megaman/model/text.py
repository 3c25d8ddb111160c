"""TEMPORARY: helper's file will replace it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    states: Tensor
    pooled: Tensor | None = None

    def __len__(self):
        return len(self.states)

    def __getitem__(self, rows):
        return Text(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, device, dtype=None):
        return Text(
            self.states.to(device, dtype), None if self.pooled is None else self.pooled.to(device, dtype)
        )

    def expand(self, count):
        return Text(
            self.states.expand(count, -1, -1), None if self.pooled is None else self.pooled.expand(count, -1)
        )

    @staticmethod
    def cat(texts):
        return Text(
            torch.cat([t.states for t in texts]),
            None if texts[0].pooled is None else torch.cat([t.pooled for t in texts]),
        )


def ids_of(tokenizer, texts, most, at_least=1):
    ids = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids[:, None]


def padded_as(ids, end, pad):
    is_end = ids == end
    behind = (is_end.cumsum(-1) - is_end.long()) > 0
    return ids.masked_fill(behind, pad)


def read(ids, encoders, kind, tokenizer):
    n, c, l = ids.shape
    states, pooled = [], None
    for e in kind.encoders:
        model = encoders[e.part]
        own = (
            ids
            if e.pads_with is None
            else padded_as(ids, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(e.pads_with))
        )
        out = model(own.reshape(n * c, l).to(model.device), output_hidden_states=e.layer != -1)
        s = out.last_hidden_state if e.layer == -1 else out.hidden_states[e.layer]
        states.append(s.reshape(n, c * l, -1))
        if e.has_pooled:
            pooled = out.text_embeds.reshape(n, c, -1)[:, 0]
    return Text(torch.cat(states, -1) if len(states) > 1 else states[0], pooled)


def notes_on_length(tokenizer, texts, most):
    return []
