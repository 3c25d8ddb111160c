"""Adapters of the true Stable Diffusions 1.5, 2.1 and XL, whose modules are built without their numbers: how
many are trained, that every module has one name in every spelling, that every tool finds what it is given.
"""

import copy
import re
from functools import cache, partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_interop import a1111s_name, comfyuis_dictionary, kohyas_modules, ldm_modules, shape_of
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from megaman.common.kinds import KINDS, SD1, SD2, UNET, XL, Kind
from megaman.config.train import TrainConfig
from megaman.lora.adapter import Adapter, LoraLayer, underscored
from megaman.lora.formats import kohya_name, kohya_tensors
from megaman.lora.injection import TARGETS, inject, lora_modules, targets_of
from megaman.lora.names import canonical, diffusers_name, dotted, ldm_name
from megaman.training.sampler import generator_of

EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)
Shapes = dict[str, tuple[int, ...]]

BLOCKS = {"block_out_channels": (320, 640, 1280, 1280)}
UNETS = {
    SD1: {**BLOCKS, "cross_attention_dim": 768, "attention_head_dim": 8},
    SD2: {
        **BLOCKS,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    XL: {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
}
TEXT_SIZES = {768: (12, 12), 1024: (23, 16), 1280: (32, 20)}  # layers and heads by width
TEXT_WIDTHS = {SD1: (768,), SD2: (1024,), XL: (768, 1280)}


@cache
def unet_of(kind: Kind) -> UNet2DConditionModel:
    """Its modules without their numbers: to copy, never to change."""
    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[kind])


@cache
def encoders_of(kind: Kind) -> dict[str, torch.nn.Module]:
    """Its text encoders without their numbers."""
    found = {}
    for encoder, width in zip(kind.encoders, TEXT_WIDTHS[kind], strict=True):
        layers, heads = TEXT_SIZES[width]
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
        )
        with torch.device("meta"):
            found[encoder.part] = (CLIPTextModelWithProjection if encoder.has_pooled else CLIPTextModel)(
                config
            )
    return found


def shapes_in(model: torch.nn.Module) -> Shapes:
    """The weights of linear and convolution modules."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: tuple(one.weight.shape) for name, one in model.named_modules() if isinstance(one, kinds)}


# ---------------------------------------------------------------- how many

COUNTS = {
    SD1: {"attention": (128, None), "attention+ff": (160, None), "linear": (192, None), "conv": (250, None)},
    SD2: {
        "attention": (128, 1_659_904),
        "attention+ff": (160, 3_057_664),
        "linear": (192, 3_457_024),
        "conv": (250, 7_650_304),
    },
    XL: {
        "attention": (560, 11_612_160),
        "attention+ff": (700, 20_930_560),
        "linear": (722, 21_278_720),
        "conv": (767, 24_079_360),
    },
}
TEXT_COUNTS = {
    (SD1, "text_encoder"): (72, 1_327_104),
    (SD2, "text_encoder"): (138, 3_391_488),
    (XL, "text_encoder"): (66, 1_327_104 * 11 // 12),  # nobody reads the last layer
    (XL, "text_encoder_2"): (192, 5_898_240),
}


def sizes_at(rank: int, shapes: list[tuple[int, ...]]) -> int:
    """The parameters of pairs of this rank for weights of these shapes."""
    return sum(rank * (rows + torch.Size(rest).numel()) for rows, *rest in shapes)


@EVERY_KIND
@pytest.mark.parametrize("targets", TARGETS)
def test_as_many_modules_of_the_unet_are_trained_as_were_counted(kind: Kind, targets: str) -> None:
    shapes = shapes_in(unet_of(kind))
    names = targets_of(UNET, unet_of(kind), targets, kind)
    count, parameters = COUNTS[kind][targets]
    assert len(names) == len(set(names)) == count
    if parameters is not None:
        assert sizes_at(8, [shapes[name] for name in names]) == parameters


@pytest.mark.parametrize(("kind", "part"), TEXT_COUNTS, ids=lambda word: getattr(word, "folder", word))
def test_as_many_modules_of_an_encoder_are_trained_as_were_counted(kind: Kind, part: str) -> None:
    model = encoders_of(kind)[part]
    shapes = shapes_in(model)
    count, parameters = TEXT_COUNTS[kind, part]
    for targets in ("attention+ff", "linear", "conv"):
        names = targets_of(part, model, targets, kind)
        assert (len(names), sizes_at(8, [shapes[name] for name in names])) == (count, parameters)
    assert len(targets_of(part, model, "attention", kind)) == count * 4 // 6


def test_peft_wraps_just_these_of_xl() -> None:
    unet = copy.deepcopy(unet_of(XL))
    cfg = TrainConfig(lora_rank=8, lora_alpha=8, lora_targets="conv")
    inject({UNET: unet}, cfg, XL, partial(generator_of, 1))
    assert list(lora_modules(unet)) == targets_of(UNET, unet_of(XL), "conv", XL)
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    assert trained == COUNTS[XL]["conv"][1]


# ---------------------------------------------------------------- names


def whole_ldm(kind: Kind) -> Shapes:
    """As ldm_modules, with what lies before and behind the blocks."""
    ends: Shapes = {
        "input_blocks.0.0": (320, 4, 3, 3),
        "time_embed.0": (1280, 320),
        "time_embed.2": (1280, 1280),
        "out.2": (4, 320, 3, 3),
    }
    added: Shapes = {"label_emb.0.0": (1280, 2816), "label_emb.0.2": (1280, 1280)}
    return ends | (added if kind is XL else {}) | ldm_modules(kind)


@EVERY_KIND
def test_every_module_has_just_one_name_in_ldm_and_back(kind: Kind) -> None:
    shapes, wanted = shapes_in(unet_of(kind)), whole_ldm(kind)
    names = {name: ldm_name(name, kind) for name in shapes}
    assert len(shapes) == len(wanted) == (794 if kind is XL else 282)
    assert {names[name]: shape for name, shape in shapes.items()} == wanted
    for name, ldm in names.items():
        assert diffusers_name(ldm) == diffusers_name(underscored(ldm)) == name


@EVERY_KIND
def test_underscores_are_never_taken_for_another_module(kind: Kind) -> None:
    for part, model in {UNET: unet_of(kind), **encoders_of(kind)}.items():
        names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        assert len({underscored(name) for name in names}) == len(names)
        assert {dotted(underscored(name)) for name in names} == names
        keys = {canonical(part, name) for name in names}
        assert len({underscored(key) for key in keys}) == len(keys) == len(names)
        assert {canonical(part, underscored(key)) for key in keys} == keys
        assert all(key.startswith("text_") for key in keys if part != UNET)


def test_what_ldm_has_no_name_for_is_a_bug() -> None:
    with pytest.raises(ValueError, match="LDM has no name"):
        ldm_name("down_blocks.4.resnets.0.conv1", XL)


# ---------------------------------------------------------------- who finds what


@cache
def file_of(kind: Kind) -> dict[str, torch.Tensor]:
    """What is written for all that can be trained, at rank 1: our keys and shapes around zeros."""
    layers = {}
    for part, model in {UNET: unet_of(kind), **encoders_of(kind)}.items():
        shapes = shapes_in(model)
        for name in targets_of(part, model, "conv", kind):
            rows, *rest = shapes[name]
            up = torch.zeros(rows, 1, *[1] * len(rest[1:]))
            layers[part, canonical(part, name)] = LoraLayer(torch.zeros(1, *rest), up, 1.0)
    return kohya_tensors(Adapter(layers, {}, kind))


def modules_of(kind: Kind, home: str) -> Shapes:
    """The modules that the file names, and the shapes of their updates."""
    tensors = file_of(kind)
    names = {key.split(".")[0] for key in tensors if key.startswith(home)}
    parts = ("lora_down.weight", "lora_up.weight")
    return {name: shape_of(*(tensors[f"{name}.{part}"] for part in parts)) for name in names}


def kohyas(kind: Kind) -> Shapes:
    """kohya's names: of XL, whose UNet it builds itself, those of its own modules; else diffusers'."""
    if kind is not XL:
        return {name: tuple(shape) for name, shape in kohyas_modules(unet_of(kind)).items()}
    outside = ("input_blocks.0.", "time_embed.", "label_emb.", "out.")
    ldm = whole_ldm(kind)
    return {f"lora_unet_{underscored(name)}": ldm[name] for name in ldm if not name.startswith(outside)}


def a1111s(kind: Kind, name: str) -> tuple[int, ...]:
    """What A1111 applies a key to: patterns turn diffusers' names into LDM's; XL's files have those."""
    table = {f"diffusion_model_{underscored(ldm)}": shape for ldm, shape in whole_ldm(kind).items()}
    return table[a1111s_name(name).replace("lora_unet", "diffusion_model")]


def comfyuis(kind: Kind) -> Shapes:
    """ComfyUI's map: every module of the loaded LDM model under its own name, and under diffusers'."""
    ldm = whole_ldm(kind)
    inside = {name: ldm[name] for name in ldm if name.split(".")[0].endswith(("blocks", "block"))}
    inside.pop("input_blocks.0.0")
    own = {f"lora_unet_{underscored(name)}": shape for name, shape in ldm.items()}
    return own | {key: ldm[name] for key, name in comfyuis_dictionary(inside).items()}


STABILITYS = """
    input_blocks_1_0 down_blocks_0_resnets_0      input_blocks_2_0 down_blocks_0_resnets_1
    input_blocks_3_0_op down_blocks_0_downsamplers_0_conv
    input_blocks_4_0 down_blocks_1_resnets_0      input_blocks_4_1 down_blocks_1_attentions_0
    input_blocks_5_0 down_blocks_1_resnets_1      input_blocks_5_1 down_blocks_1_attentions_1
    input_blocks_6_0_op down_blocks_1_downsamplers_0_conv
    input_blocks_7_0 down_blocks_2_resnets_0      input_blocks_7_1 down_blocks_2_attentions_0
    input_blocks_8_0 down_blocks_2_resnets_1      input_blocks_8_1 down_blocks_2_attentions_1
    middle_block_0 mid_block_resnets_0            middle_block_1 mid_block_attentions_0
    middle_block_2 mid_block_resnets_1
    output_blocks_0_0 up_blocks_0_resnets_0       output_blocks_0_1 up_blocks_0_attentions_0
    output_blocks_1_0 up_blocks_0_resnets_1       output_blocks_1_1 up_blocks_0_attentions_1
    output_blocks_2_0 up_blocks_0_resnets_2       output_blocks_2_1 up_blocks_0_attentions_2
    output_blocks_2_2_conv up_blocks_0_upsamplers_0_conv
    output_blocks_3_0 up_blocks_1_resnets_0       output_blocks_3_1 up_blocks_1_attentions_0
    output_blocks_4_0 up_blocks_1_resnets_1       output_blocks_4_1 up_blocks_1_attentions_1
    output_blocks_5_0 up_blocks_1_resnets_2       output_blocks_5_1 up_blocks_1_attentions_2
    output_blocks_5_2_conv up_blocks_1_upsamplers_0_conv
    output_blocks_6_0 up_blocks_2_resnets_0       output_blocks_7_0 up_blocks_2_resnets_1
    output_blocks_8_0 up_blocks_2_resnets_2
"""  # in XL: Stability's place, diffusers'
RESNETS = {"_in_layers_2": "_conv1", "_out_layers_3": "_conv2", "_skip_connection": "_conv_shortcut"}


def invokeais(kind: Kind, name: str) -> tuple[int, ...]:
    """What InvokeAI applies a key to: a diffusers module; of XL the place, the key's longest beginning in a
    list, is exchanged.
    """
    table = {underscored(module): shape for module, shape in shapes_in(unet_of(kind)).items()}
    rest = name.removeprefix("lora_unet_")
    if kind is XL:
        words = STABILITYS.split()
        places = dict(zip(words[::2], words[1::2], strict=True))
        place = max((place for place in places if rest.startswith(place)), key=len)
        within = rest.removeprefix(place)
        rest = places[place] + RESNETS.get(within, within)
    return table[rest]


@EVERY_KIND
def test_every_tool_finds_every_module_of_the_unet(kind: Kind) -> None:
    names = modules_of(kind, "lora_unet_")
    assert len(names) == COUNTS[kind]["conv"][0]
    is_ldm = {name for name in names if re.match("lora_unet_(input|middle|output)_", name)}
    assert is_ldm == (set(names) if kind is XL else set())  # never both: diffusers would drop one set
    kohya, comfyui = kohyas(kind), comfyuis(kind)
    for name, shape in names.items():
        assert shape == kohya[name] == comfyui[name] == a1111s(kind, name) == invokeais(kind, name), name


PREFIXES = {SD1: {"lora_te": 12}, SD2: {"lora_te": 23}, XL: {"lora_te1": 12, "lora_te2": 32}}


@EVERY_KIND
def test_every_tool_finds_every_module_of_the_encoders(kind: Kind) -> None:
    """kohya, ComfyUI, InvokeAI and diffusers read the same names; A1111 all four of an attention or none."""
    names = modules_of(kind, "lora_te")
    found: dict[tuple[str, int], set[str]] = {}
    for name in names:
        prefix, layer, part = re.fullmatch(
            r"(lora_te\d?)_text_model_encoder_layers_(\d+)_(self_attn_(?:q|k|v|out)_proj|mlp_fc[12])", name
        ).groups()
        assert int(layer) < PREFIXES[kind][prefix]
        found.setdefault((prefix, int(layer)), set()).add(part)
    assert {prefix for prefix, _ in found} == PREFIXES[kind].keys()
    four = {f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")}
    assert all(parts == four | {"mlp_fc1", "mlp_fc2"} for parts in found.values())
    assert len(names) == sum(TEXT_COUNTS[key][0] for key in TEXT_COUNTS if key[0] is kind)


def test_the_names_of_xl_are_these() -> None:
    block = "transformer_blocks.9.attn2.to_k"
    for name, key in {
        f"down_blocks.2.attentions.1.{block}": f"input_blocks_8_1_{underscored(block)}",
        f"mid_block.attentions.0.{block}": f"middle_block_1_{underscored(block)}",
        "up_blocks.1.attentions.2.proj_out": "output_blocks_5_1_proj_out",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.2.resnets.0.conv_shortcut": "output_blocks_6_0_skip_connection",
        "add_embedding.linear_2": "label_emb_0_2",
    }.items():
        assert kohya_name(UNET, name, XL) == f"lora_unet_{key}"
    assert ldm_name("up_blocks.0.upsamplers.0.conv", SD1) == "output_blocks.2.1.conv"
