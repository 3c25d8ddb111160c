"""Layouts that only others write: read as the adapter that they hold, and drawn with alike."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapted import inject_lora
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from test_adapters import unet_output
from test_interop import comfyuis_dictionary, error, ldm_modules

from megaman.common.console import UserError
from megaman.common.kinds import SD1
from megaman.config.train import TrainConfig
from megaman.lora.adapter import Adapter, Key, LoraLayer, underscored
from megaman.lora.formats import kohya_tensors
from megaman.lora.init_lora import read_init_lora
from megaman.lora.injection import adapter_of, lora_modules
from megaman.lora.load import read_adapter
from megaman.lora.merge import MergedAdapter
from megaman.lora.names import diffusers_name
from megaman.model.stable_diffusion import StableDiffusion

Tensors = dict[str, torch.Tensor]
AROUND = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.2": "conv_out",
}  # what lies outside the blocks


# ---------------------------------------------------------------- LDM's names


def ldm_names() -> dict[str, str]:
    """Every linear and convolution module of Stable Diffusion 1.5: diffusers' underscored name, LDM's."""
    inside = {
        key.removeprefix("lora_unet_"): name for key, name in comfyuis_dictionary(ldm_modules(SD1)).items()
    }
    return inside | {underscored(name): ldm for ldm, name in AROUND.items()}


@pytest.fixture(scope="module")
def sd15() -> UNet2DConditionModel:
    """Its modules without their numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def test_every_module_of_sd15_has_just_one_name_in_ldm(sd15: UNet2DConditionModel) -> None:
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    shapes = {name: module.weight.shape for name, module in sd15.named_modules() if isinstance(module, kinds)}
    names = ldm_names()
    assert len(names) == len(set(names.values())) == len(shapes) == 282
    dotted = {diffusers_name(ldm): ldm for ldm in names.values()}
    assert dotted.keys() == shapes.keys()
    assert {underscored(name): ldm for name, ldm in dotted.items()} == names
    assert {underscored(diffusers_name(underscored(ldm))): ldm for ldm in names.values()} == names
    sizes = ldm_modules(SD1)
    assert all(tuple(shapes[name]) == sizes[ldm] for name, ldm in dotted.items() if ldm in sizes)


def test_diffusers_own_names_stay_and_norms_are_found(sd15: UNet2DConditionModel) -> None:
    with_weights = [name.rpartition(".")[0] for name, _ in sd15.named_parameters()]
    for name in with_weights:
        assert diffusers_name(name) == name
        assert diffusers_name(underscored(name)) == name
    norms = {
        "out.0": "conv_norm_out",
        "output_blocks.11.0.in_layers.0": "up_blocks.3.resnets.2.norm1",
        "middle_block.2.out_layers.0": "mid_block.resnets.1.norm2",
        "input_blocks.1.1.norm": "down_blocks.0.attentions.0.norm",
        "middle_block.1.transformer_blocks.0.norm3": "mid_block.attentions.0.transformer_blocks.0.norm3",
    }
    for ldm, name in norms.items():
        assert diffusers_name(ldm) == name
        assert diffusers_name(underscored(ldm)) == name


# ---------------------------------------------------------------- whole files


@pytest.fixture(scope="module")
def small_sd15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's blocks, narrow."""
    torch.manual_seed(3)
    return UNet2DConditionModel(
        block_out_channels=(16, 16, 32, 32), cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8
    )


@pytest.fixture(scope="module")
def adapter(small_sd15: UNet2DConditionModel) -> Adapter:
    """A trained one for every linear and convolution module, with a part for the text encoder."""
    unet = copy.deepcopy(small_sd15)
    inject_lora(unet, TrainConfig(lora_rank=4, lora_alpha=32, lora_targets="conv"))
    torch.manual_seed(9)
    for module in lora_modules(unet).values():
        module.lora_B["default"].weight.data.normal_(std=0.02)
    layers = dict(adapter_of({"unet": unet}, SD1).layers)
    outside = {"conv_in": (16, 4, 3, 3), "conv_out": (4, 16, 3, 3), "time_embedding.linear_1": (64, 16)}
    for name, (rows, *rest) in outside.items():
        layers["unet", name] = LoraLayer(
            torch.randn(4, *rest), torch.randn(rows, 4, *[1] * len(rest[1:])), 2.0
        )
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    layers["text_encoder", text] = LoraLayer(torch.randn(4, 24), torch.randn(24, 4), 2.0)
    return Adapter(layers)


def written(
    adapter: Adapter, prefixes: dict[str, str], parts: tuple[str, str], *, has_alpha: bool
) -> Tensors:
    """The adapter under LDM's names. prefixes: of each component; one that has none is left out."""
    names, tensors = ldm_names(), {}
    for (component, name), layer in adapter.layers.items():
        if component in prefixes:
            ldm = names[underscored(name)] if component == "unet" else name
            key = prefixes[component] + ldm
            scale = 1.0 if has_alpha else layer.alpha / layer.rank
            tensors[f"{key}.{parts[0]}.weight"] = layer.down
            tensors[f"{key}.{parts[1]}.weight"] = layer.up * scale
            if has_alpha:
                tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def flat(adapter: Adapter) -> Tensors:
    """kohya's layout with LDM's names, as its trainers write them for Stable Diffusion XL."""
    tensors = written(adapter, {"unet": "", "text_encoder": ""}, ("lora_down", "lora_up"), has_alpha=True)
    kohya = {}
    for key, tensor in tensors.items():
        name, part = key.rsplit(".lora_", 1) if ".lora_" in key else (key.removesuffix(".alpha"), None)
        home = "lora_te1_" if "text_model" in name else "lora_unet_"
        kohya[home + underscored(name) + (".alpha" if part is None else f".lora_{part}")] = tensor
    return kohya


COMFYUI = {"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer."}
DOWN_UP, A_B = ("lora_down", "lora_up"), ("lora_A", "lora_B")
LAYOUTS: dict[str, Callable[[Adapter], Tensors]] = {
    "ComfyUI, trained": lambda adapter: written(adapter, COMFYUI, DOWN_UP, has_alpha=True),
    "ComfyUI, extracted": lambda adapter: written(adapter, COMFYUI, DOWN_UP, has_alpha=False) | unchanged(),
    "OneTrainer's COMFY": lambda adapter: written(adapter, COMFYUI, A_B, has_alpha=True),
    "OneTrainer's ORIGINAL": lambda adapter: written(adapter, {"unet": ""}, A_B, has_alpha=True),
    "OneTrainer's OMI": lambda adapter: written(
        adapter, {"unet": "unet.", "text_encoder": "clip_l."}, DOWN_UP, has_alpha=True
    ),
    "a checkpoint's prefixes": lambda adapter: written(
        adapter,
        {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."},
        DOWN_UP,
        has_alpha=True,
    ),
    "OneTrainer's own, dotted": lambda adapter: written(
        adapter, {"unet": "lora_unet.", "text_encoder": "lora_te."}, DOWN_UP, has_alpha=True
    ),
    "kohya's, underscored": flat,
}


def unchanged() -> Tensors:
    """What ComfyUI's extraction writes beside the pairs: differences of norms and biases, pairs of modules
    that the text encoder has there and not here; all of them nothing.
    """
    text = "text_encoders.clip_l.transformer.text_model"
    return {
        "diffusion_model.out.0.diff": torch.zeros(16),
        "diffusion_model.out.0.diff_b": torch.zeros(16),
        f"{text}.final_layer_norm.diff": torch.zeros(24),
        f"{text}.embeddings.token_embedding.lora_down.weight": torch.randn(4, 24),
        f"{text}.embeddings.token_embedding.lora_up.weight": torch.zeros(100, 4),
    }


def by_name(adapter: Adapter) -> dict[Key, LoraLayer]:
    return {
        (part, underscored(name)): layer for (part, name), layer in adapter.layers.items() if layer.up.any()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_with_ldms_names_holds_the_same_updates_and_draws_alike(
    small_sd15: UNet2DConditionModel, plain: StableDiffusion, adapter: Adapter, tmp_path: Path, layout: str
) -> None:
    save_file(LAYOUTS[layout](adapter), tmp_path / "a.safetensors")
    read, expected = read_adapter(tmp_path / "a.safetensors"), adapter
    if "ORIGINAL" in layout:  # which has no place for a text encoder
        expected = Adapter({key: layer for key, layer in adapter.layers.items() if key[0] == "unet"})
    found, wanted = by_name(read), by_name(expected)
    assert found.keys() == wanted.keys()
    for key, layer in wanted.items():
        assert error(found[key].delta(), layer.delta()) <= 1e-6, key
    outputs = []
    for one in (read, expected):
        unet, text_encoder = copy.deepcopy(small_sd15), copy.deepcopy(plain.encoders["text_encoder"])
        MergedAdapter(one, {"unet": unet, "text_encoder": text_encoder}, SD1).set_scale(0.7)
        query = text_encoder.get_submodule("encoder.layers.0.self_attn.q_proj").weight
        outputs.append((unet_output(unet, plain), query))
    assert error(outputs[0][0], outputs[1][0]) <= 1e-5
    assert error(outputs[0][1], outputs[1][1]) <= 1e-6


def test_training_goes_on_from_a_file_with_ldms_names(
    small_sd15: UNet2DConditionModel, adapter: Adapter, tmp_path: Path
) -> None:
    save_file(LAYOUTS["OneTrainer's ORIGINAL"](adapter), tmp_path / "a.safetensors")
    init = read_init_lora(str(tmp_path / "a.safetensors"))
    names = {name for component, name in adapter.layers if component == "unet"}
    assert set(init.module_names("unet", small_sd15)) == names


def test_an_ldm_doras_lengths_are_read_with_it(adapter: Adapter, tmp_path: Path) -> None:
    tensors = written(adapter, {"unet": "diffusion_model."}, A_B, has_alpha=True)
    lengths = {key.replace("alpha", "dora_scale"): None for key in tensors if key.endswith("alpha")}
    for key in lengths:
        up = tensors[key.replace("dora_scale", "lora_B.weight")]
        lengths[key] = torch.rand(len(up), *[1] * (up.ndim - 1)) + 0.5
    save_file(tensors | lengths, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    assert {tuple(layer.magnitude.shape[1:]) for layer in read.layers.values()} == {(1,), (1, 1, 1)}


# ---------------------------------------------------------------- biases and norms


def test_what_comfyui_trains_of_biases_and_norms_is_added_to_them(
    small_sd15: UNet2DConditionModel, adapter: Adapter, tmp_path: Path
) -> None:
    """ComfyUI's trainer moves them too; LyCORIS's train_norm writes norms as w_norm and b_norm."""
    torch.manual_seed(4)
    block = "input_blocks.1.1.transformer_blocks.0"
    differences = {
        f"diffusion_model.{block}.attn1.to_out.0.diff_b": torch.randn(16),
        "diffusion_model.out.2.diff_b": torch.randn(4),
        f"diffusion_model.{block}.norm1.diff": torch.randn(16),
        f"diffusion_model.{block}.norm1.diff_b": torch.randn(16),
        "lora_unet_up_blocks_3_resnets_2_norm1.w_norm": torch.randn(32),
        "lora_unet_up_blocks_3_resnets_2_norm1.b_norm": torch.randn(32),
    }
    places = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias",
        "conv_out.bias",
        "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.norm1.bias",
        "up_blocks.3.resnets.2.norm1.weight",
        "up_blocks.3.resnets.2.norm1.bias",
    ]
    path, unet = tmp_path / "a.safetensors", copy.deepcopy(small_sd15)
    unet_alone = {"unet": "diffusion_model."}
    save_file(written(adapter, unet_alone, DOWN_UP, has_alpha=True) | differences, path)
    merged = MergedAdapter(read_adapter(path), {"unet": unet}, SD1)
    merged.set_scale(0.5)
    for name, difference in zip(places, differences.values(), strict=True):
        expected = small_sd15.get_parameter(name) + 0.5 * difference
        torch.testing.assert_close(unet.get_parameter(name), expected)
    merged.set_scale(0.0)
    assert all(torch.equal(one, small_sd15.get_parameter(name)) for name, one in unet.named_parameters())
    with pytest.raises(UserError, match="changes 6 biases and norms too"):
        read_init_lora(str(path))


# ---------------------------------------------------------------- pairs of mixed shapes


@pytest.mark.parametrize("flat_part", ["lora_up", "lora_down"])
def test_a_convolutions_pair_may_be_half_flat(
    small_sd15: UNet2DConditionModel, adapter: Adapter, tmp_path: Path, flat_part: str
) -> None:
    """LyCORIS's DyLoRA writes down (r,in,1,1) and up (out,r)."""
    proj = {key: layer for key, layer in adapter.layers.items() if key[1].endswith(("proj_in", "attn1.to_q"))}
    tensors = kohya_tensors(Adapter(proj))
    for key, tensor in tensors.items():
        if flat_part in key:
            tensors[key] = tensor.flatten(1)
        elif tensor.ndim == 2 and "to_q" in key:
            tensors[key] = tensor[:, :, None, None]  # and a Linear's, half as a convolution's
    save_file(tensors, tmp_path / "a.safetensors")
    read = by_name(read_adapter(tmp_path / "a.safetensors"))
    unets = [copy.deepcopy(small_sd15) for _ in range(2)]
    for unet, one in zip(unets, (Adapter(read), Adapter(proj)), strict=True):
        MergedAdapter(one, {"unet": unet}, SD1).set_scale(1.0)
    for (_, name), layer in proj.items():
        before, found, wanted = (unet.get_submodule(name).weight for unet in (small_sd15, *unets))
        assert error(found - before, wanted - before) < 2e-3  # float16's rounding
        assert layer.delta().any()
