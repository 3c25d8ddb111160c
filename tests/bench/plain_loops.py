"""The two loops that ours is measured against, written for the purpose, on the same base, pictures and rank.

A, as diffusers' example script trains: VAE and text encoder run in every step, PEFT's LoRA on the attention's
four projections, float32 on a CPU, autocast over half-precision weights on a card. B, as kohya's scripts
train at their best: latents and text states cached, autocast over half-precision weights, its LoRA modules
beside the frozen layers, the loss read in every step. Both through accelerate, as theirs are. On a CPU B's
bfloat16 weights lie channels_last, which is kinder than it is itself: without that they are several times
slower.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from bench.setting import Setting
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from megaman.common.kinds import UNET, XL
from megaman.config.train import TrainConfig
from megaman.lora.injection import targets_of
from megaman.model.stable_diffusion import StableDiffusion, conditions, load_base
from megaman.model.text import Text

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Step = Callable[[], None]


class Pictures(Dataset[dict[str, Tensor]]):
    """A folder's pictures, opened and scaled anew whenever asked for, and their captions' tokens."""

    def __init__(self, folder: Path, side: int, base: StableDiffusion) -> None:
        """side: of the square that they are scaled to, pixels."""
        self.paths = sorted(folder.glob("*.png"))
        self.side = side
        self.ids = [base.ids_of([path.with_suffix(".txt").read_text().strip()])[0] for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """pixels (3,side,side) in [-1, 1]; ids (C,77)."""
        size = (self.side, self.side)
        image = Image.open(self.paths[index]).convert("RGB").resize(size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixels": pixels, "ids": self.ids[index]}


def endless(loader: Any) -> Iterator[dict[str, Tensor]]:
    """Its batches, epoch after epoch."""
    while True:
        yield from loader


def accelerator_of(setting: Setting, precision: str) -> Accelerator:
    """accelerate's, with its autocast and, for fp16, its gradient scaler."""
    return Accelerator(mixed_precision=precision, cpu=setting.device == "cpu")


def base_of(setting: Setting, dtype: torch.dtype) -> StableDiffusion:
    """The base in this precision, all of it on the device."""
    base = load_base(setting.base, device=torch.device(setting.device), dtype=dtype)
    base.place("vae", *base.parts)
    return base


def sizes_of(setting: Setting) -> Tensor:
    """What XL's UNet is told of pictures that are not cut, (B,6)."""
    side = float(setting.resolution)
    row = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=setting.device)
    return row.expand(setting.batch, -1)


def target_of(base: StableDiffusion, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to predict."""
    if base.prediction_type == "v_prediction":
        return base.scheduler.get_velocity(latents, noise, timesteps)
    return noise


def diffusers_loop(setting: Setting, cfg: TrainConfig) -> tuple[Step, torch.dtype]:
    """One step of loop A, and its precision."""
    precision = "no" if setting.device == "cpu" else setting.precision
    accelerator, dtype = accelerator_of(setting, precision), DTYPES[precision]
    base = base_of(setting, dtype)
    if base.kind is not XL:  # whose own VAE overflows in half precision: its script keeps it float32
        base.vae.to(dtype)
    config = LoraConfig(
        r=cfg.lora_rank, lora_alpha=cfg.lora_rank, init_lora_weights="gaussian", target_modules=ATTENTION
    )
    base.unet.add_adapter(config)
    if precision == "fp16":
        cast_training_params(base.unet, dtype=torch.float32)
    trained = [parameter for parameter in base.unet.parameters() if parameter.requires_grad]
    pictures = Pictures(Path(setting.pictures), setting.resolution, base)
    loader = DataLoader(pictures, batch_size=setting.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    unet, optimizer, loader, rates = accelerator.prepare(
        base.unet, optimizer, loader, get_scheduler("constant", optimizer)
    )
    unet.train()
    batches, sizes = endless(loader), sizes_of(setting)
    count = base.scheduler.config.num_train_timesteps

    def step() -> None:
        batch = next(batches)
        with accelerator.accumulate(unet):
            pixels = batch["pixels"].to(base.vae.device, base.vae.dtype)
            latents = base.vae.encode(pixels).latent_dist.sample() * base.vae.config.scaling_factor
            latents = latents.to(dtype)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, count, (len(latents),), device=latents.device)
            noisy = base.scheduler.add_noise(latents, noise, timesteps)
            text = base.read(batch["ids"])
            target = target_of(base, latents, noise, timesteps)
            added = conditions(text, sizes)
            predicted = unet(noisy, timesteps, text.states, **added, return_dict=False)[0]
            loss = functional.mse_loss(predicted.float(), target.float())
            accelerator.gather(loss.repeat(len(latents))).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        loss.detach().item()

    return step, dtype


class BesideLayer(nn.Module):
    """kohya's LoRA module: down and up, float32, beside a frozen layer whose forward it takes over."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            shape = (layer.kernel_size, layer.stride, layer.padding)
            self.down: nn.Module = nn.Conv2d(layer.in_channels, rank, *shape, bias=False)
            self.up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.multiplier = 1.0
        self.scale = alpha / rank
        self.frozen = layer.forward
        layer.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's result and the update's."""
        return self.frozen(x) + self.up(self.down(x)) * self.multiplier * self.scale


def kohya_loop(setting: Setting, cfg: TrainConfig) -> tuple[Step, torch.dtype]:
    """One step of loop B, and its precision: the one asked for, but that accelerate has no fp16 on a CPU."""
    precision = "bf16" if (setting.device, setting.precision) == ("cpu", "fp16") else setting.precision
    accelerator, dtype = accelerator_of(setting, precision), DTYPES[precision]
    base = base_of(setting, dtype)
    pictures = Pictures(Path(setting.pictures), setting.resolution, base)
    known = [cached(base, pictures[index]) for index in range(len(pictures))]
    base.place(UNET)
    base.drop_encoders()
    unet, device = base.unet, base.device
    names = targets_of(UNET, unet, cfg.lora_targets, base.kind)
    network = nn.ModuleList(
        BesideLayer(unet.get_submodule(name), cfg.lora_rank, cfg.lora_alpha) for name in names
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=cfg.learning_rate)
    network, optimizer, rates = accelerator.prepare(network, optimizer, get_scheduler("constant", optimizer))
    unet.train()
    sizes = sizes_of(setting)
    count = base.scheduler.config.num_train_timesteps

    def step() -> None:
        rows = [known[index] for index in torch.randint(0, len(known), (setting.batch,)).tolist()]
        with accelerator.accumulate(network):
            latents = torch.stack([latent for latent, _ in rows]).to(device, dtype)
            latents = latents * base.vae.config.scaling_factor
            text = Text.cat([text for _, text in rows]).to(device, dtype)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, count, (len(latents),), device=device)
            noisy = base.scheduler.add_noise(latents, noise, timesteps)
            with accelerator.autocast():
                added = conditions(text, sizes)
                predicted = unet(noisy, timesteps, text.states, **added, return_dict=False)[0]
            target = target_of(base, latents, noise, timesteps)
            losses = functional.mse_loss(predicted.float(), target.float(), reduction="none")
            loss = losses.mean(dim=(1, 2, 3)).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad(set_to_none=True)
        loss.detach().item()

    return step, dtype


@torch.no_grad()
def cached(base: StableDiffusion, example: dict[str, Tensor]) -> tuple[Tensor, Text]:
    """A picture's latents (C,h,w) and its caption's states, on the CPU."""
    pixels = example["pixels"][None].to(base.vae.device, base.vae.dtype)
    return base.vae.encode(pixels).latent_dist.sample()[0].cpu(), base.read(example["ids"][None]).to("cpu")
