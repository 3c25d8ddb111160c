"""The embedded base: what it may know, how large it is, and that it draws what it is asked for."""

import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

from megaman.base import EMBEDDED, EMBEDDED_FOLDER, draw, load_base, pipeline_of
from megaman.tiny_sd.figures import (
    BACKGROUNDS,
    HERO_WORDS,
    caption,
    random_figure,
    random_hero,
)
from megaman.tiny_sd.figures import (
    draw as draw_figure,
)

STARTER = ROOT / "megaman" / "starter_images"
HELD_OUT = ROOT / "tests" / "data" / "held_out"


def test_the_base_is_real_complete_and_under_25_mb() -> None:
    size = sum(path.stat().st_size for path in EMBEDDED_FOLDER.rglob("*") if path.is_file())
    assert size < 25_000_000
    base = load_base(EMBEDDED, device=torch.device("cpu"), dtype=torch.float32)
    kinds = [type(part).__name__ for part in (base.unet, base.vae, base.text_encoder, base.tokenizer)]
    assert kinds == ["UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTokenizer"]
    assert (base.stride, base.native_resolution) == (4, 64)
    assert base.vae.config.scaling_factor not in (1.0, 0.18215)


def test_no_caption_of_the_base_tells_of_the_hero_and_no_figure_wears_his_dress() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        figure = random_figure(rng)
        assert not any(word in caption(figure, rng).lower() for word in HERO_WORDS)
        assert figure.kind != "hero"
        assert not (figure.kind == "robot" and figure.body == "blue" and figure.trim in ("white", "yellow"))


def test_one_seed_draws_one_picture() -> None:
    first, again = (random_hero(random.Random(3)) for _ in range(2))
    assert first == again
    assert draw_figure(first).tobytes() == draw_figure(again).tobytes()


@pytest.mark.parametrize(("folder", "count"), [(STARTER, 30), (HELD_OUT, 12)], ids=["starter", "held out"])
def test_the_heros_pictures_are_there_with_captions(folder: Path, count: int) -> None:
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == count
    for path in pictures:
        assert path.with_suffix(".txt").read_text(encoding="utf-8").startswith("mega man, ")
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")


def test_held_out_pictures_are_not_among_the_starter_pictures() -> None:
    seen = {path.read_bytes() for path in STARTER.glob("*.png")}
    assert not any(path.read_bytes() in seen for path in HELD_OUT.glob("*.png"))


def test_the_base_draws_the_background_that_the_prompt_names() -> None:
    base = load_base(EMBEDDED, device=torch.device("cpu"), dtype=torch.float32)
    pipeline = pipeline_of(base)
    names = ["white", "black", "sky", "rose"]
    images = draw(
        base,
        pipeline,
        prompt=[f"a red robot, {name} background" for name in names],
        num_inference_steps=15,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(i) for i in range(4)],
    )
    for name, image in zip(names, images, strict=True):
        corners = [image.getpixel(place) for place in ((2, 2), (61, 2), (2, 61), (61, 61))]
        shown = [sum(channel) / 4 for channel in zip(*corners, strict=True)]
        assert nearest_background(shown) == name, (name, shown)


def nearest_background(colour: list[float]) -> str:
    """The named background that a colour is nearest to."""

    def distance(name: str) -> float:
        wanted = bytes.fromhex(BACKGROUNDS[name][1:])
        return sum((a - b) ** 2 for a, b in zip(colour, wanted, strict=True))

    return min(BACKGROUNDS, key=distance)
