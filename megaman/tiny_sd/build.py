"""Rebuilds the embedded base from nothing: pictures -> tokenizer -> VAE -> latents -> UNet and text encoder
-> diffusers folder. The UNet learns in two stages: our own figures alone, then the mixture of all sources.

    pip install -r requirements_megaman_lora.txt
    pip install --no-deps robohash==2.0 resvg_py==0.5.0
    npm install --prefix build_tiny_sd @dicebear/core@9.4.3 @dicebear/pixel-art@9.4.3 \\
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9
    python -m megaman.tiny_sd.build --work build_tiny_sd

Seeded, and resumable at every stage: run the same command again after an interruption. Two CPU cores need
about two hours.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from megaman.model.memory import keep_freed_memory
from megaman.tiny_sd import sources
from megaman.tiny_sd.figures import FILLERS, HERO_WORDS, contact_sheet
from megaman.tiny_sd.sketch import BACKGROUNDS
from megaman.tiny_sd.tokens import silent_ids, token_ids, write_tokenizer

SIDE_PX = 64
LATENT_CHANNELS = 8
CAPTIONS_EACH = 4  # caption variants drawn for each picture
HELD_OUT = 500  # the last pictures of each stage are never trained on
EMPTY_SHARE = 0.12  # of the captions: the unconditional half of classifier-free guidance
BATCH = 32  # half as many pairs
OUTLINES = (350, 950)  # the timesteps at which outlines are decided; half of all examples come from there
FIGURE_WEIGHT = 3.0  # of a cell that shows the figure, against one of the plain background
SECONDS_BETWEEN_SAVES = 240
STARTED = time.monotonic()


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum. All of it, with the seed, decides the weights, besides the code."""

    name: str
    shares: dict[str, float]  # of each source of pictures
    pairs: int  # of pictures
    steps: int  # of UNet and text encoder
    seed: int
    always: tuple[str, ...] = ()  # what every figure's caption names


FIGURES = Stage("figures", {"figures": 1.0}, 16_000, 5_000, 2026, ("pose", "facing"))
MIXTURE = Stage("mixture", sources.SHARES, 20_000, 5_000, 2027)
VAE_STEPS, VAE_BATCH = 20_000, 8
VAE_CROPS = 17_000  # of its steps: 32 px crops in bfloat16; then whole pictures in float32, half a batch
SCRAPS, SCRAP_SHARE = 20_000, 0.4  # shapes of nothing, of the VAE's pictures


# ---------------------------------------------------------------- pictures and captions


def tell(line: str) -> None:
    """A line of the build's log, with the hours and minutes since its start."""
    minutes = int(time.monotonic() - STARTED) // 60
    print(f"{minutes // 60}:{minutes % 60:02} {line}", flush=True)


def check_work(work: Path) -> None:
    """Notes the recipe in the work folder. Ends with an error if the folder was begun with another."""
    settings = [VAE_STEPS, VAE_CROPS, VAE_BATCH, SCRAPS, SCRAP_SHARE, BATCH, OUTLINES, FIGURE_WEIGHT]
    recipe = json.dumps([asdict(FIGURES), asdict(MIXTURE), *settings])
    file = work / "recipe.json"
    if file.exists() and file.read_text() != recipe:
        raise SystemExit(f"error: {work}: was begun with another recipe; take a fresh folder for --work")
    file.write_text(recipe)


def render(stage: Stage, work: Path) -> tuple[Tensor, list[str]]:
    """All pictures as uint8 (N,3,64,64) and CAPTIONS_EACH captions a picture, in order; kept in the work
    folder. Rows 2 i and 2 i + 1 are a pair, and so are their captions.
    """
    file, captions_file = work / f"{stage.name}.safetensors", work / f"{stage.name}.json"
    if not captions_file.exists():
        rng = random.Random(stage.seed)
        pixels, captions = np.empty((2 * stage.pairs, SIDE_PX, SIDE_PX, 3), np.uint8), []
        for i, pair in enumerate(sources.pairs(stage.pairs, stage.shares, rng, work, stage.always)):
            words = rng.getrandbits(64)
            for j, (picture, describe) in enumerate(pair):
                pixels[2 * i + j] = np.asarray(picture)
                alike = random.Random(words)
                captions += [describe(alike) for _ in range(CAPTIONS_EACH)]
        save_file({"pictures": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()}, file)
        captions_file.write_text(json.dumps(captions))
    captions = json.loads(captions_file.read_text())
    told = [text for text in captions if any(word in text for word in HERO_WORDS)]
    if told:
        raise SystemExit(f"error: the base must not know the hero, but a caption reads {told[0]!r}")
    return load_file(file)["pictures"], captions


# ---------------------------------------------------------------- resumable training


class Progress:
    """What an interrupted stage needs to go on, in one file: parameters, moments, the average, the step."""

    def __init__(self, file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
        self.file, self.model, self.optimizer, self.ema = file, model, optimizer, ema
        self.saved_at = time.monotonic()

    def restore(self) -> int:
        """The step to go on from; 0 for a fresh start."""
        if not self.file.exists():
            return 0
        tensors = load_file(self.file)
        for i, parameter in enumerate(self.model.parameters()):
            parameter.data.copy_(tensors[f"parameter.{i}"])
            self.ema.shadow_params[i].copy_(tensors[f"average.{i}"])
            moments = {
                key: tensors[f"{key}.{i}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{i}" in tensors
            }
            if moments:
                self.optimizer.state[parameter] = moments
        self.ema.optimization_step = step = int(tensors["at"])
        return step

    def save(self, step: int, *, now: bool = False) -> None:
        """Writes the state if the last one is old enough, or at once."""
        if not now and time.monotonic() - self.saved_at < SECONDS_BETWEEN_SAVES:
            return
        tensors = {"at": torch.tensor(step)}
        for i, parameter in enumerate(self.model.parameters()):
            tensors |= {f"parameter.{i}": parameter.data, f"average.{i}": self.ema.shadow_params[i]}
            tensors |= {f"{key}.{i}": value for key, value in self.optimizer.state[parameter].items()}
        partial = self.file.with_suffix(".partial")
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, partial)
        partial.replace(self.file)
        self.saved_at = time.monotonic()


def cosine(step: int, total: int, warmup: int = 200, floor: float = 0.03) -> float:
    """Factor of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def steps(progress: Progress, total: int) -> Iterator[int]:
    """The steps still to do, with the learning rate set, the step taken (clipped) and the state saved
    around the caller's backward.
    """
    peaks = [group["lr"] for group in progress.optimizer.param_groups]
    start = progress.restore()
    for step in range(start, total):
        for group, peak in zip(progress.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine(step, total)
        progress.optimizer.zero_grad(set_to_none=True)
        yield step
        nn.utils.clip_grad_norm_(list(progress.model.parameters()), 1.0)
        progress.optimizer.step()
        progress.ema.step(list(progress.model.parameters()))
        progress.save(step + 1)
    if start < total:
        progress.save(total, now=True)
    progress.ema.copy_to(list(progress.model.parameters()))


# ---------------------------------------------------------------- VAE


def new_vae() -> AutoencoderKL:
    """0.96 M parameters, 8 latent channels, 64 px -> 16 x 16; without attention, so that it can learn on
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
    for step in steps(progress, VAE_STEPS):
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
    vae.eval().requires_grad_(False)
    tell(f"vae: held-out PSNR {psnr(vae, held_out):.2f} dB")
    vae.register_to_config(scaling_factor=round(1 / vae.encode(held_out).latent_dist.mean.std().item(), 5))
    return vae


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
def latents_of(stage: Stage, vae: AutoencoderKL, pictures: Tensor, work: Path) -> Tensor:
    """The scaled posterior means of all pictures, (N,8,16,16); kept in the work folder."""
    file = work / f"{stage.name}_latents.safetensors"
    if not file.exists():
        parts = [
            vae.encode(part.to(vae.device).float() / 127.5 - 1).latent_dist.mean.cpu()
            for part in pictures.split(128)
        ]
        save_file({"latents": torch.cat(parts) * vae.config.scaling_factor}, file)
    return load_file(file)["latents"]


# ---------------------------------------------------------------- UNet and text encoder


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

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """noisy (B,8,16,16), timesteps (B,), ids (B,77) -> the predicted noise (B,8,16,16)."""
        return self.unet(noisy, timesteps, self.text_encoder(ids).last_hidden_state).sample


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
    silent (M,77).
    """

    latents: Tensor
    cells: Tensor  # the share of each that the figure covers
    ids: Tensor
    silent: Tensor  # captions that say nothing


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
        {"params": model.text_encoder.parameters(), "lr": 2.5e-4},
    ]
    optimizer = torch.optim.AdamW(rates, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
    progress = Progress(work / f"{stage.name}_denoiser.safetensors", model, optimizer, ema)
    pairs, mean_loss = (len(lesson.latents) - HELD_OUT) // 2, None
    for step in steps(progress, stage.steps):
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        picks = torch.randint(0, pairs, (BATCH // 2,), generator=generator)
        timesteps = learning_timesteps(BATCH // 2, generator)
        losses = denoising_losses(model, examples(lesson, picks, generator), timesteps, generator)
        losses.mean().backward()
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


def examples(lesson: Lesson, pairs: Tensor, generator: torch.Generator) -> Examples:
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
    weights = 1 + (FIGURE_WEIGHT - 1) * lesson.cells[picks]
    return Examples(lesson.latents[picks], weights / weights.mean(dim=(2, 3), keepdim=True), texts)


def learning_timesteps(pairs: int, generator: torch.Generator) -> Tensor:
    """A timestep a pair, half of them where outlines are decided."""
    anywhere = torch.randint(0, 1000, (pairs,), generator=generator)
    outlines = torch.randint(*OUTLINES, (pairs,), generator=generator)
    return torch.where(torch.rand(pairs, generator=generator) < 0.5, outlines, anywhere)


@torch.no_grad()
def held_out_loss(progress: Progress, lesson: Lesson) -> float:
    """The averaged weights' loss on pairs that were never trained on; always the same noise, timesteps evenly
    spread.
    """
    generator, parameters = torch.Generator().manual_seed(0), list(progress.model.parameters())
    progress.ema.store(parameters)
    progress.ema.copy_to(parameters)
    pairs = torch.arange((len(lesson.latents) - HELD_OUT) // 2, len(lesson.latents) // 2)
    losses = []
    for part in pairs.split(50):
        timesteps = torch.randint(0, 1000, (len(part),), generator=generator)
        told = examples(lesson, part, generator)
        losses.append(denoising_losses(progress.model, told, timesteps, generator))
    progress.ema.restore(parameters)
    return torch.cat(losses).mean().item()


def denoising_losses(
    model: Denoiser, told: Examples, timesteps: Tensor, generator: torch.Generator
) -> Tensor:
    """Min-SNR weighted losses (B,) with offset noise 0.05; both of a pair at the same timestep (B/2,) under
    the same noise, so that only what their captions tell apart differs.
    """
    scheduler, shape = new_scheduler(), told.clean[::2].shape
    noise = torch.randn(shape, generator=generator)
    noise += 0.05 * torch.randn((*shape[:2], 1, 1), generator=generator)
    noise, timesteps = noise.repeat_interleave(2, 0), timesteps.repeat_interleave(2)
    noisy, device = scheduler.add_noise(told.clean, noise, timesteps), told.ids.device
    predicted = model(noisy.to(device), timesteps.to(device), told.ids)
    snr = compute_snr(scheduler, timesteps)
    errors = told.weights.to(device) * (predicted - noise.to(device)).square()
    return (snr.clamp(max=5.0) / snr).to(device) * errors.mean(dim=(1, 2, 3))


# ---------------------------------------------------------------- export


def export(
    folder: Path, vae: AutoencoderKL, model: Denoiser, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Writes Stable Diffusion's diffusers layout in half precision; returns the pipeline."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for name in ("vae", "text_encoder", "unet", "scheduler"):
        getattr(pipeline, name).save_pretrained(folder / name)
    pipeline.save_config(folder)
    for file in folder.glob("*/*.safetensors"):
        weights = load_file(file)
        if file.parent.name == "text_encoder":  # transformers 4 looks for the prefix, 5 reads it too
            weights = {
                key if key.startswith("text_model.") else f"text_model.{key}": value
                for key, value in weights.items()
            }
        save_file(
            {key: value.half() if value.is_floating_point() else value for key, value in weights.items()},
            file,
            {"format": "pt"},
        )
        file.chmod(0o644)
    return pipeline


SHEET = """red-robot blue-robot green-robot yellow-robot purple-robot black-robot
red-wizard purple-wizard green-wizard blue-wizard orange-wizard white-wizard
black-ninja red-ninja teal-ninja purple-knight red-knight yellow-knight
white-astronaut orange-astronaut pink-astronaut brown-robot gray-robot teal-robot"""


def sample_sheet(pipeline: StableDiffusionPipeline, file: Path, guidance_scale: float = 4.0) -> None:
    """A sheet of 24 prompts that it never saw in this wording."""
    pipeline.set_progress_bar_config(disable=True)
    world = zip(SHEET.split(), cycle(BACKGROUNDS), strict=False)
    prompts = [f"a {figure.replace('-', ' ')}, {background} background" for figure, background in world]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipeline(
        prompts, num_inference_steps=25, guidance_scale=guidance_scale, generator=generators
    ).images
    contact_sheet([image.resize((128, 128), 0) for image in images], 6).save(file)


def main() -> None:
    """Runs every stage that is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for pictures, latents and the state of the training"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="where the diffusers folder goes"
    )
    flags = parser.parse_args()
    keep_freed_memory()
    work, output = flags.work, flags.output
    work.mkdir(parents=True, exist_ok=True)
    check_work(work)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages = (FIGURES, MIXTURE)
    captions = [text for stage in stages for text in render(stage, work)[1]]
    words = {word for text in (*captions, *FILLERS) for word in text.replace(",", " ").split()}
    write_tokenizer(output / "tokenizer", sorted(words))
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    silent = silent_ids(tokenizer, FIGURES.seed).to(device)
    torch.manual_seed(FIGURES.seed)
    model, vae = Denoiser(len(tokenizer)).to(device), train_vae(render(MIXTURE, work)[0], work, device)
    for stage in stages:
        pictures, captions = render(stage, work)
        latents = latents_of(stage, vae, pictures, work)
        lesson = Lesson(latents, covered(pictures), token_ids(tokenizer, captions), silent)
        model = train_denoiser(stage, model, lesson, work)
    pipeline = export(output, vae.cpu(), model.cpu(), tokenizer)
    sample_sheet(pipeline, work / "sheet.png")
    tell(f"written to {output}; look at {work / 'sheet.png'}")


if __name__ == "__main__":
    main()
