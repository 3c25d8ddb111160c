"""Faster ways through the UNet, and what is said where there are none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaman.common.console import UserError
from megaman.model import compute
from megaman.model.stable_diffusion import StableDiffusion

CPU = torch.device("cpu")


def test_torchs_own_attention_needs_nothing(tiny_base: StableDiffusion) -> None:
    before = dict(tiny_base.unet.attn_processors)
    for wanted in ("auto", "sdpa"):
        compute.try_out(wanted, False, CPU)
        compute.apply_kernels(tiny_base.unet, wanted, False)
    assert dict(tiny_base.unet.attn_processors) == before


def test_xformers_where_it_cant_run_is_one_line_before_anything_slow(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--attention xformers: does not work here") as error:
        train("--attention", "xformers")
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert "cache:" not in capsys.readouterr().err


def test_a_torch_that_cant_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand a page of reasons")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(UserError, match=r"can't compile here \(no compiler\); leave it out") as error:
        compute.try_out("auto", True, CPU)
    assert error.value.exit_code == 2
