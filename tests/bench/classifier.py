"""A small judge of generated figures: kind (the hero is one), body colour, background, pose, facing, style,
and which of the hero's parts are there.

Trained on renders of our own generator, plain, blurred, noisy and after a round trip through the base's VAE;
a share of it is rubbish, so that a smear is called a smear: noise, two figures in one, and what the base
makes of words that name no figure.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from megaman.model.drawing import draw as draw_images
from megaman.model.drawing import pipeline_of
from megaman.model.drawing import words as read_words
from megaman.model.stable_diffusion import StableDiffusion
from megaman.tiny_sd.figures import (
    HERO_WORDS,
    KINDS,
    STYLES,
    random_figure,
    random_hero,
)
from megaman.tiny_sd.poses import POSES
from megaman.tiny_sd.sketch import BACKGROUNDS, COLOURS, HERO_PARTS, Figure, draw

KIND_NAMES = (*KINDS, "hero", "nothing")
BACKGROUND_NAMES = tuple(BACKGROUNDS)
HEADS: dict[str, tuple[str, ...]] = {
    "kind": KIND_NAMES,
    "body": tuple(COLOURS),
    "background": BACKGROUND_NAMES,
    "pose": tuple(POSES),
    "facing": ("left", "right"),
    "style": STYLES,
} | {part: ("missing", part) for part in HERO_PARTS}
RENDERS, TESTED = 16_000, 2_000
STEPS, BATCH = 2_000, 64
BLOBS = 256  # of the base's pictures of no figure


@dataclass(frozen=True)
class Verdict:
    """What one picture shows."""

    kind: str
    body: str
    background: str
    pose: str
    facing: str
    style: str
    parts: tuple[str, ...]  # of the hero, that are seen


class Classifier(nn.Module):
    """pixels (B,3,64,64) in [-1, 1] -> logits of each head. 0.4 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, 128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(classes)) for name, classes in HEADS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """The logits, a head each."""
        features = self.body(pixels)
        return {name: head(features) for name, head in self.heads.items()}


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """(N,3,64,64) in [-1, 1]."""
    stacked = np.stack([np.asarray(image.convert("RGB").resize((64, 64))) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_example(rng: random.Random) -> Figure:
    """A figure to judge: a hero, one without some of his parts, one of the world, or a blue robot in the
    hero's own colours without being him.
    """
    fate = rng.random()
    if fate < 0.4:
        lost = tuple(part for part in HERO_PARTS if rng.random() < 0.4) if fate < 0.2 else ()
        return replace(random_hero(rng), without=lost)
    figure = random_figure(rng)
    if fate < 0.5:
        trim = rng.choice(("white", "yellow"))
        return replace(figure, kind="robot", body="blue", head_colour="blue", trim=trim, head="round head")
    return figure


def renders(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures (N,3,64,64) and their labels, a head each."""
    rng = random.Random(seed)
    figures = [random_example(rng) for _ in range(count)]
    labels = {
        name: torch.tensor([classes.index(truth_of(figure, name)) for figure in figures])
        for name, classes in HEADS.items()
    }
    return pixels_of([draw(figure) for figure in figures]), labels


def truth_of(figure: Figure, head: str) -> str:
    """What a head should say of a figure."""
    if head in HERO_PARTS:
        return head if figure.kind == "hero" and head not in figure.without else "missing"
    return str(getattr(figure, head))


@torch.no_grad()
def round_trip(pixels: Tensor, base: StableDiffusion) -> Tensor:
    """The pictures as the base's VAE gives them back."""
    vae = base.vae
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(64)]
    return torch.cat(parts).clamp(-1, 1)


def spoiled(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What no figure looks like: noise, two figures in one, a smear. (B,3,64,64)"""
    kind = torch.randint(0, 3, (len(pixels), 1, 1, 1), generator=generator)
    noisy = 0.3 * pixels + 0.6 * torch.randn(pixels.shape, generator=generator)
    mixed = torch.where(
        torch.rand(pixels.shape[0], 1, 64, 1, generator=generator) < 0.5, pixels, pixels.roll(1, 0)
    )
    mixed = functional.avg_pool2d(mixed, 3, 1, 1)
    smeared = functional.interpolate(functional.avg_pool2d(pixels, 8), scale_factor=8, mode="bilinear")
    return torch.where(kind == 0, noisy, torch.where(kind == 1, mixed, smeared)).clamp(-1, 1)


def blobs(base: StableDiffusion, count: int, seed: int) -> Tensor:
    """What the base draws for words that name no figure; never for the trigger. (N,3,64,64)"""
    rng, images = random.Random(seed), []
    known = {word for name in (*KINDS, "hero", "nothing") for word in name.split()}
    words = sorted(
        token.removesuffix("</w>")
        for token in base.tokenizer.get_vocab()
        if token.endswith("</w>") and token[:-4].isalpha() and len(token) > 6
    )
    words = [word for word in words if word not in known and not any(part in word for part in HERO_WORDS)]
    for start in range(0, count, 32):
        prompts = [
            f"{' '.join(rng.sample(words, rng.randint(1, 3)))}, {rng.choice(BACKGROUND_NAMES)} background"
            for _ in range(32)
        ]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(32)]
        images += draw_images(
            base, pipeline_of(base), **read_words(base, prompts, [""] * len(prompts)),
            num_inference_steps=rng.choice((6, 10, 15)), height=64, width=64,
            guidance_scale=rng.choice((1.5, 3.0, 4.5)), generators=generators,
        )  # fmt: skip
    return pixels_of(images)[:count]


def roughened(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise, contrast and a shift, each by chance: generated pictures are less crisp. (B,3,64,64)"""
    chance = torch.rand(4, len(pixels), 1, 1, 1, generator=generator)
    pixels = torch.where(chance[0] < 0.3, functional.avg_pool2d(pixels, 3, 1, 1), pixels)
    noise = torch.randn(pixels.shape, generator=generator)
    pixels = pixels + 0.15 * torch.where(chance[1] < 0.5, noise, torch.zeros_like(noise))
    pixels = pixels * (0.85 + 0.3 * chance[2])
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return pixels.roll((dy, dx), (2, 3)).clamp(-1, 1)


def trained_classifier(base: StableDiffusion, work: Path) -> tuple[Classifier, dict[str, float]]:
    """The judge and its accuracy on held-out renders and round trips; kept in the work folder."""
    torch.manual_seed(0)
    model, file = Classifier(), work / "classifier.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        _train(model, base)
        work.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    return model.eval(), accuracy(model, base)


def _train(model: Classifier, base: StableDiffusion) -> None:
    pixels, labels = renders(RENDERS, seed=1)
    back, shapeless = round_trip(pixels, base), blobs(base, BLOBS, seed=50_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        picks = torch.randint(0, RENDERS, (BATCH,), generator=generator)
        source = torch.where(
            torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5, pixels[picks], back[picks]
        )
        blob = roughened(shapeless[torch.randint(0, BLOBS, (BATCH // 8,), generator=generator)], generator)
        batch = torch.cat([roughened(source, generator), spoiled(source[: BATCH // 8], generator), blob])
        nothing = torch.full((BATCH // 4,), KIND_NAMES.index("nothing"))
        logits = model.train()(batch)
        loss = functional.cross_entropy(logits["kind"], torch.cat([labels["kind"][picks], nothing]))
        for name in [*HEADS][1:]:
            loss = loss + functional.cross_entropy(logits[name][:BATCH], labels[name][picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: Classifier, base: StableDiffusion) -> dict[str, float]:
    """The share of right answers on renders it never saw, half of them after a round trip; `hero`: is it
    he or not; `rubbish called hero`: how often spoiled pictures and shapeless ones are.
    """
    pixels, labels = renders(TESTED, seed=3)
    half = TESTED // 2
    pixels = torch.cat([pixels[:half], round_trip(pixels[half:], base)])
    found = {name: logits.argmax(1) for name, logits in model.eval()(pixels).items()}
    right = {name: (found[name] == labels[name]).float().mean().item() for name in HEADS}
    hero = KIND_NAMES.index("hero")
    right["hero"] = ((found["kind"] == hero) == (labels["kind"] == hero)).float().mean().item()
    rubbish = torch.cat([spoiled(pixels, torch.Generator().manual_seed(4)), blobs(base, 64, seed=60_000)])
    rubbish = model(rubbish)["kind"].argmax(1)
    right["rubbish called hero"] = (rubbish == hero).float().mean().item()
    return {name: round(share, 4) for name, share in right.items()}


@torch.no_grad()
def judged(model: Classifier, images: Sequence[Image.Image]) -> list[Verdict]:
    """A verdict an image."""
    found = {name: logits.argmax(1).tolist() for name, logits in model.eval()(pixels_of(images)).items()}
    verdicts = []
    for i in range(len(images)):
        said = {name: classes[found[name][i]] for name, classes in HEADS.items()}
        parts = tuple(part for part in HERO_PARTS if said.pop(part) == part)
        verdicts.append(Verdict(**said, parts=parts))
    return verdicts
