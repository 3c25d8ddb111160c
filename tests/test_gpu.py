"""What only a GPU can show.

Each run is a process of its own: the suite itself hides the cards, for bit for bit equality.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.bench_learning import HELD_OUT, change, embedded_base, encoded_folder, losses
from conftest import GPUS, ROOT

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
if GPUS != "all":
    ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = GPUS


def with_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python <arguments>` with the machine's own cards in sight."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", autouse=True)
def _needs_a_gpu() -> None:
    if with_gpu("-c", "import torch; print(torch.cuda.is_available())").stdout.strip() != "True":
        pytest.skip("needs an NVIDIA card that this torch can use")


@pytest.mark.parametrize(
    "flags", [["no"], ["fp16"], ["bf16"], ["fp16", "--gradient_checkpointing"]], ids=" ".join
)
def test_every_precision_learns_the_hero_and_draws_him(tmp_path: Path, flags: list[str]) -> None:
    run, gallery = tmp_path / "run", tmp_path / "gallery"
    preset = ["--preset", "demo", "--max_train_steps", "80", "--report_to", "none", "--output_dir", str(run)]
    trained = with_gpu("megaman_lora.py", *preset, "--mixed_precision", *flags)
    assert trained.returncode == 0, trained.stderr
    assert "on cuda" in trained.stderr
    base = embedded_base()
    sets = {"hero": encoded_folder(HELD_OUT, base)}
    plain = {"hero": losses(base, sets["hero"])}
    gain = change(base, run / "lora_weights", sets, plain)["hero"]
    assert gain < -8
    drawn = with_gpu(
        *["generate_megaman.py", "--lora_path", str(run / "lora_weights"), "--output_dir", str(gallery)],
        *["--mixed_precision", flags[0]],
    )
    assert drawn.returncode == 0, drawn.stderr
    assert len(list(gallery.glob("*.png"))) == 20  # the base's beside each


BESIDE = """
import torch
from megaman.config.train import EMBEDDED
from megaman.model import compute, drawing
from megaman.model.decoding import Decoder, decode
from megaman.model.stable_diffusion import load_base

device = torch.device("cuda")
base = load_base(EMBEDDED, device=device, dtype=compute.pick_dtype("auto", device))
base.place("vae", *base.parts)
decoder = Decoder(base)

def latents(seed):
    return drawing.draw_latents(
        base, drawing.pipeline_of(base), **drawing.words(base, ["a wizard"] * 4, [""] * 4), width=256,
        height=256, num_inference_steps=4, guidance_scale=3.0,
        generators=[torch.Generator().manual_seed(4 * seed + each) for each in range(4)],
    )

begun, kept = [], []
for seed in range(6):
    kept.append(latents(seed))
    begun.append(decoder.start(kept[-1] + 0))  # memory that is given back while it is read
for made, drawn in zip(begun, kept):
    for beside, plain in zip(made, decode(base, drawn)):
        assert beside.picture().tobytes() == plain.picture().tobytes()
assert decoder.most_px == 256**2, decoder.most_px
print(len({each.picture().tobytes() for made in begun for each in made}), "pictures")
"""


def test_pictures_that_are_decoded_beside_the_next_batch_are_the_same() -> None:
    told = with_gpu("-c", BESIDE)
    assert (told.returncode, told.stdout) == (0, "24 pictures\n"), told.stderr


def test_a_run_with_checkpoints_is_judged_on_the_card(tmp_path: Path) -> None:
    run, gallery = tmp_path / "run", tmp_path / "gallery"
    preset = ["--preset", "demo", "--max_train_steps", "80", "--report_to", "none", "--output_dir", str(run)]
    trained = with_gpu("megaman_lora.py", *preset, "--save_steps", "40", "--mixed_precision", "fp16")
    assert trained.returncode == 0, trained.stderr
    judged = with_gpu(
        *["generate_megaman.py", "--lora_path", str(run / "lora_weights"), "--output_dir", str(gallery)],
        *["--recommend", "--num_images_per_prompt", "1"],
    )
    assert judged.returncode == 0, judged.stderr
    assert (gallery / "recommend.html").is_file()
