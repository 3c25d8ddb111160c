"""The embedded base's tokenizer: CLIP's own byte-pair table, cut to the words that matter."""

import json
import random
from itertools import pairwise
from pathlib import Path

from torch import Tensor
from transformers import CLIPTokenizer

from megaman.model.tokenizer import byte_letters, clip_merges
from megaman.tiny_sd.figures import FILLERS, HERO_WORDS


def write_tokenizer(folder: Path, words: list[str], whole_words: int = 6000) -> None:
    """CLIP's own byte-pair merges, cut to those that it uses on our words and on its own commonest words.

    (MIT, OpenAI CLIP.)
    """
    merges = clip_merges()
    whole = ["".join(pair).removesuffix("</w>") for pair in merges if pair[1].endswith("</w>")]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    used: set[tuple[str, str]] = set()
    for word in [*words, *whole[:whole_words]]:
        used |= _merges_of(word, ranks)
    kept = [pair for pair in merges if pair in used]
    letters = byte_letters()
    vocabulary = [
        *letters,
        *(f"{c}</w>" for c in letters),
        *("".join(pair) for pair in kept),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(map(" ".join, kept)) + "\n", encoding="utf-8"
    )
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>"}
    settings |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _merges_of(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    parts, used = [*word[:-1], word[-1] + "</w>"], set()
    while True:
        pairs = [(ranks[pair], pair) for pair in pairwise(parts) if pair in ranks]
        if not pairs:
            return used
        _, best = min(pairs)
        used.add(best)
        at = next(i for i, pair in enumerate(pairwise(parts)) if pair == best)
        parts[at : at + 2] = ["".join(best)]


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions as int64 (N,77), padded as Stable Diffusion pads."""
    return tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids


def silent_ids(tokenizer: CLIPTokenizer, seed: int, count: int = 512) -> Tensor:
    """Captions that say nothing: half of them empty, half random words, so that words it does not know
    leave it calm. (count,77)
    """
    rng = random.Random(seed)
    vocabulary = [
        token.removesuffix("</w>")
        for token in tokenizer.get_vocab()
        if token.endswith("</w>") and token[:-4].isalpha()
    ]
    words = sorted(
        word
        for word in vocabulary
        if len(word) > 2 and not any(part in word for part in (*HERO_WORDS, "man", "rock"))
    )
    texts = [
        ", ".join(rng.sample([*FILLERS, *rng.sample(words, 6)], rng.randint(1, 5))) if i % 2 else ""
        for i in range(count)
    ]
    return token_ids(tokenizer, texts)
