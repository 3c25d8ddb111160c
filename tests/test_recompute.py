"""Recomputing: every level gives the same gradients to the bit; the cheapest that fits is taken."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import megaman_lora
from megaman.common.console import UserError
from megaman.common.kinds import KINDS, SD1, SD2, XL, Kind, Level
from megaman.config.train import TrainConfig
from megaman.model import footprint, memory
from megaman.model.footprint import Estimate
from megaman.model.memory import MemoryPlan
from megaman.training import objective

LEVELS: list[Level] = [*SD1.steps]
SWITCH = "gradient_checkpointing"  # of a block, as diffusers calls it
DROPPING = ["--lora_dropout", "0.3", "--lora_targets", "conv", "--preserve_weight", "1"]


def gradients(run: megaman_lora.Run, level: Level) -> tuple[list[torch.Tensor], int]:
    """A step's gradients at a level, and how many tensors it keeps from forward for backward."""
    run.memory.recomputed = level
    megaman_lora.apply_memory_plan(run)
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        megaman_lora.forward_backward(run, run.data.sampler.batch(0), 0)
    return [each.grad.clone() for each in run.trainable.values()], kept


@pytest.mark.parametrize(
    ("base_folder", "more_flags"),
    [
        (SD1, DROPPING),
        (SD2, ["--base_weights", "int8"]),
        (XL, ["--use_dora", "--lora_targets", "linear"]),
        (XL, [*DROPPING, "--text_encoder_lr", "5e-3"]),
    ],
    ids=["sd1, dropout", "sd2, int8", "xl, DoRA", "xl and its encoders, dropout"],
    indirect=True,
)
def test_every_level_gives_the_same_gradients_to_the_bit_and_keeps_less(train_flags: list[str]) -> None:
    run = megaman_lora.set_up(megaman_lora.read_config(train_flags)[0])
    for parameter in run.trainable.values():  # B begins empty, and A then without a gradient
        parameter.data.add_(0.01)
    plain, most = gradients(run, "nothing")
    assert any(each.any() for each in plain)
    kept = {}
    for level in LEVELS[1:]:
        same, kept[level] = gradients(run, level)
        if level == "largest":
            switches = [name for name, each in run.base.unet.named_modules() if vars(each).get(SWITCH)]
            assert {".".join(name.split(".")[:2]) for name in switches} == {"down_blocks.0", "up_blocks.1"}
        assert all(torch.equal(one, other) for one, other in zip(plain, same, strict=True)), level
    assert max(kept.values()) < most
    assert kept["largest and feed-forwards"] < min(kept["largest"], kept["feed-forwards"])
    assert kept["two largest"] < kept["largest"]
    assert min(kept, key=kept.__getitem__) in ("all", "two largest")  # of two sizes these are nearly all
    again, as_before = gradients(run, "nothing")  # and nothing is left of it
    assert as_before == most
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def estimate_of(kind: Kind, base_gib: float) -> Estimate:
    """Of one picture of 1024 x 1024 beside a base of this size."""
    steps = {level: cost.attention for level, cost in kind.steps.items()}
    added = {level: cost.added for level, cost in kind.steps.items()}
    return Estimate(base_gib, 0.2, steps, added, is_checkpointed=True, in_bytes=base_gib / 2)


@pytest.mark.parametrize(
    ("kind", "card_gib", "level"),
    [
        (XL, 24.0, "nothing"),
        (XL, 12.0, "nothing"),
        (XL, 10.0, "two largest"),
        (XL, 8.1, "two largest and feed-forwards"),
        (XL, 7.0, "all"),
        (XL, 4.0, "all"),  # no level fits
        (XL, None, "all"),  # nobody knows what fits
        (SD1, 5.0, "feed-forwards"),
        (SD1, 4.5, "largest"),
    ],
)
def test_the_cheapest_level_that_a_card_holds_is_taken(
    kind: Kind, card_gib: float | None, level: Level
) -> None:
    estimate = estimate_of(kind, 4.8 if kind is XL else 1.6)
    assert estimate.level_for(card_gib) == level
    hardly = card_gib == 4.0
    assert ("hardly holds" in estimate.line(card_gib, level)) == hardly


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "linear", "conv"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)
def test_each_level_of_a_kind_adds_time_and_takes_less_memory(
    kind: Kind, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "kind_of_width", lambda _: kind)
    base = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(cross_attention_dim=0)))
    levels = footprint.levels_of(base, TrainConfig(lora_targets=targets))
    costs = [kind.steps[level] for level in levels]
    assert all(one.gib(targets) > other.gib(targets) for one, other in pairwise(costs))
    assert all(one.added < other.added for one, other in pairwise(costs))
    assert (levels[0], levels[-1]) == ("nothing", "all")
    assert len(levels) >= 5
    compiled = footprint.levels_of(base, TrainConfig(lora_targets=targets, compile=True))
    assert [*compiled] == [level for level in levels if "feed" not in level]


def test_where_memory_runs_out_what_costs_least_goes_first(capsys: pytest.CaptureFixture[str]) -> None:
    plan = MemoryPlan(4)
    seen: list[tuple[int, str]] = []
    with pytest.raises(UserError, match="out of memory at step 3, with one picture at a time") as error:
        while True:
            plan.shrink(2, LEVELS)
            seen.append((plan.batch, plan.recomputed))
    assert error.value.exit_code == 6
    between = [(4, level) for level in LEVELS[1:-1]]
    assert seen == [*between, (2, LEVELS[-2]), (1, LEVELS[-2]), (1, "all")]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "memory ran out at step 3: feed-forwards are recomputed now; steps take longer"
    assert told[-2:] == [
        "memory ran out at step 3: 1 at a time now, as many pictures a step",
        "memory ran out at step 3: all blocks are recomputed now; steps take longer",
    ]


def test_a_checkpoint_tells_what_fitted_also_in_the_words_of_earlier_versions() -> None:
    plan = MemoryPlan(2, "largest")
    assert MemoryPlan.of(plan.facts()) == plan
    assert MemoryPlan.of({"batch": 1, "checkpointing": True}) == MemoryPlan(1, "all")
    assert MemoryPlan.of({"batch": 4, "checkpointing": False}) == MemoryPlan(4, "nothing")


def test_a_run_takes_what_its_card_holds_and_more_recomputing_before_smaller_batches(
    train_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(footprint, "kind_of_width", lambda _: SD1)
    run = megaman_lora.set_up(megaman_lora.read_config([*train_flags, "--gradient_checkpointing"])[0])
    estimate = footprint.estimate_of(run.base, run.trainable.values(), run.cfg, run.memory.batch)
    card = (estimate.total("largest") + 1e-9) / memory.LARGEST_SHARE
    monkeypatch.setattr(memory, "card_gib", lambda _: card)
    megaman_lora.begin(run)
    assert run.memory == MemoryPlan(2, "largest")
    assert "; the largest blocks are recomputed, 19 % more computing)" in capsys.readouterr().err
    honest = objective.denoising_losses

    def starved(*given: object) -> torch.Tensor:
        if not run.memory.recomputed.startswith("two"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(*given)

    monkeypatch.setattr(objective, "denoising_losses", starved)
    megaman_lora.forward_backward(run, run.data.sampler.batch(0), 0)
    assert run.memory == MemoryPlan(2, "two largest")
    assert capsys.readouterr().err.count("memory ran out at step 1: ") == 2
