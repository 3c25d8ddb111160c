"""A run by the clock: how many steps fit, a rate without a jump, and the same again after a stop."""

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TEXT
from test_resume import bytes_of, stop_after  # noqa: F401  a fixture

import megaman_lora
from megaman.common.console import UserError
from megaman.common.signals import Stopped
from megaman.config.train import TrainConfig, read_config
from megaman.training import checkpoints, pace
from megaman.training.schedule import begun, lr_at, settled, text_encoder_stop_at

MINUTE = ("--max_minutes", "1", "--save_steps", "50", "--validation_steps", "50")


class Clock:
    """Time that passes in steps only, seconds each."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.step_s = 2.0
        self.trial_s: float | None = None  # of a step that is tried before, if it takes another time

    def monotonic(self) -> float:
        """As time's."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the run, in which only steps take time."""
    clock = Clock()
    honest, tried = megaman_lora.forward_backward, megaman_lora.try_step

    def forward_backward(*step: Any) -> Any:
        clock.now += clock.step_s
        return honest(*step)

    def try_step(run: Any) -> None:
        before = clock.now
        tried(run)
        clock.now = before + (clock.trial_s or clock.step_s)

    monkeypatch.setattr(megaman_lora, "forward_backward", forward_backward)
    monkeypatch.setattr(megaman_lora, "try_step", try_step)
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    monkeypatch.setattr(pace, "END_S", 0.0)
    monkeypatch.setattr(pace, "BYTES_A_SECOND", math.inf)
    return clock


@pytest.fixture
def by_the_clock(train_flags: list[str]) -> Callable[..., Path]:
    """Trains a minute, with further flags, and returns lora_weights/."""
    at = train_flags.index("--max_train_steps")
    flags = [*train_flags[:at], *train_flags[at + 2 :], *MINUTE]
    return lambda *more: megaman_lora.train(read_config([*flags, *more])[0])


def record_of(weights: Path) -> dict[str, Any]:
    return json.loads((weights.parent / "training_config.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the total


def test_as_many_steps_are_trained_as_fit(by_the_clock: Callable[..., Path], clock: Clock) -> None:
    began = clock.now
    weights = by_the_clock()
    record = record_of(weights)
    assert clock.now - began == 60  # two steps that were tried, then these
    assert (record["max_train_steps"], record["earlier_total"]) == (28, [7, 28])
    assert record["max_minutes"] is None
    (last,) = (weights.parent / "checkpoints").iterdir()
    assert last.name == "step-000028"
    assert "pace" not in checkpoints.read_checkpoint(last).run
    header = (weights / "megaman_lora.safetensors").read_bytes().decode("latin-1")
    assert '"ss_steps":"28"' in header
    assert '"ss_max_train_steps":"28"' in header
    lines = (weights.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = {line["step"]: line["lr"] for line in map(json.loads, lines) if "lr" in line}
    assert rates[28] < 0.005 * 1e-2  # of the peak


@pytest.mark.parametrize(
    ("trial_s", "step_s", "totals"),
    [(1.0, 3.0, (19, [5, 58])), (6.0, 1.0, (54, [2, 9]))],
    ids=["slow", "fast"],
)
def test_a_first_measure_that_was_wrong_is_mended(
    by_the_clock: Callable[..., Path],
    clock: Clock,
    trial_s: float,
    step_s: float,
    totals: tuple[int, list[int]],
) -> None:
    clock.trial_s, clock.step_s = trial_s, step_s
    began = clock.now
    record = record_of(by_the_clock())
    assert 60 - step_s < clock.now - began <= 60
    assert (record["max_train_steps"], record["earlier_total"]) == totals


def test_a_time_that_is_over_before_the_first_step_still_gives_an_adapter(
    by_the_clock: Callable[..., Path], clock: Clock
) -> None:
    clock.step_s = 100.0
    assert record_of(by_the_clock())["max_train_steps"] == 1


def test_previews_losses_and_checkpoints_are_left_time_for(clock: Clock) -> None:
    run = SimpleNamespace(
        cfg=TrainConfig(max_minutes=10, validation_steps=20, save_steps=30, max_train_steps=9999),
        pace=pace.Pace(steps=10, steps_s=10.0),
        trainable={},
        accelerator=None,
    )
    for verb, seconds in ((pace.PREVIEW, 5.0), (pace.LOSS, 1.0), (pace.CHECKPOINT, 2.0)):
        run.pace.note(verb, seconds)
    total = pace._fitted(run, 0)

    def takes_s(total: int) -> int:
        looks = len({*range(20, total + 1, 20), total})
        saved = len({*range(30, total + 1, 30), total})
        losses = len({*range(20, total + 1, 20), *range(30, total + 1, 30), total})
        return total + 5 * looks + 2 * saved + losses + 2  # the adapter's files

    assert takes_s(total) <= 600 < takes_s(total + 1)
    assert 350 < total < 450


def test_a_run_with_its_total_named_writes_what_it_always_wrote(train: Callable[..., Path]) -> None:
    weights = train()
    facts = checkpoints.read_checkpoint(weights.parent / "checkpoints" / "step-000004").run
    assert "pace" not in facts
    assert "max_minutes" not in (weights / "megaman_lora.safetensors").read_bytes().decode("latin-1")


# ---------------------------------------------------------------- the rate


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "polynomial", "cosine_with_restarts"])
@pytest.mark.parametrize("total", [60, 90, 100, 130, 700])
def test_the_rate_goes_on_where_it_is_and_comes_to_nothing(scheduler: str, total: int) -> None:
    cfg = begun(TrainConfig(lr_scheduler=scheduler, learning_rate=1.0, max_minutes=1), 200)
    assert cfg.lr_warmup_steps == 10
    fixed = settled(cfg, 50, total)
    assert [lr_at(step, fixed) for step in range(51)] == [lr_at(step, cfg) for step in range(51)]
    rates = [lr_at(step, fixed) for step in range(total)]
    if scheduler != "cosine_with_restarts":
        steepest = 3.2 / (
            total - 50
        )  # no schedule falls faster than from 1 to 0 by a squared line's beginning
        assert max(abs(a - b) for a, b in itertools.pairwise(rates[10:])) < max(steepest, 0.012)
        assert lr_at(total, fixed) < 1e-12
        assert rates[-1] < 1.1 / (total - 50)
    longer = settled(cfg, 50, 200)
    assert [lr_at(step, longer) for step in range(200)] == pytest.approx(
        [lr_at(step, cfg) for step in range(200)]
    )


def test_encoders_that_had_stopped_stay_so() -> None:
    def stops(share: float, total: int) -> int:
        cfg = TrainConfig(text_encoder_lr=1e-5, text_encoder_stop=share, max_minutes=1)
        return text_encoder_stop_at(settled(begun(cfg, 200), 50, total))

    assert [stops(0.2, 60), stops(0.2, 400), stops(0.5, 60), stops(0.5, 400)] == [40, 40, 50, 200]


# ---------------------------------------------------------------- the same again


@pytest.mark.parametrize("more", [[], [*TEXT, "--text_encoder_stop", "0.5", "--lora_dropout", "0.1"]])
def test_its_record_repeats_the_run(
    by_the_clock: Callable[..., Path], clock: Clock, tmp_path: Path, more: list[str]
) -> None:
    clock.trial_s, clock.step_s = 5.0, 3.0
    weights = by_the_clock(*more)
    record = weights.parent / "training_config.json"
    config = ["--config", str(record), "--output_dir", str(tmp_path / "again")]
    again = megaman_lora.train(read_config(config)[0])
    assert record_of(again)["max_train_steps"] == record_of(weights)["max_train_steps"] == 18
    assert bytes_of(again) == bytes_of(weights)
    cfg, _ = read_config(["--config", str(record), "--max_train_steps", "9"])
    assert cfg.earlier_total is None  # it belonged to the other total


@pytest.fixture(scope="module")
def unbroken_runs() -> list[tuple[list[bytes], dict[str, Any]]]:
    """What an unbroken run has ended with, once one has."""
    return []


@pytest.mark.parametrize(
    ("cut", "told"),
    [(1, True), (2, False), (2, True), (6, False)],
    ids=["before the quarter", "at it, the same flags", "at it, the record", "later, the same flags"],
)
def test_a_stopped_run_ends_with_the_bytes_of_an_unbroken_one(
    by_the_clock: Callable[..., Path],
    clock: Clock,
    stop_after: Callable[..., None],  # noqa: F811
    unbroken_runs: list[tuple[list[bytes], dict[str, Any]]],
    cut: int,
    told: bool,
) -> None:
    clock.trial_s, clock.step_s = 5.0, 3.0
    if not unbroken_runs:
        unbroken = by_the_clock()
        unbroken_runs.append((bytes_of(unbroken), record_of(unbroken)))
    ((expected, record),) = unbroken_runs
    stop_after(cut)
    with pytest.raises(Stopped) as stopped:
        by_the_clock()
    if told:
        words = str(stopped.value).split("megaman_lora.py ")[1].split()
        weights = megaman_lora.train(read_config(words)[0])
    else:
        weights = by_the_clock("--resume_from_checkpoint", "latest")
    assert bytes_of(weights) == expected
    places = {name: record_of(weights)[name] for name in ("data_dir", "output_dir")}
    assert record_of(weights) == record | places


def test_what_was_decided_after_the_checkpoint_is_not_decided_again(
    by_the_clock: Callable[..., Path],
    clock: Clock,
) -> None:
    clock.trial_s, clock.step_s = 5.0, 3.0
    often = ("--save_steps", "1", "--checkpoints_total_limit", "99")
    unbroken = by_the_clock(*often)
    expected, record = bytes_of(unbroken), record_of(unbroken)
    clock.step_s = 1.0  # were it measured again, the total would be another
    early = unbroken.parent / "checkpoints" / "step-000001"
    assert checkpoints.read_checkpoint(early).settings["max_minutes"] == 1
    weights = by_the_clock(*often, "--resume_from_checkpoint", str(early))
    assert bytes_of(weights) == expected
    assert record_of(weights)["max_train_steps"] == record["max_train_steps"]


def test_a_run_that_was_never_timed_keeps_its_total(
    train: Callable[..., Path], by_the_clock: Callable[..., Path]
) -> None:
    train()
    with pytest.raises(
        UserError, match="4 steps in all, and was never timed; leave --max_minutes out"
    ) as error:
        by_the_clock("--resume_from_checkpoint", "latest")
    assert error.value.exit_code == 7


@pytest.mark.parametrize("other", [("--max_train_steps", "5"), ("--num_train_epochs", "2")])
def test_two_lengths_contradict_each_other(other: tuple[str, str]) -> None:
    both = f"^{' and '.join(sorted(('--max_minutes', other[0])))} contradict each other; give one"
    with pytest.raises(UserError, match=both) as error:
        read_config(["--max_minutes", "1", *other])
    assert error.value.exit_code == 2
    cfg, _ = read_config(["--preset", "demo", "--max_minutes", "1.5"])  # a preset's total gives way
    assert cfg.max_minutes == 1.5


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((UserError, SystemExit)) as error:
        read_config([f"--max_minutes={wrong}"])
    assert getattr(error.value, "exit_code", getattr(error.value, "code", None)) == 2


def test_a_run_that_goes_on_without_its_clock_says_so(
    by_the_clock: Callable[..., Path],
    train: Callable[..., Path],
    stop_after: Callable[..., None],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(1)
    with pytest.raises(Stopped):
        by_the_clock()
    train("--resume_from_checkpoint", "latest")
    assert "note: the run went by the clock (--max_minutes" in capsys.readouterr().err
