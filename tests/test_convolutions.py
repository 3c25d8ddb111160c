"""Convolutions of few cells as products: torch's numbers, without a second copy of a weight."""

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from test_fused import adapted, apart, changed, farthest, inputs_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

import generate_megaman
import megaman_lora
from megaman.common.kinds import SD1, UNET
from megaman.config.generate import GenerateConfig
from megaman.config.train import EMBEDDED, TrainConfig
from megaman.kernels import convolutions, onednn, products
from megaman.kernels.convolutions import FrozenConv2d, is_product, take_over
from megaman.kernels.onednn import LaidOutConv2d, lay_out
from megaman.lora.adapter import Adapter
from megaman.lora.fused import fuse, layers_read
from megaman.lora.injection import adapter_of
from megaman.lora.merge import MergedAdapter
from megaman.model import int8
from megaman.model.int8 import Int8Conv2d, store_in_int8
from megaman.model.stable_diffusion import StableDiffusion

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)
ONE_STEP = ((1, 1), (1, 1))  # a convolution's stride and padding


@pytest.fixture
def small_too(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Lets small weights be products, whatever the CPU; what each product's convolution was given."""
    given: list[torch.Size] = []
    real = convolutions._around

    def noted(padded: Tensor, *others: Sequence[int]) -> list[Tensor]:
        given.append(padded.shape)
        return real(padded, *others)

    monkeypatch.setattr(convolutions, "SMALLEST_WEIGHT", 0)
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    monkeypatch.setattr(convolutions, "_around", noted)
    return given


def frozen(layer: nn.Conv2d, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    """A layer as a UNet's that computes on a CPU."""
    return layer.requires_grad_(False).to(dtype, memory_format=torch.channels_last)


def there_and_back(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer makes of x, and the gradient to x of a sum that weighs each number otherwise."""
    x = x.detach().requires_grad_()
    made = layer(x)
    weights = torch.linspace(-1, 1, made.numel(), dtype=made.dtype).reshape(made.shape)
    return made.detach(), torch.autograd.grad((made * weights).sum(), x)[0]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(32, 48, 3, padding=1), (1, 32, 4, 4)),
        (nn.Conv2d(32, 48, 3, padding=1), (2, 32, 5, 7)),
        (nn.Conv2d(32, 48, 3, padding=1), (1, 32, 1, 2)),
        (nn.Conv2d(32, 48, 3, padding=1, bias=False), (3, 32, 4, 4)),
        (nn.Conv2d(32, 48, 3, padding=1, stride=2), (1, 32, 8, 8)),
        (nn.Conv2d(32, 48, 3, padding=0, stride=2), (2, 32, 9, 6)),
        (nn.Conv2d(32, 48, (3, 5), padding=(1, 2), stride=(2, 3)), (1, 32, 8, 11)),
        (nn.Conv2d(32, 48, 1), (2, 32, 6, 6)),
    ],
    ids=lambda each: str(each).replace(" ", ""),
)
@pytest.mark.parametrize("lies", [torch.contiguous_format, torch.channels_last], ids=str)
def test_products_and_gradients_are_torchs(
    layer: nn.Conv2d, shape: tuple[int, ...], lies: torch.memory_format, small_too: list[torch.Size]
) -> None:
    layer = frozen(deepcopy(layer))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=lies)
    expected = there_and_back(layer, x)
    take_over(layer)
    made = there_and_back(layer, x)
    assert type(layer) is FrozenConv2d
    assert len(small_too) == 2
    for one, other in zip(expected, made, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        assert other.is_contiguous(memory_format=torch.channels_last)


def test_in_half_precision_they_are_as_near_to_the_truth_as_torchs(small_too: list[torch.Size]) -> None:
    layer = frozen(nn.Conv2d(256, 128, 3, padding=1), torch.bfloat16)
    x = torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    true = there_and_back(deepcopy(layer).double(), x.double())
    expected = there_and_back(layer, x)
    take_over(layer)
    made = there_and_back(layer, x)
    assert len(small_too) == 2
    for exact, torchs, ours in zip(true, expected, made, strict=True):
        assert ours.dtype == torch.bfloat16
        assert apart(exact, ours) < 1.01 * apart(exact, torchs) < 0.01  # one rounding


def test_nothing_of_the_input_is_kept_and_there_is_no_second_gradient(small_too: list[torch.Size]) -> None:
    layer = frozen(nn.Conv2d(32, 48, 3, padding=1))
    take_over(layer)
    kept: list[Tensor] = []
    x = torch.randn(1, 32, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        made = layer(x)
    assert [each.data_ptr() for each in kept] == [layer.weight.data_ptr()]
    first = torch.autograd.grad(made.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):  # instead of a second gradient of nothing
        torch.autograd.grad(first.sum(), x)
    layer(x).add_(1).sum().backward()  # it may be changed in place, as torch's own
    assert len(small_too) == 4


# ---------------------------------------------------------------- which


def weight_of(channels: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Of a convolution with so many channels in and out."""
    return torch.empty((channels, channels, 3, 3), dtype=dtype, device=device).contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize(
    ("shape", "weight", "expected"),
    [
        ((1, 640, 8, 8), weight_of(640, torch.bfloat16), True),
        ((2, 640, 8, 8), weight_of(640, torch.bfloat16), True),
        ((3, 640, 8, 8), weight_of(640, torch.bfloat16), False),  # too many cells
        ((1, 640, 16, 16), weight_of(640, torch.float32), True),
        ((1, 640, 16, 17), weight_of(640, torch.float32), False),
        ((0, 640, 8, 8), weight_of(640, torch.bfloat16), False),
        ((1, 320, 8, 8), weight_of(320, torch.bfloat16), False),  # too small a weight
        ((1, 640, 8, 8), weight_of(640, torch.float16), False),
        ((1, 640, 8, 8), weight_of(640, torch.bfloat16).contiguous(), False),  # in torch's order
        ((1, 640, 8, 8), weight_of(640, torch.bfloat16, "meta"), False),
    ],
)
def test_sizes_decide(
    shape: tuple[int, ...], weight: Tensor, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    assert is_product(shape, weight, ONE_STEP) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_onednn", [torch.float32, torch.bfloat16], ids=str)
def test_a_precision_that_this_cpu_does_not_leave_to_onednn_stays_torchs(
    dtype: torch.dtype, by_onednn: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: by_onednn == torch.float32)
    monkeypatch.setattr(products, "has_bfloat16", lambda: by_onednn == torch.bfloat16)
    assert is_product((1, 640, 8, 8), weight_of(640, dtype), ONE_STEP) == (dtype == by_onednn)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_product((1, 640, 8, 8), weight_of(640, dtype), ONE_STEP)


def test_the_cells_that_come_out_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    weight = weight_of(640, torch.bfloat16)
    assert not is_product((1, 640, 16, 16), weight, ONE_STEP)
    assert is_product((1, 640, 16, 16), weight, ((2, 2), (1, 1)))


@pytest.mark.usefixtures("small_too")
def test_only_frozen_convolutions_of_the_usual_form_are_taken_over() -> None:
    bias_in_training = nn.Conv2d(8, 8, 3, padding=1)
    bias_in_training.weight.requires_grad_(False)
    others = [
        nn.Conv2d(8, 8, 3, padding=1),  # in training
        nn.Conv2d(8, 8, 1, padding=1).requires_grad_(False),
        bias_in_training,
        nn.Conv2d(8, 8, 3, padding="same").requires_grad_(False),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular").requires_grad_(False),
        nn.Conv2d(8, 8, 3, groups=2).requires_grad_(False),
        nn.Conv2d(8, 8, 3, dilation=2).requires_grad_(False),
        nn.Conv2d(8, 8, 3).requires_grad_(False).half(),
    ]
    usual = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    take_over(nn.ModuleList(others))
    assert all(each.weight.is_contiguous() for each in others)
    take_over(nn.ModuleList([*others, usual]))
    assert {type(each) for each in others} == {nn.Conv2d}
    assert type(usual) is FrozenConv2d


# ---------------------------------------------------------------- in models


@pytest.mark.parametrize("targets", ["attention", "conv"])
def test_a_unet_with_a_lora_predicts_and_learns_the_same(
    targets: str, tiny_base: StableDiffusion, small_too: list[torch.Size]
) -> None:
    plain = adapted(tiny_base.unet, TrainConfig(lora_rank=4, lora_targets=targets))
    fast = changed(plain, fuse, take_over)
    assert farthest(plain, fast) < 1e-5
    taken = [each for each in fast.modules() if isinstance(each, FrozenConv2d) and each.kernel_size == (3, 3)]
    assert len(small_too) > 1.8 * len(taken) > 20  # there and, but for the first ones, back


def test_products_in_float32_take_the_operator_of_true_sizes(
    small_too: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[torch.Size, torch.Size]] = []
    real = products.by_onednn

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given.append((x.shape, weight.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(products, "by_onednn", noted)
    layer = frozen(nn.Conv2d(256, 192, 3, padding=1))
    x = torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = there_and_back(layer, x)
    take_over(layer)
    for one, other in zip(expected, there_and_back(layer, x), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    assert given == [((192, 9 * 256), (64, 9 * 256)), ((64, 9 * 192), (256, 9 * 192))]
    assert len(small_too) == 2


def test_a_merged_adapter_changes_them_and_leaves_them_as_they_were(
    tiny_base: StableDiffusion, small_too: list[torch.Size]
) -> None:
    trained = adapted(tiny_base.unet, TrainConfig(lora_rank=4, lora_targets="conv"))
    adapter = adapter_of({UNET: trained}, SD1)
    plain, fast = deepcopy(tiny_base.unet), deepcopy(tiny_base.unet)
    take_over(fast)
    inputs, _ = inputs_of(plain)
    before = fast(*inputs).sample
    merged = [MergedAdapter(adapter, {UNET: unet}, SD1) for unet in (plain, fast)]
    for each in merged:
        each.set_scale(1.0)
    changed = fast(*inputs).sample
    assert apart(plain(*inputs).sample, changed) < 1e-5
    assert apart(before, changed) > 1e-3
    merged[1].set_scale(0)
    assert torch.equal(fast(*inputs).sample, before)
    assert small_too


def test_a_product_gets_no_second_copy_until_it_has_more_cells(
    tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch, small_too: list[torch.Size]
) -> None:
    for name in ("LEAST_GAIN", "LEAST_WORTH"):
        monkeypatch.setattr(onednn, name, -1e9)
    inputs, _ = inputs_of(tiny_base.unet)  # two examples, 8 x 8
    for most, expected in ((128, 0), (127, 1)):
        monkeypatch.setattr(convolutions, "MOST_CELLS", {torch.float32: most})
        monkeypatch.setattr(onednn, "_GAINS", {})
        unet = deepcopy(tiny_base.unet)
        take_over(unet)
        lay_out(unet, lambda unet=unet: unet(*inputs), layers_read(unet))
        laid_out = [each for each in unet.modules() if isinstance(each, LaidOutConv2d)]
        assert (len(laid_out) > 0) == expected
        small_too.clear()
        made = unet(*inputs).sample
        assert small_too
        assert apart(tiny_base.unet(*inputs).sample, made) < 1e-5


def test_fewer_cells_than_a_layout_was_made_for_give_the_same_bits_with_and_without_it(
    monkeypatch: pytest.MonkeyPatch, small_too: list[torch.Size]
) -> None:
    for name in ("LEAST_GAIN", "LEAST_WORTH"):  # which a clock decides
        monkeypatch.setattr(onednn, name, -1e9)
    for name in ("_GAINS", "_PROOFS"):
        monkeypatch.setattr(onednn, name, {})
    monkeypatch.setattr(convolutions, "MOST_CELLS", {torch.float32: 127})
    x = torch.randn(2, 512, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, product, laid_out = (nn.Sequential(frozen(nn.Conv2d(512, 256, 3, padding=1))) for _ in range(3))
    for model in (product, laid_out):
        model.load_state_dict(plain.state_dict())
        take_over(model)
    assert lay_out(laid_out, lambda: laid_out(x)) == 1
    small_too.clear()
    torchs, expected = there_and_back(plain, x[:1]), there_and_back(product, x[:1])
    assert len(small_too) == 2
    assert not any(torch.equal(one, other) for one, other in zip(torchs, expected, strict=True))
    for _ in range(2):  # when it is found out, and when it is known
        made = there_and_back(laid_out, x[:1])
        assert all(torch.equal(one, other) for one, other in zip(expected, made, strict=True))


def test_layers_of_bytes_make_products_of_their_whole_weights(
    tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch, small_too: list[torch.Size]
) -> None:
    monkeypatch.setattr(int8, "SMALLEST_LAYER", 1)
    store_in_int8(tiny_base.unet)
    layer = next(each for each in tiny_base.unet.modules() if isinstance(each, Int8Conv2d))
    x = torch.randn(1, layer.in_channels, 8, 8)
    whole = int8.whole(layer.weight, layer.factors, x.dtype)
    window = layer.stride, layer.padding
    expected = functional.conv2d(x, whole, layer.bias, *window)
    onednn.as_channels_last(tiny_base.unet)
    made, gradient = there_and_back(layer, x)
    weights = torch.linspace(-1, 1, made.numel()).reshape(made.shape)
    assert len(small_too) == 2
    first = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    true = conv2d_input(x.shape, whole, weights, *window)
    torch.testing.assert_close(gradient, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("meta", False)])
@pytest.mark.usefixtures("small_too")
def test_drawing_on_a_cpu_takes_them(device: str, expected: bool) -> None:
    where = torch.device(device)
    base = generate_megaman.load_base(EMBEDDED, Adapter({}), GenerateConfig(), where, torch.float32)
    assert any(isinstance(each, FrozenConv2d) for each in base.unet.modules()) == expected


@pytest.mark.parametrize(("flag", "expected"), [((), True), (("--use_dora", "true"), False)])
@pytest.mark.usefixtures("small_too")
def test_training_takes_them(flag: tuple[str, ...], expected: bool, train_flags: list[str]) -> None:
    run = megaman_lora.set_up(megaman_lora.read_config([*train_flags, *flag])[0])
    assert any(isinstance(each, FrozenConv2d) for each in run.base.unet.modules()) == expected
