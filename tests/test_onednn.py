"""Weights laid out once for a CPU: the same bits as torch's own layers, or torch's own layers."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from test_fused import adapted, computed, inputs_of
from torch import Tensor, nn

from megaman.common.kinds import SD1, XL, Kind
from megaman.config.train import TrainConfig
from megaman.kernels import heap, onednn, products
from megaman.kernels.onednn import LaidOutConv2d, LaidOutLinear, lay_out
from megaman.lora.fused import fuse, layers_read
from megaman.model import footprint
from megaman.model.stable_diffusion import StableDiffusion, load_base

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)
KINDS_OF_LAYERS = (LaidOutConv2d, LaidOutLinear)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lays out whatever gives the same bits, however long it takes."""
    monkeypatch.setattr(onednn, "LEAST_GAIN", -1e9)
    monkeypatch.setattr(onednn, "LEAST_WORTH", -1e9)
    monkeypatch.setattr(onednn, "_GAINS", {})
    monkeypatch.setattr(onednn, "_PROOFS", {})
    yield


def laid_out_in(unet: nn.Module) -> list[Any]:
    """The layers whose weights were laid out."""
    return [module for module in unet.modules() if isinstance(module, KINDS_OF_LAYERS)]


def run_once(unet: nn.Module) -> Callable[[], object]:
    """A pass through a UNet."""
    inputs, added = inputs_of(unet)
    return lambda: unet(*inputs, added_cond_kwargs=added)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", onednn.PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", [SD1, XL], ids=lambda kind: kind.folder)
def test_predictions_and_gradients_are_torchs_to_the_bit(
    kind: Kind, dtype: torch.dtype, tiny_folders: Callable[[Kind], Path]
) -> None:
    base = load_base(str(tiny_folders(kind)), device=torch.device("cpu"), dtype=dtype)
    plain = adapted(base.unet, TrainConfig(lora_rank=4, lora_targets="linear"), kind)
    plain.to(memory_format=torch.channels_last)
    fuse(plain)
    fast = deepcopy(plain)
    count = lay_out(fast, run_once(fast), layers_read(fast))
    assert count == len(laid_out_in(fast)) > 10
    assert all(torch.equal(one, other) for one, other in zip(computed(plain), computed(fast), strict=True))


@pytest.mark.usefixtures("always")
def test_other_sizes_and_batches_give_torchs_bits_too(tiny_base: StableDiffusion) -> None:
    plain = tiny_base.unet.to(memory_format=torch.channels_last)
    fast = deepcopy(plain)
    assert lay_out(fast, run_once(fast)) > 10
    for batch, side in ((1, 8), (3, 8), (1, 12), (2, 16)):
        latents = torch.randn(batch, 4, side, side, requires_grad=True)
        states = torch.randn(batch, 77, plain.config.cross_attention_dim)
        results = []
        for unet in (plain, fast):
            made = unet(latents, 500, states).sample
            results.append((made, *torch.autograd.grad(made.sum(), latents)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)), (batch, side)


@pytest.mark.usefixtures("always")
def test_the_memory_that_is_told_counts_both_layouts(
    tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "kind_of_width", lambda _: SD1)
    plain = footprint.estimate_of(tiny_base, [], TrainConfig(), 1)
    lay_out(tiny_base.unet, run_once(tiny_base.unet))
    given_up = [each.layouts.onward for each in laid_out_in(tiny_base.unet)]
    size = sum(each.numel() * each.element_size() for each in given_up)
    fast = footprint.estimate_of(tiny_base, [], TrainConfig(), 1)
    assert size > 10_000
    assert (fast.base - plain.base) * 2**30 == pytest.approx(size)
    assert fast.in_bytes == pytest.approx(plain.in_bytes)
    assert plain.in_bytes == pytest.approx(plain.base / 4)  # of float32


@pytest.mark.usefixtures("always")
def test_there_is_no_second_gradient() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    x = torch.randn(8, 32, requires_grad=True)
    assert lay_out(model, lambda: model(x)) == 1
    first = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):  # instead of one of nothing
        torch.autograd.grad(first.sum(), x)


@pytest.mark.usefixtures("always")
def test_torchs_copy_is_given_up_and_comes_back_at_a_look(tiny_base: StableDiffusion) -> None:
    weights = {name: each.clone() for name, each in tiny_base.unet.named_parameters()}
    lay_out(tiny_base.unet, run_once(tiny_base.unet))
    left = dict(tiny_base.unet.named_parameters())
    gone = [
        f"{name}.weight"
        for name, each in tiny_base.unet.named_modules()
        if each in laid_out_in(tiny_base.unet)
    ]
    assert gone
    assert left.keys() == weights.keys() - set(gone)
    for name in gone:
        layer = tiny_base.unet.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.weight, weights[name])
        with pytest.raises((AttributeError, KeyError, TypeError)):
            layer.weight = nn.Parameter(weights[name])


@pytest.mark.usefixtures("always")
def test_layers_of_other_bits_or_in_use_elsewhere_stay_torchs(
    tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = tiny_base.unet
    twin = deepcopy(unet)
    lay_out(twin, run_once(twin))
    name = next(name for name, layer in twin.named_modules() if isinstance(layer, LaidOutLinear))
    kept = unet.mid_block.resnets[0].conv1
    real = onednn._conv
    monkeypatch.setattr(onednn, "_GAINS", {})
    monkeypatch.setattr(onednn, "_conv", lambda *args: real(*args) + 1e-6)
    lay_out(unet, run_once(unet), keep=[unet.get_submodule(name)])
    assert type(unet.get_submodule(name)) is nn.Linear
    assert type(kept) is nn.Conv2d
    assert not any(isinstance(each, LaidOutConv2d) for each in laid_out_in(unet))
    assert laid_out_in(unet)


@pytest.mark.parametrize("missing", ["_linear_layout", "by_onednn", "_conv", "_conv_layout"])
def test_without_the_private_operators_all_stays_as_it_is(
    missing: str, tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = deepcopy(tiny_base.unet).to(memory_format=torch.channels_last)

    def gone(*_: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")

    monkeypatch.setattr(products if missing == "by_onednn" else onednn, missing, gone)
    monkeypatch.setattr(onednn, "_GAINS", {})
    lay_out(tiny_base.unet, run_once(tiny_base.unet))
    inputs, _ = inputs_of(before)
    assert torch.equal(tiny_base.unet(*inputs).sample, before(*inputs).sample)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("free", "processes"), [(0, 1), (100_000, 1), (400_000, 1), (400_000, 4)])
def test_second_copies_take_half_of_the_free_memory_and_the_best_come_first(
    free: int, processes: int, tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = tiny_base.unet
    layers = [each for each in unet.modules() if onednn.can_be_laid_out(each)]
    sizes = {layer: layer.weight.nbytes for layer in layers}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(onednn, "_gain", lambda layer, _: float(sizes[layer]))
    given_back: list[int] = []
    monkeypatch.setattr(heap, "give_back", lambda: given_back.append(1))
    count = lay_out(unet, run_once(unet), processes=processes)
    taken = laid_out_in(unet)
    assert count == len(taken) == len(given_back)
    share = free / 2 / processes
    left = [sizes[layer] for layer in layers if layer not in taken]
    assert 0 <= share - sum(sizes[layer] for layer in taken) < min(left)
    fitting = [size for size in sizes.values() if size <= share]
    assert not fitting or max(sizes[layer] for layer in taken) == max(fitting)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("which", "most"), [("LEAST_GAIN", 1.0), ("LEAST_WORTH", 1e12)])
def test_nothing_slower_or_hardly_faster_for_its_memory_is_laid_out(
    which: str, most: float, tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, which, most)
    assert lay_out(tiny_base.unet, run_once(tiny_base.unet)) == 0


def test_the_same_numbers_lying_in_another_order_are_not_the_same() -> None:
    x = torch.arange(16.0).reshape(1, 2, 2, 4)
    assert onednn._is_same(x, x.clone())
    assert not onednn._is_same(x, x.contiguous(memory_format=torch.channels_last))


def test_a_layer_in_training_is_left_to_torch() -> None:
    layer = nn.Linear(32, 32)
    assert not onednn.can_be_laid_out(layer)
    assert onednn.can_be_laid_out(layer.requires_grad_(False))


def test_a_gain_is_told_in_seconds_for_each_gib_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([3.0, 2.0, 1.0, 1.0])  # torch's ways there and back, then the faster ones
    monkeypatch.setattr(onednn, "_timed", lambda compute: (next(seconds), compute()))
    monkeypatch.setattr(onednn, "_is_same", lambda *_: True)
    monkeypatch.setattr(onednn, "_GAINS", {})
    layer = nn.Linear(64, 64).requires_grad_(False)
    assert onednn._gain(layer, torch.Size((8, 64))) == pytest.approx(3 / (64 * 64 * 4 / 2**30))
