"""Other people's adapter files: read whole, by their keys, or refused in one line."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
import torch
from conftest import bound_by_modes
from safetensors.torch import load_file, save_file
from test_interop import trained

import generate_megaman
from megaman.common.console import UserError, reported
from megaman.common.kinds import SD1
from megaman.lora.adapter import underscored
from megaman.lora.formats import diffusers_metadata, diffusers_tensors, kohya_tensors, peft_tensors
from megaman.lora.injection import adapter_of
from megaman.lora.load import read_adapter
from megaman.lora.save import write_adapter
from megaman.model.stable_diffusion import StableDiffusion

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def kohya(plain: StableDiffusion) -> Tensors:
    """A good file's tensors, for the tiny base."""
    return kohya_tensors(adapter_of({"unet": trained(plain, lora_rank=4, lora_alpha=32)}, SD1))


@pytest.fixture(scope="module")
def dora(plain: StableDiffusion) -> Tensors:
    """A good DoRA's tensors, in PEFT's layout."""
    return peft_tensors(adapter_of({"unet": trained(plain, lora_rank=4, lora_alpha=32, use_dora=True)}, SD1))


# ---------------------------------------------------------------- refusals


def _first(tensors: Tensors, end: str) -> str:
    return next(key for key in tensors if key.endswith(end))


def _renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): value for key, value in tensors.items()}


def _dotted(key: str) -> str:
    """kohya's key of an attention's to_q as diffusers spells it."""
    name, _, part = key.partition(".")
    name = re.sub(r"_(?=\d|attentions|transformer_blocks|attn1|to_q)", ".", name.removeprefix("lora_unet_"))
    return f"unet.{re.sub(r'(?<=[0-9])_', '.', name)}.{part}"


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "NaN": (lambda t: t | {_first(t, "up.weight"): torch.full((16, 4), float("nan"))}, "holds NaN"),
    "infinite alpha": (lambda t: t | {_first(t, "alpha"): torch.tensor(float("inf"))}, "holds NaN or inf"),
    "several alphas": (lambda t: t | {_first(t, "alpha"): torch.ones(4)}, "has 4 alphas"),
    "half a pair": (lambda t: {k: v for k, v in t.items() if k != _first(t, "down.weight")}, "be placed"),
    "ranks differ": (lambda t: t | {_first(t, "down.weight"): torch.ones(3, 16)}, "make no pair"),
    "no rank": (lambda t: t | {_first(t, "down.weight"): torch.ones(0, 16)}, "make no pair"),
    "LoHa": (lambda t: _renamed(t, "lora_up.weight", "hada_w1_a"), "is a LoHa"),
    "LoCon with a core": (lambda t: t | {"lora_unet_x.lora_mid.weight": torch.ones(4, 4, 3, 3)}, "a core"),
    "Stable Diffusion XL's second encoder": (
        lambda t: _renamed(t, "lora_unet_down", "lora_te2_down"),
        "made for Stable Diffusion XL, this base is Stable Diffusion 1.x",
    ),
    "a checkpoint": (lambda _: {"model.diffusion_model.out.2.bias": torch.ones(4)}, "is a whole model"),
    "a bias of no module": (lambda t: t | {"lora_unet_x.diff_b": torch.ones(4)}, "does not have"),
    "a bias of another size": (
        lambda t: t | {_first(t, "attn1_to_out_0.alpha").replace("alpha", "diff_b"): torch.ones(3)},
        "made for another base",
    ),
    "one module under its old and its new name": (
        lambda t: t | {key.replace("to_out_0", "to_out"): value.clone() for key, value in t.items()},
        "be placed",
    ),
    "one module under two names": (
        lambda t: t | {_dotted(key): value.clone() for key, value in t.items() if "attn1_to_q" in key},
        "be placed",
    ),
    "another base": (
        lambda t: t | {_first(t, "attn2_to_k.lora_down.weight"): torch.ones(4, 768)},
        "768 wide",
    ),
    "unknown module": (lambda t: _renamed(t, "attn1_to_q", "attn3_to_q"), "does not have"),
    "DoRA's lengths cut": (lambda t: t | {"lora_unet_x.dora_scale": torch.ones(5)}, "be placed"),
    "no Linear": (lambda t: t | {_first(t, "down.weight"): torch.ones(4, 16, 1)}, "make no pair"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_or_foreign_adapter_is_exit_4_and_one_line(
    kohya: Tensors,
    tiny_folder: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, complaint = REFUSED[kind]
    save_file(damage(kohya), tmp_path / "a.safetensors")
    flags = [
        "--lora_path",
        tmp_path / "a.safetensors",
        "--base_model",
        tiny_folder,
        "--output_dir",
        tmp_path / "gen",
    ]
    monkeypatch.setattr(sys, "argv", ["generate_megaman.py", *map(str, flags)])
    with pytest.raises(SystemExit) as left:
        commands.run(commands.drawing)
    told = capsys.readouterr().err
    assert left.value.code == 4, told
    assert complaint in told
    assert told.count("\n") == 1
    assert told.startswith("error: ")
    assert not list(tmp_path.glob("gen/*.png"))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"r": 4, "lora_alpha": 32, "use_dora": True, "alpha_pattern": {"(": 3}}, "strength is unknown"),
        ({"r": 4, "lora_alpha": "much"}, "strength is unknown"),
        ({"r": 4}, "strength is unknown"),
        ([], "strength is unknown"),
        ({"r": 4, "lora_alpha": 32, "use_dora": True}, "lengths are gone"),
    ],
    ids=str,
)
def test_a_peft_folder_whose_configuration_does_not_fit_is_refused(
    dora: Tensors, tmp_path: Path, config: object, complaint: str
) -> None:
    save_file({k: v for k, v in dora.items() if "magnitude" not in k}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=complaint) as raised:
        read_adapter(tmp_path)
    assert raised.value.exit_code == 4


def test_doras_lengths_of_another_shape_are_refused(dora: Tensors, tmp_path: Path) -> None:
    name = _first(dora, "lora_magnitude_vector")
    save_file(dora | {name: torch.ones(5)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 32}')
    with pytest.raises(UserError, match=r"lengths are of shape \(5,\)"):
        read_adapter(tmp_path)


def test_a_folder_with_several_unknown_files_asks_which(kohya: Tensors, tmp_path: Path) -> None:
    save_file(kohya, tmp_path / "hero.safetensors")
    assert len(read_adapter(tmp_path).layers) == len(kohya) // 3
    save_file(kohya, tmp_path / "villain.safetensors")
    with pytest.raises(UserError, match=r"holds 2 adapters \(hero.safetensors, villain.safetensors\)"):
        read_adapter(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users and modes of POSIX")
@pytest.mark.parametrize("closed", ["hero", "hero/a.safetensors"])
def test_an_adapter_that_may_not_be_read_is_told_so_and_not_as_missing(
    closed: str, kohya: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hero").mkdir()
    save_file(kohya, tmp_path / "hero" / "a.safetensors")
    (tmp_path / closed).chmod(0)
    with bound_by_modes(), pytest.raises(SystemExit) as left, reported():
        read_adapter(tmp_path / "hero")
    (tmp_path / closed).chmod(0o755)
    assert left.value.code == 6
    assert f"{tmp_path / closed}: Permission denied" in capsys.readouterr().err


DOWN, UP = torch.ones(4, 320), torch.ones(320, 4)
FOREIGN: dict[str, tuple[Tensors, str]] = {
    "LoHa": ({"lora_unet_x.hada_w1_a": UP, "lora_unet_x.alpha": torch.tensor(1.0)}, "is a LoHa"),
    "LoKr": ({"lora_unet_x.lokr_w1": UP, "lora_unet_x.lokr_w2_a": UP}, "is a LoKr"),
    "GLoRA": ({f"lora_unet_x.{part}.weight": UP for part in ("a1", "a2", "b1", "b2")}, "is a GLoRA"),
    "kohya's OFT": ({"oft_unet_x.oft_blocks": torch.ones(4, 80, 80)}, "is an OFT"),
    "diag-OFT": ({"lora_unet_x.oft_blocks": torch.ones(4, 80, 80)}, "is an OFT"),
    "an early diag-OFT": ({"lora_unet_x.oft_diag": torch.ones(4, 80, 80)}, "is an OFT"),
    "(IA)^3": ({"lora_unet_x.weight": torch.ones(320, 1), "lora_unet_x.on_input": torch.ones(1)}, "(IA)^3"),
    "T-LoRA": ({"lora_unet_x.q_layer.weight": DOWN, "lora_unet_x.lambda_layer": torch.ones(1, 4)}, "T-LoRA"),
    "full": ({"lora_unet_x.diff": torch.ones(320, 320)}, "whole differences"),
    "Flux": ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": DOWN}, "Flux"),
    "Flux by diffusers": ({"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": DOWN}, "Flux"),
    "Stable Diffusion 3": (
        {"lora_transformer_joint_blocks_0_x.lora_down.weight": DOWN},
        "Stable Diffusion 3",
    ),
    "an embedding": ({"emb_params": torch.ones(2, 768)}, "an embedding"),
    "an embedding for SDXL": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "an embedding"),
    "an embedding of diffusers'": ({"<hero>": torch.ones(1, 768)}, "an embedding"),
    "an embedding in a bundle": (
        {
            "bundle_emb.hero.clip_l": torch.ones(1, 768),
            "diffusion_model.out.2.lora_A.weight": torch.ones(4, 320, 3, 3),
            "diffusion_model.out.2.lora_B.weight": torch.ones(4, 4, 1, 1),
        },
        "save the LoRA without it",
    ),
    "a ControlNet": ({"control_model.zero_convs.0.0.weight": torch.ones(320, 320, 1, 1)}, "a ControlNet"),
    "a whole model": ({"first_stage_model.decoder.conv_in.weight": UP}, "--base_model"),
    "a UNet": ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(4, 4, 3, 3)}, "a model of its own"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_lora_for_stable_diffusion_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    tensors, name = FOREIGN[kind]
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as raised:
        read_adapter(tmp_path / "a.safetensors")
    assert raised.value.exit_code == 4
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- spellings


@pytest.mark.parametrize("spelling", ["default", "no prefix", "weight behind the lengths"])
def test_older_spellings_are_read_as_the_same_adapter(dora: Tensors, tmp_path: Path, spelling: str) -> None:
    tensors = dict(dora)
    if spelling == "default":
        tensors = _renamed(tensors, ".weight", ".default.weight")
    elif spelling == "no prefix":
        tensors = _renamed(tensors, "base_model.model.", "")
    else:
        tensors = _renamed(tensors, "magnitude_vector", "magnitude_vector.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4, "use_dora": true}')
    (tmp_path / "plain").mkdir()
    save_file(dora, tmp_path / "plain" / "adapter_model.safetensors")
    (tmp_path / "plain" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
    assert read_adapter(tmp_path).digest == read_adapter(tmp_path / "plain").digest


def test_a_peft_text_encoder_beside_the_unet_is_read_with_it(plain: StableDiffusion, tmp_path: Path) -> None:
    """As PEFT's users save a trained text encoder; transformers 4's names and 5's."""
    write_adapter(adapter_of({"unet": trained(plain, lora_rank=4, lora_alpha=32)}, SD1), tmp_path)
    for level in ("text_model.", ""):
        (tmp_path / "text_encoder").mkdir(exist_ok=True)
        name = f"base_model.model.{level}encoder.layers.0.self_attn.q_proj"
        pair = {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.ones(24, 2)}
        save_file(pair, tmp_path / "text_encoder" / "adapter_model.safetensors")
        (tmp_path / "text_encoder" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6}')
        layers = read_adapter(tmp_path).layers
        text = [layer for (part, _), layer in layers.items() if part == "text_encoder"]
        assert [layer.alpha for layer in text] == [6.0]


def test_the_line_says_how_much_was_loaded(
    plain: StableDiffusion, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = trained(plain, lora_rank=4, lora_alpha=32, lora_targets="conv", use_dora=True)
    write_adapter(adapter_of({"unet": live}, SD1), tmp_path / "lora")
    pictures = {}
    for name in ("adapter_model", "megaman_lora", "pytorch_lora_weights"):
        cfg = generate_megaman.GenerateConfig(
            lora_path=str(tmp_path / "lora" / f"{name}.safetensors"),
            base_model=str(tiny_folder),
            output_dir=str(tmp_path / name),
            prompts=["a"],
            width=32,
            height=32,
            num_inference_steps=2,
            lora_scale=[0.5],
        )
        (picture,) = generate_megaman.generate(cfg).parent.glob("*.png")
        pictures[name] = picture.name
        told = capsys.readouterr().err
        assert (
            f"loaded {len(adapter_of({'unet': live}, SD1).layers)} UNet and 0 text-encoder modules, scale 0.5"
            in told
        )
    assert len(set(pictures.values())) == 1  # the same adapter, so the same picture


def test_no_tensor_is_dropped_on_the_way(kohya: Tensors, tmp_path: Path) -> None:
    save_file(kohya, tmp_path / "a.safetensors")
    layers = read_adapter(tmp_path / "a.safetensors").layers
    assert {f"lora_unet_{underscored(name)}" for _, name in layers} == {key.split(".")[0] for key in kohya}
    assert len(load_file(tmp_path / "a.safetensors")) == 3 * len(layers)


# ---------------------------------------------------------------- strength


def test_a_diffusers_file_that_names_no_alpha_says_so_once(
    plain: StableDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of({"unet": trained(plain, lora_rank=4, lora_alpha=32)}, SD1)
    tensors = diffusers_tensors(adapter)
    for name, content, metadata in (
        ("bare", tensors, None),
        (
            "with alphas",
            tensors | {_first(tensors, "lora_A.weight")[:-13] + "alpha": torch.tensor(4.0)},
            None,
        ),
        ("with metadata", tensors, diffusers_metadata(adapter)),
        ("ours", tensors, {"megaman": "{}"}),
        ("kohya's", {k: v for k, v in kohya_tensors(adapter).items() if "alpha" not in k}, None),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(content, path, metadata)
        capsys.readouterr()
        alphas = [{layer.alpha for layer in read_adapter(path).layers.values()} for _ in range(2)]
        assert alphas == [{32.0 if name == "with metadata" else 4.0}] * 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (name == "bare")
        assert all("names no alpha" in line and "--lora_scale" in line for line in said)
