"""Attention in few products: torch's numbers, a part at a time, and only where it is meant to be."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from test_fused import adapted, apart, changed, computed, inputs_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import generate_megaman
import megaman_lora
from megaman.common.kinds import SD1
from megaman.config.generate import GenerateConfig
from megaman.config.train import EMBEDDED, TrainConfig
from megaman.kernels import attention, products
from megaman.kernels.attention import FewProducts, attend, take_over
from megaman.lora.adapter import Adapter
from megaman.lora.fused import fuse
from megaman.model.read_once import text_read_once
from megaman.model.recompute import recompute
from megaman.model.stable_diffusion import StableDiffusion


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[slice, slice]]:
    """Lets any CPU compute so; which heads and tokens were computed together."""
    noted: list[tuple[slice, slice]] = []
    real = attention._weights

    def weights(raised: tuple[Tensor, Tensor], *part: slice) -> Tensor:
        noted.append(part)
        return real(raised, *part)

    assert attention._is_right()  # tried once, and not noted
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    monkeypatch.setattr(attention, "_weights", weights)
    return noted


def heads_of(pictures: int, heads: int, tokens: int, others: int, width: int) -> list[Tensor]:
    """Query, key and value as diffusers splits them, of scores that tell tokens apart."""
    generator = torch.Generator().manual_seed(tokens)
    made = []
    for count, size in ((tokens, 2.0), (others, 1.5), (others, 1.0)):
        flat = size * torch.randn((pictures, count, heads * width), generator=generator)
        made.append(flat.bfloat16().unflatten(-1, (heads, width)).transpose(1, 2))
    return made


def there_and_back(way: object, inputs: list[Tensor]) -> list[Tensor]:
    """What a way makes, and the gradients to all inputs of a sum that weighs each number otherwise."""
    inputs = [each.detach().requires_grad_() for each in inputs]
    made = way(*inputs)
    weights = torch.linspace(-1, 1, made.numel(), dtype=made.dtype).reshape(made.shape)
    return [made.detach(), *torch.autograd.grad((made * weights).sum(), inputs)]


@pytest.mark.parametrize(
    ("shape", "at_once", "computed_in"),
    [
        ((1, 8, 64, 77, 40), 2**20, 1),
        ((2, 3, 16, 16, 24), 2**20, 1),
        ((2, 3, 16, 16, 24), 4 * 16 * 16, 2),  # four heads, then two
        ((1, 2, 40, 40, 16), 40 * 40, 2),  # one after the other
        ((2, 2, 40, 77, 16), 16 * 77, 4 * 3),  # sixteen tokens of one, the last time eight
        ((1, 2, 3, 5, 16), 2, 2 * 3),
        ((1, 2, 30, 300, 16), 2**20, 1),  # weights that are made again on the way back
        ((1, 2, 30, 300, 16), 7 * 300, 2 * 5),
        ((1, 1, 640, 40, 16), 4 * 40, 160),  # of which the gradients are added up
    ],
    ids=str,
)
def test_what_is_attended_to_and_the_gradients_are_torchs(
    parts: list, shape: tuple[int, ...], at_once: int, computed_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    inputs = heads_of(*shape)
    exact = there_and_back(scaled_dot_product_attention, [each.double() for each in inputs])
    expected = there_and_back(scaled_dot_product_attention, inputs)
    made = there_and_back(attend, inputs)
    assert len(parts) == computed_in * (1 if shape[3] <= attention.KEPT_TOKENS else 2)
    for true, theirs, ours in zip(exact, expected, made, strict=True):
        assert (ours.dtype, ours.shape) == (torch.bfloat16, theirs.shape)
        assert apart(true, ours) < max(6e-3, 1.5 * apart(true, theirs))


class Made(TorchDispatchMode):
    """The shapes of all that is made inside of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: object = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.shapes.append(tuple(made.shape))
        return made


def test_weights_are_kept_only_for_a_way_back(parts: list) -> None:
    inputs = heads_of(1, 2, 16, 18, 8)
    with Made() as made:
        attend(*inputs)
    assert made.shapes == []
    with Made() as made:
        attend(*[each.requires_grad_() for each in inputs])
    assert made.shapes == [(2, 16, 18)]


def test_no_second_gradient_goes_through(parts: list) -> None:
    inputs = [each.requires_grad_() for each in heads_of(1, 2, 4, 4, 8)]
    (gradient,) = torch.autograd.grad(attend(*inputs).float().square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_unets_predictions_and_gradients_are_torchs(parts: list, tiny_base: StableDiffusion) -> None:
    plain = adapted(tiny_base.unet.to(torch.bfloat16), TrainConfig(lora_rank=4), SD1)
    ours = changed(plain, take_over)
    layers = [each for each in ours.modules() if isinstance(each, Attention)]
    assert layers
    assert all(type(each.processor) is FewProducts for each in layers)
    exact = computed(changed(plain, lambda unet: unet.float()))
    for true, expected, made in zip(exact, computed(plain), computed(ours), strict=True):
        assert not torch.equal(expected, made)  # it is another way
        assert apart(true, made) < max(4e-2, 1.8 * apart(true, expected))


def test_what_is_recomputed_or_read_once_is_the_same(parts: list, tiny_base: StableDiffusion) -> None:
    unet = changed(adapted(tiny_base.unet.to(torch.bfloat16), TrainConfig(lora_rank=4), SD1), fuse, take_over)
    plain = computed(unet)
    recompute(unet, "all")
    before = len(parts)
    again = computed(unet)
    assert len(parts) - before == 2 * before  # once more on the way back
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    inputs, added = inputs_of(unet)
    with torch.no_grad(), text_read_once(unet):
        one, other = (unet(*inputs, added_cond_kwargs=added, return_dict=False)[0] for _ in range(2))
    assert torch.equal(one, plain[0].to(one.dtype))
    assert torch.equal(one, other)


def test_a_heads_digits_do_not_depend_on_its_neighbours(parts: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 3 * 128 * 160)
    inputs = heads_of(1, 4, 128, 160, 40)
    assert torch.equal(attend(*inputs)[:, 3], attend(*[each[:, 2:] for each in inputs])[:, 1])


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, TypeError])
def test_what_torch_has_no_more_is_left_to_it(
    parts: list, error: type[Exception], tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(torch, "_softmax_backward_data", gone)
    attention._is_right.cache_clear()
    take_over(tiny_base.unet)
    attention._is_right.cache_clear()
    assert type(next(each for each in tiny_base.unet.modules() if isinstance(each, Attention)).processor) is (
        AttnProcessor2_0
    )


def test_masks_and_float32_stay_torchs(parts: list, tiny_base: StableDiffusion) -> None:
    layer = next(each for each in tiny_base.unet.modules() if isinstance(each, Attention))
    layer.to(torch.bfloat16)
    states, mask = torch.randn(1, 16, layer.to_q.in_features).bfloat16(), torch.zeros(1, 16).bfloat16()
    expected = [layer(states), layer(states, attention_mask=mask)]
    take_over(tiny_base.unet)
    made = [layer(states), layer(states, attention_mask=mask)]
    assert len(parts) == 1
    assert torch.equal(made[1], expected[1])
    torch.testing.assert_close(made[0], expected[0], rtol=0.05, atol=0.02)
    layer.float()(states.float())
    assert len(parts) == 1


@pytest.mark.parametrize("norm", ["spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross"])
def test_layers_that_normalise_are_left(parts: list, norm: str, tiny_base: StableDiffusion) -> None:
    layer = next(each for each in tiny_base.unet.modules() if isinstance(each, Attention))
    setattr(layer, norm, torch.nn.Identity())
    take_over(tiny_base.unet)
    assert type(layer.processor) is AttnProcessor2_0


def test_layers_with_more_than_attention_or_another_kernel_are_left(
    parts: list, tiny_base: StableDiffusion
) -> None:
    first, second, third, *_ = [each for each in tiny_base.unet.modules() if isinstance(each, Attention)]
    first.set_processor(AttnProcessor())
    second.residual_connection = True
    third.rescale_output_factor = 2.0
    take_over(tiny_base.unet)
    assert type(first.processor) is AttnProcessor
    assert type(second.processor) is type(third.processor) is AttnProcessor2_0


@pytest.mark.parametrize("missing", ["prefers_onednn", "has_bfloat16"])
def test_other_processors_keep_torchs(
    parts: list, missing: str, tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, missing, lambda: False)
    take_over(tiny_base.unet)
    processors = {type(each.processor) for each in tiny_base.unet.modules() if isinstance(each, Attention)}
    assert processors == {AttnProcessor2_0}


@pytest.mark.parametrize(("kernels", "is_ours"), [("auto", True), ("sdpa", False)])
def test_training_computes_so_unless_torchs_is_asked_for(
    parts: list, kernels: str, is_ours: bool, train_flags: list[str]
) -> None:
    flags = ["--mixed_precision", "bf16", "--max_train_steps", "1", "--attention", kernels]
    megaman_lora.train(megaman_lora.read_config([*train_flags, *flags])[0])
    assert bool(parts) == is_ours


def test_drawing_computes_so(parts: list) -> None:
    settings = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    base = generate_megaman.load_base(EMBEDDED, Adapter({}), GenerateConfig(), *settings.values())
    processors = {type(each.processor) for each in base.unet.modules() if isinstance(each, Attention)}
    assert processors == {FewProducts}
