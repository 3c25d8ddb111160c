"""LoRA layers in one function: what PEFT's own layers compute, for every form that it covers."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from megaman.common.kinds import SD1, SD2, UNET, XL, Kind
from megaman.config.train import TrainConfig
from megaman.kernels import convolutions, products
from megaman.lora.fused import FusedLinear, FusedPointwise, _summed, fuse, layers_read, merges
from megaman.lora.injection import adapter_of, inject, lora_modules
from megaman.model.int8 import store_in_int8, whole
from megaman.model.stable_diffusion import StableDiffusion, load_base
from megaman.training.checkpoints import trained
from megaman.training.sampler import generator_of

SCALE = 2.0**12  # of the loss, as fp16's scaler would: its smallest numbers are lost without
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def adapted(unet: nn.Module, cfg: TrainConfig, kind: Kind = SD1) -> nn.Module:
    """A copy of a UNet with a LoRA that changes something."""
    copy = deepcopy(unet)
    inject({UNET: copy}, cfg, kind, partial(generator_of, cfg.seed))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trained({UNET: copy}).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return copy.train()


def inputs_of(unet: nn.Module, side: int = 8) -> tuple[list[Tensor], dict]:
    """What a UNet is called with: two examples."""
    generator = torch.Generator().manual_seed(2)
    config, dtype = unet.config, next(unet.parameters()).dtype
    latents = torch.randn(2, config.in_channels, side, side, generator=generator).to(dtype)
    states = torch.randn(2, 77, config.cross_attention_dim, generator=generator).to(dtype)
    inputs = [latents, torch.tensor([300, 700]), states]
    if config.addition_embed_type is None:
        return inputs, {}
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pooled = torch.randn(2, width, generator=generator).to(dtype)
    return inputs, {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}


def computed(unet: nn.Module) -> tuple[Tensor, Tensor]:
    """A UNet's prediction and all gradients of its square, as one row."""
    inputs, added = inputs_of(unet)
    parameters = [each for each in unet.parameters() if each.requires_grad]
    made = unet(*inputs, added_cond_kwargs=added, return_dict=False)[0].float()
    gradients = torch.autograd.grad(made.square().mean() * SCALE, parameters)
    assert all(each.dtype == torch.float32 for each in gradients)
    return made.detach(), torch.cat([each.flatten() for each in gradients])


def apart(one: Tensor, other: Tensor) -> float:
    """How far two tensors lie apart, of the length of the first."""
    return ((one.double() - other.double()).norm() / one.double().norm()).item()


def changed(unet: nn.Module, *changes: Callable[[nn.Module], None]) -> nn.Module:
    """A copy of a model, put through these one after the other."""
    copy = deepcopy(unet)
    for change in changes:
        change(copy)
    return copy


def farthest(plain: nn.Module, fast: nn.Module) -> float:
    """How far two UNets lie apart, in their predictions or in their gradients."""
    return max(apart(one, other) for one, other in zip(computed(plain), computed(fast), strict=True))


@pytest.mark.parametrize("targets", ["attention", "linear", "conv"])
@pytest.mark.parametrize("kind", [SD1, SD2, XL], ids=lambda kind: kind.folder)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=lambda dtype: str(dtype)[6:])
def test_predictions_and_gradients_are_pefts(
    kind: Kind, dtype: torch.dtype, targets: str, tiny_folders: Callable[[Kind], Path]
) -> None:
    base = load_base(str(tiny_folders(kind)), device=torch.device("cpu"), dtype=dtype)
    plain = adapted(base.unet, TrainConfig(lora_rank=4, lora_targets=targets), kind)
    fast = deepcopy(plain).to(memory_format=torch.channels_last)
    fuse(fast)
    kinds = {type(module) for module in lora_modules(fast).values()}
    assert FusedLinear in kinds
    has_pointwise = targets == "conv" or (targets == "linear" and kind is SD1)
    assert (FusedPointwise in kinds) == has_pointwise
    exact = computed(deepcopy(plain).float())
    for true, expected, made in zip(exact, computed(plain), computed(fast), strict=True):
        rounded = 1.8 * apart(true, expected)  # PEFT's own error, in fewer places
        assert apart(true, made) < (1e-4 if dtype == torch.float32 else max(4e-2, rounded))


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("layer", "take_over", "fused_kind", "frozen_kind"),
    [
        (nn.Linear(8, 8), products.take_over, FusedLinear, products.FrozenLinear),
        (nn.Conv2d(8, 8, 1), convolutions.take_over, FusedPointwise, convolutions.FrozenConv2d),
    ],
    ids=["linear", "convolution"],
)
def test_a_lora_of_a_layer_that_was_taken_over_is_fused(
    layer: nn.Module,
    take_over: Callable[[nn.Module], None],
    fused_kind: type,
    frozen_kind: type,
    is_before: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(convolutions, "SMALLEST_WEIGHT", 0)
    frozen = nn.ModuleDict({"to_q": deepcopy(layer)}).requires_grad_(False)
    wrapped = get_peft_model(frozen, LoraConfig(r=2, target_modules=["to_q"]))
    order = (take_over, fuse) if is_before else (fuse, take_over)
    (module,) = lora_modules(changed(wrapped, *order)).values()
    assert type(module) is fused_kind
    assert type(module.base_layer) is frozen_kind


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("width_out", [8, 640])
def test_beside_and_within_the_weight_are_one_number(rows: int, width_out: int) -> None:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"to_q": nn.Linear(32, width_out)}).requires_grad_(False)
    wrapped = get_peft_model(layer, LoraConfig(r=4, lora_alpha=12, target_modules=["to_q"]))
    (module,) = lora_modules(wrapped).values()
    nn.init.normal_(module.lora_B["default"].weight)
    x = torch.randn(rows, 32, requires_grad=True)
    weights = [x, module.lora_A["default"].weight, module.lora_B["default"].weight]
    expected = module(x)
    true = torch.autograd.grad(expected.square().sum(), weights)
    fuse(wrapped)
    made = module(x)
    assert ("_Merged" in str(made.grad_fn.next_functions)) == merges(32, width_out, rows)
    for one, other in zip(true, torch.autograd.grad(made.square().sum(), weights), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_what_it_does_not_cover_stays_pefts(settings: dict, tiny_base: StableDiffusion) -> None:
    unet = adapted(tiny_base.unet, TrainConfig(lora_rank=4, lora_targets="conv", **settings))
    before = [type(module) for module in lora_modules(unet).values()]
    fuse(unet)
    assert [type(module) for module in lora_modules(unet).values()] == before
    assert layers_read(unet) == {module.get_base_layer() for module in lora_modules(unet).values()}


def test_switched_off_it_is_the_base_to_the_bit_and_saved_it_is_pefts(tiny_base: StableDiffusion) -> None:
    unet = adapted(tiny_base.unet, TrainConfig(lora_rank=4, lora_targets="linear"))
    before = adapter_of({UNET: unet}, SD1)
    inputs, _ = inputs_of(unet)
    fuse(unet)
    after = adapter_of({UNET: unet}, SD1)
    assert after.digest == before.digest
    unet.disable_adapters()
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, tiny_base.unet.train()(*inputs).sample)


def test_a_base_of_bytes_is_read_whole_again_in_both_directions(tiny_base: StableDiffusion) -> None:
    store_in_int8(tiny_base.unet)
    plain = adapted(tiny_base.unet, TrainConfig(lora_rank=4, lora_targets="attention+ff"))
    fast = deepcopy(plain)
    fuse(fast)
    assert {type(module) for module in lora_modules(fast).values()} == {FusedLinear}
    (made, gradients), (expected, true) = computed(fast), computed(plain)
    assert apart(expected, made) < 1e-4
    assert apart(true, gradients) < 1e-4


def kept_bytes(unet: nn.Module) -> int:
    """What a pass keeps for its gradients, weights among it."""
    found = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs, _ = inputs_of(unet)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(*inputs)
    return sum(found.values())


def test_half_precision_keeps_less_for_the_gradients(tiny_base: StableDiffusion) -> None:
    plain = adapted(tiny_base.unet.to(torch.bfloat16), TrainConfig(lora_rank=4))
    fast = deepcopy(plain)
    fuse(fast)
    assert kept_bytes(fast) < 0.9 * kept_bytes(plain)


def test_fifty_steps_follow_a_plain_float32_loop(tiny_base: StableDiffusion) -> None:
    losses = {}
    for fast in (False, True):
        unet = adapted(tiny_base.unet, TrainConfig(lora_rank=4, lora_targets="linear"))
        if fast:
            unet.to(memory_format=torch.channels_last)
            fuse(unet)
        parameters = [each for each in unet.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=2e-4)
        losses[fast] = []
        generator = torch.Generator().manual_seed(3)
        for _ in range(50):
            inputs, _ = inputs_of(unet)
            noise = torch.randn(inputs[0].shape, generator=generator)
            loss = (unet(inputs[0] + noise, *inputs[1:]).sample - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[fast].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][-1] < 0.95 * losses[True][0]


def test_sums_in_float16_do_not_overflow_on_the_way() -> None:
    one, other = (torch.full((64, 2), 300.0, dtype=torch.float16) for _ in range(2))
    assert torch.equal(_summed(one, other, torch.float32), torch.full((2, 2), 64 * 300.0**2))


@pytest.mark.parametrize("dtype", PRECISIONS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(1000, 1300), (320, 320, 3, 3), (3, 700_000), (5, 4)], ids=str)
def test_bytes_made_whole_in_pieces_are_those_of_one_pass(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    factors = torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=generator)
    if len(shape) == 4:
        stored = stored.to(memory_format=torch.channels_last)
    made = whole(stored, factors, dtype)
    assert torch.equal(made, torch.mul(stored, factors, out=torch.empty_like(stored, dtype=dtype)))
    assert made.stride() == stored.stride()
