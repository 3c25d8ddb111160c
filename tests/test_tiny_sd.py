"""The embedded base: what it may know, how large it is, and that it draws what it is asked for."""

import itertools
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.classifier import pixels_of
from conftest import ROOT
from diffusers.training_utils import EMAModel
from PIL import Image

from megaman.common.files import sha256_of
from megaman.config.train import EMBEDDED
from megaman.model.drawing import draw, pipeline_of, words
from megaman.model.hub import EMBEDDED_FOLDER
from megaman.model.stable_diffusion import load_base
from megaman.tiny_sd import autoencoder, denoiser, figures, progress, sources, stages
from megaman.tiny_sd.figures import (
    DIFFERENCES,
    HERO_WORDS,
    caption,
    counterpart,
    is_in_heros_dress,
    random_figure,
    random_hero,
)
from megaman.tiny_sd.poses import POSES
from megaman.tiny_sd.sketch import BACKGROUNDS, HERO_PARTS
from megaman.tiny_sd.sketch import draw as draw_figure

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


def test_the_vae_is_certain_so_that_a_lora_learns_from_pictures_and_not_from_noise() -> None:
    base = load_base(EMBEDDED, device=torch.device("cpu"), dtype=torch.float32)
    pictures = pixels_of([Image.open(path) for path in sorted(STARTER.glob("*.png"))[:4]])
    told = base.vae.encode(pictures).latent_dist
    assert told.std.max() < 1e-3 * told.mean.std()
    vae = autoencoder.new_vae()
    assert vae.encode(pictures).latent_dist.std.min() > 0.1
    autoencoder.settle(vae)
    assert vae.encode(pictures).latent_dist.std.max() < 1e-3


def test_no_caption_of_the_base_tells_of_the_hero_and_no_figure_wears_his_dress() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        figure = random_figure(rng)
        assert not any(word in caption(figure, rng).lower() for word in HERO_WORDS)
        assert figure.kind != "hero"
        assert not is_in_heros_dress(figure)
        assert not is_in_heros_dress(counterpart(figure, rng)[0])


def test_a_pair_differs_in_one_field_and_its_captions_in_that_fields_words() -> None:
    rng, differing = random.Random(2), set()
    for _ in range(400):
        figure = random_figure(rng)
        other, field = counterpart(figure, rng)
        values = (getattr(each, field) for each in (figure, other))
        assert len({*values}) == 2
        assert draw_figure(figure).tobytes() != draw_figure(other).tobytes() or field == "style"
        differing.add(field)
        words = rng.getrandbits(64)
        told, of_other = (caption(each, random.Random(words), (field,)) for each in (figure, other))
        pieces = [*zip(told.split(", "), of_other.split(", "), strict=True)]
        assert 1 <= sum(one != two for one, two in pieces) <= (2 if field == "body" else 1), (told, of_other)
    assert differing == DIFFERENCES.keys()


def test_poses_directions_and_the_heros_parts_differ_plainly() -> None:
    hero = random_hero(random.Random(5))
    drawn = {
        (pose, facing): pixels_of([draw_figure(replace(hero, pose=pose, facing=facing))])
        for pose in POSES
        for facing in ("left", "right")
    }
    for one, two in itertools.combinations(drawn, 2):
        changed = ((drawn[one] - drawn[two]).abs().amax(1) > 0.2).float().mean()
        assert changed > 0.15, (one, two)  # of all pixels
    whole = pixels_of([draw_figure(hero)])
    for part in HERO_PARTS:
        lost = pixels_of([draw_figure(replace(hero, without=(part,)))])
        assert ((whole - lost).abs().amax(1) > 0.2).float().sum() > 40, part  # pixels


def test_a_build_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def built(file: Path, last: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        average = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, power=0.75)
        saved = progress.Progress(file, model, optimizer, average)
        for step in progress.steps(saved, last, 6):
            inputs = torch.randn((4, 3), generator=torch.Generator().manual_seed(step))
            model(inputs).square().mean().backward()
        return [parameter.detach().clone() for parameter in model.parameters()]

    whole = built(tmp_path / "whole", 6)
    assert not torch.equal(built(tmp_path / "in parts", 3)[0], whole[0])
    assert all(map(torch.equal, built(tmp_path / "in parts", 6), whole))
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "in parts"}


def test_the_denoiser_learns_from_pairs_under_one_noise() -> None:
    torch.manual_seed(0)
    lesson = denoiser.Lesson(
        torch.randn(8, autoencoder.LATENT_CHANNELS, 16, 16),
        torch.rand(8, 1, 16, 16),
        torch.randint(0, 90, (8 * 4, 77)),
        torch.randint(0, 90, (3, 77)),
        torch.tensor([1]),
    )
    told = denoiser.examples(lesson, torch.tensor([2, 0]), torch.Generator().manual_seed(1))
    assert torch.equal(told.clean, lesson.latents[[4, 5, 0, 1]])
    assert torch.allclose(told.weights.mean(dim=(1, 2, 3)), torch.ones(4))
    seen = {}

    class Watching(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            seen.update(noisy=noisy, timesteps=timesteps)
            return torch.zeros_like(noisy)

    timesteps = torch.tensor([999, 10])
    generator = torch.Generator().manual_seed(2)
    losses = denoiser.denoising_losses(Watching(), told, torch.zeros(4, 77, 128), timesteps, generator)
    assert seen["timesteps"].tolist() == [999, 999, 10, 10]
    kept = denoiser.new_scheduler().alphas_cumprod[999].sqrt()
    difference = seen["noisy"][0] - seen["noisy"][1]
    assert torch.allclose(difference, kept * (told.clean[0] - told.clean[1]), atol=1e-5)
    assert losses.shape == (4,)
    assert losses[2] < 0.1 * losses[0]  # min-SNR: what is nearly clean already counts little


def test_a_stage_s_timesteps_and_noise_are_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    of_sides = torch.cat([denoiser.learning_timesteps(stages.SIDES, generator) for _ in range(40)])
    assert 500 <= of_sides.min() < 530
    assert 920 < of_sides.max() < 950
    seen = []

    def watching(noisy: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        seen.append(noisy.mean(dim=(2, 3)).std().item())  # of each channel's mean
        return torch.zeros_like(noisy)

    clean, ids = torch.zeros(32, autoencoder.LATENT_CHANNELS, 16, 16), torch.zeros(32, 77, dtype=torch.long)
    told = denoiser.Examples(clean, torch.ones(32, 1, 16, 16), ids)
    late, states = torch.full((16,), 999), torch.zeros(32, 77, 128)
    for offset in (0.0, 0.5):
        denoiser.denoising_losses(watching, told, states, late, generator, offset)
    assert seen[0] < 0.1 < 0.4 < seen[1]


def test_what_a_pair_differs_in_counts_more() -> None:
    clean = torch.zeros(4, autoencoder.LATENT_CHANNELS, 16, 16)
    clean[0, :, 2, 3] = 1.0
    ids, silent = torch.ones(16, 77, dtype=torch.long), torch.ones(1, 77, dtype=torch.long)
    lesson = denoiser.Lesson(clean, torch.zeros(4, 1, 16, 16), ids, silent, torch.tensor([0]))
    plain, told = (
        denoiser.examples(lesson, torch.tensor([0]), torch.Generator(), 3.0, weight) for weight in (0.0, 1.0)
    )
    assert torch.equal(plain.weights, torch.ones(2, 1, 16, 16))
    assert torch.allclose(told.weights.mean(dim=(1, 2, 3)), torch.ones(2))
    assert (told.weights[:, 0, 2, 3] > 100).all()


def test_pairs_of_left_and_right_are_found_by_their_captions_and_taken_more_often() -> None:
    told = [
        ("a red robot, facing left", "a red robot, facing right"),
        ("a red robot, facing left", "a teal robot, facing left"),
        ("a bright fox, facing right", "a bright fox, facing left"),
        ("a fox", "a fox"),
    ]
    captions = [text for pair in told for each in pair for text in [each] * denoiser.CAPTIONS_EACH]
    turned = denoiser.turned_pairs(captions)
    assert turned.tolist() == [0, 2]
    picks, generator = torch.ones(1000, dtype=torch.long), torch.Generator().manual_seed(0)
    taken = denoiser.with_turned(picks, turned, 0.5, generator)
    assert 400 < (taken == 1).sum() < 600
    assert set(taken.tolist()) == {0, 1, 2}


def test_terser_captions_leave_out_what_a_pair_has_in_common() -> None:
    rng, captions = random.Random(3), []
    for _ in range(200):
        figure = random_figure(rng)
        other, field = counterpart(figure, rng)
        words = rng.getrandbits(64)
        for each in (figure, other):
            alike = random.Random(words)
            captions += [caption(each, alike, ("pose", "facing", field)) for _ in range(stages.CAPTIONS_EACH)]
    told = stages.terser(captions, 0.5, 1)
    assert stages.terser(captions, 0.0, 1) == captions
    named = [any(pose in text for pose in POSES) for text in told]
    assert 0.5 < sum(named) / len(named) < 0.85
    each = stages.CAPTIONS_EACH
    for at in range(0, len(told), 2 * each):
        for one, two, first, second in zip(
            told[at : at + each], told[at + each :], captions[at : at + each], captions[at + each :],
            strict=False,
        ):  # fmt: skip
            apart = set(first.split(", ")) ^ set(second.split(", "))
            assert set(one.split(", ")) ^ set(two.split(", ")) == apart
            assert {*first.split(", ")} - {*one.split(", ")} <= {*POSES, "facing left", "facing right"}


def test_the_text_encoders_states_are_asked_for_the_captions_words() -> None:
    torch.manual_seed(0)
    model = denoiser.Denoiser(90)
    ids = torch.full((2, 77), 89)
    ids[:, 0], ids[0, 1:4], ids[1, 1:3] = 88, torch.tensor([5, 6, 7]), torch.tensor([5, 9])
    states = model.read(ids)
    before = model.untold(states, ids)
    model.untold(states, ids).backward()
    assert model.text_encoder.get_input_embeddings().weight.grad[[5, 6, 7, 9]].abs().sum(1).all()
    with torch.no_grad():  # a reader that knows the words and no others
        model.words.weight.zero_()
        model.words.bias.fill_(-20)
        model.words.bias[[5, 6, 7, 9]] = 0
    assert model.untold(states, ids) < 2 < before


def test_a_cell_is_covered_where_the_picture_is_not_its_background() -> None:
    picture = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    picture[..., 8:12, 4:6] = 0
    cells = denoiser.covered(picture)
    assert cells.shape == (1, 1, 16, 16)
    assert cells[0, 0, 2, 1] == 0.5
    assert cells.sum() == 0.5


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
    decibels = {name: autoencoder.psnr(vae, pixels_of(pictures)) for name, pictures in drawn.items()}
    assert decibels["figures"] > 30, decibels
    assert decibels["heroes"] > 29, decibels
