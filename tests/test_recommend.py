"""Which checkpoint, what strength: every measure on cases made for it, the order on numbers made for it, the
command from end to end, and what it says of rubbish.
"""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import inject_lora
from PIL import Image, ImageOps
from safetensors.torch import save_file
from test_pages import Reader, digest_of, page_policy
from transformers import CLIPVisionConfig, CLIPVisionModel

import generate_megaman
from megaman.common.console import UserError
from megaman.common.html import TEMPLATES, script_of
from megaman.common.kinds import SD1, SD2, UNET, XL, Kind
from megaman.config.generate import read_config
from megaman.config.record import recorded
from megaman.config.train import EMBEDDED, STARTER_IMAGES, TrainConfig
from megaman.generation import judge, measures, ranking, recommendation, seeing, trained_on
from megaman.generation.comparison import prompts_for
from megaman.generation.features import Picture, features_of, pixels_of
from megaman.generation.prompts import Prompt
from megaman.generation.ranking import RULES, Cell, Measures, ranked, reasons_for, told
from megaman.generation.seeing import CellFiles
from megaman.generation.trained_on import TrainingPictures, find_training_pictures, held_out_losses, rise_at
from megaman.lora.adapter import Adapter
from megaman.lora.injection import adapter_of
from megaman.lora.save import write_kohya
from megaman.model.decoding import Decoded
from megaman.model.stable_diffusion import StableDiffusion, load_base
from megaman.tiny_sd.figures import random_figure, random_hero
from megaman.tiny_sd.sketch import BACKGROUNDS, Figure, draw
from megaman_lora import open_training_set

# ---------------------------------------------------------------- measures, each on pictures made for it

PLACES = tuple(BACKGROUNDS)[:3]  # the "prompts": a background each
SEEDS = 2


@pytest.fixture(scope="module")
def embedded() -> StableDiffusion:
    return load_base(EMBEDDED, device=torch.device("cpu"), dtype=torch.float32)


def figures(make: Callable[[random.Random], Figure], seed: int) -> list[Image.Image]:
    """A figure a prompt and seed, each before the background that its prompt asks for."""
    rng = random.Random(seed)
    made = [make(rng) for _ in range(len(PLACES) * SEEDS)]
    return [draw(Figure(**vars(f) | {"background": PLACES[i // SEEDS]})) for i, f in enumerate(made)]


def measured(
    base: StableDiffusion,
    named: Sequence[Image.Image | None],
    plain: Sequence[Image.Image | None] = (),
    *,
    flip: bool = False,
) -> Measures:
    """The measures of a cell that drew these, beside a base that drew foreign figures, and eight heroes that
    were trained on, with `flip` mirrored too.
    """
    foreign = figures(random_figure, 1)
    training = [draw(random_hero(random.Random(seed))) for seed in range(8)]
    cells, pictures = [], []
    for shots in ([foreign, foreign], [named, plain or foreign]):
        grids = []
        for images in shots:
            files = [None if image is None else f"{len(pictures) + i}" for i, image in enumerate(images)]
            pictures += images
            grids.append([files[i : i + SEEDS] for i in range(0, len(files), SEEDS)])
        cells.append(CellFiles(*grids, seeds=[[*range(SEEDS)]] * len(PLACES)))
    there = {str(i): image for i, image in enumerate(pictures) if image is not None}
    mirrored = [ImageOps.mirror(image) for image in training] if flip else []
    shown = (*there.values(), *training, *mirrored)
    looked_at = [Picture((64, 64), lambda image=image: pixels_of(image)) for image in shown]
    seen = seeing.see(list(there), cells[0], features_of(looked_at, base, None), len(mirrored))
    return seeing.measured(cells[1], cells[0], seen, None)


def test_the_base_s_own_pictures_are_the_zero_of_every_measure(embedded: StableDiffusion) -> None:
    found = measured(embedded, figures(random_figure, 1))
    assert found.likeness == pytest.approx(0, abs=1e-6)
    assert found.obedience == pytest.approx(1)
    assert (found.leakage, found.copies, found.damage) == (0, 0, 0)


def test_heroes_are_like_the_training_pictures_and_strangers_are_not(embedded: StableDiffusion) -> None:
    hero, stranger = (measured(embedded, figures(make, 8)).likeness for make in (random_hero, random_figure))
    assert hero > 0.5
    assert stranger < 0.3


def test_likeness_is_the_mean_of_what_is_shown_and_of_its_colours(
    embedded: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[bool, float | None] = {}  # of colours, and of all else
    is_colours = measures.COLOUR_STEPS**3
    monkeypatch.setattr(measures, "likeness", lambda drawn, *_: told[drawn.shape[1] == is_colours])
    for of_colours, of_looks, mean in (
        (0.2, 0.8, 0.5),
        (None, 0.8, 0.8),
        (0.2, None, 0.2),
        (None, None, None),
    ):
        told |= {True: of_colours, False: of_looks}
        assert measured(embedded, figures(random_hero, 8)).likeness == pytest.approx(mean)


def test_a_copied_training_picture_is_found_and_a_new_one_is_none(embedded: StableDiffusion) -> None:
    fresh = figures(random_hero, 8)
    copied = [draw(random_hero(random.Random(seed))) for seed in (0, 1, 2)]
    assert measured(embedded, fresh).copies == 0
    assert measured(embedded, [*copied, *fresh[3:]]).copies == pytest.approx(0.5)


def test_a_mirrored_copy_is_one_where_the_training_mirrored(embedded: StableDiffusion) -> None:
    turned = [ImageOps.mirror(draw(random_hero(random.Random(seed)))) for seed in range(6)]
    assert measured(embedded, turned).copies < 1
    assert measured(embedded, turned, flip=True).copies == 1


def test_a_copy_that_is_a_little_noisy_is_one_still(embedded: StableDiffusion) -> None:
    rng = np.random.default_rng(0)
    copies = [np.asarray(draw(random_hero(random.Random(seed))), dtype=float) for seed in range(6)]
    noisy = [Image.fromarray(np.clip(c + rng.normal(0, 12, c.shape), 0, 255).astype("uint8")) for c in copies]
    assert measured(embedded, noisy).copies == 1


def test_where_prompts_decide_nothing_obedience_is_lost(embedded: StableDiffusion) -> None:
    obedient = figures(random_hero, 8)
    rng = random.Random(8)
    heroes = [random_hero(rng) for _ in obedient]
    deaf = [draw(Figure(**vars(hero) | {"background": "mint"})) for hero in heroes]
    assert measured(embedded, obedient).obedience > 0.8
    assert abs(measured(embedded, deaf).obedience) < 0.2


def test_pictures_without_the_trigger_that_change_are_leakage(embedded: StableDiffusion) -> None:
    heroes, foreign = figures(random_hero, 8), figures(random_figure, 1)
    one = measured(embedded, heroes, [heroes[0], *foreign[1:]]).leakage
    all_of_them = measured(embedded, heroes, heroes).leakage
    assert 0 < one < 0.4 < 0.8 < all_of_them


def test_burnt_pale_and_missing_pictures_are_damage(embedded: StableDiffusion) -> None:
    heroes = figures(random_hero, 8)
    rng = np.random.default_rng(0)
    burnt = Image.fromarray((rng.random((64, 64, 3)) > 0.5).astype("uint8") * 255)
    pale = Image.new("RGB", (64, 64), "#808080")
    assert measured(embedded, heroes).damage == 0
    found = measured(embedded, [burnt, pale, None, *heroes[3:]])
    assert found.damage == pytest.approx(3 / 12)  # of six with and six without the trigger
    assert found.obedience is None  # a prompt's seeds are not all there
    assert found.likeness is not None


def noise_of(side: int, spots: int) -> Image.Image:
    """A picture of soft spots, so many along a side, within the tones of the heroes."""
    shades = np.random.default_rng(0).normal(130, 70, (spots, spots, 1)) + np.array([40, 0, -40])
    return Image.fromarray(shades.clip(10, 245).astype("uint8")).resize(
        (side, side), Image.Resampling.BICUBIC
    )


def test_noise_is_damage_and_hard_edges_are_none(embedded: StableDiffusion) -> None:
    heroes = figures(random_hero, 8)
    assert measured(embedded, [noise_of(64, 64), noise_of(64, 24), *heroes[2:]]).damage == pytest.approx(
        2 / 12
    )
    grains = [measures.tone_of(np.asarray(noise_of(side, 24))).grain for side in (64, 512)]
    assert grains[0] == pytest.approx(grains[1], rel=0.1)
    stripes = Image.new("RGB", (64, 64), "#406080")
    for x in range(0, 64, 4):
        stripes.paste("#e0c060", (x, 0, x + 2, 64))
    assert measures.tone_of(np.asarray(stripes)).grain == 0


def test_one_seed_or_one_prompt_tells_nothing_of_obedience() -> None:
    looks, seeds = np.random.default_rng(0).normal(size=(3, 2, 5)), [[1, 2]] * 3
    assert measures.obedience(looks, looks, seeds) == pytest.approx(1)
    assert measures.obedience(looks[:1], looks[:1], seeds[:1]) is None
    assert measures.obedience(looks[:, :1], looks[:, :1], [[1], [1], [2]]) is None
    assert measures.obedience(np.zeros_like(looks), np.zeros_like(looks), seeds) is None
    assert measures.leakage(looks[:, :1], looks[:, :1]) is None
    assert measures.leakage([], []) is None


def made_of(seeds: Sequence[Sequence[int]], answer: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Features of drawings in which the prompt counts `answer`, and the seed as much as the prompt at 1."""
    prompts, noises = np.random.default_rng(1).normal(size=(2, 99, 400))
    rest = rng.normal(size=400) / 4
    return [np.array([answer * prompts[p] + noises[s] + rest for s in row]) for p, row in enumerate(seeds)]


@pytest.mark.parametrize(
    "seeds",
    [[[7, 8]] * 6, [[2 * p, 2 * p + 1] for p in range(6)], [[p, p + 1] for p in range(6)],
     [[7, 8, 9], [7, 8], [1, 2], [1, 2, 3, 4], [5, 6], [5, 8]]],
    ids=["the same", "others", "one shared", "of every number"],
)  # fmt: skip
def test_obedience_is_measured_whatever_seeds_the_prompts_have(seeds: list[list[int]]) -> None:
    rng = np.random.default_rng(0)
    base = made_of(seeds, 1, rng)
    for answer in (0.0, 0.5, 1.0):
        assert measures.obedience(made_of(seeds, answer, rng), base, seeds) == pytest.approx(answer, abs=0.1)


def test_obedience_of_the_same_seeds_is_what_prompts_and_drawings_vary_together_by() -> None:
    drawn, base = np.random.default_rng(0).normal(size=(2, 4, 3, 5)) + 1

    def together(these: np.ndarray) -> float:  # without the mean over the prompts, two seeds with each other
        own, other = (each - each.mean(axis=0) for each in (these, base))
        return sum((own[:, s] * other[:, t]).sum() for s in range(3) for t in range(3) if s != t)

    found = measures.obedience(drawn, base, [[1, 2, 3]] * 4)
    assert found == pytest.approx(together(drawn) / together(base))


def test_leakage_is_measured_whatever_number_of_seeds_the_prompts_have() -> None:
    rng = np.random.default_rng(0)
    base = [rng.normal(size=(count, 400)) for count in (1, 2, 3)]
    moved = [each + rng.normal(size=each.shape) for each in base]
    assert measures.leakage(moved, base) == pytest.approx(1 / 2**0.5, abs=0.1)
    assert measures.leakage(base, base) == 0


def test_distances_are_those_of_every_pair() -> None:
    rng = np.random.default_rng(0)
    these, those = rng.normal(size=(5, 7)), rng.normal(size=(4, 7))
    pairs = [[np.sqrt(((a - b) ** 2).mean()) for b in those] for a in these]
    assert measures.distances(these, those) == pytest.approx(np.array(pairs))
    assert measures.away(these, these) < measures.away(these, these, is_itself=True)
    assert measures.away(these, these[:1]) == pytest.approx(measures.distances(these, these[:1]).mean())


@pytest.mark.parametrize("kind", [SD1, SD2, XL], ids=lambda kind: kind.folder)
def test_every_kind_of_base_looks_at_pictures_of_any_size(
    tiny_folders: Callable[[Kind], Path], kind: Kind
) -> None:
    base = load_base(str(tiny_folders(kind)), device=torch.device("cpu"), dtype=torch.float32)
    shades = [torch.full((3, *size), shade) for size in ((32, 32), (36, 28)) for shade in (-0.5, 0.5)]
    pictures = [Picture(tuple(shade.shape[1:]), lambda shade=shade: shade) for shade in shades]
    found = features_of(pictures, base, None)
    assert found.latents.shape[0] == found.looks.shape[0] == len(found.tones) == 4
    alone = features_of(pictures[1:2], base, None)  # a neighbour in the batch changes nothing
    assert np.allclose(alone.looks[0], found.looks[1], atol=1e-5)
    assert not np.allclose(found.looks[0], found.looks[1], atol=1e-3)


# ---------------------------------------------------------------- the order, on numbers made for it

GOOD = {"likeness": 0.9, "copies": 0.0, "obedience": 1.0, "leakage": 0.4, "damage": 0.0}


def cell(step: int, strength: float = 1.0, **changes: float | None) -> Cell:
    return Cell(f"step-{step:06}", step, strength, Measures(**GOOD | changes))


def first_of(*cells: Cell) -> tuple[int, float]:
    """Step and strength of the recommended one, whatever the order of the cells."""
    found = {(r := ranked(order)[0].cell).step * 1000 + r.strength for order in (cells, cells[::-1])}
    assert len(found) == 1
    chosen = ranked(cells)[0].cell
    return chosen.step, chosen.strength


@pytest.mark.parametrize(
    "fault", [{"copies": 0.3}, {"obedience": 0.5}, {"leakage": 1.5}, {"damage": 0.4}, {"loss_rise": 0.4}]
)
def test_an_early_checkpoint_or_a_weaker_one_is_taken_before_an_overtrained_one(fault: dict) -> None:
    early, weak = cell(300, likeness=0.8), cell(3000, 0.5, likeness=0.8)
    late = cell(3000, likeness=1.0, **fault)
    assert first_of(early, late) == (300, 1)
    assert first_of(weak, late) == (3000, 0.5)
    told_of = [told(reason) for reason in reasons_for(ranked([early, late]))]
    assert any(line.startswith("more likeness than this") for line in told_of), told_of


def test_what_is_trained_more_is_taken_where_that_does_no_harm() -> None:
    assert first_of(cell(100, likeness=0.3), cell(400), cell(400, 0.5, likeness=0.5)) == (400, 1)
    assert told(reasons_for(ranked([cell(100, likeness=0.3), cell(400)]))[-1]).startswith("no other cell")


def test_copies_that_a_higher_strength_hides_are_paid_all_the_same() -> None:
    copying, wilder = cell(3000, copies=0.3), cell(3000, 1.25)
    assert first_of(copying, wilder, cell(3000, 0.5, likeness=0.6)) == (3000, 0.5)
    assert first_of(copying, cell(2000, 1.25)) == (2000, 1.25)  # nobody copied until then


def test_copies_that_more_training_hides_are_paid_all_the_same() -> None:
    copying, spoilt, weak = cell(1000, copies=0.3), cell(2000), cell(2000, 0.5, likeness=0.6)
    assert first_of(copying, spoilt, weak) == (2000, 0.5)
    assert first_of(copying, spoilt, cell(500, likeness=0.6)) == (500, 1)
    elsewhere = [replace(each, step=0) for each in (copying, spoilt)]  # nobody knows which came first
    assert first_of(*elsewhere) == (0, 1)
    assert ranked(elsewhere)[0].cell.name == spoilt.name


def test_colours_are_counted_in_the_middle_of_a_picture() -> None:
    red = np.full((16, 32, 3), (200, 30, 30), np.uint8)
    framed = red.copy()
    framed[[0, 1, -1]] = framed[:, :8] = framed[:, -8:] = (10, 10, 240)
    assert np.array_equal(measures.colours_of(red), measures.colours_of(framed))
    a_little, blue = red + np.uint8(9), red[..., ::-1]
    away = [np.abs(measures.colours_of(red) - measures.colours_of(each)).sum() for each in (a_little, blue)]
    assert away[0] < away[1] / 2
    assert (measures.colours_of(blue) ** 2).sum() == pytest.approx(1)


def test_drawings_in_other_colours_are_less_alike_however_they_are_shaped() -> None:
    rng = random.Random(8)
    heroes = [random_hero(rng) for _ in range(16)]
    pale = [Image.blend(draw(each), Image.new("RGB", (64, 64), "#8899bb"), 0.6) for each in heroes[:8]]
    world = [draw(random_figure(rng)) for _ in range(8)]
    shown = [draw(each) for each in heroes]
    rows = [
        np.stack([measures.colours_of(np.asarray(each)) for each in some]) for some in (pale, world, shown)
    ]
    of_pale, of_world, of_heroes = rows
    found = [measures.likeness(each, of_world, of_heroes[8:]) for each in (of_pale, of_heroes[:8])]
    assert found[0] is not None and found[1] is not None
    assert found[0] < 0.5 < found[1], found


def test_of_equals_the_usual_strength_then_the_best_then_the_earliest_is_taken() -> None:
    equal = [cell(200, likeness=0.89), cell(300, likeness=0.9), cell(300, 0.75, likeness=0.91)]
    assert first_of(*equal) == (300, 1)
    assert first_of(cell(200), *equal) == (200, 1)
    assert first_of(cell(100), cell(200)) == (100, 1)


def test_a_little_of_a_fault_costs_nothing_and_more_of_it_ever_more() -> None:
    for rule in RULES:
        values = np.linspace(0, 2, 21)
        points = [rule.points(value) for value in values]
        assert rule.points(rule.bound) == 0 == max(points)
        assert sorted(points, reverse=not rule.is_good) == points
        assert rule.weight > 0
        assert len(rule.why) > 40


def test_a_cell_whose_pictures_overflowed_is_no_better_than_the_worst() -> None:
    lost = cell(500, obedience=None, damage=0.1)  # of one prompt a seed is missing
    order = ranked([lost, cell(100, obedience=0.3), cell(200, likeness=0.8)])
    assert order[0].cell.step == 200
    points = {each.cell.step: each.points["obedience"] for each in order}
    assert points[500] == points[100] < points[200]


def test_what_nobody_has_costs_nobody() -> None:
    none = dict.fromkeys(GOOD)
    order = ranked([cell(1, **none), cell(2, **none)])
    assert [each.score for each in order] == [0, 0]
    assert reasons_for(order) == []
    assert ranked([]) == []


def test_ranking_and_measures_know_no_model() -> None:
    for room in (ranking, measures):
        source = Path(room.__file__).read_text(encoding="utf-8")
        assert not re.search(r"^(import|from) (torch|diffusers|transformers|PIL)", source, re.M)


# ---------------------------------------------------------------- prompts


def test_prompts_without_the_trigger_join_those_that_have_it() -> None:
    adapter = Adapter({}, {"trigger": "mgmn", "config": {"preserve_class": ["android"]}})
    texts = [prompt.text for prompt in prompts_for([], adapter)]
    assert [text.split(",")[0] for text in texts] == ["mgmn"] * 6 + ["android"] * 2
    named = Adapter({}, {"trigger": "mgmn", "config": {"preserve_class": ["", "android"]}})
    assert [prompt.text for prompt in prompts_for([], named)] == texts  # never the empty caption
    asked = [Prompt("MGMN, running", {"seed": 3})]
    assert prompts_for(asked, adapter) == [*asked, Prompt("android, running", {"seed": 3})]
    both = [Prompt("mgmn"), Prompt("a red wizard")]
    assert prompts_for(both, adapter) == both
    assert prompts_for([], Adapter({}, {"config": "?"}))[-1].text.startswith("robot, ")


# ---------------------------------------------------------------- the command


def recommend(lora: Path, output: Path, *flags: str) -> dict[str, Any]:
    """Runs the command in two denoising steps; what recommend.json holds."""
    argv = ["--recommend", f"--lora_path={lora}", f"--output_dir={output}", "--num_inference_steps=2"]
    page = generate_megaman.generate(read_config([*argv, *flags]))
    assert page == output / "recommend.html"
    return json.loads((output / "recommend.json").read_text(encoding="utf-8"))


PROMPTS = ["--prompts", "mega man, red background", "mega man, running"]


def test_a_run_is_recommended_from_end_to_end(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = recommend(finished / "lora_weights", tmp_path / "gen", *PROMPTS)
    told_lines = capsys.readouterr().err
    assert "recommend: 72 pictures, 8 each of the base and of 8 checkpoints x strengths" in told_lines
    cells = {(row["adapter"], row["strength"]) for row in found["rows"]}
    names = ("step-000002", "megaman_lora")
    assert cells == {(name, s) for name in names for s in (0.5, 0.75, 1, 1.25)} | {("megaman_lora", 0)}
    assert len(found["training"]) == 6
    for row in found["rows"]:
        assert len(row["named"]) == len(row["plain"]) == 4
        for name in ("likeness", "copies", "obedience", "leakage", "damage"):
            assert isinstance(row["measures"][name], float), (name, row["adapter"])
        for shot in (*row["named"], *row["plain"]):
            assert (tmp_path / "gen" / shot["file"]).is_file()
            assert 0 <= shot["nearest"] < 6
            assert shot["is_copy"] == (shot["distance"] < measures.COPY_SHARE)
    scores = [row["score"] for row in found["rows"][1:-1]]
    assert scores == sorted(scores, reverse=True)
    assert found["rows"][-1]["measures"]["leakage"] == 0
    chosen = found["rows"][0]
    assert f"recommended: {chosen['adapter']}" in told_lines
    assert found["command"] in told_lines
    step = {"step-000002": 2, "megaman_lora": 4}[chosen["adapter"]]
    is_plain = step == 4 and chosen["strength"] == 1  # the run's own adapter as it is
    assert ("--lora_scale 1" if is_plain else f"--adopt step-{step:06}") in found["command"]
    again = recommend(finished / "lora_weights", tmp_path / "gen", *PROMPTS)
    assert "pictures: 0 to draw, 72 already there" in capsys.readouterr().err
    assert again == found


def test_prompts_with_seeds_of_their_own_are_measured_and_what_can_t_be_is_told(
    finished: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    few = [f"--prompts_file={prompts}", "--lora_scale", "1"]

    def found_of(*lines: str, name: str) -> dict[str, Any]:
        prompts.write_text("\n".join(lines), encoding="utf-8")
        return recommend(finished / "lora_weights", tmp_path / name, *few)

    found = found_of("mega man, red --d 3", "mega man, blue --d 3", "mega man, red --d 6", name="own")
    assert [len(row["named"]) for row in found["rows"]] == [6] * 3
    for row in found["rows"]:
        assert isinstance(row["measures"]["obedience"], float)
        assert isinstance(row["measures"]["leakage"], float)
    assert found["notes"] == [list(recommendation.NO_LOSS)]
    alone = found_of("mega man, red --d 3", name="alone")
    assert {row["measures"]["obedience"] for row in alone["rows"]} == {None}
    assert list(recommendation.NO_PROMPTS) in alone["notes"]


def test_an_interrupted_recommendation_keeps_what_is_drawn(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*PROMPTS[:2], "--lora_scale", "1", "--batch_size", "2"]
    drawn = generate_megaman.draw_batch
    left = [3]

    def dying(*args: Any) -> list[Decoded]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return drawn(*args)

    monkeypatch.setattr(generate_megaman, "draw_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        recommend(finished / "lora_weights", tmp_path / "gen", *few)
    assert not (tmp_path / "gen" / "recommend.html").exists()
    monkeypatch.undo()
    recommend(finished / "lora_weights", tmp_path / "gen", *few)
    assert "pictures: 6 to draw, 6 already there" in capsys.readouterr().err


def test_a_cell_whose_numbers_overflow_comes_last_and_stops_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = generate_megaman.render

    def overflowing(batch: Sequence[Any], *rest: Any) -> list[Decoded]:
        drawn = render(batch, *rest)
        return [replace(each, is_whole=each.is_whole & (job.lora_scale != 2))
                for job, each in zip(batch, drawn, strict=True)]  # fmt: skip

    monkeypatch.setattr(generate_megaman, "render", overflowing)
    found = recommend(finished / "lora_weights", tmp_path / "gen", *PROMPTS, "--lora_scale", "1", "2")
    lost = [row for row in found["rows"] if row["strength"] == 2]
    assert [row["strength"] for row in found["rows"]] == [1, 1, 2, 2, 0]
    assert {row["measures"]["damage"] for row in lost} == {1}
    assert {shot["file"] for row in lost for shot in row["named"]} == {None}
    assert "not drawn: its numbers overflowed" in (tmp_path / "gen" / "recommend.html").read_text()


def run_of(folder: Path, base: StableDiffusion, factor: float) -> Path:
    """A run of ours on the embedded base whose LoRA is noise of this size; its lora_weights/."""
    cfg = TrainConfig(
        pretrained_model_name=EMBEDDED, data_dir=STARTER_IMAGES, resolution=64, lora_targets="linear"
    )
    inject_lora(base.unet, cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in base.unet.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(factor * torch.randn(parameter.shape, generator=generator))
    about = {"base": EMBEDDED, "resolution": 64, "trigger": "mega man", "guidance_scale": 4.5}
    write_kohya(
        adapter_of({UNET: base.unet}, SD1, about), folder / "lora_weights" / "megaman_lora.safetensors"
    )
    (folder / "training_config.json").write_text(json.dumps(recorded(cfg)))
    return folder / "lora_weights"


@pytest.fixture(scope="module")
def noisy_run(tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[str, Any]]:
    """The rows of a recommendation for a LoRA of noise, by strength: hardly any, the usual one, 3."""
    root = tmp_path_factory.mktemp("noisy")
    spent = load_base(EMBEDDED, device=torch.device("cpu"), dtype=torch.float32)
    lora = run_of(root / "run", spent, 0.02)
    flags = [*PROMPTS, "--lora_scale", "0.01", "1", "3"]
    found = recommend(lora, root / "gen", *flags, "--num_inference_steps=3")
    return {"found": found, **{row["strength"]: row["measures"] for row in found["rows"]}}


def test_an_untrained_lora_changes_nothing_and_is_nothing_like_the_pictures(noisy_run: dict) -> None:
    untrained = noisy_run[0.01]
    assert abs(untrained["likeness"]) < 0.05
    assert untrained["obedience"] == pytest.approx(1, abs=0.05)
    assert untrained["leakage"] < 0.05
    assert untrained["copies"] == untrained["damage"] == 0


def test_a_lora_at_strength_3_leaks_disobeys_and_comes_last(noisy_run: dict) -> None:
    usual, wild = noisy_run[1], noisy_run[3]
    assert wild["leakage"] > usual["leakage"] > 0.05
    assert wild["obedience"] < usual["obedience"]
    assert wild["damage"] > 0.9 > 0.5 > usual["damage"]
    assert noisy_run["found"]["rows"][-2]["strength"] == 3  # behind all others but the base


# ---------------------------------------------------------------- rubbish


def test_without_checkpoints_or_a_run_only_strengths_are_compared(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lonely = tmp_path / "loras" / "lora_weights"
    shutil.copytree(adapter_folder, lonely)
    base = json.loads((adapter_folder.parent / "training_config.json").read_text())["pretrained_model_name"]
    flags = [*PROMPTS[:2], "--lora_scale", "1", "2", f"--base_model={base}"]
    found = recommend(lonely, tmp_path / "gen", *flags, "--num_images_per_prompt=1")
    said = capsys.readouterr().err
    assert "no checkpoints beside it; only strengths are compared" in said
    assert "Likeness and copies are left out: the adapter lies in no training run of ours." in said
    assert "--lora_path" in found["command"]
    assert "--adopt" not in found["command"]
    assert {row["measures"]["likeness"] for row in found["rows"]} == {None}
    notes = [text for text, _ in found["notes"]]
    assert recommendation.NO_SEEDS[0] in notes


def test_an_adapter_from_elsewhere_is_called_by_its_name(
    adapter_folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "Rockman v2.safetensors"
    shutil.copy(adapter_folder / "megaman_lora.safetensors", theirs)  # which tells its 5 steps
    few = [*PROMPTS[:2], "--lora_scale", "1", f"--base_model={tiny_folder}", "--num_images_per_prompt=1"]
    found = recommend(theirs, tmp_path / "gen", *few)
    assert found["rows"][0]["label"] == ["{n}", "Rockman v2"]
    assert "recommended: Rockman v2 at strength 1: " in capsys.readouterr().err
    shown = [a for _, a in Reader((tmp_path / "gen" / "recommend.html").read_text(encoding="utf-8")).tags]
    assert not [a for a in shown if a.get("data-t") == "step {n}"]


def test_training_pictures_that_are_gone_are_said_to_be(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "lora_weights", run / "lora_weights")
    shutil.copy(finished / "metrics.jsonl", run)
    record = json.loads((finished / "training_config.json").read_text())

    def missing(**changes: Any) -> str:
        (run / "training_config.json").write_text(json.dumps(record | changes))
        found = find_training_pictures(run / "lora_weights", 32, 4)
        assert found.missing is None or not found.pictures
        return "" if found.missing is None else told(found.missing)

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.png").write_bytes(b"no picture")
    assert missing() == ""
    assert missing(crop="?", resolution="large") == ""
    assert "no longer in" in missing(data_dir="./gone")
    assert "no longer in" in missing(data_dir=5)
    assert "holds other pictures than those of the training" in missing(data_dir=str(empty))
    changed = tmp_path / "changed"
    shutil.copytree(record["data_dir"], changed)
    assert missing(data_dir=str(changed)) == ""
    next(changed.glob("*.png")).unlink()
    assert "holds other pictures than those of the training" in missing(data_dir=str(changed))
    (run / "training_config.json").write_text("{")
    assert find_training_pictures(run / "lora_weights", 32, 4).missing == (trained_on.NO_RUN, "")


def test_pictures_are_cut_and_sized_as_the_training_did(finished: Path) -> None:
    found = find_training_pictures(finished / "lora_weights", 512, 4).pictures
    assert {str(each.crop.bucket) for each in found} == {"28x36"}  # of 40 x 48 at 32 px, not at 512
    assert found[0].crop.pixels().shape == (3, 36, 28)


def test_the_demo_s_own_pictures_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "lora_weights").mkdir(parents=True)
    record = recorded(TrainConfig(data_dir=STARTER_IMAGES, resolution=64, validation_split=0))
    (tmp_path / "run" / "training_config.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    assert len(find_training_pictures(tmp_path / "run" / "lora_weights", 64, 8).pictures) == 30


def test_pictures_that_the_run_held_out_are_no_training_pictures(tmp_path: Path) -> None:
    (tmp_path / "run" / "lora_weights").mkdir(parents=True)
    cfg = TrainConfig(data_dir=STARTER_IMAGES, resolution=64, validation_split=0.2, seed=5)
    data, _ = open_training_set(replace(cfg, output_dir=str(tmp_path / "none")), processes=1)
    assert len(data.held_out) == 6

    def found_of(record: dict[str, Any]) -> set[str]:
        (tmp_path / "run" / "training_config.json").write_text(json.dumps(record))
        found = find_training_pictures(tmp_path / "run" / "lora_weights", 64, 8)
        return {each.name for each in found.pictures}

    names = [path.name for path in data.dataset.paths]
    assert found_of(recorded(cfg)) == {name for i, name in enumerate(names) if i not in data.held_out}
    for damage in ({"validation_split": "x"}, {"validation_split": 2.0}, {"seed": None}):
        assert found_of(recorded(cfg) | damage) == set(names)


def test_held_out_losses_are_read_past_every_damage(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "lora_weights", run / "lora_weights")
    shutil.copy(finished / "training_config.json", run)
    assert held_out_losses(run / "lora_weights") == {}
    lines = ['{"step": 0, "validation_loss": 1.0}', "{", "[]", "null", '{"step": 5, "loss": 2}', "\x00"]
    lines += ['{"step": 10, "validation_loss": NaN}', '{"step": 20, "validation_loss": 0.5}']
    lines += ['{"step": "x", "validation_loss": 1}', '{"step": 30, "validation_loss": 0.6}', '{"step": 4']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    losses = held_out_losses(run / "lora_weights")
    assert losses == {0: 1.0, 20: 0.5, 30: 0.6}
    rises = [rise_at(step, losses) for step in (0, 10, 20, 30)]
    assert rises == [0, 0, 0, pytest.approx(0.2)]  # at 10 as at the last measured before
    assert rise_at(5, {10: 1.0}) is None


@pytest.mark.parametrize("theirs", ['{"mine": 1}', "[1]", "no json", None])
def test_numbers_of_another_s_in_the_place_are_refused_before_anything_is_drawn(
    finished: Path, tmp_path: Path, theirs: str | None
) -> None:
    gallery, elsewhere = tmp_path / "gen", tmp_path / "mine.json"
    recommend(finished / "lora_weights", gallery, *PROMPTS[:2], "--lora_scale", "1")
    numbers = gallery / "recommend.json"
    numbers.unlink()
    if theirs is None:
        numbers.mkdir()
    else:
        elsewhere.write_text(theirs)
        numbers.symlink_to(elsewhere)
    with pytest.raises(UserError, match="no recommendation of ours") as error:
        recommend(finished / "lora_weights", gallery, *PROMPTS[:2], "--lora_scale", "1")
    assert error.value.exit_code == 7
    assert theirs is None or elsewhere.read_text() == theirs


def test_a_drawing_that_was_cropped_since_is_left_out_and_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*PROMPTS, "--lora_scale", "1"]
    found = recommend(finished / "lora_weights", tmp_path / "gen", *few)
    file = tmp_path / "gen" / found["rows"][0]["named"][0]["file"]
    Image.new("RGB", (120, 30)).save(file)
    again = recommend(finished / "lora_weights", tmp_path / "gen", *few)
    assert "1 picture of another size than drawn, left out" in capsys.readouterr().err
    shots = [shot["file"] for row in again["rows"] for shot in row["named"]]
    assert shots.count(None) == 1
    assert file.is_file()


def test_a_page_of_another_s_in_the_place_is_refused_before_anything_is_drawn(
    finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "gen"
    generate_megaman.generate(
        read_config([f"--lora_path={finished / 'lora_weights'}", f"--output_dir={output}", "--prompts=a",
                     "--num_inference_steps=1"])
    )  # fmt: skip
    (output / "recommend.html").write_text("mine")
    with pytest.raises(UserError, match="is no page of ours") as error:
        recommend(finished / "lora_weights", output, *PROMPTS)
    assert error.value.exit_code == 7
    assert (output / "recommend.html").read_text() == "mine"
    assert len(list(output.glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--judge", "o/m"], "--judge looks at the pictures of --recommend"),
        (["--recommend", "--lora_scale", "0"], "--recommend: --lora_scale 0 draws the base alone"),
        (["--recommend", "--gallery_only"], "--gallery_only draws nothing: leave --recommend out"),
    ],
)
def test_flags_that_contradict_are_refused(flags: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        read_config(flags)
    assert error.value.exit_code == 2


def test_the_user_s_strengths_and_seeds_come_before_ours() -> None:
    assert read_config(["--recommend"]).lora_scale == [0.5, 0.75, 1.0, 1.25]
    assert read_config(["--recommend"]).num_images_per_prompt == 2
    cfg = read_config(["--recommend", "--lora_scale", "1", "--num_images_per_prompt", "1"])
    assert (cfg.lora_scale, cfg.num_images_per_prompt) == ([1.0], 1)
    assert read_config([]).lora_scale is None


# ---------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP image model of random weights."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24,
        patch_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip") / "judge"
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def test_a_clip_model_looks_where_one_is_named(clip: Path, finished: Path, tmp_path: Path) -> None:
    few = [*PROMPTS, "--lora_scale", "1"]
    own = recommend(finished / "lora_weights", tmp_path / "gen", *few)
    found = recommend(finished / "lora_weights", tmp_path / "gen", *few, f"--judge={clip}")
    assert found["judge"] == clip.name  # no path: a page is shared
    for ours, theirs in zip(own["rows"], found["rows"], strict=True):
        assert ours["measures"]["copies"] == theirs["measures"]["copies"]  # the VAE tells those
        if ours["strength"] and ours["adapter"] == theirs["adapter"]:
            assert ours["measures"]["likeness"] != theirs["measures"]["likeness"]


def test_a_judge_sees_the_middle_square_in_clip_s_own_scaling(clip: Path) -> None:
    pixels = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    wide = torch.cat([torch.ones(1, 3, 24, 8), pixels, -torch.ones(1, 3, 24, 8)], dim=3)
    look = judge.load_judge(str(clip), torch.device("cpu"))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        pooled = CLIPVisionModel.from_pretrained(clip).eval()(pixel_values=(pixels / 2 + 0.5 - mean) / std)
    expected = torch.nn.functional.normalize(pooled.pooler_output, dim=1)
    assert torch.allclose(look(wide), expected, atol=1e-5)
    (clip / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    other = judge.load_judge(str(clip), torch.device("cpu"))(pixels)
    (clip / "preprocessor_config.json").unlink()
    assert not torch.allclose(other, expected, atol=1e-3)


def damaged(name: str, clip: Path, folder: Path) -> str:
    """The name of a judge that is none, in a way."""
    if name == "offline":
        return "nobody/no-such-judge"
    if name == "missing":
        return str(folder / "nowhere")
    shutil.copytree(clip, folder / name)
    if name == "no weights":
        (folder / name / "model.safetensors").rename(folder / name / "model.bin")
    elif name == "broken weights":
        (folder / name / "model.safetensors").write_bytes(b"rubbish")
    elif name == "other weights":
        save_file({"x": torch.zeros(2)}, folder / name / "model.safetensors", {"format": "pt"})
    else:
        text = {"not clip": '{"model_type": "bert"}', "broken config": "{", "list": "[1]"}[name]
        (folder / name / "config.json").write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("offline", "the hub can't be reached and this judge is not on this machine"),
        ("missing", "no such folder of a model"),
        ("no weights", r"only \.safetensors weights are read"),
        ("broken weights", "can't be loaded"),
        ("other weights", "of such a one's tensors are not there"),
        ("not clip", "no CLIP image model but bert"),
        ("broken config", "its config.json can't be read"),
        ("list", "its config.json can't be read"),
    ],
)
def test_a_judge_that_is_none_is_one_line(clip: Path, tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        judge.load_judge(damaged(name, clip, tmp_path), torch.device("cpu"))
    assert error.value.exit_code == 4
    assert len(error.value.problems) == 1
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the page


def page_of(tmp_path: Path, **changes: Any) -> str:
    """The page of two cells and the base."""
    shot = {"file": "a.png", "prompt": "mega man", "seed": 1, "width": 64, "height": 64, "nearest": None}
    shot |= {"distance": None, "is_copy": False}
    row = {"id": "cell-0", "adapter": "x", "label": ("step {n}", "5"), "step": 5, "strength": 1.0}
    row |= {"score": -0.1, "points": {}, "measures": dict.fromkeys(recommendation.MEANINGS)}
    row |= {"named": [shot | changes, shot | {"file": None}], "plain": [shot]}
    base = row | {"id": "cell-1", "strength": 0, "score": None, "label": ("{n}", "x")}
    notes = [recommendation.NO_SEEDS, recommendation.NO_PLAIN, recommendation.NO_LOSS]
    notes += [recommendation.NO_PROMPTS, recommendation.NOT_DRAWN, recommendation.NO_ANSWER]
    texts = [(text, "1 %") for text in (*ranking.SAID.values(), *ranking.REJECTED.values())]
    facts = {"base": "b", "trigger": "t", "judge": None, "command": "python <x>", "rows": [row, base]}
    missing = [trained_on.NO_RUN, trained_on.GONE, trained_on.CHANGED]
    facts |= {"notes": [*notes, *((text, "x") for text in missing)], "reasons": [*texts, ranking.UNSURPASSED]}
    recommendation.write_page(tmp_path / "recommend.html", facts, TrainingPictures())
    return (tmp_path / "recommend.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style>"])
def test_nothing_in_a_prompt_becomes_markup(tmp_path: Path, evil: str) -> None:
    plain, page = Reader(page_of(tmp_path)), Reader(page_of(tmp_path, prompt=evil))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_runs_its_own_script_alone_and_asks_nobody(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    script = page.split("<script>")[1].split("</script>")[0]
    assert script == script_of("recommend.js")
    assert f"script-src 'sha256-{digest_of(script)}';" in page_policy(page)
    assert not re.search(r"https?://", page)
    links = {a[name] for _, a in Reader(page).tags for name in ("src", "href") if name in a}
    assert links == {"a.png", "#cell-0", "#cell-1"}


def test_every_text_of_the_page_has_its_chinese(tmp_path: Path) -> None:
    script = (TEMPLATES / "recommend.js").read_text(encoding="utf-8")
    table = script.split("const CHINESE = {")[1].split("\n};")[0]
    known = dict(re.findall(r'"((?:[^"\\]|\\.)*)":\s*"((?:[^"\\]|\\.)*)",', table))
    template = (TEMPLATES / "recommend.html.j2").read_text(encoding="utf-8")
    shown = {a["data-t"] for _, a in Reader(page_of(tmp_path)).tags if "data-t" in a} - {"{n}"}
    shown |= set(re.findall(r'say\("([^"]+)"', template)) | set(re.findall(r'told\("([^"]+)"', script))
    shown |= set(re.findall(r'shots\("([^"]+)"', template)) - {"title"}
    assert len(shown) > 50
    assert shown <= known.keys()
    for english, chinese in known.items():
        assert set(re.findall(r"{\w+}", english)) == set(re.findall(r"{\w+}", chinese)), english


if sys.platform != "win32":

    def test_in_a_browser_the_cells_are_sorted_by_any_measure(finished: Path, tmp_path: Path) -> None:
        from browser import NoBrowser, browser

        recommend(finished / "lora_weights", tmp_path / "gen", *PROMPTS[:2], "--lora_scale", "0.5", "1")
        column = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[1].textContent)"
        cells = "[...document.querySelectorAll('#cells details')].map((each) => each.id)"
        rows = "[...document.querySelectorAll('tbody tr')].map((row) => row.dataset.cell)"
        try:
            with browser(tmp_path / "profile") as chromium:
                chromium.open(tmp_path / "gen" / "recommend.html")
                press = "document.querySelectorAll('thead button')[1].click()"
                chromium.run(press)
                assert chromium.run(column) == ["0", "0.5", "0.5", "1", "1"]
                assert chromium.run(cells) == chromium.run(rows)
                chromium.run(press)
                assert chromium.run(column) == ["1", "1", "0.5", "0.5", "0"]
                chromium.run("document.querySelector('#language').click()")
                assert chromium.run("document.querySelector('h1').textContent") == "用哪個檢查點、多大強度"
        except NoBrowser as reason:
            pytest.skip(str(reason))
