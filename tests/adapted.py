"""LoRAs in live models, for tests that need no run; and what a run has left."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from megaman.common.kinds import SD1, UNET
from megaman.config.train import TrainConfig
from megaman.lora.init_lora import InitLora
from megaman.lora.injection import inject
from megaman.training.checkpoints import trained
from megaman.training.sampler import generator_of


def inject_lora(
    unet: UNet2DConditionModel, cfg: TrainConfig, init: InitLora | None = None
) -> list[nn.Parameter]:
    """Wraps a Stable Diffusion 1.x's UNet as a run does; its trainable parameters."""
    inject({UNET: unet}, cfg, SD1, partial(generator_of, cfg.seed), init)
    return list(trained({UNET: unet}).values())


def steps_told(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that tell of training steps."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of lora_weights/ in PEFT's layout: the UNet's, and the text encoders' in their folders."""
    return {
        f"{path.parent.relative_to(folder)} {key}": tensor
        for path in sorted(folder.rglob("adapter_model.safetensors"))
        for key, tensor in load_file(path).items()
    }
