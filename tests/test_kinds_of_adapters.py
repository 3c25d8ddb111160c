"""An adapter of every kind of Stable Diffusion, with its text encoders: what is written is what was trained,
for the libraries' own loaders too; what is for another kind is refused by its name.
"""

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_interop import error
from tiny_models import save_tiny

from megaman.common.console import UserError
from megaman.common.kinds import KINDS, SD1, SD2, UNET, XL, Kind
from megaman.config.train import TrainConfig
from megaman.lora.adapter import Adapter, Key, LoraLayer, underscored
from megaman.lora.formats import diffusers_metadata, diffusers_tensors, kohya_tensors, peft_tensors
from megaman.lora.init_lora import read_init_lora
from megaman.lora.injection import adapter_of, inject, lora_modules
from megaman.lora.load import read_adapter
from megaman.lora.merge import MergedAdapter
from megaman.lora.save import write_adapter, write_kohya
from megaman.training.sampler import generator_of

Parts = dict[str, torch.nn.Module]
Tensors = dict[str, torch.Tensor]
Sums = dict[str, float]
SEED = 42
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)
FILES = ["adapter_model.safetensors", "megaman_lora.safetensors", "pytorch_lora_weights.safetensors"]
FORMS = [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 6}]


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """A tiny base of each kind on the disk."""
    root = tmp_path_factory.mktemp("kinds")
    return {kind: tiny_folder if kind is SD1 else save_tiny(kind, root / kind.folder) for kind in KINDS}


@pytest.fixture(scope="module")
def bases(folders: dict[Kind, Path]) -> dict[Kind, Parts]:
    """Their UNets and text encoders: to copy, never to change."""
    return {kind: parts_of(kind, pipeline_of(folder)) for kind, folder in folders.items()}


def pipeline_of(folder: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


def parts_of(kind: Kind, pipeline: DiffusionPipeline) -> Parts:
    return {part: getattr(pipeline, part).eval() for part in kind.parts}


def injected(base: Parts, kind: Kind, **settings: object) -> Parts:
    """A copy of the base's parts with an untrained adapter."""
    parts = copy.deepcopy(base)
    cfg = TrainConfig(**{"lora_rank": 4, "lora_alpha": 32, "lora_targets": "conv", **settings})
    inject(parts, cfg, kind, partial(generator_of, SEED))
    return parts


def moved(parts: Parts) -> Parts:
    """The same parts, with everything that trains away from where it begins."""
    torch.manual_seed(9)
    for model in parts.values():
        model.eval()
        for module in lora_modules(model).values():
            module.lora_B["default"].weight.data.normal_(std=0.1 / module.scaling["default"])
            for lengths in module.lora_magnitude_vector.values():
                lengths.weight.data *= 1 + 0.1 * torch.rand_like(lengths.weight)
    return parts


@pytest.fixture(scope="module")
def trained(bases: dict[Kind, Parts]) -> Iterator[Callable[..., Parts]]:
    """Gives a copy of the kind's parts with an adapter in which everything that trains has moved, made once
    of each form: to read, never to change.
    """
    made: list[tuple[Parts, Sums]] = []

    @cache
    def of(kind: Kind, **settings: object) -> Parts:
        parts = moved(injected(bases[kind], kind, **settings))
        made.append((parts, sums_of(parts)))
        return parts

    yield of
    assert all(sums_of(parts) == sums for parts, sums in made)


def sums_of(parts: Parts) -> Sums:
    """Tells whether anything in the parts was changed."""
    return {
        f"{part}.{name}": tensor.double().sum().item()
        for part, model in parts.items()
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def written(trained: Callable[..., Parts], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of what is written of such an adapter, written once of each form."""

    @cache
    def of(kind: Kind, **settings: object) -> Path:
        live, folder = trained(kind, **settings), tmp_path_factory.mktemp("written")
        write_adapter(adapter_of(live, kind), folder, live=live)
        return folder

    return of


def read_by(encoder: torch.nn.Module, layer: int, has_pooled: bool) -> list[torch.Tensor]:
    """What a UNet is told of a text by one encoder."""
    ids = torch.arange(1, 15).reshape(2, 7)
    told = encoder(ids, output_hidden_states=True)
    states = told.last_hidden_state if layer == -1 else told.hidden_states[layer]
    return [states, told.text_embeds] if has_pooled else [states]


@torch.no_grad()
def outputs(kind: Kind, parts: Parts) -> dict[str, torch.Tensor]:
    """What each part says to fixed inputs."""
    torch.manual_seed(5)
    unet = parts[UNET]
    text = torch.randn(2, 7, unet.config.cross_attention_dim)
    more = {}
    if kind.has_sizes:
        more = {"added_cond_kwargs": {"text_embeds": torch.randn(2, 20), "time_ids": torch.rand(2, 6) * 32}}
    found = {UNET: unet(torch.randn(2, 4, 16, 16), torch.tensor([10, 700]), text, **more).sample}
    for encoder in kind.encoders:
        for i, states in enumerate(read_by(parts[encoder.part], encoder.layer, encoder.has_pooled)):
            found[f"{encoder.part} {i}"] = states
    return found


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    errors = {part: error(found[part], wanted[part]) for part in wanted}
    assert max(errors.values()) <= tolerance, errors


def assert_apart(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(error(found[part], other[part]) > 0.01 for part in found)


# ---------------------------------------------------------------- what is written


@EVERY_KIND
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_file_holds_the_live_update_of_every_part(
    trained: Callable[..., Parts], tmp_path: Path, kind: Kind, form: dict[str, object]
) -> None:
    live = trained(kind, **form)
    adapter = adapter_of(live, kind)
    written = write_adapter(adapter, tmp_path, live=live)
    pairs = {folder / name for folder in homes(kind, tmp_path) for name in (FILES[0], "adapter_config.json")}
    assert pairs | {tmp_path / name for name in FILES[1:]} <= set(written)
    assert all(path.is_file() for path in written)
    assert adapter.components == kind.parts
    modules = {part: dict(model.named_modules()) for part, model in live.items()}
    for path, tolerance in ((tmp_path, 1e-6), (tmp_path / FILES[1], 1e-3), (tmp_path / FILES[2], 1e-3)):
        read = read_adapter(path)
        assert read.layers.keys() == adapter.layers.keys()
        assert read.kind is (None if kind is SD1 else kind)  # whose tiny width tells nothing
        for (part, name), layer in read.layers.items():
            assert layer.alpha == pytest.approx(12 if "use_rslora" in form else 32)
            module = modules[part].get(name) or modules[part][name.removeprefix("text_model.")]
            assert error(layer.delta(), module.get_delta_weight("default").detach()) <= tolerance
        assert read.digest == adapter.digest


def homes(kind: Kind, folder: Path) -> list[Path]:
    """Where PEFT's pairs lie."""
    return [folder, *(folder / encoder.part for encoder in kind.encoders)]


@EVERY_KIND
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_a_merged_adapter_of_every_file_is_the_live_model(
    trained: Callable[..., Parts],
    written: Callable[..., Path],
    bases: dict[Kind, Parts],
    kind: Kind,
    form: dict[str, object],
) -> None:
    live = trained(kind, **form)
    expected, plain = outputs(kind, live), outputs(kind, bases[kind])
    assert_apart(plain, expected)
    folder = written(kind, **form)
    for path in (folder, folder / FILES[1], folder / FILES[2]):
        parts = copy.deepcopy(bases[kind])
        merged = MergedAdapter(read_adapter(path), parts, kind)
        assert merged.counts == {part: len(lora_modules(model)) for part, model in live.items()}
        merged.set_scale(1.0)
        assert_alike(outputs(kind, parts), expected, 1e-5 if path == folder else 2e-3)
        merged.set_scale(0.0)
        assert_alike(outputs(kind, parts), plain, 0)


@EVERY_KIND
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_diffusers_own_loader_gives_the_live_outputs(
    trained: Callable[..., Parts],
    written: Callable[..., Path],
    folders: dict[Kind, Path],
    kind: Kind,
    form: dict[str, object],
) -> None:
    live = trained(kind, **form)
    expected = outputs(kind, live)
    folder = written(kind, **form)
    for name in [None, *FILES[1:]][: 1 if form else 3]:  # of a DoRA, diffusers drops kohya's magnitudes
        pipeline = pipeline_of(folders[kind])
        pipeline.load_lora_weights(folder, **({} if name is None else {"weight_name": name}))
        assert_alike(outputs(kind, parts_of(kind, pipeline)), expected, 1e-5 if form else 2e-3)


@EVERY_KIND
def test_diffusers_layout_is_exact_with_its_metadata(
    trained: Callable[..., Parts], folders: dict[Kind, Path], tmp_path: Path, kind: Kind
) -> None:
    live = trained(kind)
    adapter = adapter_of(live, kind)
    header = diffusers_metadata(adapter)
    told = json.loads(header["lora_adapter_metadata"])
    for part, model in live.items():  # which diffusers takes for the names of that part's modules
        names = [name.removeprefix("text_model.") for name in lora_modules(model)]
        found = [name.removeprefix("text_model.") for name in told[f"{part}.target_modules"]]
        assert sorted(found) == sorted(names)
    save_file(diffusers_tensors(adapter), tmp_path / FILES[2], header)
    pipeline = pipeline_of(folders[kind])
    pipeline.load_lora_weights(tmp_path)
    assert_alike(outputs(kind, parts_of(kind, pipeline)), outputs(kind, live), 1e-5)
    assert read_adapter(tmp_path).digest == adapter.digest


@EVERY_KIND
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_pefts_own_loader_gives_the_live_outputs(
    trained: Callable[..., Parts],
    written: Callable[..., Path],
    bases: dict[Kind, Parts],
    kind: Kind,
    form: dict[str, object],
) -> None:
    live = trained(kind, **form)
    folder = written(kind, **form)
    parts = copy.deepcopy(bases[kind])
    for part, model in parts.items():
        place = {} if part == UNET else {"subfolder": part}
        parts[part] = PeftModel.from_pretrained(model, folder, **place)
    assert_alike(outputs(kind, parts), outputs(kind, live), 1e-5)


QUERY = "encoder.layers.1.self_attn.q_proj"
KEYS = {
    SD2: {
        ("kohya", "unet"): "lora_unet_down_blocks_0_attentions_0_proj_in",
        ("kohya", "text_encoder"): f"lora_te_text_model_{underscored(QUERY)}",
        ("diffusers", "text_encoder"): f"text_encoder.text_model.{QUERY}",
        ("peft", "text_encoder"): f"base_model.model.{QUERY}",
    },
    XL: {
        ("kohya", "unet"): "lora_unet_input_blocks_4_1_proj_in",
        ("diffusers", "unet"): "unet.down_blocks.1.attentions.0.proj_in",
        ("peft", "unet"): "base_model.model.down_blocks.1.attentions.0.proj_in",
        ("kohya", "text_encoder"): f"lora_te1_text_model_{underscored(QUERY)}",
        ("kohya", "text_encoder_2"): f"lora_te2_text_model_{underscored(QUERY)}",
        ("diffusers", "text_encoder"): f"text_encoder.text_model.{QUERY}",
        ("diffusers", "text_encoder_2"): f"text_encoder_2.text_model.{QUERY}",
        ("peft", "text_encoder"): f"base_model.model.{QUERY}",
        ("peft", "text_encoder_2"): f"base_model.model.text_model.{QUERY}",
    },
}


@pytest.mark.parametrize("kind", KEYS, ids=lambda kind: kind.folder)
def test_keys_are_those_that_each_tool_writes(trained: Callable[..., Parts], kind: Kind) -> None:
    adapter = adapter_of(trained(kind), kind)
    writers = {"kohya": kohya_tensors, "diffusers": diffusers_tensors, "peft": peft_tensors}
    ends = {"kohya": ".lora_down.weight", "diffusers": ".lora_A.weight", "peft": ".lora_A.weight"}
    for (layout, part), key in KEYS[kind].items():
        source = adapter.only(part) if layout == "peft" else adapter
        assert key + ends[layout] in writers[layout](source)
    dotted = "down_blocks.1.attentions.0.proj_in" if kind is XL else "down_blocks.0.attentions.0.proj_in"
    assert (UNET, dotted) in adapter.layers
    for encoder in kind.encoders:
        assert (encoder.part, f"text_model.{QUERY}") in adapter.layers


def test_a_file_of_stable_diffusion_1_has_one_text_encoder_without_a_number(
    trained: Callable[..., Parts],
) -> None:
    keys = kohya_tensors(adapter_of(trained(SD1), SD1))
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in keys
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in keys
    assert "lora_unet_up_blocks_0_upsamplers_0_conv.alpha" not in keys  # no target of ours
    assert {key.split("_")[1] for key in keys} == {"unet", "te"}


@EVERY_KIND
def test_a_part_that_a_file_lost_is_exit_4(trained: Callable[..., Parts], tmp_path: Path, kind: Kind) -> None:
    live = trained(kind)
    adapter = adapter_of(live, kind)
    lost = kind.encoders[-1].part
    layers = {key: layer for key, layer in adapter.layers.items() if key[0] != lost}
    with pytest.raises(UserError, match="every module is gone") as raised:
        write_adapter(Adapter(layers, {}, kind), tmp_path, live=live)
    assert raised.value.exit_code == 4
    key = next(key for key in adapter.layers if key[0] == lost)
    layers = {**adapter.layers, key: LoraLayer(adapter.layers[key].down, adapter.layers[key].up, 8.0)}
    with pytest.raises(UserError, match=f"{lost}/adapter_model.*update of {lost} .* differs by 75.0%"):
        write_adapter(Adapter(layers, {}, kind), tmp_path, live=live)


# ---------------------------------------------------------------- what others write


def renamed(adapter: Adapter, prefixes: dict[str, str], names: Callable[[Key], str]) -> Tensors:
    tensors = {}
    for key, layer in adapter.layers.items():
        name = prefixes[key[0]] + names(key)
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def xls_own(adapter: Adapter) -> Adapter:
    """With modules that we don't train: the second encoder's projection, the sizes' embedding."""
    extra = {
        ("text_encoder_2", "text_projection"): LoraLayer(torch.randn(2, 20), torch.randn(20, 2), 1.0),
        (UNET, "add_embedding.linear_1"): LoraLayer(torch.randn(2, 68), torch.randn(32, 2), 1.0),
        (UNET, "up_blocks.0.upsamplers.0.conv"): LoraLayer(
            torch.randn(2, 16, 3, 3), torch.randn(16, 2, 1, 1), 1.0
        ),
    }
    return Adapter({**adapter.layers, **extra}, {}, XL)


LDM = {
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.attentions.0": "middle_block.1",
    **{f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for i in (0, 1) for j in range(3)},
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "add_embedding.linear_1": "label_emb.0.0",
}  # of XL


def in_ldm(key: Key) -> str:
    component, name = key
    place = next((place for place in LDM if component == UNET and name.startswith(place)), "")
    return LDM[place] + name.removeprefix(place) if place else name


COMFYUI = {
    UNET: "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
OMI = {UNET: "unet.", "text_encoder": "clip_l.", "text_encoder_2": "clip_g."}
DIFFUSERS = {UNET: "unet.", "text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
KOHYA = {UNET: "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
XLS_LAYOUTS: dict[str, Callable[[Adapter], Tensors]] = {
    "ComfyUI": lambda one: renamed(one, COMFYUI, in_ldm),
    "OneTrainer's OMI": lambda one: renamed(one, OMI, in_ldm),
    "diffusers, dotted": lambda one: renamed(one, DIFFUSERS, lambda key: key[1]),
    "kohya": lambda one: renamed(one, KOHYA, lambda key: underscored(in_ldm(key))),
    "kohya with diffusers' names": lambda one: renamed(one, KOHYA, lambda key: underscored(key[1])),
}


@pytest.mark.parametrize("layout", XLS_LAYOUTS)
def test_an_xl_file_of_any_tool_is_the_same_adapter(
    trained: Callable[..., Parts], bases: dict[Kind, Parts], tmp_path: Path, layout: str
) -> None:
    torch.manual_seed(1)
    adapter = xls_own(adapter_of(trained(XL, lora_targets="linear"), XL))
    save_file(XLS_LAYOUTS[layout](adapter), tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    assert read.layers.keys() == adapter.layers.keys()
    assert read.digest == adapter.digest
    assert read.kind is XL  # by its second encoder
    results = []
    for one in (read, adapter):
        parts = copy.deepcopy(bases[XL])
        MergedAdapter(one, parts, XL).set_scale(0.7)
        results.append(outputs(XL, parts))
    assert_alike(results[0], results[1], 0)
    assert_apart(results[0], outputs(XL, bases[XL]))
    write_kohya(read, tmp_path / "b.safetensors")  # read from underscores, written under the right places
    assert load_file(tmp_path / "b.safetensors").keys() == XLS_LAYOUTS["kohya"](adapter).keys()


def test_an_sd2_file_of_comfyui_is_read(trained: Callable[..., Parts], tmp_path: Path) -> None:
    adapter = adapter_of(trained(SD2), SD2)
    tensors = renamed(
        adapter, {UNET: "unet.", "text_encoder": "text_encoders.clip_h.transformer."}, lambda key: key[1]
    )
    save_file(tensors, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").layers.keys() == adapter.layers.keys()


def test_an_alpha_of_each_component_is_read_exactly(
    trained: Callable[..., Parts], folders: dict[Kind, Path], bases: dict[Kind, Parts], tmp_path: Path
) -> None:
    adapter = adapter_of(trained(XL, lora_targets="linear"), XL)
    alphas = {UNET: 6.0, "text_encoder": 2.0, "text_encoder_2": 9.0}
    kohya = {
        key: torch.tensor(alphas[component_of(key)]) if key.endswith(".alpha") else tensor
        for key, tensor in kohya_tensors(adapter).items()
    }
    save_file(kohya, tmp_path / "kohya.safetensors")
    told = {
        f"{part}.{field}": value
        for part, alpha in alphas.items()
        for field, value in (("r", 4), ("lora_alpha", alpha))
    }
    for part in alphas:
        told[f"{part}.target_modules"] = [
            name.removeprefix("text_model.") for home, name in adapter.layers if home == part
        ]
    save_file(
        diffusers_tensors(adapter),
        tmp_path / "diffusers.safetensors",
        {"lora_adapter_metadata": json.dumps(told)},
    )
    for name, tolerance in (("kohya", 2e-3), ("diffusers", 1e-5)):
        read = read_adapter(tmp_path / f"{name}.safetensors")
        assert {(part, layer.alpha) for (part, _), layer in read.layers.items()} == set(alphas.items())
        pipeline, parts = pipeline_of(folders[XL]), copy.deepcopy(bases[XL])
        pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
        MergedAdapter(read, parts, XL).set_scale(1.0)
        assert_alike(outputs(XL, parts), outputs(XL, parts_of(XL, pipeline)), tolerance)


def component_of(key: str) -> str:
    homes = {"lora_unet_": UNET, "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
    return next(part for home, part in homes.items() if key.startswith(home))


def test_a_pattern_of_a_flattened_encoder_finds_its_module(
    trained: Callable[..., Parts], tmp_path: Path
) -> None:
    write_adapter(adapter_of(trained(XL), XL), tmp_path)
    config = tmp_path / "text_encoder" / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "lora_alpha": 32, "alpha_pattern": {f"^{QUERY}": 5.0}}))
    layers = read_adapter(tmp_path).layers
    assert {name for (_, name), layer in layers.items() if layer.alpha == 5} == {f"text_model.{QUERY}"}
    assert read_adapter(tmp_path / "text_encoder_2").components == ("text_encoder_2",)


# ---------------------------------------------------------------- for another base


@pytest.mark.parametrize("made_for", [SD2, XL], ids=lambda kind: kind.folder)
@EVERY_KIND
def test_an_adapter_of_another_kind_is_refused_by_both_names(
    written: Callable[..., Path], bases: dict[Kind, Parts], made_for: Kind, kind: Kind
) -> None:
    folder = written(made_for)
    for path in (folder, folder / FILES[1]):
        if made_for is kind:
            MergedAdapter(read_adapter(path), copy.deepcopy(bases[kind]), kind)
            continue
        told = f"made for {made_for.name}, this base is {kind.name}. Name its own with --base_model."
        with pytest.raises(UserError, match=told) as raised:
            MergedAdapter(read_adapter(path), copy.deepcopy(bases[kind]), kind)
        assert raised.value.exit_code == 4
        told = f"made for {made_for.name}, this base is {kind.name}. Name a base of its kind"
        init = read_init_lora(str(path), made_for.parts)
        with pytest.raises(UserError, match=told) as raised:
            inject(copy.deepcopy(bases[kind]), TrainConfig(), kind, partial(generator_of, SEED), init)
        assert raised.value.exit_code == 4


@EVERY_KIND
def test_a_file_that_says_nothing_is_known_by_the_width_of_its_text(tmp_path: Path, kind: Kind) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    pair = {
        f"{name}.lora_down.weight": torch.ones(4, kind.text_width),
        f"{name}.lora_up.weight": torch.ones(640, 4),
    }
    save_file(pair, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").kind is kind
    save_file(
        {key.replace("attn2", "attn1"): tensor for key, tensor in pair.items()}, tmp_path / "b.safetensors"
    )
    assert read_adapter(tmp_path / "b.safetensors").kind is None


def test_a_relative_of_unknown_kind_is_judged_by_its_shapes(
    trained: Callable[..., Parts], bases: dict[Kind, Parts]
) -> None:
    adapter = adapter_of(trained(SD2, lora_targets="attention"), None)
    MergedAdapter(adapter, copy.deepcopy(bases[SD2]), None)
    with pytest.raises(UserError, match="its text is 28 wide, this base's 24"):
        MergedAdapter(adapter.only(UNET), copy.deepcopy(bases[SD1]), SD1)


def test_modules_that_the_base_does_not_have_are_counted(
    trained: Callable[..., Parts], bases: dict[Kind, Parts]
) -> None:
    adapter = adapter_of(trained(SD2), SD2)
    some = next(iter(adapter.layers.values()))
    foreign = {(UNET, f"down_blocks.9.attentions.{i}.proj_in"): some for i in range(2)}
    with pytest.raises(UserError, match=r"down_blocks.9.attentions.0.proj_in' and 1 others, which this base"):
        MergedAdapter(Adapter({**adapter.layers, **foreign}), copy.deepcopy(bases[SD2]), SD2)
    with pytest.raises(UserError, match=r"text_encoder module .* and 11 others, which this base"):
        MergedAdapter(adapter, {UNET: copy.deepcopy(bases[SD2][UNET])}, SD2)


def test_keys_that_no_layout_has_are_counted(trained: Callable[..., Parts], tmp_path: Path) -> None:
    tensors = kohya_tensors(adapter_of(trained(XL), XL))
    foreign = {f"lora_te4_x.lora_{half}.weight": torch.ones(4, 4) for half in ("down", "up")}
    save_file(tensors | foreign, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="2 of its keys can't be placed, such as 'lora_te4_x"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("folder", ["sdxl", 5])
def test_a_kind_that_is_none_is_damage(tmp_path: Path, folder: object) -> None:
    pair = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(1, 4),
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 1),
    }
    save_file(pair, tmp_path / "a.safetensors", {"megaman": json.dumps({"kind": folder})})
    with pytest.raises(UserError, match=r"metadata is damaged \(kind"):
        read_adapter(tmp_path / "a.safetensors")


# ---------------------------------------------------------------- what is trained


@EVERY_KIND
def test_an_untrained_adapter_is_the_base_and_a_step_moves_every_b(
    bases: dict[Kind, Parts], kind: Kind
) -> None:
    parts = injected(bases[kind], kind)
    assert_alike(outputs(kind, parts), outputs(kind, bases[kind]), 0)
    encoders = [read_by(parts[e.part], e.layer, e.has_pooled) for e in kind.encoders]
    text = torch.cat([states for states, *_ in encoders], dim=-1)
    more = {}
    if kind.has_sizes:
        more = {"added_cond_kwargs": {"text_embeds": encoders[-1][1], "time_ids": torch.rand(2, 6)}}
    parts[UNET](
        torch.randn(2, 4, 16, 16), torch.tensor([10, 700]), text, **more
    ).sample.square().sum().backward()
    for part, model in parts.items():
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
        for name, module in lora_modules(model).items():
            up = module.lora_B["default"].weight
            assert up.dtype == torch.float32
            assert up.grad is not None and up.grad.any(), f"{part} {name}"


@EVERY_KIND
def test_what_is_trained_is_float32_on_a_half_precision_base(bases: dict[Kind, Parts], kind: Kind) -> None:
    half = {part: copy.deepcopy(model).to(torch.bfloat16) for part, model in bases[kind].items()}
    parts = injected(half, kind, use_dora=True)
    for model in parts.values():
        dtypes = {parameter.requires_grad: set() for parameter in model.parameters()}
        for parameter in model.parameters():
            dtypes[parameter.requires_grad].add(parameter.dtype)
        assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
        for module in lora_modules(model).values():
            weight = module.get_base_layer().weight.float()
            lengths = module.lora_magnitude_vector["default"].weight.flatten()
            torch.testing.assert_close(lengths, weight.flatten(1).norm(dim=1))


def test_of_an_encoder_all_four_of_attention_and_only_read_layers_are_trained(
    bases: dict[Kind, Parts],
) -> None:
    for targets, ends in (("attention", 4), ("attention+ff", 6), ("linear", 6), ("conv", 6)):
        parts = injected(bases[XL], XL, lora_targets=targets)
        layers = {part: text_layers(parts[part]) for part in ("text_encoder", "text_encoder_2")}
        assert layers == {
            "text_encoder": dict.fromkeys((0, 1), ends),  # of three
            "text_encoder_2": dict.fromkeys((0, 1, 2), ends),  # the last is read for the pooled vector
        }
    assert text_layers(injected(bases[SD2], SD2, lora_targets="attention")["text_encoder"]) == {0: 4, 1: 4}


def text_layers(model: torch.nn.Module) -> dict[int, int]:
    """How many modules of each layer are wrapped."""
    numbers = [int(name.split("layers.")[1].split(".")[0]) for name in lora_modules(model)]
    return {number: numbers.count(number) for number in numbers}


@EVERY_KIND
def test_the_numbers_that_a_begins_with_hang_on_seed_part_and_place_alone(
    bases: dict[Kind, Parts], kind: Kind
) -> None:
    for names in (kind.parts, kind.parts[:1], kind.parts[1:]):
        parts = injected({name: bases[kind][name] for name in names}, kind, lora_targets="attention")
        for part, model in parts.items():
            purpose = "lora" if part == UNET else f"lora {part}"
            for number, module in enumerate(lora_modules(model).values()):
                down = module.lora_A["default"].weight
                drawn = torch.randn(down.shape, generator=generator_of(SEED, purpose, number)) / 4
                assert torch.equal(down, drawn)


# ---------------------------------------------------------------- going on from an adapter


@EVERY_KIND
@pytest.mark.parametrize("form", [{}, {"use_dora": True, "lora_targets": "attention"}], ids=str)
def test_training_goes_on_from_every_part(
    trained: Callable[..., Parts],
    written: Callable[..., Path],
    bases: dict[Kind, Parts],
    kind: Kind,
    form: dict[str, object],
) -> None:
    live = trained(kind, **form)
    folder = written(kind, **form)
    for path, tolerance in ((folder, 1e-5), (folder / FILES[1], 2e-3)):
        init = read_init_lora(str(path), kind.parts)
        cfg = TrainConfig(**init.settings(False))
        wanted = (4, 32, form.get("lora_targets", "conv"))
        assert (cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets) == wanted
        parts = copy.deepcopy(bases[kind])
        inject(parts, cfg, kind, partial(generator_of, SEED), init)
        assert_alike(
            outputs(kind, {name: part.eval() for name, part in parts.items()}), outputs(kind, live), tolerance
        )


@EVERY_KIND
def test_a_run_of_the_unet_alone_refuses_to_lose_an_encoder(
    trained: Callable[..., Parts], written: Callable[..., Path], bases: dict[Kind, Parts], kind: Kind
) -> None:
    adapter = adapter_of(trained(kind), kind)
    folder = written(kind)
    count = len(adapter.layers) - len(adapter.only(UNET).layers)
    with pytest.raises(UserError, match=f"changes {count} modules of text encoders too") as raised:
        read_init_lora(str(folder))
    assert raised.value.exit_code == 4
    init = read_init_lora(str(folder), kind.parts)
    with pytest.raises(UserError, match=f"changes {count} modules of text encoders too"):
        inject(
            {UNET: copy.deepcopy(bases[kind][UNET])}, TrainConfig(), kind, partial(generator_of, SEED), init
        )


def test_components_of_several_ranks_and_alphas_come_to_one_and_a_new_encoder_begins_fresh(
    trained: Callable[..., Parts], bases: dict[Kind, Parts], tmp_path: Path
) -> None:
    adapter = adapter_of(trained(XL, lora_rank=8, lora_alpha=8), XL)
    layers = {}
    for (part, name), layer in adapter.layers.items():
        rank, alpha = {UNET: (8, 8.0), "text_encoder": (2, 1.0), "text_encoder_2": (0, 0.0)}[part]
        if rank:
            layers[part, name] = LoraLayer(layer.down[:rank].clone(), layer.up[:, :rank].clone(), alpha)
    save_file(kohya_tensors(Adapter(layers, {}, XL)), tmp_path / "a.safetensors")
    init = read_init_lora(str(tmp_path / "a.safetensors"), XL.parts)
    cfg = TrainConfig(**init.settings(False))
    assert (cfg.lora_rank, cfg.lora_alpha) == (8, 8)
    parts, merged = copy.deepcopy(bases[XL]), copy.deepcopy(bases[XL])
    inject(parts, cfg, XL, partial(generator_of, SEED), init)
    MergedAdapter(Adapter(layers), merged, XL).set_scale(1.0)
    assert_alike(outputs(XL, parts), outputs(XL, merged), 2e-3)
    assert len(lora_modules(parts["text_encoder_2"])) == 18
    assert len({layer.alpha / layer.rank for layer in adapter_of(parts, XL).layers.values()}) == 1


# ---------------------------------------------------------------- what it tells of itself


def told_by(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


WORDS = {
    (SD1, "epsilon"): ("sd_v1", "False", "stable-diffusion-v1/lora", "diffusers", "SD1", "1"),
    (SD2, "epsilon"): ("sd_v2", "True", "stable-diffusion-v2-512/lora", "diffusers", "SD2", "1"),
    (SD2, "v_prediction"): ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "diffusers", "SD2", "1"),
    (XL, "v_prediction"): (
        "sdxl_base_v1-0",
        "False",
        "stable-diffusion-xl-v1-base/lora",
        "https://github.com/Stability-AI/generative-models",
        "SDXL",
        "2",
    ),
}


@pytest.mark.parametrize(("kind", "prediction"), WORDS, ids=lambda word: getattr(word, "folder", word))
def test_a_true_base_is_said_in_the_words_that_tools_test_for(
    tmp_path: Path, kind: Kind, prediction: str
) -> None:
    about = {
        "base": "owner/model",
        "trigger": "mega man",
        "text_width": kind.text_width,
        "resolution": 768,
        "prediction_type": prediction,
        "config": {"text_encoder_lr": 1e-5, "learning_rate": 1e-4},
        "zero_snr": prediction != "epsilon",
    }
    names = ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]
    layers = {
        (UNET, name): LoraLayer(torch.ones(1, kind.text_width), torch.ones(2, 1), 1.0) for name in names
    }
    layers["text_encoder", f"text_model.{QUERY}"] = LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    write_adapter(Adapter(layers, about, kind), tmp_path)
    told = told_by(tmp_path / FILES[1])
    sidecar = json.loads((tmp_path / "megaman_lora.json").read_text())
    found = (
        told["ss_base_model_version"],
        told["ss_v2"],
        told["modelspec.architecture"],
        told["modelspec.implementation"],
        sidecar["sd version"],
        told["modelspec.encoder_layer"],
    )
    assert found == WORDS[kind, prediction]
    is_v = prediction == "v_prediction"
    assert told["modelspec.prediction_type"] == ("v" if is_v else "epsilon")
    assert (told.get("ss_v_parameterization"), told.get("ss_zero_terminal_snr")) == (
        ("True",) * 2 if is_v else (None,) * 2
    )
    assert told["modelspec.resolution"] == "768x768"
    assert told["ss_text_encoder_lr"] == "1e-05"
    assert "kind" not in json.loads(told["megaman"])
    assert read_adapter(tmp_path / FILES[1]).kind is kind
    card = (tmp_path / "README.md").read_text()
    assert ("import DiffusionPipeline" in card) == (kind is not SD1)
    assert "| modules | 2 (UNet 1, text_encoder 1) |" in card
    assert 'PeftModel.from_pretrained(pipe.text_encoder, "lora_weights", subfolder="text_encoder")' in card
    for code in card.split("```python\n")[1:]:
        compile(code.split("```")[0], "card", "exec")


def test_what_is_no_news_is_not_told(tmp_path: Path) -> None:
    layers = {(UNET, "mid_block.attentions.0.proj_in"): LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    about = {
        "text_width": 24,
        "prediction_type": "epsilon",
        "config": {"text_encoder_lr": 0.0},
        "zero_snr": False,
    }
    write_adapter(Adapter(layers, about, SD1), tmp_path)
    told = told_by(tmp_path / FILES[1])
    news = {
        "ss_text_encoder_lr",
        "ss_v_parameterization",
        "ss_zero_terminal_snr",
        "ss_base_model_version",
        "ss_v2",
    }
    assert not news & told.keys()
    assert json.loads(told["megaman"]) == about
    card = (tmp_path / "README.md").read_text()
    assert "| modules | 1 |" in card
    assert "from diffusers import StableDiffusionPipeline" in card
    assert "subfolder" not in card
    assert not (tmp_path / "text_encoder").exists()
