"""CLIP's tokenizer, with which every Stable Diffusion reads: made of the table that ships with us, so that no
base has to be at hand for counting a caption's tokens.
"""

import lzma
from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer

from megaman.common.kinds import CHUNK

MERGES = Path(__file__).parents[1] / "kinds" / "clip" / "merges.txt.xz"  # OpenAI's CLIP, MIT
LENGTH = CHUNK + 2  # of what the text encoders read, beginning and end included
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def clip_merges() -> list[tuple[str, ...]]:
    """CLIP's 48,894 pairs that make one token, the first ones first."""
    lines = lzma.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    return [tuple(line.split(" ")) for line in lines]


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion 1.x: its vocabulary of 49,408, its merges, its padding."""
    merges = clip_merges()
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=merges,
        pad_token=END,
        model_max_length=LENGTH,
    )


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in CLIP's table, in its order: first those that are
    printable themselves. (GPT-2's code.)
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
