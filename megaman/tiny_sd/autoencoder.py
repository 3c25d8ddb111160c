"""The embedded base's VAE: its shape, its training, what it does to pictures."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaman.common.files import replacing
from megaman.tiny_sd import sources
from megaman.tiny_sd.progress import Progress, steps, tell
from megaman.tiny_sd.stages import HELD_OUT, MIXTURE, SIDE_PX, Pictures

LATENT_CHANNELS = 8
VAE_STEPS, VAE_BATCH = 20_000, 8
VAE_CROPS = 17_000  # of its steps: 32 px crops in bfloat16; then whole pictures in float32, half a batch
SCRAPS, SCRAP_SHARE = 20_000, 0.4  # shapes of nothing, of the VAE's pictures
RECIPE = (LATENT_CHANNELS, VAE_STEPS, VAE_CROPS, VAE_BATCH, SCRAPS, SCRAP_SHARE)


def new_vae() -> AutoencoderKL:
    """0.93 M parameters, 8 latent channels, 64 px -> 16 x 16; without attention, so that it can learn on
    crops.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=LATENT_CHANNELS,
        norm_num_groups=8, sample_size=SIDE_PX, mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip


def train_vae(pictures: Tensor, work: Path, device: torch.device) -> AutoencoderKL:
    """The VAE, its scaling factor measured. It learns from the mixture's pictures and from shapes of nothing,
    so that it can show what no picture of the base holds: a character to be taught.

    32 px crops first (many small steps), whole pictures at the end.
    """
    vae = new_vae().to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    ema = EMAModel(vae.parameters(), decay=0.998, use_ema_warmup=True, power=0.75)
    progress = Progress(work / "vae.safetensors", vae, optimizer, ema)
    trained, held_out = pictures[:-HELD_OUT], pictures[-HELD_OUT:].to(device).float() / 127.5 - 1
    scraps = scraps_of(MIXTURE.seed)
    for step in steps(progress, VAE_STEPS, VAE_STEPS):
        rng = np.random.default_rng((MIXTURE.seed, 1, step))
        torch.manual_seed(MIXTURE.seed * 1_000_003 + step)  # of the posterior's sample
        are_crops = step < VAE_CROPS
        size = VAE_BATCH if are_crops else VAE_BATCH // 2
        count = int((rng.random(size) < SCRAP_SHARE).sum())
        picks = rng.integers(0, len(scraps), count), rng.integers(0, len(trained), size - count)
        batch = torch.cat([scraps[picks[0]], trained[picks[1]]]).to(device).float() / 127.5 - 1
        if are_crops:
            x, y = rng.integers(0, SIDE_PX - 32 + 1, 2)
            batch = batch[..., y : y + 32, x : x + 32]
        with torch.autocast(device.type, torch.bfloat16, enabled=are_crops):
            posterior = vae.encode(batch).latent_dist
            shown = vae.decode(posterior.sample()).sample
        error = shown.float() - batch
        loss = error.square().mean() + 0.3 * error.abs().mean() + 1e-6 * posterior.kl().mean()
        loss.backward()
        if step % 500 == 0:
            tell(f"vae step {step}: loss {loss.item():.4f}")
    settle(vae.eval().requires_grad_(False))
    tell(f"vae: held-out PSNR {psnr(vae, held_out):.2f} dB")
    vae.register_to_config(scaling_factor=round(1 / vae.encode(held_out).latent_dist.mean.std().item(), 5))
    return vae


@torch.no_grad()
def settle(vae: AutoencoderKL) -> None:
    """Takes the spread out of what the VAE says of a picture: its sample is its mean.

    The weak pull towards a normal distribution leaves a spread of 0.4 where the means have 1, most of it in a
    channel that the decoder hardly reads. The UNet learns from the means; a LoRA that learns from
    samples would be taught that noise. Stable Diffusion's own VAE has a spread of thousandths.
    """
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = -30  # the least logarithm of a variance that diffusers takes


def scraps_of(seed: int) -> Tensor:
    """SCRAPS heaps of shapes, uint8 (N,3,64,64)."""
    rng = random.Random(seed)
    drawn = np.stack([np.asarray(sources.scrap(rng)) for _ in range(SCRAPS)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Decibels of the round trip, the mean over the pictures. images (N,3,64,64) in [-1, 1]."""
    back = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    errors = ((back - images) / 2).square().mean(dim=(1, 2, 3))
    return (-10 * errors.log10()).mean().item()


@torch.no_grad()
def latents_of(wanted: Pictures, vae: AutoencoderKL, pictures: Tensor, work: Path) -> Tensor:
    """The scaled posterior means of all pictures, (N,8,16,16); kept in the work folder."""
    file = work / f"{wanted.name}_latents.safetensors"
    if not file.exists():
        parts = [
            vae.encode(part.to(vae.device).float() / 127.5 - 1).latent_dist.mean.cpu()
            for part in pictures.split(128)
        ]
        with replacing(file) as partial:
            save_file({"latents": torch.cat(parts) * vae.config.scaling_factor}, partial)
    return load_file(file)["latents"]
