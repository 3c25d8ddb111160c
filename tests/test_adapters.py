"""One adapter, every layout: what is written is what was trained, for the libraries' own loaders too."""

import json
from pathlib import Path

import pytest
import torch
from adapted import inject_lora
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from megaman.common.console import UserError
from megaman.common.kinds import SD1
from megaman.config.train import TrainConfig
from megaman.lora.adapter import Adapter, LoraLayer
from megaman.lora.formats import kohya_tensors, peft_tensors
from megaman.lora.injection import adapter_of
from megaman.lora.load import read_adapter
from megaman.lora.merge import MergedAdapter
from megaman.lora.save import write_adapter
from megaman.model.stable_diffusion import StableDiffusion, load_base


def unet_output(unet: torch.nn.Module, base: StableDiffusion) -> torch.Tensor:
    """What the UNet says to fixed inputs."""
    torch.manual_seed(5)
    noisy, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, base.unet.config.cross_attention_dim)
    with torch.no_grad():
        return unet(noisy, torch.tensor([10, 700]), text).sample


@pytest.fixture
def live(tiny_base: StableDiffusion) -> StableDiffusion:
    """A base with an adapter at rank 4, alpha 32 whose B is no longer zero."""
    inject_lora(tiny_base.unet, TrainConfig(lora_rank=4, lora_alpha=32))
    torch.manual_seed(9)
    for name, parameter in tiny_base.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return tiny_base


def test_an_untrained_adapter_is_the_base_to_the_bit(tiny_base: StableDiffusion) -> None:
    plain = unet_output(tiny_base.unet, tiny_base)
    trainable = inject_lora(tiny_base.unet, TrainConfig())
    assert torch.equal(unet_output(tiny_base.unet, tiny_base), plain)
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    targets = [
        name
        for name, _ in tiny_base.unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    assert len(trainable) == 2 * len(targets)


def test_the_adapter_is_float32_on_a_half_precision_base(tiny_folder: Path) -> None:
    base = load_base(str(tiny_folder), device=torch.device("cpu"), dtype=torch.bfloat16)
    trainable = inject_lora(base.unet, TrainConfig())
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    assert base.unet.conv_in.weight.dtype == torch.bfloat16
    assert base.vae.dtype == torch.float32


def test_all_three_files_hold_the_live_models_update(live: StableDiffusion, tmp_path: Path) -> None:
    trained = adapter_of({"unet": live.unet}, SD1)
    write_adapter(trained, tmp_path)
    files = ["adapter_model.safetensors", "megaman_lora.safetensors", "pytorch_lora_weights.safetensors"]
    names = {key[1].replace(".", "_") for key in trained.layers}
    for file in files:
        read = read_adapter(tmp_path / file)
        assert {key[1].replace(".", "_") for key in read.layers} == names
        for component, name in trained.layers:
            module = live.unet.get_submodule(name)
            expected = module.get_delta_weight("default").detach()
            found = next(
                v for k, v in read.layers.items() if k[1].replace(".", "_") == name.replace(".", "_")
            )
            tolerance = 1e-6 if file.startswith("adapter_model") else 1e-3
            torch.testing.assert_close(
                found.delta(), expected, rtol=tolerance, atol=tolerance * expected.abs().max()
            )
            assert found.alpha == 32
            assert component == "unet"
    assert (tmp_path / files[1]).read_bytes() == (tmp_path / files[2]).read_bytes()


def test_pefts_own_loader_gives_the_live_output(
    live: StableDiffusion, tiny_folder: Path, tmp_path: Path
) -> None:
    write_adapter(adapter_of({"unet": live.unet}, SD1), tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    model = PeftModel.from_pretrained(unet, tmp_path)
    torch.testing.assert_close(unet_output(model, live), unet_output(live.unet, live), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_name", [None, "megaman_lora.safetensors"])
def test_diffusers_own_loader_gives_the_live_output(
    live: StableDiffusion, tiny_folder: Path, tmp_path: Path, weight_name: str | None
) -> None:
    write_adapter(adapter_of({"unet": live.unet}, SD1), tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    plain = unet_output(pipeline.unet, live)
    pipeline.load_lora_weights(tmp_path, **({} if weight_name is None else {"weight_name": weight_name}))
    expected = unet_output(live.unet, live)
    assert (plain - expected).abs().max() > 0.02  # the adapter does something at all
    torch.testing.assert_close(unet_output(pipeline.unet, live), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["peft", "kohya", "diffusers", "diffusers old"])
def test_a_merged_adapter_is_the_live_model_and_at_strength_zero_the_base(
    live: StableDiffusion, tiny_folder: Path, tmp_path: Path, layout: str
) -> None:
    trained = adapter_of({"unet": live.unet}, SD1)
    if layout == "peft":
        write_adapter(trained, tmp_path)
        path = tmp_path
    else:
        path = tmp_path / "lora.safetensors"
        save_file(tensors_of(trained, layout), path)
    base = load_base(str(tiny_folder), device=torch.device("cpu"), dtype=torch.float32)
    plain = unet_output(base.unet, base)
    merged = MergedAdapter(read_adapter(path), base.parts, SD1)
    merged.set_scale(1.0)
    torch.testing.assert_close(
        unet_output(base.unet, base), unet_output(live.unet, live), rtol=2e-3, atol=2e-3
    )
    merged.set_scale(0.0)
    assert torch.equal(unet_output(base.unet, base), plain)


def tensors_of(adapter: Adapter, layout: str) -> dict[str, torch.Tensor]:
    """The adapter in a layout that others write. diffusers' layouts have no alpha, so the strength is
    folded into B.
    """
    if layout == "kohya":
        return kohya_tensors(adapter)
    tensors = {}
    for (_, name), layer in adapter.layers.items():
        up = layer.up * (layer.alpha / layer.rank)
        if layout == "diffusers old":
            stem, leaf = name.removesuffix(".0").rsplit(".", 1)
            tensors[f"unet.{stem}.processor.{leaf}_lora.down.weight"] = layer.down
            tensors[f"unet.{stem}.processor.{leaf}_lora.up.weight"] = up
        else:
            tensors[f"unet.{name}.lora.down.weight"] = layer.down
            tensors[f"unet.{name}.lora.up.weight"] = up
    return tensors


def test_a_kohya_file_without_alpha_counts_as_alpha_equal_to_rank(
    live: StableDiffusion, tmp_path: Path
) -> None:
    tensors = {
        key: value
        for key, value in kohya_tensors(adapter_of({"unet": live.unet}, SD1)).items()
        if "alpha" not in key
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert {layer.alpha for layer in read_adapter(tmp_path / "a.safetensors").layers.values()} == {4.0}


@pytest.mark.parametrize("is_rslora", [False, True])
def test_diffusers_own_file_is_read_at_its_strength(
    live: StableDiffusion, tmp_path: Path, is_rslora: bool
) -> None:
    trained = adapter_of({"unet": live.unet}, SD1)
    layers = {key.removeprefix("base_model.model."): value for key, value in peft_tensors(trained).items()}
    about = {"r": 4, "lora_alpha": 16, "use_rslora": is_rslora, "alpha_pattern": {"attn2.to_k": 6}}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=about
    )
    alphas = {name: layer.alpha for (_, name), layer in read_adapter(tmp_path).layers.items()}
    factor = 2 if is_rslora else 1  # alpha / sqrt(4) is twice alpha / 4
    assert {alpha for name, alpha in alphas.items() if name.endswith("attn2.to_k")} == {6.0 * factor}
    assert {alpha for name, alpha in alphas.items() if not name.endswith("attn2.to_k")} == {16.0 * factor}


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"base": 5}', '{"resolution": "large"}'])
def test_damaged_metadata_is_refused(live: StableDiffusion, tmp_path: Path, text: str) -> None:
    save_file(
        kohya_tensors(adapter_of({"unet": live.unet}, SD1)), tmp_path / "a.safetensors", {"megaman": text}
    )
    with pytest.raises(UserError, match="metadata is damaged"):
        read_adapter(tmp_path / "a.safetensors")


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    layer = LoraLayer(torch.ones(1, 2), torch.full((2, 1), 1e5), 1.0)
    with pytest.raises(UserError, match="too large for float16"):
        write_adapter(Adapter({("unet", "a.to_q"): layer}), tmp_path)


def test_a_text_encoder_adapter_changes_the_text_encoder(tiny_base: StableDiffusion) -> None:
    module = tiny_base.encoders["text_encoder"].get_submodule("encoder.layers.0.self_attn.q_proj")
    before, embedded = module.weight.clone(), tiny_base.embed(["mega man"]).states
    layer = LoraLayer(torch.ones(1, 24), torch.ones(24, 1), 1.0)
    key = ("text_encoder", "text_model_encoder_layers_0_self_attn_q_proj")
    MergedAdapter(Adapter({key: layer}), tiny_base.parts, SD1).set_scale(0.5)
    torch.testing.assert_close(module.weight, before + 0.5)
    assert not torch.equal(tiny_base.embed(["mega man"]).states, embedded)


def test_the_digest_is_of_the_weights_and_not_of_the_file(live: StableDiffusion, tmp_path: Path) -> None:
    trained = adapter_of({"unet": live.unet}, SD1)
    write_adapter(trained, tmp_path)
    assert (
        read_adapter(tmp_path).digest
        == read_adapter(tmp_path / "megaman_lora.safetensors").digest
        == trained.digest
    )


def test_metadata_tells_base_and_trigger_and_no_path(adapter_folder: Path) -> None:
    adapter = read_adapter(adapter_folder / "megaman_lora.safetensors")
    assert adapter.metadata["base"] == "tiny_base"
    assert adapter.metadata["trigger"] == "mega man"
    assert adapter.metadata["resolution"] == 32
    for file in adapter_folder.iterdir():
        assert str(adapter_folder.parents[1]).encode() not in file.read_bytes()
    assert json.loads((adapter_folder / "adapter_config.json").read_text())["lora_alpha"] == 32


# ---------------------------------------------------------------- refusals


def broken(kind: str, good: dict[str, torch.Tensor], folder: Path) -> Path:
    """A file that must be refused."""
    path = folder / f"{kind}.safetensors"
    first = next(key for key in good if key.endswith("lora_B.weight"))
    if kind == "nan":
        save_file(good | {first: torch.full_like(good[first], float("nan"))}, path)
    elif kind == "half a pair":
        save_file({key: value for key, value in good.items() if key != first}, path)
    elif kind == "strange keys":
        save_file(good | {"base_model.model.conv_in.lora_magnitude_vector": torch.ones(3)}, path)
    elif kind == "no lora":
        save_file({"conv_in.weight": torch.ones(3)}, path)
    elif kind == "truncated":
        save_file(good, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle inside":
        torch.save(good, path)
    return path


@pytest.mark.parametrize(
    "kind", ["nan", "half a pair", "strange keys", "no lora", "truncated", "empty", "pickle inside"]
)
def test_a_damaged_or_foreign_file_is_refused(live: StableDiffusion, tmp_path: Path, kind: str) -> None:
    path = broken(kind, peft_tensors(adapter_of({"unet": live.unet}, SD1)), tmp_path)
    with pytest.raises(UserError) as error:
        read_adapter(path)
    assert error.value.exit_code == 4
    assert kind in str(error.value)  # the file is named


@pytest.mark.parametrize("name", ["lora.bin", "lora.ckpt", "lora.pt", "lora.pkl"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    with pytest.raises(UserError, match="pickle files"):
        read_adapter(tmp_path / name)


def test_a_missing_adapter_or_an_empty_folder_names_the_remedy(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="--preset demo"):
            read_adapter(path)


def test_an_adapter_of_another_base_is_refused_and_says_why(live: StableDiffusion, tiny_folder: Path) -> None:
    plain = load_base(str(tiny_folder), device=torch.device("cpu"), dtype=torch.float32)
    layers = dict(adapter_of({"unet": live.unet}, SD1).layers)
    key = next(key for key in layers if key[1].endswith("attn2.to_k"))
    layers[key] = LoraLayer(torch.ones(4, 768), layers[key].up, 4.0)
    with pytest.raises(UserError, match="768 wide, this base's 24"):
        MergedAdapter(Adapter(layers), {"unet": plain.unet}, SD1)
    with pytest.raises(UserError, match="does not have"):
        MergedAdapter(Adapter({("unet", "middle.of.nowhere"): layers[key]}), {"unet": plain.unet}, SD1)


def test_a_peft_file_without_its_configuration_is_refused(live: StableDiffusion, tmp_path: Path) -> None:
    write_adapter(adapter_of({"unet": live.unet}, SD1), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="strength is unknown"):
        read_adapter(tmp_path)


def test_an_adapter_that_became_nan_in_training_is_not_written(live: StableDiffusion, tmp_path: Path) -> None:
    next(p for name, p in live.unet.named_parameters() if "lora_B" in name).data.fill_(float("inf"))
    with pytest.raises(UserError) as error:
        adapter_of({"unet": live.unet}, SD1)
    assert error.value.exit_code == 5
    assert not list(tmp_path.iterdir())


def test_files_have_the_modes_that_the_umask_grants(adapter_folder: Path) -> None:
    modes = {oct(file.stat().st_mode & 0o777) for file in adapter_folder.iterdir()}
    plain = adapter_folder.parent / "plain"
    plain.touch()
    assert modes == {oct(plain.stat().st_mode & 0o777)}


def test_tensors_read_back_are_those_written(live: StableDiffusion, tmp_path: Path) -> None:
    trained = adapter_of({"unet": live.unet}, SD1)
    write_adapter(trained, tmp_path)
    read = load_file(tmp_path / "adapter_model.safetensors")
    assert read.keys() == peft_tensors(trained).keys()
    assert all(torch.equal(read[key], value) for key, value in peft_tensors(trained).items())
