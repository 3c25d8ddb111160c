"""What does looking at a folder cost, the first time and the second?

    python tests/bench/bench_data.py [--work FOLDER] [--pictures 1000] [--encoded 60]

First: a dry run over 1,000 pictures of mixed sizes up to a megapixel, seconds and memory, twice. Then:
training on 60 pictures at 256 px with a VAE and a text encoder of Stable Diffusion 1.5's true size (random
weights, a small UNet), seconds from the command to the line that training begins and to the end of the first
step, twice. Prints a table, then one JSON line.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megaman.common.console import quiet_libraries  # noqa: E402
from megaman.model.hub import EMBEDDED_FOLDER  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402


def write_pictures(folder: Path, count: int, largest_px: int) -> Path:
    """Noise and plain areas in random shapes, PNG and JPEG, with captions for half of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    for i in range(count):
        width = rng.randint(largest_px // 8, largest_px)
        height = min(largest_px, max(64, round(width * rng.uniform(0.5, 2))))
        path = folder / f"megaman_run_{i:04}.{rng.choice(('png', 'jpg'))}"
        if path.exists():
            continue
        colour = tuple(rng.randrange(256) for _ in range(3))
        noise = torch.randint(
            0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
        )
        picture = Image.new("RGB", (width, height), colour)
        picture.paste(
            Image.fromarray(noise.numpy()).resize((width // 2, height // 2)), (width // 4, height // 4)
        )
        picture.save(path)
        if i % 2:
            path.with_suffix(".txt").write_text(f"mega man, running, number {i}\n", encoding="utf-8")
    return folder


def save_base(folder: Path) -> Path:
    """A true-size VAE and text encoder with random weights around a small UNet."""
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        ).half(),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )).half(),
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED_FOLDER / "tokenizer"),
        unet=UNet2DConditionModel(
            sample_size=32, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=768,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4, norm_num_groups=8,
        ),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


MEASURED = """
import pathlib, re, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    most = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
    print("memory:", int(most[1]) / 1024, file=sys.stderr)
"""  # the kernel's count for a child begins with its parent's, which holds torch: the child has to say itself


def run(*flags: str) -> dict[str, float | str]:
    """One training command: seconds in all, until it trains and until its first step is done (the samples of
    step 0 come before), peak memory in MB, its cache's hits.
    """
    started, result, told = time.monotonic(), {}, ""
    command = [sys.executable, "-c", MEASURED, str(ROOT / "megaman_lora.py"), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        for line in child.stderr:
            told += line
            if line.startswith("training:"):
                result["ready"] = round(time.monotonic() - started, 1)
            if line.startswith("step 1/"):
                result["stepped"] = round(time.monotonic() - started, 1)
            if found := re.search(r"cache: (\d+ of \d+)", line):
                result["cache"] = found[1]
            if found := re.search(r"memory: ([\d.]+)", line):
                result["memory"] = round(float(found[1]), 1)
    if child.returncode:
        raise SystemExit(f"exit {child.returncode}:\n{told}")
    return result | {"seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    """Runs everything and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp(prefix="bench_data_")))
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--encoded", type=int, default=60)
    flags = parser.parse_args()
    work, result = flags.work, {"bench": "data", "pictures": flags.pictures, "encoded": flags.encoded}
    few, many = (write_pictures(work / str(n), n, 1000) for n in (10, flags.pictures))
    dry = ["--cache_dir", str(work / "cache"), "--output_dir", str(work / "dry"), "--dry_run"]
    memory_of_few = run("--data_dir", str(few), *dry)["memory"]
    for name in ("first", "second"):
        seen = run("--data_dir", str(many), *dry)
        result[f"report, {name} time, s"] = seen["seconds"]
        result[f"memory, {name} time, MB"] = seen["memory"]
        result[f"memory above ten pictures, {name} time, MB"] = round(seen["memory"] - memory_of_few, 1)
    base = save_base(work / "base")
    pictures = write_pictures(work / "encoded", flags.encoded, 400)
    training = ["--pretrained_model_name", str(base), "--data_dir", str(pictures), "--resolution", "256"]
    training += ["--max_train_steps", "1", "--train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    training += ["--mixed_precision", "no", "--report_to", "none", "--cache_dir", str(work / "cache")]
    for name in ("first", "second"):
        seen = run(*training, "--output_dir", str(work / f"out_{name}"))
        result[f"training begins, {name} run, s"] = seen["ready"]
        result[f"first step done, {name} run, s"] = seen["stepped"]
        result[f"cache, {name} run"] = seen["cache"]
    for key, value in result.items():
        print(f"{key:45} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
