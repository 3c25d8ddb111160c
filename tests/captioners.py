"""Tiny taggers and captioners: random weights in timm's and transformers' own classes, and their files."""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import string
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BartTokenizer,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE = 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
WORDS = [*SPECIAL, *("a", "blue", "robot", "stands", "on", "sand", "red", "hat", "with", "cannon")]
ARCHITECTURE = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {
        **{"img_size": SIDE, "depth": 1, "embed_dim": 32, "num_heads": 2},
        **{"global_pool": "avg", "class_token": False, "fc_norm": False},
    },
    "pretrained_cfg": {
        **{"input_size": [3, SIDE, SIDE], "fixed_input_size": False, "interpolation": "bicubic"},
        **{"crop_pct": 1.0, "crop_mode": "center", "mean": [0.5] * 3, "std": [0.5] * 3},
    },
}  # written as the v3 taggers' config.json


class _StandIn(type):
    """A class whose every attribute is another."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (), {})


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which timm imports and a tagger never calls: none is built for the torch of
    a test machine without a card.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        is_ours = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(_StandIn(spec.name, (), {}), name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing."""


def imported_timm() -> Any:
    """The real timm. Skips the test where it is not installed."""
    if "timm" not in sys.modules and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed (pip install --no-deps timm)")
    try:
        return importlib.import_module("timm")
    except Exception:  # no torchvision, or one of another torch
        for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
    finder = _NoTorchvision()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # nobody else shall take it for the library


Tags = Sequence[tuple[str, int, float | None]]  # a tag, its category, how sure it is; None: that depends


def save_tagger(folder: Path, tags: Tags, seed: int = 0) -> Path:
    """Writes a tagger of these tags, each of one score for every picture, or of one that depends on it."""
    timm = imported_timm()
    torch.manual_seed(seed)
    config = ARCHITECTURE | {"num_classes": len(tags)}
    model = timm.create_model(config["architecture"], num_classes=len(tags), **config["model_args"])
    with torch.no_grad():
        model.head.weight.mul_(200)  # random weights hardly tell pictures apart
        for row, (_, _, score) in enumerate(tags):
            if score is not None:
                model.head.weight[row] = 0
                model.head.bias[row] = math.log(score / (1 - score))
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [f"{number},{tag},{category},9" for number, (tag, category, _) in enumerate(tags)]
    table = "\n".join(["tag_id,name,category,count", *rows])
    (folder / "selected_tags.csv").write_text(f"{table}\n", encoding="utf-8")
    return folder


def _tokenizer(folder: Path) -> BertTokenizerFast:
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS), encoding="utf-8")
    return BertTokenizerFast(str(vocabulary))


def save_blip(folder: Path) -> Path:
    """Writes a BLIP that says random words of WORDS."""
    tokenizer = _tokenizer(folder)
    ids = {"bos_token_id": 5, "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | ids | {"vocab_size": len(WORDS), "max_position_embeddings": 192, "encoder_hidden_size": 16}
    vision = small | {"image_size": SIDE, "patch_size": 16}
    torch.manual_seed(3)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_git(folder: Path) -> Path:
    """Writes a GIT that says random words of WORDS."""
    tokenizer = _tokenizer(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(3)
    vision = small | {"image_size": SIDE, "patch_size": 16}
    config = GitConfig(
        vision_config=vision, vocab_size=len(WORDS), max_position_embeddings=96, **small, **ids
    )
    GitForCausalLM(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    GitProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_florence(folder: Path) -> Path:
    """Writes a Florence-2 that says random letters."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *string.ascii_letters]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"})
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    small = {f"{half}_{name}": number for half in ("encoder", "decoder") for name, number in sides.items()}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text = small | ids | {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16}
    vision = {"depths": [1] * 4, "embed_dim": [8, 8, 16, 16], "num_heads": [2] * 4, "num_groups": [2] * 4}
    vision |= {"window_size": 2, "projection_dim": 16}
    torch.manual_seed(4)
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id)
    model = Florence2ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30)  # random weights hardly hear what they are asked
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5  # 64 px are 2 x 2 cells, and their mean
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


def noise_picture(seed: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """A picture of coloured noise, RGB."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())
