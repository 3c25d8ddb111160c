"""What a base is, is found out before anything is trained on it."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from megaman.common.console import Exit, UserError
from megaman.model.stable_diffusion import SD2_TEXT_WIDTH, load_base, peek


def test_a_stable_diffusion_2_is_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    config = {**pipeline.text_encoder.config.to_dict(), "hidden_size": SD2_TEXT_WIDTH, "intermediate_size": 8}
    pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**config))
    pipeline.unet = UNet2DConditionModel.from_config(
        {**pipeline.unet.config, "cross_attention_dim": SD2_TEXT_WIDTH}
    )
    pipeline.save_pretrained(tmp_path / "sd2")
    with pytest.raises(UserError, match=r"it is a Stable Diffusion 2\.x") as caught:
        load_base(str(tmp_path / "sd2"), device=torch.device("cpu"), dtype=torch.float32)
    assert caught.value.exit_code == Exit.MODEL


def test_a_peek_tells_what_this_disk_knows_and_says_where_it_guesses(tiny_folder: Path) -> None:
    known = peek(str(tiny_folder))
    assert (known.cell_px, known.is_exact) == (4, True)
    guessed = peek("nobody/nothing")
    assert (guessed.cell_px, guessed.is_exact) == (64, False)
