"""Training in float16 under a scaler of the gradients, as on an NVIDIA card, here on the CPU."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_resume
import test_train
import torch
from adapted import steps_told, weights_in
from conftest import TEXT
from PIL import Image

import megaman_lora
from megaman.common.console import UserError
from megaman.common.kinds import SD1, SD2, XL
from megaman.common.signals import Stopped
from megaman.model import compute
from megaman.training import validation
from megaman.training.checkpoints import read_checkpoint
from megaman.training.tracker import StepResult, Tracker


@pytest.fixture(autouse=True)
def half_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU train in float16."""
    monkeypatch.setattr(compute, "FP16_DEVICES", {"cuda", "cpu"})


@pytest.fixture
def train_flags(train_flags: list[str]) -> list[str]:
    """A run of four steps in half precision."""
    return [*train_flags, "--mixed_precision", "fp16"]


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets every run begin with another scaler: init_scale, growth_interval (steps)."""
    honest = torch.amp.GradScaler
    return lambda **settings: monkeypatch.setattr(torch.amp, "GradScaler", partial(honest, **settings))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[StepResult]:
    """The steps of all runs of a test, one after the other, as the loop saw them."""
    seen: list[StepResult] = []
    honest = Tracker.record

    def record(self: Tracker, step: StepResult) -> None:
        seen.append(step)
        honest(self, step)

    monkeypatch.setattr(Tracker, "record", record)
    return seen


def state_after(output: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """A checkpoint's tensors, and its scaler's state."""
    checkpoint = read_checkpoint(output / "checkpoints" / f"step-{step:06}")
    return dict(checkpoint.tensors), checkpoint.run["scaler"]


# ---------------------------------------------------------------- what holds in float32 too
stop_after = test_resume.stop_after
test_a_non_finite_loss_stops = test_train.test_a_non_finite_loss_stops_the_run_and_keeps_what_was_saved
test_a_loss_that_is_no_number_names_its_step = (
    test_resume.test_a_loss_that_is_no_number_names_its_step_and_picture_and_touches_no_file
)
test_a_preview_that_is_no_picture_stops = test_resume.test_a_preview_that_is_no_picture_stops_with_its_step


def test_it_learns_what_float32_learns(
    train: Callable[..., Path], steps: list[StepResult], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max_train_steps", "14", "--validation_steps", "14", "--save_steps", "14")
    train(*flags)
    assert "the base in float16" in capsys.readouterr().err
    train(*flags, "--mixed_precision", "no")
    half, whole = (torch.stack([step.loss for step in part]) for part in (steps[:14], steps[14:]))
    assert not any(step.was_skipped for step in steps)
    assert half[-7:].mean() < 0.96 * half[:7].mean()
    assert (half - whole).abs().max() < 5e-3 * whole.max()


@pytest.mark.parametrize(
    ("base_folder", "flags"),
    [
        (SD1, "--gradient_checkpointing --preserve_weight 1 --ema_decay 0.9"),
        (SD1, "--lora_targets conv --base_weights int8"),
        (SD1, "--lora_targets conv --use_dora"),
        (SD2, "--lora_targets attention+ff --lora_dropout 0.3"),
        (XL, "--text_encoder_lr 5e-3"),
    ],
    indirect=["base_folder"],
    ids=lambda value: value if isinstance(value, str) else value.folder,
)
def test_every_form_takes_the_steps_of_float32(
    train: Callable[..., Path], steps: list[StepResult], flags: str
) -> None:
    """The losses of three steps, and the gradients' size at each."""
    few = ("--max_train_steps", "3", "--save_steps", "9", "--validation_steps", "9")
    half = weights_in(train(*flags.split(), *few))
    whole = weights_in(train(*flags.split(), *few, "--mixed_precision", "no"))
    most = 0.06 if "int8" in flags else 0.03  # two roundings; 0.041 at the third step
    for of_half, of_whole in zip(steps[:3], steps[3:], strict=True):
        torch.testing.assert_close(of_half.loss, of_whole.loss, rtol=5e-3, atol=0)
        torch.testing.assert_close(of_half.grad_norm, of_whole.grad_norm, rtol=most, atol=0)
    assert test_train.differences(whole, half).quantile(0.9) < 0.15


def test_accumulating_is_one_batch_of_twice_the_size(train: Callable[..., Path]) -> None:
    few = ("--max_train_steps", "2", "--save_steps", "9", "--validation_steps", "9")
    one = weights_in(train("--train_batch_size", "4", *few))
    two = weights_in(train("--train_batch_size", "2", "--gradient_accumulation_steps", "2", *few))
    assert test_train.differences(one, two).quantile(0.95) < 0.01


# ---------------------------------------------------------------- the scaler


def test_a_scale_that_overflows_skips_steps_and_falls_until_it_learns(
    train: Callable[..., Path], scaler: Callable[..., None], steps: list[StepResult]
) -> None:
    first, total = 2.0**27, 8
    scaler(init_scale=first)
    flags = ["--max_train_steps", str(total), "--save_steps", "1", "--checkpoints_total_limit", "20"]
    output = train(*flags, "--validation_steps", "20", "--lr_scheduler", "constant").parent
    skipped = [step.was_skipped for step in steps]
    assert skipped[0]
    assert 2 <= sum(skipped) < total
    before: dict[str, torch.Tensor] = {}
    for done in range(1, total + 1):
        tensors, kept = state_after(output, done)
        assert kept["scale"] == first / 2 ** sum(skipped[:done])
        since = [*reversed(skipped[:done]), True].index(True)
        assert kept["_growth_tracker"] == since
        is_as_before = tensors.keys() == before.keys() and all(
            torch.equal(value, before[key]) for key, value in tensors.items()
        )
        assert is_as_before == skipped[done - 1] or done == 1
        before = tensors
    assert all(value.any() for key, value in before.items() if ".lora_B." in key)
    assert steps_told(output)[-1]["loss"] > 0


def test_a_run_that_only_overflowed_says_so_and_has_learned_nothing(
    train: Callable[..., Path], scaler: Callable[..., None]
) -> None:
    scaler(init_scale=2.0**60)
    weights = train("--max_train_steps", "2")
    assert not any(value.any() for key, value in weights_in(weights).items() if "lora_B" in key)
    assert steps_told(weights.parent)[-1]["grad_norm"] is None


def test_twenty_overflows_in_a_row_end_the_run(
    train: Callable[..., Path], scaler: Callable[..., None], tmp_path: Path
) -> None:
    scaler(init_scale=2.0**100)
    with pytest.raises(UserError, match="20 steps in a row overflowed in fp16, up to step 20 ") as error:
        train("--max_train_steps", "30", "--save_steps", "50", "--train_batch_size", "1")
    assert error.value.exit_code == 5
    assert not (tmp_path / "out" / "lora_weights").exists()


TRICKY = [flag for flag in test_resume.TRICKY if flag not in ("--lora_dropout", "0.3")]


@pytest.mark.parametrize(
    ("base_folder", "flags"),
    [(SD1, TRICKY), (XL, [*TEXT, "--text_encoder_stop", "0.5", "--lora_dropout", "0.3"])],
    ids=["tricky", "XL and its encoders, for half of it"],
    indirect=["base_folder"],
)
def test_a_stopped_run_ends_with_the_bytes_and_the_scale_of_an_unbroken_one(
    train: Callable[..., Path],
    stop_after: Callable[..., None],
    scaler: Callable[..., None],
    steps: list[StepResult],
    flags: list[str],
) -> None:
    scaler(init_scale=2.0**26, growth_interval=2)
    flags = [*flags, "--max_train_steps", "6", "--save_steps", "50", "--validation_steps", "50"]
    whole = train(*flags)
    stop_after(3)
    with pytest.raises(Stopped):
        train(*flags)
    parts = train(*flags, "--resume_from_checkpoint", "latest")
    assert test_resume.bytes_of(parts) == test_resume.bytes_of(test_resume.kept(whole))
    then, now = (state_after(folder.parent, 6)[1] for folder in (test_resume.kept(whole), parts))
    assert then == now
    skipped = [step.was_skipped for step in steps]
    assert skipped[:6] == skipped[6:]
    assert any(skipped[:3])
    assert not all(skipped[:6])


# ---------------------------------------------------------------- what is drawn


def test_previews_are_float32s_and_change_nothing(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--lr_scheduler", "constant", "--learning_rate", "1e-3")
    seen = set()
    honest = validation.draw

    def draw(base: object, *args: object, **settings: object) -> object:
        seen.add((settings["prompt_embeds"].dtype, base.unet.__dict__.get("forward")))
        return honest(base, *args, **settings)

    monkeypatch.setattr(validation, "draw", draw)
    often = train(*flags, "--validation_steps", "1")
    assert seen == {(torch.float16, None)}  # not accelerate's, which gives float32
    seldom = weights_in(train(*flags, "--validation_steps", "4"))
    kept = weights_in(test_resume.kept(often))
    assert all(torch.equal(value, kept[key]) for key, value in seldom.items())
    whole = train(*flags, "--mixed_precision", "no").parent
    pictures = [
        np.asarray(Image.open(folder / "samples" / "step-000004" / "01.png"), np.float32)
        for folder in (test_resume.kept(often).parent, whole)
    ]
    difference = np.abs(pictures[0] - pictures[1])
    assert difference.mean() < 1
    assert difference.max() < 24


def test_a_preview_is_drawn_by_the_unet_as_it_is(train_flags: list[str]) -> None:
    run = megaman_lora.set_up(megaman_lora.read_config(train_flags)[0])
    base = run.base
    look = validation.Look(32, 7.5, 1)
    (image,) = validation.draw_previews(base, run.validation_text, look, 0, False)
    assert image.size == (32, 32)
    noisy = torch.zeros(1, 4, 16, 16, dtype=torch.float16)
    predicted = base.unet(noisy, torch.tensor([5]), run.validation_text[:1].states, return_dict=False)[0]
    assert predicted.dtype == torch.float16  # nothing is wrapped around it
    compute.end(run.accelerator)
