"""A step recorded once and replayed, as far as that can be seen without a card: what is computed comes from
the same places each time, and nothing in it waits for a device.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapted import weights_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaman.config.train import TrainConfig
from megaman.training import objective
from megaman.training import step as step_room
from megaman.training.graph import WARM_UPS, Replayed
from megaman.training.step import GraphedStep, why_no_graph

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


class NoWaiting(TorchDispatchMode):
    """Refuses operators whose result, or its shape, Python must wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in WAITS or by_mask:
            raise RuntimeError(f"{name} waits for the device\nand a page of reasons")
        return func(*args, **(kwargs or {}))


class Again:
    """Stands in for a recording: computes anew from what lies in the recorded places."""

    def __init__(self, compute: Callable[[], Sequence[Tensor]]) -> None:
        self.compute = compute
        self.made: list[Tensor] = []

    def replay(self) -> None:
        """Fills `made`."""
        with NoWaiting():
            self.made[:] = self.compute()


class Recorder:
    """Stands in for a card; like there, recording computes nothing."""

    recordings: list[Again]

    def __init__(self) -> None:
        Recorder.recordings = []

    def warm_up(self, compute: Callable[[], Any]) -> Any:
        """Computes."""
        return compute()

    def record(self, compute: Callable[[], Sequence[Tensor]]) -> tuple[Again, list[Tensor]]:
        """What will be computed, and where it will lie."""
        again = Again(compute)
        Recorder.recordings.append(again)
        return again, again.made


class Unable(Recorder):
    """A card that can't record."""

    def record(self, compute: Callable[[], Sequence[Tensor]]) -> tuple[Again, list[Tensor]]:
        """As CUDA does where something waits."""
        raise RuntimeError("operation not permitted when stream is capturing\nand a page of reasons")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run record on the CPU, with the stand-in."""
    monkeypatch.setattr(step_room, "CudaRecorder", Recorder)
    monkeypatch.setattr(step_room, "why_no_graph", lambda *_, **__: None)


def test_what_is_replayed_reads_the_places_and_gives_copies() -> None:
    replayed = Replayed(lambda one, other, factor: [one * factor + other], Recorder())
    results = []
    for number in range(WARM_UPS + 3):
        one, other = torch.full((2,), float(number)), torch.ones(2)
        results.append(*replayed([one, other], 10.0))
        assert len(Recorder.recordings) == (number >= WARM_UPS)
    assert [result.tolist() for result in results] == [[10.0 * n + 1] * 2 for n in range(WARM_UPS + 3)]
    replayed([torch.ones(3), torch.ones(3)], 10.0)
    replayed([torch.ones(2), torch.ones(2)], 20.0)
    assert len(Recorder.recordings) == 1  # another form is computed first, and recorded by itself


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    "flags", [[], ["--preserve_weight", "1"], ["--gradient_accumulation_steps", "2"]], ids=str
)
def test_a_recorded_run_learns_what_a_plain_one_does(
    train: Callable[..., Path], tmp_path: Path, flags: list[str]
) -> None:
    same = ["--max_train_steps", "10", "--train_batch_size", "1", "--learning_rate", "1e-3", *flags]
    plain = weights_in(train(*same, "--output_dir", str(tmp_path / "plain")))
    recorded = weights_in(train(*same, "--cuda_graph", "--output_dir", str(tmp_path / "recorded")))
    assert len(Recorder.recordings) >= 2  # what gives gradients, and what follows
    for name, weight in plain.items():
        torch.testing.assert_close(recorded[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("card")
def test_a_recorded_run_that_is_resumed_ends_like_an_unbroken_one(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    steps = ["--train_batch_size", "1", "--cuda_graph", "--save_steps", "3"]
    whole = weights_in(train(*steps, "--max_train_steps", "8", "--output_dir", str(tmp_path / "whole")))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000003"
    resumed = train(*steps, "--max_train_steps", "8", "--output_dir", str(tmp_path / "whole"),
                    "--resume_from_checkpoint", str(checkpoint))  # fmt: skip
    for name, weight in weights_in(resumed).items():
        assert torch.equal(weight, whole[name])


@pytest.mark.usefixtures("card")
def test_a_step_that_can_t_be_recorded_goes_on_without(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_room, "CudaRecorder", Unable)
    train("--max_train_steps", "6", "--train_batch_size", "1", "--cuda_graph")
    told = [line for line in capsys.readouterr().err.splitlines() if "--cuda_graph" in line]
    reason = "operation not permitted when stream is capturing"
    assert told == [f"note: --cuda_graph: this step can't be recorded ({reason}); it goes on without"] * 2


@pytest.mark.usefixtures("card")
def test_a_loss_that_waits_for_the_device_is_seen_here(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = objective.min_snr_weights

    def waits(timesteps: Tensor, *rest: Any) -> Tensor:
        return real(timesteps, *rest) * (1 if timesteps[0].item() >= 0 else 2)

    monkeypatch.setattr(objective, "min_snr_weights", waits)
    with pytest.raises(RuntimeError, match="_local_scalar_dense waits"):
        train("--max_train_steps", "6", "--train_batch_size", "1", "--cuda_graph")


def test_what_is_recorded_is_forgotten_where_memory_ran_out() -> None:
    step = GraphedStep.__new__(GraphedStep)
    step.replayed_backward = Replayed(lambda one: [one + 1], Recorder())
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    place = parameter.grad
    step.trainable = {"lora": parameter}
    for _ in range(WARM_UPS + 1):
        step.replayed_backward([torch.ones(2)])
    step.clear()
    assert not step.replayed_backward.recorded
    assert parameter.grad is place
    assert not place.any()


@pytest.mark.parametrize(
    ("device", "processes", "settings", "is_crowded", "why"),
    [
        ("cpu", 1, {}, False, "NVIDIA"),
        ("cuda", 2, {}, False, "several processes"),
        ("cuda", 1, {"optimizer": "prodigy"}, False, "--optimizer adamw"),
        ("cuda", 1, {"text_encoder_lr": 1e-5}, False, "--text_encoder_lr"),
        ("cuda", 1, {"lora_dropout": 0.1}, False, "--lora_dropout"),
        ("cuda", 1, {}, True, "too small"),
    ],
)
def test_what_can_t_be_recorded_is_named(
    device: str, processes: int, settings: dict, is_crowded: bool, why: str
) -> None:
    accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=processes)
    reason = why_no_graph(TrainConfig(**settings), accelerator, is_crowded=is_crowded)
    assert reason is not None
    assert why in reason


def test_on_a_cpu_it_is_left_out_and_said(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train("--max_train_steps", "1", "--cuda_graph")
    assert "note: --cuda_graph is left out: it needs an NVIDIA card" in capsys.readouterr().err
