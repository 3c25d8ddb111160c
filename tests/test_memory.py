"""What a step is told to take of memory, before the first one."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT
from counted import GIB, base_of_true_shape, encoders_on_meta, peak_bytes, step_of

import megaman_lora
from megaman.common.kinds import KINDS, SD1, XL, Kind
from megaman.config.train import TrainConfig
from megaman.lora.fused import fuse
from megaman.lora.injection import inject
from megaman.model import compute
from megaman.model.footprint import RECOMPUTED_TEXT, estimate_of
from megaman.model.recompute import recompute
from megaman.model.text import read as text_of
from megaman.model.tokenizer import clip_tokenizer
from megaman.training.sampler import generator_of

OFF_BY = 0.1  # how far an estimate may be from the count

# ---------------------------------------------------------------- before the first step


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_targets": "conv"},
        {"gradient_checkpointing": True, "text_encoder_lr": 1e-4},
    ],
    ids=str,
)
def test_the_estimate_is_what_a_step_of_true_size_takes(settings: dict) -> None:
    cfg = TrainConfig(resolution=512, **settings)
    base = base_of_true_shape(SD1)
    run, parameters = step_of(base, cfg, 64)
    level = "all" if cfg.gradient_checkpointing else "nothing"
    recompute(base.unet, level, base.encoders.values())
    told = estimate_of(base, parameters, cfg, 1).steps[level]
    assert told == pytest.approx(peak_bytes(run) / GIB, rel=OFF_BY)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)
def test_encoders_in_training_take_what_the_estimate_adds_for_a_text(kind: Kind) -> None:
    cfg = TrainConfig(resolution=512, text_encoder_lr=1e-4)
    unet = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=kind.text_width), dtype=torch.float16)
    base = SimpleNamespace(unet=unet, parts={})
    without = estimate_of(base, [], TrainConfig(resolution=512), 1).steps["nothing"]
    added = [estimate_of(base, [], cfg, 1, chunks).steps["nothing"] - without for chunks in (1, 2)]
    encoders = encoders_on_meta(kind)
    inject(encoders, cfg, kind, partial(generator_of, 0))
    for encoder in encoders.values():
        fuse(encoder)
    ids = torch.zeros(1, 1, 77, dtype=torch.long, device="meta")

    def read() -> None:
        text = text_of(ids, encoders, kind, clip_tokenizer())
        (text.states.float().sum() + (0 if text.pooled is None else text.pooled.float().sum())).backward()

    counted = peak_bytes(read) / GIB
    assert added == pytest.approx([counted, 2 * counted], rel=OFF_BY)
    for encoder in encoders.values():
        encoder.gradient_checkpointing_enable({"use_reentrant": False})
    assert peak_bytes(read) / GIB == pytest.approx(RECOMPUTED_TEXT * counted, abs=0.1 * counted)


@pytest.mark.parametrize("base_folder", [XL], indirect=True)
def test_encoders_in_training_are_recomputed_too(train_flags: list[str]) -> None:
    flags = [*train_flags, *TEXT, "--gradient_checkpointing"]
    run = megaman_lora.set_up(megaman_lora.read_config(flags)[0])
    assert not any(part.is_gradient_checkpointing for part in run.base.parts.values())
    megaman_lora.begin(run)
    assert all(part.is_gradient_checkpointing for part in run.base.parts.values())
    compute.end(run.accelerator)
