"""Pictures that are kept out: which, that they never train, and what the loss on them is for."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapted import weights_in
from conftest import EVERY_KIND
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image

import megaman_lora
from megaman.common.cache import Store
from megaman.common.signals import StopRequest
from megaman.model.stable_diffusion import StableDiffusion
from megaman.model.text import Text
from megaman.training import validation
from megaman.training.checkpoints import STATE_FILE, latest_checkpoint
from megaman.training.tracker import Tracker
from megaman.training.validation import BestCheckpoint, Look, held_out
from megaman_lora import MegaManDataset, sampler_of


def chosen_of(digests: list[str], share: float, seed: int) -> frozenset[int]:
    """The choice among pictures of these contents."""
    return held_out(digests, [f"{i}.png" for i in range(len(digests))], share, seed)


def test_the_choice_hangs_on_contents_and_seed_alone() -> None:
    digests = [f"digest {i}" for i in range(40)]
    chosen = chosen_of(digests, 0.1, 42)
    assert len(chosen) == 4
    turned = chosen_of(digests[::-1], 0.1, 42)
    assert {digests[i] for i in chosen} == {digests[::-1][i] for i in turned}
    assert chosen_of(digests, 0.1, 43) != chosen
    more = chosen_of([*digests, "new"], 0.1, 42)
    assert len(chosen - more) <= 1  # one picture more changes at most one place


def test_copies_of_a_picture_share_its_fate() -> None:
    digests = [f"digest {i % 8}" for i in range(24)]
    for seed in range(20):
        chosen = {digests[i] for i in chosen_of(digests, 0.1, seed)}
        left = {digest for i, digest in enumerate(digests) if digest not in chosen}
        assert len(chosen) == 1
        assert not chosen & left


@pytest.mark.parametrize(("count", "share"), [(14, 0.5), (40, 0.0), (15, 0.01)])
def test_few_pictures_or_no_share_keep_none_out(count: int, share: float) -> None:
    assert chosen_of([str(i) for i in range(count)], share, 1) == frozenset()


@pytest.fixture
def sixteen(folder_of_pictures: Path) -> Path:
    """Pictures enough that some are kept out."""
    for i in range(7, 17):
        Image.new("RGB", (40 + i, 50), (i * 10, 90, 255 - i * 9)).save(
            folder_of_pictures / f"megaman_{i}.png"
        )
    return folder_of_pictures


def lines_of(output: Path) -> dict[int, float]:
    """Step -> validation loss."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def test_they_never_train(sixteen: Path) -> None:
    dataset = MegaManDataset(sixteen, None)
    chosen = held_out([picture.digest for picture in dataset.scanned], ["x"] * len(dataset), 0.25, 42)
    stream = sampler_of(dataset, 3, chosen)
    seen = {place.picture for step in range(2 * len(stream)) for place in stream.batch(step)}
    assert seen == set(range(len(dataset))) - chosen
    assert len(chosen) == round(0.25 * len(dataset))


@EVERY_KIND
def test_the_loss_is_measured_and_measuring_changes_nothing(
    train: Callable[..., Path], sixteen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max_train_steps", "6", "--save_steps", "3", "--learning_rate", "0.01")
    often = train(*flags, "--validation_steps", "2")
    told = lines_of(often.parent)
    assert list(told) == [0, 2, 3, 4, 6]
    assert len(set(told.values())) == 5
    assert "kept out of the training (--validation_split)" in capsys.readouterr().err
    weights = weights_in(often)
    seldom = train(*flags, "--validation_steps", "6")
    after = weights_in(seldom)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert lines_of(seldom.parent) == {step: told[step] for step in (0, 3, 6)}


def test_a_resumed_run_knows_the_best_and_measures_the_same(
    train: Callable[..., Path], sixteen: Path, tmp_path: Path
) -> None:
    flags = ["--save_steps", "2", "--validation_steps", "2", "--lr_scheduler", "constant"]
    flags += ["--learning_rate", "0.1", "--seed", "1"]  # too high, so that the last step is not the best
    unbroken = train(*flags, "--max_train_steps", "6").parent
    whole, best = lines_of(unbroken), latest_checkpoint(unbroken / "checkpoints").run["best"]
    assert best["loss"] == min(loss for step, loss in whole.items() if step)
    assert best["step"] == 4  # measured by the part that is resumed
    shutil.rmtree(unbroken)
    for part in ("4", "6"):
        resume = ("--resume_from_checkpoint", "latest") if part == "6" else ()
        output = train(*flags, "--max_train_steps", part, *resume).parent
    assert lines_of(output) == whole
    assert latest_checkpoint(output / "checkpoints").run["best"] == best


def test_the_best_checkpoint_keeps_its_state(
    train: Callable[..., Path],
    sixteen: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    honest = megaman_lora.validate

    def worse_and_worse(run: megaman_lora.Run, tracker: Tracker, step: int) -> None:
        honest(run, tracker, step)
        run.best.note_measured(step, float(step + 1))

    monkeypatch.setattr(megaman_lora, "validate", worse_and_worse)
    flags = ("--save_steps", "1", "--max_train_steps", "5", "--checkpoints_total_limit", "2")
    folder = train(*flags).parent / "checkpoints"
    assert sorted(path.parent.name for path in folder.glob(f"*/{STATE_FILE}")) == [
        "step-000001", "step-000004", "step-000005",
    ]  # fmt: skip
    assert "the smallest validation loss, 2.0000, was at step 1; see" in capsys.readouterr().err


def test_only_what_was_measured_at_a_checkpoint_can_be_best() -> None:
    best = BestCheckpoint()
    best.note_measured(3, 0.1)
    best.note_saved(4)
    assert best.step is None
    best.note_measured(4, 0.3)
    best.note_saved(4)
    assert best.step == 4
    best.note_measured(8, 0.5)
    best.note_saved(8)
    assert (best.step, best.loss) == (4, 0.3)


# ---------------------------------------------------------------- sample pictures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which sample pictures were really drawn."""
    steps = []
    honest = validation.draw_previews

    def noted(
        base: StableDiffusion, text: Text, look: Look, step: int, stop: StopRequest
    ) -> list[Image.Image]:
        steps.append(step)
        return honest(base, text, look, step, stop)

    monkeypatch.setattr(validation, "draw_previews", noted)
    return steps


def first_samples(weights: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((weights.parent / "samples" / "step-000000").glob("*.png"))]


def test_the_bases_own_samples_are_drawn_once_and_come_out_the_same(
    train: Callable[..., Path], tmp_path: Path, drawn: list[int]
) -> None:
    flags = ["--max_train_steps", "1", "--validation_prompt", "mega man", "a robot"]
    flags += ["--cache_dir", str(tmp_path / "cache")]
    first = first_samples(train(*flags))
    assert (drawn, len(first)) == ([0, 1], 2)
    assert first_samples(train(*flags, "--learning_rate", "1e-3", "--lora_rank", "2")) == first
    assert drawn == [0, 1, 1]
    assert len({*first, *first_samples(train(*flags, "--seed", "7"))}) == 4
    assert drawn == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("flag", ["--use_dora", "--init_lora"])
def test_samples_that_an_adapter_has_a_part_in_are_always_drawn(
    train: Callable[..., Path], finished: Path, drawn: list[int], flag: str
) -> None:
    value = [str(finished / "lora_weights")] if flag == "--init_lora" else []
    for _ in range(2):
        train("--max_train_steps", "1", flag, *value)
    assert drawn == [0, 1] * 2


def test_whatever_decides_the_bases_samples_is_in_their_key(plain: StableDiffusion) -> None:
    text, look = plain.embed(["", "mega man"]), Look(32, 7.5, 42)
    other = plain.embed(["", "a robot"])
    half = replace(plain, unet=UNet2DConditionModel.from_config(plain.unet.config).half())
    predicts = DDPMScheduler.from_config(plain.scheduler.config, prediction_type="v_prediction")
    cases = [
        ("a", plain, text, look, "auto"), ("b", plain, text, look, "auto"), ("a", plain, other, look, "auto"),
        ("a", plain, text, Look(40, 7.5, 42), "auto"), ("a", plain, text, Look(32, 5.0, 42), "auto"),
        ("a", plain, text, Look(32, 7.5, 43), "auto"), ("a", plain, text, look, "xformers"),
        ("a", half, text, look, "auto"), ("a", replace(plain, scheduler=predicts), text, look, "auto"),
    ]  # fmt: skip
    keys = [validation.key_of_base_previews(*case) for case in cases]
    assert len({*keys}) == len(cases)
    assert validation.key_of_base_previews(*cases[0]) == keys[0]


def test_samples_that_were_stopped_or_found_no_memory_are_not_kept(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 6), "red")
    answers = iter([[], [picture, picture]])
    store = Store(tmp_path)
    for expected in (0, 2, 2):
        kept = validation.kept_previews("a" * 64, store, lambda: next(answers))
        assert [each.tobytes() for each in kept] == [picture.tobytes()] * expected
