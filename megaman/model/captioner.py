"""Captioners: models of transformers that write a sentence about a picture."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from megaman.common.cache import key_of
from megaman.common.console import Exit, UserError, one_line
from megaman.common.files import sha256_of

CONFIG = "config.json"
ASKED = {"blip": "", "git": "", "florence2": "<DETAILED_CAPTION>"}  # what each kind is asked for a caption
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")  # one of these holds the words
BEAMS = 3  # the likeliest sentence, always the same
MOST_TOKENS = 120  # of a sentence: a detailed one ends by itself before
RECIPE = 1  # raised when sentences are made in another way


@dataclass(frozen=True)
class Captioner:
    """A captioner's files, looked at; its weights are not loaded yet."""

    name: str  # as the user knows it
    folder: Path
    kind: str  # transformers' model_type
    weights: ClassVar[str] = "*.safetensors"  # the names of the files to fetch
    are_tags: ClassVar[bool] = False  # what it tells of a picture

    @property
    def title(self) -> str:
        """What it is, in words."""
        return f"a captioner ({self.kind})"

    @property
    def key(self) -> str:
        """What decides what it says of a picture."""
        files = sorted({*self.folder.glob("*.json"), *self.folder.glob("*.txt"), *self._weights})
        return key_of("sentence", RECIPE, *(part for file in files for part in (file.name, sha256_of(file))))

    @property
    def _weights(self) -> list[Path]:
        return [file for file in self.folder.glob("*.safetensors") if file.is_file()]

    @classmethod
    def open(cls, name: str, folder: Path) -> "Captioner":
        """The captioner whose configuration lies in a folder. UserError (exit 4) if it is none that is
        read.
        """
        try:
            config = json.loads((folder / CONFIG).read_bytes())
            kind = config.get("model_type", config.get("architecture", "unknown"))
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            raise UserError(
                f"{name}: neither a tagger nor a captioner (its {CONFIG} is missing or damaged). Name "
                "one, such as SmilingWolf/wd-vit-tagger-v3 or Salesforce/blip-image-captioning-base.",
                Exit.MODEL,
            ) from error
        if "auto_map" in config:
            reason = "wants to run code of its own, which is never loaded"
            raise UserError(f"{name}: {reason}. Name a model of transformers' own.", Exit.MODEL)
        if kind not in ASKED:
            without = "and has no selected_tags.csv, as a tagger has"
            raise UserError(
                f"{name}: is a {kind!r}, no captioner that is read ({', '.join(ASKED)}), {without}. Name "
                "one of these.",
                Exit.MODEL,
            )
        return cls(name, folder, kind)

    def check_weights(self) -> None:
        """UserError (exit 4) if the weights, or the words that they say, don't lie there."""
        if not self._weights:
            raise UserError(
                f"{self.name}: no .safetensors weights there; pickle files (.bin, .pt) can run code and are "
                "not read. Fetch it whole, or name another.",
                Exit.MODEL,
            )
        if not any(file for pattern in TOKENIZERS for file in self.folder.glob(pattern)):
            lacks = f"no tokenizer there ({', '.join(TOKENIZERS)})"  # transformers would take an empty one
            raise UserError(f"{self.name}: {lacks}. Fetch it whole, or name another.", Exit.MODEL)

    def load(self, device: torch.device) -> Callable[[Sequence[Image.Image]], list[str]]:
        """Loads the weights; what is returned says a sentence of each RGB picture. UserError (exit 4) if they
        can't be loaded.
        """
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        transformers_logging.disable_progress_bar()  # of loading only: the bars of a download stay
        try:
            processor = AutoProcessor.from_pretrained(self.folder, **local)
            model, found = AutoModelForImageTextToText.from_pretrained(
                self.folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local
            )
            if lacking := sorted(key for key in found["missing_keys"] if key.endswith(".weight")):
                raise ValueError(f"its weights lack {lacking[0]}")  # which the library makes up
        except Exception as error:  # the library raises what it likes
            text = " ".join(str(error).split())[:200]
            reason = f"this captioner can't be loaded ({text}). Is it complete?"
            raise UserError(f"{self.name}: {reason}", Exit.MODEL) from error
        model.eval().to(device)
        asked = ASKED[self.kind]

        def read(images: Sequence[Image.Image]) -> list[str]:
            """What is said of each picture, in a sentence."""
            texts = {"text": [asked] * len(images)} if asked else {}
            inputs = processor(images=list(images), return_tensors="pt", **texts).to(device)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=MOST_TOKENS, num_beams=BEAMS, do_sample=False)
            sentences = processor.batch_decode(ids, skip_special_tokens=True)
            return [one_line(" ".join(sentence.split())) for sentence in sentences]

        return read
