"""Attention of few tokens on a CPU in bfloat16: whole products and one softmax, which torch's kernel cuts up.

torch's fused kernel keeps no matrix of weights, which pays where there are thousands of tokens. Of a few
hundred, and of a text's 77, the matrix is small, and making it whole takes half to two thirds of the time,
forward and backward (tests/bench/bench_attention.py).
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

MOST_WEIGHTS = 1024 * 77  # of a head, up to which it is faster; in bfloat16, of float32 at no size


class SmallAttention(AttnProcessor2_0):
    """diffusers' processor, which hands what is small and plain to `attended`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor:
        """(B,N,C) -> (B,N,C)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        weights = hidden_states.shape[1] * context.shape[1]
        is_small = hidden_states.dtype == torch.bfloat16 and weights <= MOST_WEIGHTS
        if not is_small or hidden_states.ndim != 3 or attention_mask is not None or rest or options:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, *rest, **options
            )
        made = attended(attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context), attn.heads)
        return attn.to_out[1](attn.to_out[0](made))


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """What each of N tokens takes from M others, (B,N,C), of query (B,N,C), key and value (B,M,C)."""
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    query = query * query.shape[-1] ** -0.5
    weights = torch.matmul(query, key.transpose(-1, -2)).softmax(-1)  # (B,heads,N,M)
    return torch.matmul(weights, value).transpose(1, 2).flatten(2)


def attend_small(unet: UNet2DConditionModel) -> None:
    """Lets a UNet's layers that use torch's attention, and nothing beside it, compute so."""
    for layer in unet.modules():
        if isinstance(layer, Attention) and _is_plain(layer):
            layer.set_processor(SmallAttention())


def _is_plain(layer: Attention) -> bool:
    """Whether a layer is what Stable Diffusion's are: projections and attention."""
    beside = (layer.spatial_norm, layer.group_norm, layer.norm_q, layer.norm_k, layer.norm_cross)
    is_usual = type(layer.processor) is AttnProcessor2_0 and all(each is None for each in beside)
    return is_usual and not layer.residual_connection and layer.rescale_output_factor == 1
