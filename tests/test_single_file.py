"""Single files, as web UIs keep their models: told by their header, loaded without a network."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_base
from safetensors.torch import load_file, save_file
from single_files import write_single_file

import generate_megaman
from megaman.common.console import Exit, UserError
from megaman.common.kinds import SD1
from megaman.model import detection
from megaman.model.single_file import kind_in
from megaman.model.stable_diffusion import StableDiffusion, load_base, peek
from megaman.model.tokenizer import clip_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with CLIP's own vocabulary, as single files have it."""
    return save_tiny_base(tmp_path_factory.mktemp("clip") / "tiny", clip_tokenizer())


@pytest.fixture
def tiny_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of the tiny base's shape beside Stable Diffusion 1.x."""
    monkeypatch.setitem(detection.TEXT_WIDTHS, 24, replace(SD1, text_width=24, folder=str(folder)))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to reach another machine fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def loaded(name: Path, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    return load_base(str(name), device=torch.device("cpu"), dtype=dtype)


def test_a_single_file_loads_to_the_bit_without_a_network(
    folder: Path, tiny_kind: None, no_network: None, tmp_path: Path
) -> None:
    whole = loaded(folder)
    single = loaded(write_single_file(folder, tmp_path / "tiny_v1.safetensors"))
    assert single.name == "tiny_v1.safetensors"
    assert single.digest == whole.digest
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = ({"vae": each.vae, **each.parts}[part].state_dict() for each in (single, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    texts = ["mega man!", ""]
    assert torch.equal(single.embed(texts).states, whole.embed(texts).states)
    for name in ("prediction_type", "beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        assert single.scheduler.config[name] == whole.scheduler.config[name]


def test_a_file_in_half_precision_keeps_its_numbers_and_the_vae_is_float32(
    folder: Path, tiny_kind: None, tmp_path: Path
) -> None:
    base = loaded(write_single_file(folder, tmp_path / "a.safetensors", torch.float16), torch.bfloat16)
    assert (base.vae.dtype, base.unet.dtype, base.encoders["text_encoder"].dtype) == (
        *(torch.float32, torch.bfloat16, torch.bfloat16),
    )
    weight = base.vae.decoder.conv_in.weight
    assert torch.equal(weight, weight.half().float())


def test_a_single_file_is_trained_on_and_drawn_with_without_a_network(
    folder: Path, tiny_kind: None, no_network: None, train: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_single_file(folder, tmp_path / "hero base.safetensors")
    whole = load_file(train("--pretrained_model_name", str(folder)) / "adapter_model.safetensors")
    weights = train("--pretrained_model_name", str(file))
    single = load_file(weights / "adapter_model.safetensors")
    assert all(torch.equal(single[key], whole[key]) for key in whole)
    cfg = generate_megaman.GenerateConfig(
        lora_path=str(weights), output_dir=str(tmp_path / "drawn"), prompts=["a"], num_inference_steps=1
    )
    assert generate_megaman.generate(cfg).is_file()


def test_a_peek_into_a_file_knows_its_cell_and_tokenizer(
    folder: Path, tiny_kind: None, tmp_path: Path
) -> None:
    known = peek(str(write_single_file(folder, tmp_path / "a.safetensors")))
    assert (known.cell_px, len(known.tokenizer)) == (4, 49408)


@pytest.mark.parametrize(
    "key",
    ["model.diffusion_model.out.2.bias", "cond_stage_model.transformer.text_model.final_layer_norm.weight"],
)
def test_a_file_that_lacks_a_tensor_is_refused(
    folder: Path, tiny_kind: None, tmp_path: Path, key: str
) -> None:
    tensors = load_file(write_single_file(folder, tmp_path / "a.safetensors"))
    del tensors[key]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UserError) as error:
        loaded(tmp_path / "b.safetensors")
    assert error.value.exit_code == Exit.MODEL
    assert str(error.value).startswith(f"{tmp_path / 'b.safetensors'}: this base model can't be loaded (")


# ---------------------------------------------------------------- what a file is

TEXT = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": (1,)}
VAE = {"first_stage_model.decoder.conv_in.weight": (1, 1, 1, 1)}
TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def unet_of(channels: int = 4, width: int = 768, features: int = 320) -> dict[str, tuple[int, ...]]:
    return {
        "model.diffusion_model.input_blocks.0.0.weight": (features, channels, 1, 1),
        "model.diffusion_model.out.2.weight": (4, features, 1, 1),
        TO_K: (1, width),
    }


FILES: dict[str, dict[str, tuple[int, ...]]] = {
    "an inpainting model": unet_of(channels=9) | TEXT | VAE,
    "InstructPix2Pix": unet_of(channels=8) | TEXT | VAE,
    "a depth model": unet_of(channels=5, width=1024) | TEXT | VAE,
    "an upscaler": unet_of(channels=7, features=256) | TEXT | VAE,
    "Stable Diffusion 2.x": unet_of(width=1024) | TEXT | VAE,
    "Stable Diffusion XL;": unet_of(width=2048) | TEXT | VAE,
    "Stable Diffusion XL's refiner": unet_of(width=1280, features=384) | TEXT | VAE,
    "a UNet alone, without": unet_of() | VAE,
    "a model without its VAE": unet_of() | TEXT,
    "a VAE alone": VAE,
    "a VAE alone; ": {"encoder.conv_in.weight": (1, 3, 1, 1), "decoder.up.0.block.0.conv1.weight": (1,)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x.weight": (1,)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (1,)},
    "a LoRA, which belongs to --lora_path": {"lora_unet_mid_block.lora_down.weight": (1,)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 1, 1)},
    "an embedding": {"emb_params": (1, 768)},
    "a UNet alone, in diffusers' names": {"conv_in.weight": (320, 4, 1, 1), "down_blocks.0.x.weight": (1,)},
    "no Stable Diffusion that is known": {"anything": (1,)},
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_of_ours_is_refused_by_what_it_is(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in FILES[name].items()}, file)
    for refused in (peek, lambda path: loaded(Path(path))):
        with pytest.raises(UserError) as error:
            refused(str(file))
        assert str(error.value).startswith(f"{file}: is {name}")
        assert error.value.exit_code == Exit.MODEL


def test_stable_diffusion_1_is_known_by_its_header(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in (unet_of() | TEXT | VAE).items()}, file)
    assert kind_in(file) is SD1
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        kind_in(file)
