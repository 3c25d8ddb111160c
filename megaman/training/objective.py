"""What a step computes: the examples of its positions, and how far the UNet's predictions are off."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from megaman.config.train import TrainConfig
from megaman.lora.injection import switched_off
from megaman.model.stable_diffusion import conditions
from megaman.model.text import Text
from megaman.training.encoding import EncodedDataset
from megaman.training.sampler import Position, generator_of

PRESERVE_EVERY = 4  # one example in four is also asked for the class: enough to hold it, and half as slow
TextOf = Callable[[list[int]], Text]  # of these rows of the encoded dataset


@dataclass(frozen=True)
class Batch:
    """The inputs of one micro-batch, on the training device.

    latents, noise (B,C,h,w); timesteps (B,); text (B,L,D); sizes (B,6): the pictures' own size, where they
    were cut, the size they are trained at. class_text, class_text_of_base (K,L,D): captions that name the
    class instead of the character, for the examples class_of (K,), read by the encoders as they are and as
    the base's were; K may be 0. masks (B,1,h,w): how much each cell of the latents counts, 1 in the mean;
    None: all alike.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Text
    sizes: Tensor
    class_text: Text
    class_text_of_base: Text
    class_of: Tensor
    masks: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that it holds, in an order that `of` knows."""
        texts = (self.text, self.class_text, self.class_text_of_base)
        pooled = [text.pooled for text in texts if text.pooled is not None]
        own = [self.latents, self.noise, self.timesteps, self.sizes, self.class_of]
        masks = [] if self.masks is None else [self.masks]
        return [*own, *(text.states for text in texts), *pooled, *masks]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Batch":
        """A batch of what `tensors` has given."""
        latents, noise, timesteps, sizes, class_of, *rest = tensors
        masks = rest.pop() if len(rest) % 3 else None  # behind three texts, with or without what is pooled
        pooled: Sequence[Any] = rest[3:] or [None] * 3
        texts = [Text(*both) for both in zip(rest[:3], pooled, strict=True)]
        return cls(latents, noise, timesteps, texts[0], sizes, texts[1], texts[2], class_of, masks)


@dataclass(frozen=True)
class ExampleDraw:
    """What was drawn for one example, on the CPU: rows of the encoded dataset, and randomness of its latents'
    shape (C,h,w).
    """

    crop_row: int
    text_row: int
    class_row: int | None
    spread: Tensor
    noise: Tensor
    timestep: Tensor


def noise_of(shape: Sequence[int], offset: float, generator: torch.Generator) -> Tensor:
    """Noise for latents (C,h,w); an offset moves the mean of each channel too. Guttenberg 2023."""
    noise = torch.randn(shape, generator=generator)
    return noise + offset * torch.randn((shape[0], 1, 1), generator=generator) if offset else noise


def draw_example(
    position: Position, encoded: EncodedDataset, cfg: TrainConfig, scheduler: DDPMScheduler
) -> ExampleDraw:
    """A position's example, from its own generator: a crop, the spread of its latents, noise, a timestep, and
    a wording of the caption or the empty caption (row 0).
    """
    number, index = position
    generator = generator_of(cfg.seed, "example", number)  # the order of its draws is what a resume repeats

    def one_of(rows: Sequence[int]) -> int:
        return rows[int(torch.randint(0, len(rows), (), generator=generator).item())]

    shape = encoded.shape_of(index)
    spread = torch.randn(shape, generator=generator)
    noise = noise_of(shape, cfg.noise_offset, generator)
    timestep = torch.randint(0, scheduler.config.num_train_timesteps, (), generator=generator)
    is_dropped = torch.rand((), generator=generator).item() < cfg.caption_dropout
    crop_row = one_of(encoded.crop_rows[index])
    text_row = one_of(encoded.text_rows[index])
    asks_class = bool(cfg.preserve_weight) and number % PRESERVE_EVERY == 0
    class_row = encoded.told_of(crop_row, one_of(encoded.class_rows[index])) if asks_class else None
    text_row = 0 if is_dropped else encoded.told_of(crop_row, text_row)
    return ExampleDraw(crop_row, text_row, class_row, spread, noise, timestep)


def make_batch(
    positions: Sequence[Position],
    encoded: EncodedDataset,
    cfg: TrainConfig,
    scheduler: DDPMScheduler,
    text_of: TextOf | None = None,
) -> Batch:
    """The inputs for these positions, the latents sampled from the VAE's posterior. text_of: reads captions
    with encoders in training; else their encoded states are taken.
    """
    drawn = [draw_example(position, encoded, cfg, scheduler) for position in positions]
    device = encoded.device
    read = text_of or encoded.text.__getitem__
    crops = [example.crop_row for example in drawn]
    asking = [number for number, example in enumerate(drawn) if example.class_row is not None]
    class_rows = [example.class_row for example in drawn if example.class_row is not None]
    means, stds = (torch.stack([rows[row] for row in crops]) for rows in (encoded.means, encoded.stds))
    return Batch(
        latents=means + stds * torch.stack([example.spread for example in drawn]).to(device),
        noise=torch.stack([example.noise for example in drawn]).to(device),
        timesteps=torch.stack([example.timestep for example in drawn]).to(device),
        text=read([example.text_row for example in drawn]),
        sizes=encoded.sizes[crops],
        class_text=read(class_rows) if class_rows else encoded.text[:0].to(device),
        class_text_of_base=encoded.text[class_rows].to(device),
        class_of=torch.tensor(asking, dtype=torch.long, device=device),
        masks=None if encoded.masks is None else torch.stack([encoded.masks[row] for row in crops]),
    )


def validation_batch(
    encoded: EncodedDataset, index: int, timesteps: Sequence[int], text_of: TextOf | None = None
) -> Batch:
    """A picture at these timesteps, always under the same noise, with its first caption: to measure on."""
    count = len(timesteps)
    noise = torch.randn((count, *encoded.shape_of(index)), generator=generator_of(0, "held out", index))
    crop_row, text_row = encoded.crop_rows[index][0], encoded.text_rows[index][0]
    nothing = encoded.text[:0].to(encoded.device)
    return Batch(
        latents=encoded.means[crop_row].expand(count, -1, -1, -1),
        noise=noise.to(encoded.device),
        timesteps=torch.tensor(timesteps, device=encoded.device),
        text=(text_of or encoded.text.__getitem__)([text_row]).expand(count),
        sizes=encoded.sizes[[crop_row]].expand(count, -1),
        class_text=nothing,
        class_text_of_base=nothing,
        class_of=torch.tensor([], dtype=torch.long, device=encoded.device),
        masks=None if encoded.masks is None else encoded.masks[crop_row].expand(count, -1, -1, -1),
    )


# ---------------------------------------------------------------- losses


def predictions(unet: nn.Module, batch: Batch, scheduler: DDPMScheduler) -> Tensor:
    """What the UNet predicts of each example, (B,C,h,w) float32."""
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    return _predicted(unet, noisy, batch.timesteps, batch.text, batch.sizes)


def denoising_losses(unet: nn.Module, batch: Batch, scheduler: DDPMScheduler, snr_gamma: float) -> Tensor:
    """The weighted squared error of each example, (B,) float32; of a masked one where it counts."""
    squared = (predictions(unet, batch, scheduler) - _target(batch, scheduler)).square()
    squared = _where_it_counts(squared, batch.masks).mean(dim=(1, 2, 3))
    return squared * min_snr_weights(batch.timesteps, scheduler, snr_gamma)


def preserving_losses(
    unet: nn.Module, batch: Batch, scheduler: DDPMScheduler, snr_gamma: float
) -> tuple[Tensor, Tensor]:
    """The error of each example (B,), and how far the UNet strays from the base under class captions, (K,).

    Both from one pass of B + K examples: the same noisy latents under both captions. What the class looks
    like is asked of the base itself, with the adapter switched off, so no pictures of it are needed. It is
    kept all over, under black masks too: nothing else holds the adapter there.
    """
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    asking = batch.class_of
    class_noisy, class_timesteps, class_sizes = (
        rows[asking] for rows in (noisy, batch.timesteps, batch.sizes)
    )
    with torch.no_grad(), switched_off(unet):
        from_base = _predicted(unet, class_noisy, class_timesteps, batch.class_text_of_base, class_sizes)
    text = Text.cat([batch.text, batch.class_text])
    timesteps, sizes = (
        torch.cat(both) for both in ((batch.timesteps, class_timesteps), (batch.sizes, class_sizes))
    )
    predicted = _predicted(unet, torch.cat([noisy, class_noisy]), timesteps, text, sizes)
    squared = (predicted - torch.cat([_target(batch, scheduler), from_base])).square()
    squared = _where_it_counts(squared, batch.masks).mean(dim=(1, 2, 3))
    losses = squared * min_snr_weights(timesteps, scheduler, snr_gamma)
    return losses[: len(noisy)], losses[len(noisy) :]


def training_losses(
    unet: nn.Module, batch: Batch, scheduler: DDPMScheduler, snr_gamma: float
) -> tuple[Tensor, Tensor]:
    """The losses to minimise: per example (B,), and per class caption (K,); K may be 0."""
    if len(batch.class_of):
        return preserving_losses(unet, batch, scheduler, snr_gamma)
    losses = denoising_losses(unet, batch, scheduler, snr_gamma)
    return losses, losses[:0]


def _predicted(unet: nn.Module, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
    states = text.states
    added = conditions(text, sizes)
    return unet(noisy.to(states.dtype), timesteps, states, **added, return_dict=False)[0].float()


def _where_it_counts(squared: Tensor, masks: Tensor | None) -> Tensor:
    """The squared errors (N,C,h,w) times the masks (B,1,h,w) of the first B of them; without masks as they
    are, with no operator more.
    """
    if masks is None:
        return squared
    rest = squared[len(masks) :]
    masked = squared[: len(masks)] * masks
    return torch.cat([masked, rest]) if len(rest) else masked


def _target(batch: Batch, scheduler: DDPMScheduler) -> Tensor:
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    return batch.noise


def min_snr_weights(timesteps: Tensor, scheduler: DDPMScheduler, snr_gamma: float) -> Tensor:
    """The weight of each example's error, (B,). Hang et al. 2023, equation 7; gamma 0 = all alike."""
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    if snr_gamma == 0:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    return snr.clamp(max=snr_gamma) / (snr + 1 if v_prediction else snr)
