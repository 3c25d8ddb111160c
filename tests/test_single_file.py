"""Single files, as web UIs keep their models: told by their header, loaded without a network."""

import json
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl
from safetensors.torch import load_file, save_file
from single_files import (
    encoder_of_true_shape,
    unet_of_true_shape,
    write_single_file,
    write_true_shape,
)
from tiny_models import WIDTHS, save_tiny

import generate_megaman
from megaman.common.console import Exit, UserError
from megaman.common.kinds import KINDS, SD1, SD2, XL, Kind
from megaman.model import detection, single_file
from megaman.model.detection import Header
from megaman.model.single_file import kind_in
from megaman.model.stable_diffusion import StableDiffusion, load_base, peek
from megaman.model.tokenizer import clip_tokenizer

TINY = {
    SD1.name: {"tensors": 208, "depths": (0, 0), "added": 0},
    SD2.name: {"tensors": 208, "depths": (0, 0), "added": 0},
    XL.name: {"tensors": 618, "depths": (1, 2), "added": 20 + 6 * 8},
}  # what the headers of tiny models tell


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a kind on the disk, and its kind as files of its size have it."""

    kind: Kind
    folder: Path

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def parts(self) -> tuple[str, ...]:
        return ("vae", *self.kind.parts)

    def as_file(self, file: Path, dtype: torch.dtype = torch.float32) -> Path:
        """The model in one file of this name: a copy of the one that is written once."""
        written = self.folder.with_suffix(f".{dtype}")
        if not written.is_file():
            write_single_file(self.folder, written, dtype)
        return Path(shutil.copyfile(written, file))


def tiny_of(kind: Kind, root: Path, patch: pytest.MonkeyPatch) -> Tiny:
    """A tiny model of this kind with CLIP's own vocabulary, as single files have it, and, while the test
    runs, a kind of its shape beside the true ones.
    """
    folder, width = root / f"tiny_{kind.folder}", WIDTHS[kind.name]
    if not folder.is_dir():
        save_tiny(kind, folder, clip_tokenizer())
    own = replace(kind, text_width=width, folder=str(folder))
    patch.setitem(detection.HEADERS, width, Header(own, **TINY[kind.name]))
    return Tiny(own, folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of this module lie."""
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.folder)
def tiny(request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A tiny model of each kind."""
    return tiny_of(request.param, root, monkeypatch)


@pytest.fixture
def tiny_sd1(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A tiny Stable Diffusion 1.x."""
    return tiny_of(SD1, root, monkeypatch)


@pytest.fixture
def tiny_xl(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A tiny XL."""
    return tiny_of(XL, root, monkeypatch)


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


def parts_in(file: Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The parts of a single file, whatever its kind."""
    return single_file.load_file(file, kind_in(file), dtype)


def assert_equal(ours: DiffusionPipeline, theirs: DiffusionPipeline, parts: tuple[str, ...]) -> None:
    """To the bit."""
    for part in parts:
        left, right = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), part


def test_a_single_file_of_each_kind_loads_to_the_bit_without_a_network(
    tiny: Tiny, no_network: None, tmp_path: Path
) -> None:
    file = tiny.as_file(tmp_path / "tiny.safetensors")
    assert kind_in(file) is tiny.kind
    single, whole = parts_in(file), DiffusionPipeline.from_pretrained(tiny.folder)
    assert type(single) is type(whole)
    assert_equal(single, whole, tiny.parts)
    assert all(not getattr(single, part).training for part in tiny.parts)
    for encoder in tiny.kind.encoders:
        if encoder.pads_with:  # the tiny folder of 2.x does not, the true one does
            getattr(whole, encoder.part.replace("text_encoder", "tokenizer")).pad_token = encoder.pads_with
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    drawn = [
        pipeline("mega man", generator=torch.Generator().manual_seed(0), **settings).images
        for pipeline in (single, whole)
    ]
    assert torch.equal(*drawn)


def test_a_file_loads_as_the_base_that_its_folder_is(tiny: Tiny, no_network: None, tmp_path: Path) -> None:
    whole = loaded(tiny.folder)
    single = loaded(tiny.as_file(tmp_path / "tiny_v1.safetensors"))
    assert single.name == "tiny_v1.safetensors"
    assert single.digest == whole.digest
    assert_equal(single, whole, ("unet", "vae"))
    texts = ["mega man!", ""]
    assert torch.equal(single.embed(texts).states, whole.embed(texts).states)
    for name in ("prediction_type", "beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        assert single.scheduler.config[name] == whole.scheduler.config[name]


def test_a_file_in_half_precision_keeps_its_numbers_and_the_vae_is_float32(
    tiny: Tiny, tmp_path: Path
) -> None:
    file = tiny.as_file(tmp_path / "a.safetensors", torch.float16)
    base = loaded(file, torch.bfloat16)
    assert (base.vae.dtype, base.unet.dtype, base.encoders["text_encoder"].dtype) == (
        *(torch.float32, torch.bfloat16, torch.bfloat16),
    )
    weight = base.vae.decoder.conv_in.weight
    assert torch.equal(weight, weight.half().float())


def test_parts_lie_in_the_files_own_pages_until_they_are_cast(tiny: Tiny, tmp_path: Path) -> None:
    file = tiny.as_file(tmp_path / "a.safetensors", torch.float16)
    parts = parts_in(file, torch.bfloat16)
    assert parts.vae.dtype == torch.float32
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    pages = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    for part in tiny.kind.parts:
        for name, tensor in getattr(parts, part).state_dict().items():
            assert tensor.dtype == torch.float16
            is_mapped = any(int(begin, 16) <= tensor.data_ptr() < int(end, 16) for begin, end in pages)
            assert is_mapped or not lines or "text_projection" in name, name  # which is stored transposed


def test_a_part_in_two_precisions_comes_in_the_one_that_is_asked_for(tiny_xl: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny_xl.as_file(tmp_path / "a.safetensors", torch.float16))
    for key in ("model.diffusion_model.out.0.weight", "conditioner.embedders.1.model.ln_final.weight"):
        tensors[key] = tensors[key].float()
    save_file(tensors, tmp_path / "b.safetensors")
    parts = parts_in(tmp_path / "b.safetensors", torch.bfloat16)
    found = [
        {tensor.dtype for tensor in getattr(parts, name).state_dict().values()} for name in tiny_xl.parts
    ]
    assert found == [{torch.float32}, {torch.bfloat16}, {torch.float16}, {torch.bfloat16}]


def test_no_picture_of_an_xl_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers writes a watermark into XL's pictures where a library for it is installed, unless told not
    to.
    """
    monkeypatch.setattr(pipeline_stable_diffusion_xl, "is_invisible_watermark_available", lambda: True)
    index = json.loads((XL.config / "model_index.json").read_text())
    assert index["add_watermarker"] is False
    parts = dict.fromkeys(("vae", "unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    assert DiffusionPipeline.from_pretrained(str(XL.config), **parts).watermark is None


def test_a_single_file_is_trained_on_and_drawn_with_without_a_network(
    tiny: Tiny, no_network: None, train: Callable[..., Path], tmp_path: Path
) -> None:
    file = tiny.as_file(tmp_path / "hero base.safetensors")
    short = ("--max_train_steps", "2")
    whole = load_file(
        train(*short, "--pretrained_model_name", str(tiny.folder)) / "adapter_model.safetensors"
    )
    weights = train(*short, "--pretrained_model_name", str(file))
    single = load_file(weights / "adapter_model.safetensors")
    assert all(torch.equal(single[key], whole[key]) for key in whole)
    cfg = generate_megaman.GenerateConfig(
        lora_path=str(weights), output_dir=str(tmp_path / "drawn"), prompts=["a"], num_inference_steps=1
    )
    assert generate_megaman.generate(cfg).is_file()


def test_a_peek_into_a_file_knows_its_cell_and_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    known = peek(str(tiny.as_file(tmp_path / "a.safetensors")))
    assert known.kind is tiny.kind
    assert known.cell_px == (8 if tiny.kind.has_sizes else 4)
    assert len(known.tokenizer) == 49408


def without(file: Path, key: str) -> Path:
    """A copy of the file that lacks a tensor."""
    tensors = load_file(file)
    del tensors[key]
    copy = file.with_stem("lacking")
    save_file(tensors, copy)
    return copy


@pytest.mark.parametrize(
    "key",
    [
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_file_that_lacks_a_tensor_is_refused(tiny_sd1: Tiny, tmp_path: Path, key: str) -> None:
    file = without(tiny_sd1.as_file(tmp_path / "a.safetensors"), key)
    with pytest.raises(UserError) as error:
        loaded(file)
    assert error.value.exit_code == Exit.MODEL
    assert str(error.value).startswith(f"{file}: this base model can't be loaded (")


@pytest.mark.parametrize(
    "key",
    [
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.2.mlp.fc1.weight",
        "first_stage_model.quant_conv.weight",
    ],
)
def test_no_tensor_of_an_xl_is_left_without_numbers(tiny_xl: Tiny, tmp_path: Path, key: str) -> None:
    file = without(tiny_xl.as_file(tmp_path / "a.safetensors"), key)
    part = {"0": "text_encoder", "1": "text_encoder_2"}.get(key.split(".")[2], "vae")
    with pytest.raises(ValueError, match=f"tensors of its {part} are missing"):
        parts_in(file)


def test_the_first_finetunes_names_of_a_text_encoder_are_read(tiny_sd1: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny_sd1.as_file(tmp_path / "a.safetensors"))
    old = {key.replace("transformer.text_model.", "transformer."): each for key, each in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "old.safetensors")
    whole = DiffusionPipeline.from_pretrained(tiny_sd1.folder)
    assert_equal(parts_in(tmp_path / "old.safetensors"), whole, tiny_sd1.parts)


# ---------------------------------------------------------------- true shapes


@pytest.mark.parametrize(
    ("kind", "parameters", "encoders"),
    [
        (SD1, 859_520_964, [123_060_480]),
        (SD2, 865_910_724, [340_387_840]),
        (XL, 2_567_463_684, [123_060_480, 694_659_840]),
    ],
    ids=lambda value: getattr(value, "folder", ""),
)
def test_the_shipped_configurations_are_of_the_true_size(
    kind: Kind, parameters: int, encoders: list[int]
) -> None:
    """The UNets' published sizes; CLIP-L, OpenCLIP-H without its last layer, CLIP-L and OpenCLIP-G."""

    def size(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    unet = unet_of_true_shape(kind)
    assert size(unet) == parameters
    assert [size(encoder_of_true_shape(kind, encoder)) for encoder in kind.encoders] == encoders
    header = detection.HEADERS[kind.text_width]
    assert header.kind is kind
    assert header.tensors == len(unet.state_dict())
    assert unet.config.cross_attention_dim == kind.text_width
    assert unet.config.sample_size * 8 == kind.resolution


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)
def test_a_file_of_true_shape_is_told_at_once(kind: Kind, tmp_path: Path) -> None:
    file = write_true_shape(kind, tmp_path / "true.safetensors")
    if file.stat().st_blocks * 512 > file.stat().st_size / 2:
        pytest.skip("this file system has no holes")
    seconds = []
    for _ in range(3):  # the best of three: the machine is shared
        before = time.monotonic()
        assert kind_in(file) is kind
        seconds.append(time.monotonic() - before)
    assert min(seconds) < 0.2


# ---------------------------------------------------------------- what a file is

TEXTS = {kind.name: {f"{encoder.key}x": (1,) for encoder in kind.encoders} for kind in KINDS}
VAE = {"first_stage_model.decoder.conv_in.weight": (1, 1, 1, 1)}
BLOCK = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.{}.attn2.to_k.weight"
Shapes = dict[str, tuple[int, ...]]


def unet_of(channels: int = 4, width: int = 768, features: int = 320, added: int = 0) -> Shapes:
    """As much of a UNet as tells what it is; the rest of its tensors by number."""
    header = detection.HEADERS.get(width)
    depths = header.depths if header else (1, 1)
    found = {"model.diffusion_model.input_blocks.0.0.weight": (features, channels, 1, 1)}
    for block, depth in zip((4, 7), depths, strict=True):
        found |= {BLOCK.format(block, i): (1, width) for i in range(depth)}
    if added or (header and header.added):
        found["model.diffusion_model.label_emb.0.0.weight"] = (1, added or header.added)
    more = (header.tensors if header else 686) - len(found)
    return found | {f"model.diffusion_model.x{i}": (1,) for i in range(more)}


def whole_of(kind: Kind, **unet: int) -> Shapes:
    """A file of this kind whose UNet differs so."""
    return unet_of(**({"width": kind.text_width} | unet)) | TEXTS[kind.name] | VAE


def deep(first: int, second: int) -> Shapes:
    """An XL of other depths."""
    kept = {key: shape for key, shape in whole_of(XL).items() if "transformer_blocks" not in key}
    for block, depth in ((4, first), (7, second)):
        kept |= {BLOCK.format(block, i): (1, XL.text_width) for i in range(depth)}
    return kept


def lacking(kind: Kind, beginning: str) -> Shapes:
    return {key: shape for key, shape in whole_of(kind).items() if not key.startswith(beginning)}


UNET_ALONE = "a UNet alone, without text encoder and VAE"
FILES: dict[str, Shapes] = {
    "an inpainting model": whole_of(SD1, channels=9),
    "an inpainting model;": whole_of(XL, channels=9),
    "InstructPix2Pix": whole_of(SD1, channels=8),
    "a depth model": whole_of(SD2, channels=5),
    "an upscaler": whole_of(SD2, channels=7, features=256),
    "an upscaler;": whole_of(SD2, features=256),
    "Stable Diffusion XL's refiner": whole_of(XL, width=1280, features=384, added=2560),
    "Stable Diffusion XL's refiner;": whole_of(XL, width=1280),
    "Stable Diffusion unCLIP": whole_of(SD2, added=2048),
    "Stable Diffusion unCLIP;": whole_of(SD2, added=1536),
    "SSD-1B, a distilled Stable Diffusion XL": deep(2, 4),
    "Vega, a distilled Stable Diffusion XL": deep(1, 2),
    "a distilled or altered Stable Diffusion XL": deep(2, 6),
    "a distilled or altered Stable Diffusion XL;": whole_of(XL, added=2816 - 512),
    "a distilled or altered Stable Diffusion 1.x": whole_of(SD1, added=1000),
    "CosXL": whole_of(XL) | {"edm_vpred.sigma_max": (1,)},
    "CosXL;": whole_of(XL, channels=8) | {"edm_vpred.sigma_max": (1,)},
    "Playground 2.5": whole_of(XL) | {"edm_mean": (1, 4, 1, 1)},
    "AltDiffusion": unet_of() | VAE | {"cond_stage_model.roberta.embeddings.word_embeddings.weight": (1,)},
    "a damaged or altered Stable Diffusion 1.x (its UNet has 685 tensors, not 686)": lacking(
        SD1, "model.diffusion_model.x600"
    ),
    "a damaged or altered Stable Diffusion XL (its UNet has 1681 tensors, not 1680)": whole_of(XL)
    | {"model.diffusion_model.more": (1,)},
    UNET_ALONE: unet_of(),
    f"{UNET_ALONE};": {"input_blocks.0.0.weight": (320, 4, 3, 3)},
    "a Stable Diffusion 1.x without its text encoder": lacking(SD1, "cond_stage_model."),
    "a Stable Diffusion XL without its text encoder": lacking(XL, "conditioner.embedders.1."),
    "a Stable Diffusion 2.x without its VAE": lacking(SD2, "first_stage_model."),
    "a VAE alone": VAE,
    "a VAE alone; ": {"encoder.conv_in.weight": (1, 3, 1, 1), "decoder.up.0.block.0.conv1.weight": (1,)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x.weight": (1,)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (1,)},
    "a LoRA, which belongs to --lora_path": {"lora_unet_mid_block.lora_down.weight": (1,)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 1, 1)},
    "a ControlNet;": whole_of(SD1) | {"control_model.input_blocks.0.0.weight": (320, 4, 1, 1)},
    "an embedding": {"emb_params": (1, 768)},
    "a UNet alone, in diffusers' names": {"conv_in.weight": (320, 4, 1, 1), "down_blocks.0.x.weight": (1,)},
    "no Stable Diffusion that is known": {"anything": (1,)},
    "no Stable Diffusion that is known here": whole_of(SD1, channels=16),
    "no Stable Diffusion that is known here;": {"model.diffusion_model.input_blocks.0.0.weight": ()},
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_of_ours_is_refused_by_what_it_is(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in FILES[name].items()}, file)
    for refused in (peek, lambda path: loaded(Path(path))):
        with pytest.raises(UserError) as error:
            refused(str(file))
        assert str(error.value).startswith(f"{file}: is {name.removesuffix(';')}")
        assert str(error.value).endswith("; this tool trains Stable Diffusion 1.x, 2.x and XL.")
        assert error.value.exit_code == Exit.MODEL


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)
def test_a_kind_is_known_by_its_header(tmp_path: Path, kind: Kind) -> None:
    file = tmp_path / "model.safetensors"
    ema = {f"model_ema.x{i}": (1,) for i in range(3)}  # a training's averages beside the weights
    save_file({key: torch.zeros(shape) for key, shape in (whole_of(kind) | ema).items()}, file)
    assert kind_in(file) is kind
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        kind_in(file)
