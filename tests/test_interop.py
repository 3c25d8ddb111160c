"""One adapter, every tool: PEFT's and diffusers' own loaders give the live model's output in every form, and
on true-size Stable Diffusion 1.5 every key names a module under the rules of kohya, A1111 and ComfyUI.
"""

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from adapted import inject_lora
from conftest import run_script
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_adapters import unet_output

from megaman.common.kinds import SD1, SD2, XL, Kind
from megaman.config.train import TrainConfig
from megaman.lora.formats import kohya_tensors
from megaman.lora.injection import TARGETS, adapter_of, lora_modules
from megaman.lora.load import read_adapter
from megaman.lora.merge import MergedAdapter
from megaman.lora.save import write_adapter, write_kohya
from megaman.model.stable_diffusion import StableDiffusion

FORMS = [
    *itertools.product([(4, 32), (8, 8)], TARGETS, [{}, {"use_dora": True}, {"use_rslora": True}]),
]
FILES = ["adapter_model.safetensors", "megaman_lora.safetensors", "pytorch_lora_weights.safetensors"]


def trained(base: StableDiffusion, **settings: object) -> UNet2DConditionModel:
    """A copy of the base's UNet with an adapter in which everything that trains has moved."""
    unet = copy.deepcopy(base.unet)
    inject_lora(unet, TrainConfig(**settings))
    torch.manual_seed(9)
    for module in lora_modules(unet).values():
        module.lora_B["default"].weight.data.normal_(std=0.1 / module.scaling["default"])
        if settings.get("use_dora"):
            lengths = module.lora_magnitude_vector["default"].weight
            lengths.data *= 1 + 0.1 * torch.rand_like(lengths)
    return unet.eval()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The size of the difference, as a share of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def plain_modules(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: getattr(module, "base_layer", module) for name, module in unet.named_modules()}


# ---------------------------------------------------------------- the libraries' own loaders


@pytest.mark.parametrize(("size", "targets", "form"), FORMS, ids=str)
def test_every_form_is_the_live_model_in_every_loader(
    plain: StableDiffusion, tmp_path: Path, size: tuple[int, int], targets: str, form: dict[str, bool]
) -> None:
    settings = {"lora_rank": size[0], "lora_alpha": size[1], "lora_targets": targets, **form}
    live = trained(plain, **settings)
    expected, untouched = unet_output(live, plain), unet_output(plain.unet, plain)
    assert error(untouched, expected) > 0.02  # the adapter does something at all
    write_adapter(adapter_of({"unet": live}, SD1), tmp_path, live={"unet": live})

    assert (
        error(unet_output(PeftModel.from_pretrained(copy.deepcopy(plain.unet), tmp_path), plain), expected)
        <= 1e-5
    )
    pipeline = StableDiffusionPipeline(
        **{
            "unet": copy.deepcopy(plain.unet),
            "vae": plain.vae,
            "text_encoder": plain.encoders["text_encoder"],
        },
        **{"tokenizer": plain.tokenizer, "scheduler": plain.scheduler, "safety_checker": None},
        **{"feature_extractor": None, "requires_safety_checker": False},
    )
    pipeline.load_lora_weights(tmp_path)
    assert len(lora_layers(pipeline.unet)) == len(lora_modules(live))
    assert error(unet_output(pipeline.unet, plain), expected) <= (1e-5 if "use_dora" in form else 1e-3)
    same = (tmp_path / FILES[1]).read_bytes() == (tmp_path / FILES[2]).read_bytes()
    assert same == ("use_dora" not in form)  # diffusers would drop kohya's magnitudes
    for name in FILES[:2] if same else FILES:
        unet = copy.deepcopy(plain.unet)
        merged = MergedAdapter(read_adapter(tmp_path / name), {"unet": unet}, SD1)
        merged.set_scale(1.0)
        assert error(unet_output(unet, plain), expected) <= (1e-5 if name == FILES[0] else 1e-3)


def lora_layers(unet: torch.nn.Module) -> list[str]:
    return [name for name, module in unet.named_modules() if getattr(module, "lora_A", None)]


FRESH_PROCESS = """
import sys
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file

base, *folders = sys.argv[1:]
for folder in folders:
    wanted = load_file(folder + "/expected.safetensors")

    def off(unet):
        with torch.no_grad():
            found = unet(wanted["noisy"], torch.tensor([10, 700]), wanted["text"]).sample
        return ((found - wanted["out"]).norm() / wanted["out"].norm()).item()

    plain = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    print(off(plain), off(PeftModel.from_pretrained(plain, folder)))
    for name in (None, "pytorch_lora_weights.safetensors"):
        pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
        pipe.load_lora_weights(folder, **({} if name is None else {"weight_name": name}))
        print(len(pipe.get_active_adapters()), off(pipe.unet))
assert not any(name.split(".")[0].startswith("megaman") for name in sys.modules)
"""


def test_a_program_with_those_libraries_alone_draws_as_the_live_model(
    plain: StableDiffusion, tiny_folder: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "lora", tmp_path / "dora"]
    for folder, is_dora in zip(folders, (False, True), strict=True):
        live = trained(plain, lora_rank=4, lora_alpha=32, lora_targets="conv", use_dora=is_dora)
        write_adapter(adapter_of({"unet": live}, SD1), folder, live={"unet": live})
        torch.manual_seed(5)
        noisy, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 24)
        wanted = {"noisy": noisy, "text": text, "out": unet_output(live, plain)}
        save_file(wanted, folder / "expected.safetensors")
    result = run_script("-c", FRESH_PROCESS, str(tiny_folder), *map(str, folders), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [[float(number) for number in line.split()] for line in result.stdout.splitlines()]
    for untouched, peft in lines[::3]:
        assert untouched > 0.1
        assert peft <= 1e-5
    for line, (adapters, off) in enumerate(lines[1:3] + lines[4:6]):
        assert adapters == 1
        assert off <= (1e-3 if line < 2 else 1e-5)


@pytest.mark.parametrize("form", [{}, {"use_dora": True}], ids=str)
def test_a_merge_is_pefts_own_merge_and_other_strengths_lie_on_the_line_through_it(
    plain: StableDiffusion, form: dict[str, bool]
) -> None:
    live = trained(plain, lora_rank=4, lora_alpha=32, lora_targets="conv", **form)
    adapter, unet = adapter_of({"unet": live}, SD1), copy.deepcopy(plain.unet)
    merged = MergedAdapter(adapter, {"unet": unet}, SD1)
    names = list(lora_modules(live))
    weights = {}
    for scale in (1.0, 0.5, -0.3, 0.0):
        merged.set_scale(scale)
        weights[scale] = {name: unet.get_submodule(name).weight.detach().clone() for name in names}
    for name in names:
        base = plain.unet.get_submodule(name).weight
        module = live.get_submodule(name)
        module.merge()
        change = module.get_base_layer().weight - base
        assert error(weights[1.0][name] - base, change) < 1e-5
        for scale in (0.5, -0.3):
            assert error(weights[scale][name] - base, scale * change) < 1e-4
        assert torch.equal(weights[0.0][name], base)


def test_a_dora_along_the_inputs_is_merged_as_its_makers_do(plain: StableDiffusion, tmp_path: Path) -> None:
    """LyCORIS's older files and OneTrainer's measure columns: dora_scale is (1,in) there."""
    live = trained(plain, lora_rank=4, lora_alpha=4)
    tensors, name = kohya_tensors(adapter_of({"unet": live}, SD1)), next(iter(lora_modules(live)))
    columns = live.get_submodule(name).in_features
    tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = torch.rand(1, columns) + 0.5
    save_file(tensors, tmp_path / "lycoris.safetensors")
    unet = copy.deepcopy(plain.unet)
    MergedAdapter(read_adapter(tmp_path / "lycoris.safetensors"), {"unet": unet}, SD1).set_scale(1.0)
    lengths = unet.get_submodule(name).weight.norm(dim=0)
    expected = tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"][0]
    torch.testing.assert_close(lengths, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- true-size Stable Diffusion 1.5


@pytest.fixture(scope="module")
def sd15() -> UNet2DConditionModel:
    """Its modules without their numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def sd15_file(unet: UNet2DConditionModel, targets: str, folder: Path) -> dict[str, torch.Tensor]:
    """What is written for it at rank 4, alpha 32: our keys and shapes around zeros."""
    live = copy.deepcopy(unet)
    inject_lora(live, TrainConfig(lora_rank=4, lora_alpha=32, lora_targets=targets))
    for module in lora_modules(live).values():
        for part in (module.lora_A, module.lora_B):
            part["default"].weight = torch.nn.Parameter(torch.zeros(part["default"].weight.shape))
    write_kohya(adapter_of({"unet": live}, SD1), folder / "sd15.safetensors")
    return load_file(folder / "sd15.safetensors")


def kohyas_modules(unet: UNet2DConditionModel) -> dict[str, torch.Size]:
    """kohya's own walk: the linear and convolution modules inside the classes that it replaces."""
    homes = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    found = {}
    for name, home in unet.named_modules():
        if type(home).__name__ in homes:
            for child, module in home.named_modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                    found[f"lora_unet.{name}.{child}".replace(".", "_")] = module.weight.shape
    return found


def ldm_modules(kind: Kind) -> dict[str, tuple[int, ...]]:
    """The blocks of a kind's UNet as the code that it was trained with builds them (CompVis',
    Stability's): their linear and convolution modules, and the shapes of the weights.
    """
    widths, depths, text = {
        SD1: ((320, 640, 1280, 1280), (1, 1, 1, 0), 768),
        SD2: ((320, 640, 1280, 1280), (1, 1, 1, 0), 1024),
        XL: ((320, 640, 1280), (0, 2, 10), 2048),
    }[kind]
    one_by_one = (1, 1) if kind is SD1 else ()
    found: dict[str, tuple[int, ...]] = {}

    def resnet(at: str, before: int, after: int) -> None:
        found[f"{at}.in_layers.2"] = (after, before, 3, 3)
        found[f"{at}.emb_layers.1"] = (after, 1280)
        found[f"{at}.out_layers.3"] = (after, after, 3, 3)
        if before != after:
            found[f"{at}.skip_connection"] = (after, before, 1, 1)

    def transformer(at: str, width: int, depth: int) -> None:
        found[f"{at}.proj_in"] = found[f"{at}.proj_out"] = (width, width, *one_by_one)
        for number in range(depth):
            block = f"{at}.transformer_blocks.{number}"
            for attention, source in (("attn1", width), ("attn2", text)):
                for part in ("to_q", "to_k", "to_v", "to_out.0"):
                    is_text = part in ("to_k", "to_v")
                    found[f"{block}.{attention}.{part}"] = (width, source if is_text else width)
            found[f"{block}.ff.net.0.proj"] = (8 * width, width)
            found[f"{block}.ff.net.2"] = (width, 4 * width)

    number, skips, last = 1, [320], 320
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for _ in range(2):
            resnet(f"input_blocks.{number}.0", last, width)
            if depth:
                transformer(f"input_blocks.{number}.1", width, depth)
            number, last = number + 1, width
            skips.append(width)
        if level < len(widths) - 1:
            found[f"input_blocks.{number}.0.op"] = (width, width, 3, 3)
            number += 1
            skips.append(width)
    resnet("middle_block.0", last, last)
    transformer("middle_block.1", last, depths[-1] or depths[-2])
    resnet("middle_block.2", last, last)
    for number in range(3 * len(widths)):
        level = len(widths) - 1 - number // 3
        width, depth = widths[level], depths[level]
        resnet(f"output_blocks.{number}.0", last + skips.pop(), width)
        if depth:
            transformer(f"output_blocks.{number}.1", width, depth)
        if number % 3 == 2 and level > 0:
            found[f"output_blocks.{number}.{2 if depth else 1}.conv"] = (width, width, 3, 3)
        last = width
    return found


RESNET_PARTS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def a1111s_name(key: str) -> str:
    """A1111's way from a file's name to a module of the LDM model: patterns, tried in turn."""

    def ending(kind: str, rest: str) -> str:
        return RESNET_PARTS.get(rest, rest).replace(".", "_") if kind == "resnets" else rest

    if found := re.fullmatch(r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", key):
        block, kind, number, rest = found.groups()
        at = 1 + int(block) * 3 + int(number)
        return f"diffusion_model_input_blocks_{at}_{int(kind == 'attentions')}_{ending(kind, rest)}"
    if found := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", key):
        kind, number, rest = found.groups()
        at = 1 if kind == "attentions" else int(number) * 2
        return f"diffusion_model_middle_block_{at}_{ending(kind, rest)}"
    if found := re.fullmatch(r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", key):
        block, kind, number, rest = found.groups()
        at = int(block) * 3 + int(number)
        return f"diffusion_model_output_blocks_{at}_{int(kind == 'attentions')}_{ending(kind, rest)}"
    return key


def comfyuis_dictionary(ldm: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """ComfyUI's exact names: lora_unet_<diffusers name> for every module of the loaded LDM model."""
    names = {}
    for name in ldm:
        side, *rest = name.split(".")
        if side == "middle_block":
            rest = ["0", *rest]
        number, slot, part = int(rest[0]), rest[1], ".".join(rest[2:])
        diffusers = {value: key for key, value in RESNET_PARTS.items()}.get(part, part)
        kind = "attentions" if "transformer" in part or "proj_" in part else "resnets"
        if side == "middle_block":
            at = f"mid_block.{kind}.{int(slot) // 2 if kind == 'resnets' else 0}"
        elif part == "op":
            at, diffusers = f"down_blocks.{number // 3 - 1}.downsamplers.0", "conv"
        elif part == "conv":
            at = f"up_blocks.{number // 3}.upsamplers.0"
        elif side == "input_blocks":
            at = f"down_blocks.{(number - 1) // 3}.{kind}.{(number - 1) % 3}"
        else:
            at = f"up_blocks.{number // 3}.{kind}.{number % 3}"
        names[f"lora_unet_{at}.{diffusers}".replace(".", "_")] = name
    return names


def shape_of(down: torch.Tensor, up: torch.Tensor) -> tuple[int, ...]:
    return (up.shape[0], *down.shape[1:])


COUNTS = {"attention": 128, "attention+ff": 160, "linear": 192, "conv": 250}


@pytest.mark.parametrize("targets", TARGETS)
def test_on_sd15_every_key_names_a_module_for_kohya_a1111_and_comfyui(
    sd15: UNet2DConditionModel, tmp_path: Path, targets: str
) -> None:
    tensors = sd15_file(sd15, targets, tmp_path)
    modules = {key.split(".")[0] for key in tensors}
    wanted = {
        f"lora_unet_{name}".replace(".", "_")
        for name, _ in sd15.named_modules()
        if name.endswith(TARGETS[targets])
    }
    assert modules == wanted
    assert len(modules) == COUNTS[targets]
    parts = (".lora_down.weight", ".lora_up.weight", ".alpha")
    assert tensors.keys() == {module + part for module in modules for part in parts}
    kohya, ldm = kohyas_modules(sd15), ldm_modules(SD1)
    a1111 = {f"diffusion_model.{name}".replace(".", "_"): shape for name, shape in ldm.items()}
    comfyui = comfyuis_dictionary(ldm)
    assert len(comfyui) == len(ldm) == len(kohya) == 192 + 80 + 6
    for module in modules:
        shape = shape_of(*(tensors[module + part] for part in parts[:2]))
        assert shape == tuple(kohya[module])  # kohya wants the very rank of its own layer: 4-D for 1x1 too
        assert shape == a1111[a1111s_name(module)]
        assert shape == ldm[comfyui[module]]
        assert tensors[module + ".alpha"].shape == ()
        assert tensors[module + ".alpha"] / tensors[module + parts[0]].shape[0] == 8
