"""The moving average of the adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapted import weights_in
from conftest import EVERY_KIND
from safetensors.torch import load_file

from megaman.common.console import UserError
from megaman.training.optim import EMA


def test_it_is_the_weighted_mean_of_what_the_parameter_was() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    average, expected = EMA({"p": parameter}, 0.8), parameter.detach().clone()
    for step in range(60):
        parameter.data = torch.tensor([float(step), 2.0])
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
        average.update(step)
    with average.swapped_in():
        torch.testing.assert_close(parameter.detach(), expected)
        assert 54 < parameter[0] < 56  # of the last steps, four behind with decay 0.8
    assert parameter.tolist() == [59.0, 2.0]


def test_the_training_goes_on_from_its_own_numbers_even_after_an_error() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = EMA({"p": parameter}, 0.5)
    parameter.data += 3
    with pytest.raises(RuntimeError), average.swapped_in():
        assert parameter.tolist() == [0, 0]
        raise RuntimeError
    assert parameter.tolist() == [3, 3]


def test_without_a_decay_there_is_none() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    average = EMA({"p": parameter}, 0)
    average.update(0)
    with average.swapped_in():
        assert parameter.tolist() == [1, 1]
    assert average.tensors() == {}


def test_a_checkpoint_holds_it_and_one_without_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    average = EMA({"p": parameter}, 0.5)
    tensors = {"average.p": average.tensors()["average.p"].clone(), "parameter.p": torch.zeros(2)}
    parameter.data += 1
    average.update(0)
    assert average.take_from(tensors).keys() == {"parameter.p"}
    assert average.kept["p"].tolist() == [1, 1]
    with pytest.raises(UserError, match="holds no average of p"):
        average.take_from({"parameter.p": torch.zeros(2)})


@EVERY_KIND
def test_the_files_hold_the_average_and_the_training_does_not_change(train: Callable[..., Path]) -> None:
    def state_and_files(*flags: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        weights = train("--learning_rate", "0.05", *flags)
        (state,) = (weights.parent / "checkpoints").glob("step-000004/state.safetensors")
        return load_file(state), weights_in(weights)

    plain, last = state_and_files()
    averaged, mean = state_and_files("--ema_decay", "0.9")
    assert all(torch.equal(averaged[key], value) for key, value in plain.items())
    kept = {key.removeprefix("average."): value for key, value in averaged.items() if key not in plain}
    assert len(kept) == len(mean) == len(last)
    for key, value in mean.items():
        assert not torch.equal(value, last[key])
        assert any(torch.equal(value, other) for other in kept.values())
