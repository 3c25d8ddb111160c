"""Faster ways through the UNet, and what is said where there are none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaman import fast
from megaman.base import BaseModel
from megaman.errors import UserError


def test_torchs_own_attention_needs_nothing(tiny_base: BaseModel) -> None:
    before = dict(tiny_base.unet.attn_processors)
    for wanted in ("auto", "sdpa"):
        fast.choose_attention(tiny_base.unet, wanted)
    assert dict(tiny_base.unet.attn_processors) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers may run here")
def test_xformers_where_it_cant_run_is_one_line(train: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--attention xformers: does not work here") as error:
        train("--attention", "xformers")
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_a_torch_that_cant_compile_is_one_line(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand a page of reasons")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(UserError, match=r"can't compile here \(no compiler\); leave it out") as error:
        fast.compile_blocks(tiny_base.unet, torch.device("cpu"))
    assert error.value.exit_code == 2
