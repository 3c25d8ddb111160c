"""Attention of few tokens in whole products: torch's numbers, and only where it is meant to be."""

from copy import deepcopy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from test_fused import adapted, apart, computed
from torch.nn.functional import scaled_dot_product_attention

from megaman.config.train import TrainConfig
from megaman.model import attention
from megaman.model.attention import SmallAttention, attend_small, attended
from megaman.model.stable_diffusion import StableDiffusion


def test_predictions_and_gradients_are_torchs(tiny_base: StableDiffusion) -> None:
    plain = adapted(tiny_base.unet.to(torch.bfloat16), TrainConfig(lora_rank=4))
    whole = deepcopy(plain)
    attend_small(whole)
    layers = [each for each in whole.modules() if isinstance(each, Attention)]
    assert all(type(each.processor) is SmallAttention for each in layers)
    exact = computed(deepcopy(plain).float())
    for true, expected, made in zip(exact, computed(plain), computed(whole), strict=True):
        assert not torch.equal(expected, made)  # it is another way
        assert apart(true, made) < max(4e-2, 1.8 * apart(true, expected))


def test_a_head_gets_what_it_attends_to() -> None:
    query, key, value = (torch.randn(3, count, 24) for count in (5, 7, 7))
    heads = [each.unflatten(-1, (4, 6)).transpose(1, 2) for each in (query, key, value)]
    expected = scaled_dot_product_attention(*heads).transpose(1, 2).reshape(3, 5, 24)
    torch.testing.assert_close(attended(query, key, value, 4), expected)


def test_many_tokens_and_masks_stay_torchs(
    tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = next(each for each in tiny_base.unet.modules() if isinstance(each, Attention))
    width = layer.to_q.in_features
    layer.to(torch.bfloat16)
    states, mask = torch.randn(1, 16, width).bfloat16(), torch.zeros(1, 16).bfloat16()
    many = torch.randn(1, 300, width).bfloat16()
    expected = [layer(states), layer(states, attention_mask=mask), layer(many)]
    attend_small(tiny_base.unet)
    used = []
    honest = attention.attended
    monkeypatch.setattr(attention, "attended", lambda *given: used.append(given) or honest(*given))
    made = [layer(states), layer(states, attention_mask=mask), layer(many)]
    assert len(used) == 1
    assert torch.equal(made[1], expected[1])
    assert torch.equal(made[2], expected[2])
    torch.testing.assert_close(made[0], expected[0], rtol=0.05, atol=0.02)
    layer.float()(states.float())
    assert len(used) == 1  # float32 stays torch's


def test_layers_with_more_than_attention_or_another_kernel_are_left(tiny_base: StableDiffusion) -> None:
    first, second, third, *_ = [each for each in tiny_base.unet.modules() if isinstance(each, Attention)]
    first.set_processor(AttnProcessor())
    second.residual_connection = True
    third.rescale_output_factor = 2.0
    attend_small(tiny_base.unet)
    assert type(first.processor) is AttnProcessor
    assert type(second.processor) is type(third.processor) is AttnProcessor2_0
