"""A file that does not hold what was trained never gets its name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_interop import trained

from megaman.common.console import UserError
from megaman.common.kinds import SD1
from megaman.lora import injection, save
from megaman.lora.adapter import Adapter, Key, LoraLayer
from megaman.lora.injection import adapter_of
from megaman.lora.load import read_adapter
from megaman.lora.save import write_adapter
from megaman.model.stable_diffusion import StableDiffusion

Tensors = dict[str, torch.Tensor]


def with_one(adapter: Adapter, **parts: object) -> Adapter:
    """The adapter with a part of one layer replaced."""
    key, layer = next(iter(adapter.layers.items()))
    return Adapter({**adapter.layers, key: dataclasses.replace(layer, **parts)}, adapter.metadata)


@pytest.mark.parametrize("form", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_what_is_trained_passes(plain: StableDiffusion, tmp_path: Path, form: dict[str, bool]) -> None:
    live = trained(plain, lora_rank=4, lora_alpha=32, lora_targets="conv", **form)
    write_adapter(adapter_of({"unet": live}, SD1), tmp_path, live={"unet": live})
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda a: with_one(a, alpha=4.0), "the update of .* differs by 87.5%"),
        (lambda a: with_one(a, up=-first(a).up), "differs by 200.0%"),
        (lambda a: with_one(a, down=first(a).down[:, :8]), "another shape"),
        (lambda a: with_one(a, magnitude=first(a).magnitude * 1.001), "magnitude of .* differ"),
        (
            lambda a: Adapter({key: a.layers[key] for key in list(a.layers)[1:]}, a.metadata),
            "1 modules differ",
        ),
        (lambda a: Adapter({moved(key): layer for key, layer in a.layers.items()}), "modules differ"),
    ],
)
def test_any_difference_from_the_live_model_is_exit_4_and_no_file(
    plain: StableDiffusion, tmp_path: Path, damage: Callable[[Adapter], Adapter], complaint: str
) -> None:
    live = trained(plain, lora_rank=4, lora_alpha=32, use_dora=True)
    with pytest.raises(UserError, match=complaint) as raised:
        write_adapter(damage(adapter_of({"unet": live}, SD1)), tmp_path, live={"unet": live})
    assert raised.value.exit_code == 4
    assert not list(tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob(".*"))


def first(adapter: Adapter) -> LoraLayer:
    return next(iter(adapter.layers.values()))


def moved(key: Key) -> Key:
    return key[0], key[1].replace("down_blocks.0", "down_blocks.7")


@pytest.mark.parametrize(
    ("writer", "file", "damage"),
    [
        (
            "kohya_tensors",
            "megaman_lora",
            lambda t: {k: v * 0 + 4 if "alpha" in k else v for k, v in t.items()},
        ),
        ("kohya_tensors", "megaman_lora", lambda t: {k: v for k, v in t.items() if "dora_scale" not in k}),
        ("kohya_tensors", "megaman_lora", lambda t: {k: v.bfloat16().half() for k, v in t.items()}),
        ("peft_tensors", "adapter_model", lambda t: {k: v.half().float() for k, v in t.items()}),
        ("diffusers_tensors", "pytorch_lora_weights", lambda t: {k: v for k, v in t.items() if "attn1" in k}),
    ],
)
def test_a_broken_writer_is_caught_by_the_file_that_it_spoils(
    plain: StableDiffusion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writer: str,
    file: str,
    damage: Callable[[Tensors], Tensors],
) -> None:
    honest = getattr(save, writer)
    monkeypatch.setattr(save, writer, lambda adapter: damage(honest(adapter)))
    live = trained(plain, lora_rank=4, lora_alpha=32, use_dora=True)
    with pytest.raises(UserError, match=f"{file}.safetensors: .* the file was not written") as raised:
        write_adapter(adapter_of({"unet": live}, SD1), tmp_path, live={"unet": live})
    assert raised.value.exit_code == 4
    assert not (tmp_path / f"{file}.safetensors").exists()


def test_a_run_whose_file_is_spoilt_ends_with_exit_4_and_keeps_its_checkpoints(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = injection.adapter_of

    def spoilt(*args: object) -> Adapter:
        return with_one(honest(*args), alpha=4.0)

    monkeypatch.setattr(injection, "adapter_of", spoilt)
    with pytest.raises(UserError, match="the file was not written") as raised:
        train()
    assert raised.value.exit_code == 4
    assert list((tmp_path / "out" / "checkpoints").glob("step-*/state.safetensors"))
    assert not (tmp_path / "out" / "lora_weights" / "megaman_lora.safetensors").exists()


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 0.0])
def test_an_adapter_that_has_hardly_begun_survives_float16(
    plain: StableDiffusion, tmp_path: Path, size: float
) -> None:
    """After few small steps B lies below what float16 can tell apart: it is written larger, A smaller."""
    live = trained(plain, lora_rank=4, lora_alpha=32)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            parameter.data *= size
    write_adapter(adapter_of({"unet": live}, SD1), tmp_path, live={"unet": live})
    exact, rounded = (
        read_adapter(tmp_path / name) for name in ("adapter_model.safetensors", "megaman_lora.safetensors")
    )
    assert exact.digest == rounded.digest
    layers = {key[1]: layer for key, layer in exact.layers.items()}
    for (_, name), layer in rounded.layers.items():
        wanted = layers[name].delta()
        assert (layer.delta() - wanted).norm() <= (1e-3 if size > 1e-8 else 0.1) * wanted.norm()
