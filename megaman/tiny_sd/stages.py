"""The curriculum: the stages in which the embedded base learns, each with its pictures and captions."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaman.common.files import replacing, write_text
from megaman.tiny_sd import sources
from megaman.tiny_sd.figures import HERO_WORDS
from megaman.tiny_sd.poses import POSES

SIDE_PX = sources.SIDE_PX
CAPTIONS_EACH = 4  # caption variants drawn for each picture
FIGURE_WEIGHT, NOISE_OFFSET = 3.0, 0.05  # of every stage that says no other, and of measuring
HELD_OUT = 500  # the last pictures of each stage are never trained on


@dataclass(frozen=True)
class Pictures:
    """Pairs of pictures to learn from, with captions. All of it decides them, besides the code."""

    name: str
    shares: dict[str, float]  # of each source of pictures
    pairs: int
    seed: int
    always: tuple[str, ...] = ()  # what every figure's caption names


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum. All of it, with the seed, decides the weights, besides the code."""

    name: str
    pictures: Pictures
    steps: int  # of UNet and text encoder
    rate_steps: int  # until the rate has fallen; a stage that another follows may end before
    seed: int
    word_weight: float = 0.0  # of telling a caption's words from the text encoder's last states
    turned_share: float = 0.0  # of the pairs taken from those that differ in left and right, beyond chance
    difference_weight: float = 0.0  # of the cells in which the two of a pair differ, against all others
    unsaid_share: float = 0.0  # of poses and of directions that captions leave out
    figure_weight: float = (
        FIGURE_WEIGHT  # of a cell that shows the figure, against one of the plain background
    )
    timesteps: tuple[int, int] = (350, 950)  # by default where outlines are decided
    timesteps_share: float = 0.5  # of the examples that come from there
    noise_offset: float = NOISE_OFFSET  # the deviation of each noise's own mean


OUR_FIGURES = Pictures("figures", {"figures": 1.0}, 16_000, 2026, ("pose", "facing"))
EVERYTHING = Pictures("mixture", sources.SHARES, 20_000, 2027)
FIGURES = Stage("figures", OUR_FIGURES, 3_000, 5_000, 2026)
WORDS = Stage(
    "words", OUR_FIGURES, 650, 5_000, 2028, word_weight=0.02, turned_share=0.5, difference_weight=1.0
)
SIDES = Stage(
    "sides", OUR_FIGURES, 400, 5_000, 2029, word_weight=0.02, turned_share=0.9, difference_weight=9.0,
    timesteps=(500, 950), timesteps_share=1.0,
)  # fmt: skip
MIXTURE = Stage(
    "mixture", EVERYTHING, 3_500, 3_500, 2027, word_weight=0.02, turned_share=0.15, difference_weight=1.0
)
TERSE = Stage("terse", EVERYTHING, 900, 900, 2030, word_weight=0.02, difference_weight=1.0, unsaid_share=0.5)
GROUNDS = Stage(
    "grounds", EVERYTHING, 1_000, 1_000, 2031, word_weight=0.02, unsaid_share=0.5, figure_weight=1.0,
    timesteps=(700, 1000), noise_offset=0.1,
)  # fmt: skip
STAGES = (FIGURES, WORDS, SIDES, MIXTURE, TERSE, GROUNDS)


def render(wanted: Pictures, work: Path) -> tuple[Tensor, list[str]]:
    """All pictures as uint8 (N,3,64,64) and CAPTIONS_EACH captions a picture, in order; kept in the work
    folder. Rows 2 i and 2 i + 1 are a pair, and so are their captions.
    """
    file, captions_file = work / f"{wanted.name}.safetensors", work / f"{wanted.name}.json"
    if not captions_file.exists():
        rng = random.Random(wanted.seed)
        pixels, captions = np.empty((2 * wanted.pairs, SIDE_PX, SIDE_PX, 3), np.uint8), []
        for i, pair in enumerate(sources.pairs(wanted.pairs, wanted.shares, rng, work, wanted.always)):
            words = rng.getrandbits(64)
            for j, (picture, describe) in enumerate(pair):
                pixels[2 * i + j] = np.asarray(picture)
                alike = random.Random(words)
                captions += [describe(alike) for _ in range(CAPTIONS_EACH)]
        with replacing(file) as partial:
            save_file({"pictures": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()}, partial)
        write_text(captions_file, json.dumps(captions))  # the last, so that it tells of the pictures too
    captions = json.loads(captions_file.read_text())
    told = [text for text in captions if any(word in text for word in HERO_WORDS)]
    if told:
        raise SystemExit(f"error: the base must not know the hero, but a caption reads {told[0]!r}")
    return load_file(file)["pictures"], captions


def terser(captions: list[str], share: float, seed: int) -> list[str]:
    """The captions with a share of poses and of directions unsaid: what says neither must still be a figure.

    What tells the two of a pair apart stays; all else is left out of both alike.
    """
    rng, told = random.Random(seed), []
    for at in range(0, len(captions), 2 * CAPTIONS_EACH):
        first, second = captions[at : at + CAPTIONS_EACH], captions[at + CAPTIONS_EACH :][:CAPTIONS_EACH]
        kept: tuple[list[str], list[str]] = ([], [])
        for pair in zip(first, second, strict=True):
            pieces = [text.split(", ") for text in pair]
            unsaid = {*POSES} if rng.random() < share else set()
            unsaid |= {"facing left", "facing right"} if rng.random() < share else set()
            unsaid &= {*pieces[0]} & {*pieces[1]}
            for texts, words in zip(kept, pieces, strict=True):
                texts.append(", ".join(word for word in words if word not in unsaid))
        told += [*kept[0], *kept[1]]
    return told
