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
    assert len(list(gallery.glob("*.png"))) == 10
