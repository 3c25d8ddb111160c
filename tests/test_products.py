"""Products of float32 matrices by the faster library: the same numbers, and the same one every time."""

import platform
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_fused import adapted, apart, changed, farthest, inputs_of
from torch import Tensor, nn

import generate_megaman
import megaman_lora
from megaman.config.generate import GenerateConfig
from megaman.config.train import EMBEDDED, TrainConfig
from megaman.kernels import products
from megaman.kernels.products import FrozenLinear, prefers_onednn, take_over
from megaman.lora.adapter import Adapter
from megaman.lora.fused import fuse
from megaman.lora.injection import lora_modules
from megaman.model.stable_diffusion import StableDiffusion

INTEL, AMD = "vendor_id : GenuineIntel", "vendor_id : AuthenticAMD"
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Lets oneDNN multiply whatever the CPU; the sizes of what it was given."""
    given: list[torch.Size] = []
    real = products.by_onednn

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given.append(x.shape)
        return real(x, weight, bias)

    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "by_onednn", noted)
    return given


def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products too."""
    monkeypatch.setattr(products, "SMALLEST_RESULT", 0)
    monkeypatch.setattr(products, "SMALLEST_WORK", 0)


@needs_onednn
def test_a_bias_that_lies_scattered_is_read_right(by_onednn: list[torch.Size]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(300, 200), torch.randn(120, 200), torch.randn(240)[::2]
    torch.testing.assert_close(products.linear(x, weight, bias), x @ weight.t() + bias, rtol=1e-5, atol=1e-4)
    assert by_onednn


@needs_onednn
def test_products_are_torchs_to_rounding_however_the_matrices_lie(by_onednn: list[torch.Size]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(300, 200), torch.randn(120, 200), torch.randn(120)
    grad = torch.randn(300, 120)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(products.linear(x, weight, bias), x @ weight.t() + bias, **close)
    torch.testing.assert_close(products.linear(x, weight), x @ weight.t(), **close)
    torch.testing.assert_close(products.matmul(grad, weight), grad @ weight, **close)
    torch.testing.assert_close(products.matmul(grad.t(), x), grad.t() @ x, **close)
    assert by_onednn == [(300, 200), (300, 200), (300, 120), (120, 300)]


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(4000, 40), torch.ones(2, 40)),  # few numbers come out
        (torch.ones(300, 8), torch.ones(300, 8)),  # little work
        (torch.ones(300, 200).bfloat16(), torch.ones(120, 200).bfloat16()),
        (torch.ones(300, 200, device="meta"), torch.ones(120, 200, device="meta")),
    ],
    ids=["narrow", "small", "bfloat16", "elsewhere"],
)
def test_small_products_and_other_precisions_are_torchs_own(
    x: Tensor, weight: Tensor, by_onednn: list[torch.Size]
) -> None:
    assert products.linear(x, weight).shape == products.matmul(x, weight.t()).shape == (len(x), len(weight))
    assert not by_onednn


@needs_onednn
@pytest.mark.parametrize(
    ("capability", "processor", "has_mkl", "expected"),
    [
        ("AVX512", AMD, True, True),
        ("AVX512", AMD, False, False),
        ("AVX512", INTEL, True, False),
        ("AVX2", AMD, True, False),
        ("DEFAULT", "", True, False),
    ],
)
def test_the_cpu_decides(
    capability: str, processor: str, has_mkl: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(products, "_processor", lambda: processor)
    assert prefers_onednn.__wrapped__() == expected


@pytest.mark.parametrize("how", ["gone", "wrong"])
def test_an_operator_that_is_gone_or_multiplies_wrong_is_not_used(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def operator(x: Tensor, weight: Tensor, _: None) -> Tensor:
        if how == "gone":
            raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")
        return x @ weight

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products, "_processor", lambda: AMD)
    monkeypatch.setattr(products, "by_onednn", operator)
    assert not prefers_onednn.__wrapped__()


@pytest.mark.parametrize("operator", [None, lambda: False, lambda: True], ids=["gone", "no", "yes"])
def test_bfloat16_is_onednns_where_it_says_so(
    operator: Callable[[], bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {} if operator is None else {"_is_mkldnn_bf16_supported": operator}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**kept))
    assert products.has_bfloat16.__wrapped__() == (operator is not None and operator())


def test_the_maker_is_known_without_linux_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    windows = "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD"
    monkeypatch.setattr(platform, "processor", lambda: windows)
    monkeypatch.setattr(products, "Path", lambda _: tmp_path / "not there")
    assert products._processor() == windows


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_frozen_layer_and_its_gradient_are_torchs(has_bias: bool, by_onednn: list[torch.Size]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(200, 160, bias=has_bias).requires_grad_(False)
    x = torch.randn(2, 100, 200, requires_grad=True)
    expected = layer(x)
    gradient = torch.autograd.grad(expected.square().sum(), x)[0]
    take_over(layer)
    made = layer(x)
    assert type(layer) is FrozenLinear
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(made.square().sum(), x)[0], gradient, rtol=1e-4, atol=1e-4)
    assert by_onednn == [(200, 200), (200, 160)]
    assert not layer(x.detach()).requires_grad
    assert layer(torch.zeros(0, 5, 200)).shape == (0, 5, 160)
    first = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):  # instead of a second gradient of nothing
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("prefers", [True, False])
def test_only_frozen_float32_layers_are_taken_over_and_only_where_it_gains(
    prefers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: prefers)
    frozen, trained, half = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4), nn.Linear(4, 4).half()
    take_over(nn.ModuleList([frozen, trained, half.requires_grad_(False)]))
    assert type(frozen) is (FrozenLinear if prefers else nn.Linear)
    assert type(trained) is type(half) is nn.Linear


@needs_onednn
@pytest.mark.parametrize(
    ("rows", "rank", "expected"),
    [
        (600, 64, [(600, 200), (600, 160), (160, 600)]),  # within the weight: forward, to x, of the weight
        (600, 4, [(600, 200), (600, 160)]),  # whose factors' gradients are small products
        (80, 4, [(80, 200), (80, 160)]),  # beside the weight
    ],
    ids=["all of it", "few ranks", "few rows"],
)
def test_a_lora_layers_large_products_are_onednns(
    rows: int, rank: int, expected: list[tuple[int, int]], by_onednn: list[torch.Size]
) -> None:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"to_q": nn.Linear(200, 160)}).requires_grad_(False)
    wrapped = get_peft_model(layer, LoraConfig(r=rank, target_modules=["to_q"]))
    (module,) = lora_modules(wrapped).values()
    fuse(wrapped)
    take_over(wrapped)
    module(torch.randn(rows, 200, requires_grad=True)).square().sum().backward()
    assert [size for size in by_onednn if min(size) > rank] == expected


@needs_onednn
@pytest.mark.parametrize("targets", ["attention", "linear", "conv"])
def test_a_unet_with_a_lora_predicts_and_learns_the_same(
    targets: str, tiny_base: StableDiffusion, by_onednn: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything(monkeypatch)
    plain = adapted(tiny_base.unet, TrainConfig(lora_rank=4, lora_targets=targets))
    assert farthest(plain, changed(plain, fuse, take_over)) < 1e-5
    assert len(by_onednn) > 50


@needs_onednn
@pytest.mark.parametrize(("device", "expected"), [("cpu", FrozenLinear), ("meta", nn.Linear)])
def test_drawing_on_a_cpu_takes_them(
    device: str, expected: type, by_onednn: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = torch.device(device)
    base = generate_megaman.load_base(EMBEDDED, Adapter({}), GenerateConfig(), where, torch.float32)
    attention = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    assert type(attention.to_q) is expected
    if device == "cpu":
        inputs, _ = inputs_of(base.unet)
        before = deepcopy(base.unet)
        for module in before.modules():
            if type(module) is FrozenLinear:
                module.__class__ = nn.Linear
        everything(monkeypatch)
        with torch.no_grad():
            assert apart(before(*inputs).sample, base.unet(*inputs).sample) < 1e-5
        assert by_onednn


@needs_onednn
def test_training_takes_them(by_onednn: list[torch.Size], train_flags: list[str]) -> None:
    run = megaman_lora.set_up(megaman_lora.read_config(train_flags)[0])
    attention = run.base.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    assert type(attention.attn1.to_q.base_layer) is type(attention.ff.net[2]) is FrozenLinear
    assert not by_onednn  # whose tiny products are too small
