"""Attention in bfloat16 on a CPU, as a few large products instead of torch's many small ones.

torch's fused kernel multiplies tile by tile, which leaves much of AMD's CPUs unused. Here as many scores are
made at a time as a cache holds, in float32, and multiplied on by oneDNN: half of the time there and back for
a text or 256 tokens, seven tenths for 1,024 and more (`tests/bench/bench_attention.py`).
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from megaman.kernels import products

SCORES_AT_ONCE = 2**20  # 4 MiB of float32
# attended to, up to which weights are kept for the way back: a text's take 33 MB a picture of 1.5 at 512 px,
# 250 MB of XL at 1024 px. Those of more are made again: a fifth of the time, where 1.5 would keep 1.3 GB
KEPT_TOKENS = 256


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What N tokens take from M others: query (B,H,N,D), key and value (B,H,M,D) -> (B,H,N,D), bfloat16."""
    joined = [each.flatten(0, 1).contiguous() for each in (query, key, value)]
    return _Attention.apply(*joined).unflatten(0, query.shape[:2])


class _Attention(torch.autograd.Function):
    """Of heads of all pictures, (A,N,D) and (A,M,D) twice -> (A,N,D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keeps its inputs and, of few tokens, the weights."""
        made = torch.empty_like(query)
        keeps = any(ctx.needs_input_grad) and key.shape[1] <= KEPT_TOKENS
        kept = query.new_empty((*query.shape[:2], key.shape[1])) if keeps else None
        raised = _raised(query, key)
        for heads, rows in _parts(query, key):
            weights = _weights(raised, heads, rows)
            made[heads, rows] = torch.bmm(weights, value[heads])
            if kept is not None:
                kept[heads, rows] = weights
        ctx.save_for_backward(query, key, value, kept)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """To query, and to key and value, which are added up in float32."""
        query, key, value, kept = ctx.saved_tensors
        grad = grad.contiguous()
        raised = None if kept is not None else _raised(query, key)
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros_like(each, dtype=torch.float32) for each in (key, value))
        for heads, rows in _parts(query, key):
            weights = kept[heads, rows] if raised is None else _weights(raised, heads, rows)
            given = grad[heads, rows]
            to_value[heads] += torch.bmm(weights.transpose(1, 2), given)
            to_weights = torch.bmm(given, value[heads].transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_query[heads, rows] = _scaled(to_scores, key[heads])
            to_key[heads] += _scaled(to_scores.transpose(1, 2), query[heads, rows])
        return to_query, to_key.to(grad.dtype), to_value.to(grad.dtype)


def _scale(query: Tensor) -> float:
    return query.shape[-1] ** -0.5


def _scaled(to_scores: Tensor, given: Tensor) -> Tensor:
    """What scores hand on, rounded once: (G,N,M), (G,M,D) -> (G,N,D)."""
    return torch.baddbmm(given.new_empty(1), to_scores, given, beta=0, alpha=_scale(given))


def _raised(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, in which their products are scores."""
    return query.float() * _scale(query), key.float()


def _weights(raised: tuple[Tensor, Tensor], heads: slice, rows: slice) -> Tensor:
    """How much some tokens of some heads take from each other: (G,R,M) bfloat16, by the scores' softmax."""
    query, key = raised[0][heads, rows], raised[1][heads]
    if _at_once(*raised) == 1:
        scores = products.matmul(query[0], key[0].t())[None]
    else:  # also of a last one by itself: a head's digits do not depend on its neighbours
        scores = torch.bmm(query, key.transpose(1, 2))
    return torch.softmax(scores, -1).bfloat16()


def _at_once(query: Tensor, key: Tensor) -> int:
    """How many heads are computed at a time."""
    return max(1, SCORES_AT_ONCE // (query.shape[1] * key.shape[1]))


def _parts(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which heads and which of their tokens are computed at a time."""
    heads, tokens, _ = query.shape
    at_once = _at_once(query, key)
    rows = tokens if at_once > 1 else max(1, SCORES_AT_ONCE // key.shape[1])
    for head in range(0, heads, at_once):
        for row in range(0, tokens, rows):
            yield slice(head, head + at_once), slice(row, row + rows)


# ---------------------------------------------------------------- layers


class FewProducts(AttnProcessor2_0):
    """diffusers' processor of attention, which computes what is plain by `attend`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B,N,C) -> (B,N,C)."""
        is_plain = hidden_states.ndim == 3 and hidden_states.dtype == torch.bfloat16
        if not is_plain or attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        by_head = [each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in projected]
        made = attend(*by_head).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](made))


def take_over(unet: nn.Module) -> None:
    """Makes a UNet's attention compute so, where this CPU gains by it and torch's attention is used: for a
    UNet in bfloat16 that computes on the CPU.
    """
    if not (products.has_bfloat16() and products.prefers_onednn() and _is_right()):
        return
    for layer in unet.modules():
        if isinstance(layer, Attention) and _is_plain(layer):
            layer.set_processor(FewProducts())


@cache
def _is_right() -> bool:
    """Whether it computes what torch does, here: a way back is made of a private operator, which may go."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn((1, 2, 8, 8), generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    try:
        made, expected = (way(*given).sum() for way in (attend, scaled_dot_product_attention))
        gradients = [torch.autograd.grad(each, given) for each in (made, expected)]
    except (RuntimeError, AttributeError, TypeError):
        return False
    pairs = zip(*gradients, strict=True)
    return all(torch.allclose(ours, theirs, rtol=0, atol=0.05) for ours, theirs in pairs)


def _is_plain(layer: Attention) -> bool:
    """Whether a layer is what Stable Diffusion's are: projections and attention."""
    beside = (layer.spatial_norm, layer.group_norm, layer.norm_q, layer.norm_k, layer.norm_cross)
    is_usual = type(layer.processor) is AttnProcessor2_0 and all(each is None for each in beside)
    return is_usual and not layer.residual_connection and layer.rescale_output_factor == 1
