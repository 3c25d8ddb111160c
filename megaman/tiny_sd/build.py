"""Rebuilds the embedded base from nothing: pictures -> tokenizer -> VAE -> latents -> UNet and text encoder
-> diffusers folder. The UNet learns in the stages of `stages.py`: our own figures, what tells their
captions apart, the mixture of all sources, and what that leaves weak.

    pip install -r requirements_megaman_lora.txt
    pip install --no-deps robohash==2.0 resvg_py==0.5.0
    npm install --prefix build_tiny_sd @dicebear/core@9.4.3 @dicebear/pixel-art@9.4.3 \\
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9
    python -m megaman.tiny_sd.build --work build_tiny_sd

Seeded, and resumable at every stage: run the same command again after an interruption. Two CPU cores need
about three and a half hours.
"""

import argparse
import json
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from megaman.kernels.heap import keep_freed_memory
from megaman.tiny_sd import autoencoder, denoiser
from megaman.tiny_sd.autoencoder import latents_of, train_vae
from megaman.tiny_sd.denoiser import (
    Denoiser,
    Lesson,
    covered,
    new_scheduler,
    train_denoiser,
    turned_pairs,
)
from megaman.tiny_sd.figures import FILLERS, contact_sheet
from megaman.tiny_sd.progress import tell
from megaman.tiny_sd.sketch import BACKGROUNDS
from megaman.tiny_sd.stages import EVERYTHING, FIGURES, OUR_FIGURES, STAGES, render, terser
from megaman.tiny_sd.tokens import silent_ids, token_ids, write_tokenizer


def check_work(work: Path) -> None:
    """Notes the recipe in the work folder. Ends with an error if the folder was begun with another."""
    recipe = json.dumps([*map(asdict, STAGES), autoencoder.RECIPE, denoiser.RECIPE])
    file = work / "recipe.json"
    if file.exists() and file.read_text() != recipe:
        raise SystemExit(f"error: {work}: was begun with another recipe; take a fresh folder for --work")
    file.write_text(recipe)


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
    captions = [text for wanted in (OUR_FIGURES, EVERYTHING) for text in render(wanted, work)[1]]
    words = {word for text in (*captions, *FILLERS) for word in text.replace(",", " ").split()}
    write_tokenizer(output / "tokenizer", sorted(words))
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    silent = silent_ids(tokenizer, FIGURES.seed).to(device)
    torch.manual_seed(FIGURES.seed)
    model, vae = Denoiser(len(tokenizer)).to(device), train_vae(render(EVERYTHING, work)[0], work, device)
    for stage in STAGES:
        pictures, captions = render(stage.pictures, work)
        if stage.unsaid_share:
            captions = terser(captions, stage.unsaid_share, stage.seed)
        latents, ids = latents_of(stage.pictures, vae, pictures, work), token_ids(tokenizer, captions)
        lesson = Lesson(latents, covered(pictures), ids, silent, turned_pairs(captions))
        model = train_denoiser(stage, model, lesson, work)
    pipeline = export(output, vae.cpu(), model.cpu(), tokenizer)
    sample_sheet(pipeline, work / "sheet.png")
    tell(f"written to {output}; look at {work / 'sheet.png'}")


if __name__ == "__main__":
    main()
