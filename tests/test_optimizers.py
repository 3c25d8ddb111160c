"""The optimizers that can be asked for: they resume to the bit, or one line says what is missing."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaman.common.console import UserError
from megaman.training.optim import optimizer_of

PACKAGES = {"adafactor": "transformers", "prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}
FLAGS = ("--lora_targets", "linear", "--lora_rank", "8")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_resumed_run_ends_with_the_bytes_of_an_unbroken_one(train: Callable[..., Path], name: str) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    rate = "1" if name == "prodigy" else "0.01"
    flags = ("--optimizer", name, "--learning_rate", rate, "--lr_scheduler", "constant", "--save_steps", "3")
    whole = (train(*FLAGS, *flags, "--max_train_steps", "6") / "adapter_model.safetensors").read_bytes()
    train(*FLAGS, *flags, "--max_train_steps", "3")
    resumed = train(*FLAGS, *flags, "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    assert (resumed / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("name", ["prodigy", "adamw8bit"])
def test_a_missing_package_is_one_line(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(UserError, match=f"--optimizer {name}: .*pip install {PACKAGES[name]}$") as error:
        train("--optimizer", name)
    assert error.value.exit_code == 2


def test_prodigy_with_a_timid_rate_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prodigyopt")
    optimizer_of("prodigy", [[torch.nn.Parameter(torch.ones(2))]], [1e-4], 0.0)
    assert "as a factor of its own; 1 is usual" in capsys.readouterr().err
