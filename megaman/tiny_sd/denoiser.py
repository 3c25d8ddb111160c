"""The embedded base's UNet and text encoder: their shape and how they learn from pairs of pictures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from megaman.tiny_sd.autoencoder import LATENT_CHANNELS
from megaman.tiny_sd.progress import Progress, steps, tell
from megaman.tiny_sd.stages import CAPTIONS_EACH, FIGURE_WEIGHT, HELD_OUT, NOISE_OFFSET, SIDE_PX, Stage

EMPTY_SHARE = 0.12  # of the captions: the unconditional half of classifier-free guidance
BATCH = 32  # half as many pairs
BEHIND = slice(40, None, 12)  # of the 77 states: those behind any but the longest captions
RECIPE = (EMPTY_SHARE, BATCH, BEHIND.start, BEHIND.step)


class Denoiser(nn.Module):
    """UNet and text encoder, trained as one."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=SIDE_PX // 4, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
            block_out_channels=(64, 96, 128), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
        )  # fmt: skip
        self.text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=512, projection_dim=128,
            num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu",
            bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        ))  # fmt: skip
        self.words = nn.Linear(128, vocabulary)  # what a state tells of its caption; only while it learns

    def read(self, ids: Tensor) -> Tensor:
        """ids (B,77) -> the text encoder's states (B,77,128)."""
        return self.text_encoder(ids).last_hidden_state

    def forward(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """noisy (B,8,16,16), timesteps (B,), states (B,77,128) -> the predicted noise (B,8,16,16)."""
        return self.unet(noisy, timesteps, states).sample

    def untold(self, states: Tensor, ids: Tensor) -> Tensor:
        """How badly the states behind a caption (B,77,128) tell which words it holds (B,77): cross-entropy.

        Without it left and right are told apart late: the UNet makes no use of what the states hardly
        say, and they hardly say what it makes no use of.
        """
        said = ids.new_zeros(len(ids), self.words.out_features, dtype=states.dtype).scatter_(1, ids, 1)
        said[:, -2:] = 0  # every caption's start and end
        said /= said.sum(1, keepdim=True).clamp(min=1)
        told = self.words(states[:, BEHIND]).log_softmax(-1)
        return -(told * said[:, None]).sum(-1).mean()


@cache
def new_scheduler() -> DDPMScheduler:
    """Stable Diffusion's own schedule."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


@dataclass(frozen=True)
class Lesson:
    """What the denoiser learns from: latents (N,8,16,16), cells (N,1,16,16), ids (N*CAPTIONS_EACH,77),
    silent (M,77), turned (K,).
    """

    latents: Tensor
    cells: Tensor  # the share of each that the figure covers
    ids: Tensor
    silent: Tensor  # captions that say nothing
    turned: Tensor  # the pairs that differ in left and right alone


def covered(pictures: Tensor) -> Tensor:
    """The share of each latent cell that is not the background, whose colour is the corner's. pictures
    uint8 (N,3,64,64) -> (N,1,16,16).
    """
    parts = []
    for part in pictures.split(1000):
        off = (part.float() - part[..., :1, :1].float()).abs().amax(1, keepdim=True)
        parts.append(functional.avg_pool2d((off > 12).float(), SIDE_PX // 16))
    return torch.cat(parts)


def train_denoiser(stage: Stage, model: Denoiser, lesson: Lesson, work: Path) -> Denoiser:
    """The denoiser after this stage: the averaged weights."""
    model.train().requires_grad_(True)
    rates = [
        {"params": model.unet.parameters(), "lr": 5e-4},
        {"params": [*model.text_encoder.parameters(), *model.words.parameters()], "lr": 2.5e-4},
    ]
    optimizer = torch.optim.AdamW(rates, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
    progress = Progress(work / f"{stage.name}_denoiser.safetensors", model, optimizer, ema)
    pairs, mean_loss = (len(lesson.latents) - HELD_OUT) // 2, None
    for step in steps(progress, stage.steps, stage.rate_steps):
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        picks = torch.randint(0, pairs, (BATCH // 2,), generator=generator)
        if stage.turned_share:
            picks = with_turned(picks, lesson.turned[lesson.turned < pairs], stage.turned_share, generator)
        timesteps = learning_timesteps(stage, generator)
        told = examples(lesson, picks, generator, stage.figure_weight, stage.difference_weight)
        states = model.read(told.ids)
        losses = denoising_losses(model, told, states, timesteps, generator, stage.noise_offset)
        untold = stage.word_weight * model.untold(states, told.ids) if stage.word_weight else 0
        (losses.mean() + untold).backward()
        loss = losses.mean().item()
        mean_loss = loss if mean_loss is None else 0.98 * mean_loss + 0.02 * loss
        if step % 100 == 0:
            tell(f"{stage.name}: denoiser step {step}: loss {mean_loss:.4f}")
        if step % 500 == 0 and step > 0:
            tell(f"{stage.name}: held-out loss {held_out_loss(progress, lesson):.4f}")
    tell(f"{stage.name}: held-out loss {held_out_loss(progress, lesson):.4f} at the end")
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Examples:
    """Pairs in a row: clean (B,8,16,16), weights (B,1,16,16) of mean 1, ids (B,77)."""

    clean: Tensor
    weights: Tensor
    ids: Tensor


def with_turned(picks: Tensor, turned: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The picks (B/2,), a share of them replaced by pairs that differ in left and right alone."""
    others = turned[torch.randint(0, len(turned), picks.shape, generator=generator)]
    return torch.where(torch.rand(picks.shape, generator=generator) < share, others, picks)


def turned_pairs(captions: Sequence[str]) -> Tensor:
    """The pairs whose captions differ in left and right alone (K,)."""
    sides = {"left": "right", "right": "left"}
    first, second = captions[:: 2 * CAPTIONS_EACH], captions[CAPTIONS_EACH :: 2 * CAPTIONS_EACH]
    turned = [re.sub(r"\b(left|right)\b", lambda side: sides[side[0]], text) for text in first]
    alike = zip(first, turned, second, strict=True)
    return torch.tensor([i for i, (one, of_it, two) in enumerate(alike) if one != two == of_it])


def examples(
    lesson: Lesson,
    pairs: Tensor,
    generator: torch.Generator,
    figure_weight: float = FIGURE_WEIGHT,
    difference_weight: float = 0.0,
) -> Examples:
    """The picked pairs with a caption of each picture, of equal wording; EMPTY_SHARE of the pairs are told
    nothing.
    """
    count, device = len(pairs), lesson.silent.device
    picks = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
    variants = torch.randint(0, CAPTIONS_EACH, (count,), generator=generator).repeat_interleave(2)
    texts = lesson.ids[picks * CAPTIONS_EACH + variants].to(device)
    empty = (torch.rand(count, generator=generator) < EMPTY_SHARE).repeat_interleave(2)
    rows = torch.randint(0, len(lesson.silent), (int(empty.sum()),), generator=generator)
    texts[empty.to(device)] = lesson.silent[rows.to(device)]
    weights = 1 + (figure_weight - 1) * lesson.cells[picks]
    clean, weights = lesson.latents[picks], weights / weights.mean(dim=(2, 3), keepdim=True)
    if difference_weight:
        differing = (clean[::2] - clean[1::2]).abs().mean(1, keepdim=True) + 1e-6
        differing = differing / differing.mean(dim=(2, 3), keepdim=True)
        both = weights + difference_weight * differing.repeat_interleave(2, 0)
        weights = both / (1 + difference_weight)
    return Examples(clean, weights, texts)


def learning_timesteps(stage: Stage, generator: torch.Generator) -> Tensor:
    """A timestep a pair (B/2,), the stage's share of them from its own range."""
    pairs = (BATCH // 2,)
    anywhere = torch.randint(0, 1000, pairs, generator=generator)
    chosen = torch.randint(*stage.timesteps, pairs, generator=generator)
    return torch.where(torch.rand(pairs, generator=generator) < stage.timesteps_share, chosen, anywhere)


@torch.no_grad()
def held_out_loss(progress: Progress, lesson: Lesson) -> float:
    """The averaged weights' loss on pairs that were never trained on; always the same noise and timesteps,
    drawn from all of them alike.
    """
    generator, parameters = torch.Generator().manual_seed(0), list(progress.model.parameters())
    progress.ema.store(parameters)
    progress.ema.copy_to(parameters)
    pairs = torch.arange((len(lesson.latents) - HELD_OUT) // 2, len(lesson.latents) // 2)
    losses = []
    for part in pairs.split(50):
        timesteps = torch.randint(0, 1000, (len(part),), generator=generator)
        told = examples(lesson, part, generator)
        states = progress.model.read(told.ids)
        losses.append(denoising_losses(progress.model, told, states, timesteps, generator))
    progress.ema.restore(parameters)
    return torch.cat(losses).mean().item()


def denoising_losses(
    model: Denoiser,
    told: Examples,
    states: Tensor,
    timesteps: Tensor,
    generator: torch.Generator,
    noise_offset: float = NOISE_OFFSET,
) -> Tensor:
    """Min-SNR weighted losses (B,) with offset noise; both of a pair at the same timestep (B/2,) under
    the same noise, so that only what their captions tell apart differs.
    """
    scheduler, shape = new_scheduler(), told.clean[::2].shape
    noise = torch.randn(shape, generator=generator)
    noise += noise_offset * torch.randn((*shape[:2], 1, 1), generator=generator)
    noise, timesteps = noise.repeat_interleave(2, 0), timesteps.repeat_interleave(2)
    noisy, device = scheduler.add_noise(told.clean, noise, timesteps), told.ids.device
    predicted = model(noisy.to(device), timesteps.to(device), states)
    snr = compute_snr(scheduler, timesteps)
    errors = told.weights.to(device) * (predicted - noise.to(device)).square()
    return (snr.clamp(max=5.0) / snr).to(device) * errors.mean(dim=(1, 2, 3))
