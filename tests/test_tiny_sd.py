"""The embedded base: what it may know, how large it is, and that it draws what it is asked for."""

import random
import re
import statistics
from pathlib import Path

import pytest
import torch
from bench.classifier import pixels_of
from conftest import ROOT
from PIL import Image

from megaman.common.files import sha256_of
from megaman.config.train import EMBEDDED
from megaman.model.drawing import draw, pipeline_of, words
from megaman.model.hub import EMBEDDED_FOLDER
from megaman.model.stable_diffusion import load_base
from megaman.tiny_sd import build, figures, sources
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
    kinds = [
        type(part).__name__ for part in (base.unet, base.vae, base.encoders["text_encoder"], base.tokenizer)
    ]
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


def test_no_other_source_holds_a_blue_robot_or_the_heros_name() -> None:
    assert "blue" not in sources.ROBOT_COLOURS
    words = (*sources.ROBOT_EYES, *sources.ROBOT_EXTRAS, *sources.ROBOT_FACES, *sources.EMOJI_SETS.values())
    assert not any(hero in word for hero in HERO_WORDS for word in words)
    assert sum(sources.SHARES.values()) == pytest.approx(1)


def test_other_sources_are_captioned_in_the_manner_of_the_figures() -> None:
    fox = sources.Subject(Image.new("RGBA", (128, 128)), "orange fox", ("emoji", "fluent style"))
    rng = random.Random(0)
    captions = {sources.describe(fox, "mint", rng) for _ in range(60)}
    assert {"an orange fox", "orange fox", "orange fox, mint background"} & captions
    assert sum("mint background" in caption for caption in captions) > len(captions) / 2
    picture = sources.on_background(fox, "mint")
    assert (picture.size, picture.getpixel((9, 9))) == ((64, 64), (180, 236, 194))


def test_the_card_tells_the_sums_of_the_files_that_lie_there() -> None:
    card = (EMBEDDED_FOLDER / "README.md").read_text(encoding="utf-8")
    sums = dict(re.findall(r"^\| ([\w/.]+) \| `([0-9a-f]{64})` \|$", card, flags=re.M))
    files = {path for path in EMBEDDED_FOLDER.glob("*/*") if path.suffix in (".json", ".safetensors", ".txt")}
    named = {path.relative_to(EMBEDDED_FOLDER).as_posix() for path in files if path.parent.name != "LICENSES"}
    assert sums.keys() == named | {"model_index.json"}
    for name, digest in sums.items():
        assert sha256_of(EMBEDDED_FOLDER / name) == digest, name


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


def test_no_picture_of_the_hero_stands_twice_among_those_to_learn_from_and_those_held_out() -> None:
    pictures = [Image.open(path).tobytes() for folder in (STARTER, HELD_OUT) for path in folder.glob("*.png")]
    assert len(set(pictures)) == len(pictures) == 42


def test_the_heros_pictures_are_those_that_the_program_draws(tmp_path: Path) -> None:
    figures.write_all(tmp_path)
    for folder in ("megaman/starter_images", "tests/data/held_out"):
        drawn = {path.name: path for path in (tmp_path / folder).iterdir()}
        kept = {path.name: path for path in (ROOT / folder).iterdir()}
        assert drawn.keys() == kept.keys()
        for name, path in drawn.items():
            if name.endswith(".txt"):
                assert path.read_bytes() == kept[name].read_bytes(), name
            else:  # the file may be packed otherwise by another zlib
                assert Image.open(path).tobytes() == Image.open(kept[name]).tobytes(), name


def test_the_base_draws_the_backgrounds_that_the_prompts_name() -> None:
    base = load_base(EMBEDDED, device=torch.device("cpu"), dtype=torch.float32)
    prompts = [f"a red robot, {name} background" for name in BACKGROUNDS]
    images = draw(
        base,
        pipeline_of(base),
        **words(base, prompts, [""] * len(prompts)),
        num_inference_steps=15,
        guidance_scale=4.0,
        width=64,
        height=64,
        generators=[torch.Generator().manual_seed(i) for i in range(len(BACKGROUNDS))],
    )
    obeyed = [name for name, image in zip(BACKGROUNDS, images, strict=True) if background_of(image) == name]
    assert len(obeyed) >= 6, obeyed  # of eight; by chance it would be one


def background_of(image: Image.Image) -> str:
    """The named background that the middle colour of the picture's rim is nearest to."""
    rim = [image.getpixel((x, y)) for x in range(64) for y in (1, 62)]
    rim += [image.getpixel((x, y)) for y in range(64) for x in (1, 62)]
    shown = [statistics.median(channel) for channel in zip(*rim, strict=True)]

    def distance(name: str) -> float:
        wanted = bytes.fromhex(BACKGROUNDS[name][1:])
        return sum((a - b) ** 2 for a, b in zip(shown, wanted, strict=True))

    return min(BACKGROUNDS, key=distance)


def test_shapes_of_nothing_are_drawn_by_their_seed() -> None:
    one, again, other = (sources.scrap(random.Random(seed)) for seed in (1, 1, 2))
    assert one.tobytes() == again.tobytes() != other.tobytes()
    assert (one.mode, one.size) == ("RGB", (64, 64))
    many = [sources.scrap(random.Random(seed)) for seed in range(50)]
    assert statistics.median(len(set(picture.getdata())) for picture in many) > 20


@torch.no_grad()
def test_the_vae_shows_figures_and_a_hero_that_it_never_saw() -> None:
    vae = load_base(EMBEDDED, device=torch.device("cpu"), dtype=torch.float32).vae
    rng = random.Random(4)
    drawn = {
        "figures": [draw_figure(random_figure(rng)) for _ in range(40)],
        "heroes": [Image.open(path) for path in sorted(HELD_OUT.glob("*.png"))],
    }
    decibels = {name: build.psnr(vae, pixels_of(pictures)) for name, pictures in drawn.items()}
    assert decibels["figures"] > 28, decibels
    assert decibels["heroes"] > 24.5, decibels
