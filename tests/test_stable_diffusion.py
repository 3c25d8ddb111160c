"""What a base is, is found out before anything is trained on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import generate_megaman
from megaman.common.console import Exit, UserError
from megaman.model.stable_diffusion import StableDiffusion, load_base, peek


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cross_attention_dim": 1024}, "reads text 1024 wide, its text encoder makes another"),
        ({"cross_attention_dim": 1280}, "it is Stable Diffusion XL's refiner"),
        ({"in_channels": 9}, "it is an inpainting model: its UNet takes 9 channels, not 4"),
    ],
    ids=str,
)
def test_a_folder_whose_parts_are_none_of_ours_is_refused_by_what_it_is(
    tiny_folder: Path, tmp_path: Path, changes: dict[str, int], reason: str
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.register_modules(unet=UNet2DConditionModel.from_config({**pipeline.unet.config, **changes}))
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"not a Stable Diffusion 1.x, 2.x or XL: .*{reason}") as caught:
        load_base(str(tmp_path / "other"), device=torch.device("cpu"), dtype=torch.float32)
    assert caught.value.exit_code == Exit.MODEL


OTHERS = {
    "is Stable Diffusion 3": ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}),
    "is Flux": ("model_index.json", {"_class_name": "FluxPipeline"}),
    "is an inpainting model": ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}),
    "is no Stable Diffusion (PixArt": ("model_index.json", {"_class_name": "PixArtAlphaPipeline"}),
    "is a model of EDM's noise": (
        "scheduler/scheduler_config.json",
        {"_class_name": "EDMDPMSolverMultistepScheduler"},
    ),
    "is a flow-matching model": (
        "scheduler/scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    ),
    "is Stable Diffusion unCLIP": ("unet/config.json", {"class_embed_type": "projection"}),
    "is a latent consistency model": ("unet/config.json", {"time_cond_proj_dim": 256}),
    "is SSD-1B, a distilled": (
        "unet/config.json",
        {"cross_attention_dim": 2048, "transformer_layers_per_block": [0, 2, 4]},
    ),
    "is a model whose VAE has means": ("vae/config.json", {"latents_mean": [0.1, 0.2, 0.3, 0.4]}),
}


@pytest.mark.parametrize("told", OTHERS)
def test_a_folder_of_another_model_is_named_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path, told: str
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    name, changes = OTHERS[told]
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError) as caught:
        loaded(folder)
    assert str(caught.value).startswith(f"{folder}: {told}")
    assert caught.value.exit_code == Exit.MODEL


def test_a_peek_tells_what_this_disk_knows_and_stable_diffusion_1_where_it_knows_nothing(
    tiny_folder: Path,
) -> None:
    known = peek(str(tiny_folder))
    assert (known.cell_px, len(known.tokenizer)) == (4, len(peek("megaman/tiny_sd").tokenizer))
    unknown = peek("nobody/nothing")
    assert (unknown.cell_px, len(unknown.tokenizer)) == (64, 49408)


# ---------------------------------------------------------------- weights as the fp16 variant


def save_variant(tiny_folder: Path, folder: Path, **settings: object) -> Path:
    """Writes the tiny base with its weights as the fp16 variant alone."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_folder, safety_checker=None, torch_dtype=torch.float16
    )
    pipeline.save_pretrained(folder, variant="fp16", **settings)
    assert not list(folder.rglob("*model.safetensors"))
    return folder


@pytest.fixture(scope="module")
def variant_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, its weights there as the fp16 variant alone."""
    return save_variant(tiny_folder, tmp_path_factory.mktemp("variant") / "tiny_base")


def loaded(folder: Path) -> StableDiffusion:
    return load_base(str(folder), device=torch.device("cpu"), dtype=torch.float32)


def are_of_half_precision(base: StableDiffusion) -> dict[str, bool]:
    """Whether a part's weights are float16's numbers, though the tensors are float32."""
    parts = {"unet": base.unet, "vae": base.vae, "text_encoder": base.encoders["text_encoder"]}
    assert {parameter.dtype for part in parts.values() for parameter in part.parameters()} == {torch.float32}
    return {
        name: all(torch.equal(weight, weight.half().float()) for weight in part.parameters())
        for name, part in parts.items()
    }


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
def test_a_folder_with_the_fp16_variant_alone_is_loaded(
    tiny_folder: Path, tmp_path: Path, plain: StableDiffusion, shards: dict[str, str]
) -> None:
    folder = save_variant(tiny_folder, tmp_path / "variant", **shards)
    assert bool(shards) == bool(list(folder.glob("unet/*.index.fp16.json")))
    for odd in ("unet/LICENSE", "text_encoder/model.bin", "vae/diffusion_pytorch_model.bin"):
        (folder / odd).write_bytes(b"nothing that is read")  # beside what is
    base = loaded(folder)
    assert set(are_of_half_precision(base).values()) == {True}
    assert base.digest == plain.digest
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(base.unet.state_dict()[name], weight.half().float())


def test_full_weights_go_before_the_variant_part_by_part(
    tiny_folder: Path, variant_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(variant_folder, tmp_path / "mixed")
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copy(tiny_folder / "unet" / weights, folder / "unet")  # both
    shutil.copy(tiny_folder / "vae" / weights, folder / "vae")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert are_of_half_precision(loaded(folder)) == {"unet": False, "vae": False, "text_encoder": True}


def test_the_fp16_variant_is_trained_on_and_drawn_with(
    train: Callable[..., Path], variant_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = train("--pretrained_model_name", str(variant_folder), "--max_train_steps", "1")
    cfg = generate_megaman.GenerateConfig(
        lora_path=str(weights), output_dir=str(tmp_path / "drawn"), prompts=["a"], num_inference_steps=1
    )
    assert generate_megaman.generate(cfg).is_file()
    assert "variant" not in capsys.readouterr().err.replace(str(tmp_path), "")
