"""What a card makes of a training step and of a picture, at true size with random weights.

    python tests/bench/bench_gpu.py [--kind sd1|sd2|xl] [--work FOLDER] [--resolution 512] [--only fp16]

Each setting runs in a process of its own: seconds a step (median), the most memory that torch held and what
was computed before, whether every loss was finite. Then seconds a picture. Prints a line a setting, then one
JSON line.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from bench.bench_true_size import save_random_base  # noqa: E402

from megaman.common.kinds import KINDS  # noqa: E402
from megaman.model import footprint  # noqa: E402
from megaman.model.compute import pick_dtype  # noqa: E402
from megaman.model.drawing import draw_or_none, pipeline_of, words  # noqa: E402
from megaman.model.stable_diffusion import load_base  # noqa: E402
from megaman.training.schedule import peak_rates  # noqa: E402
from megaman_lora import apply_memory_plan, forward_backward, read_config, set_up  # noqa: E402

WARM_UP, STEPS = 4, 16
PICTURES = 4
SETTINGS = {
    "xl": {
        "bf16, checkpointing": "--mixed_precision bf16 --gradient_checkpointing",
        "fp16, checkpointing, int8": "--mixed_precision fp16 --gradient_checkpointing --base_weights int8",
        "fp16, checkpointing, batch 4": "--mixed_precision fp16 --gradient_checkpointing "
        "--train_batch_size 4",
        "fp16": "--mixed_precision fp16",
        "bf16, checkpointing, encoders": "--mixed_precision bf16 --gradient_checkpointing "
        "--text_encoder_lr 1e-5",
    }
}
OF_SMALLER = {
    "fp32 batch 1": "--mixed_precision no",
    "fp16 batch 1": "--mixed_precision fp16",
    "bf16 batch 1": "--mixed_precision bf16",
    "fp16 batch 4": "--mixed_precision fp16 --train_batch_size 4",
    "bf16 batch 4": "--mixed_precision bf16 --train_batch_size 4",
    "fp16 batch 1, checkpointing": "--mixed_precision fp16 --gradient_checkpointing",
    "fp16 batch 4, checkpointing": "--mixed_precision fp16 --gradient_checkpointing --train_batch_size 4",
    "fp16 batch 4, compiled": "--mixed_precision fp16 --train_batch_size 4 --compile",
}
GIB = 2**30


def measure_steps(base: Path, resolution: int, flags: list[str]) -> dict[str, Any]:
    """One setting: seconds from loading to the first step, seconds a step, peak memory in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"--pretrained_model_name={base}", f"--output_dir={folder}/run"]
        paths += [f"--cache_dir={folder}/cache"]
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        for picture in sorted((ROOT / "megaman" / "starter_images").glob("*.png"))[:PICTURES]:
            shutil.copy(picture, pictures)
        data = ["--data_dir", str(pictures), "--report_to", "none"]
        sizes = ["--resolution", str(resolution), "--gradient_accumulation_steps", "1"]
        started = time.perf_counter()
        run = set_up(read_config([*paths, *data, *sizes, *flags])[0])
        ready = time.perf_counter() - started
        estimate = footprint.estimate_of(run.base, run.trainable.values(), run.cfg, run.memory.batch)
        loading = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        if run.cfg.gradient_checkpointing:
            run.memory.recomputed = "all"  # not as little as this card needs
        apply_memory_plan(run)
        seconds, losses = [], []
        for number in range(WARM_UP + STEPS):
            started = time.perf_counter()
            losses.append(forward_backward(run, run.data.sampler.batch(number), number).mean.item())
            run.step.update(peak_rates(run.cfg))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return {
        "step_s": round(statistics.median(seconds[WARM_UP:]), 4),
        "slowest_s": round(max(seconds[WARM_UP:]), 4),
        "first_s": round(seconds[0], 2),
        "set_up_s": round(ready, 1),
        "set_up_gib": round(loading, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "computed_gib": None if estimate is None else round(estimate.total(run.memory.recomputed), 2),
        "finite": all(loss == loss and abs(loss) != float("inf") for loss in losses),
    }


def measure_pictures(base: Path, resolution: int, batch: int) -> dict[str, Any]:
    """Seconds a picture of 25 steps, drawn in half precision."""
    device = torch.device("cuda")
    loaded = load_base(str(base), device=device, dtype=pick_dtype("auto", device))
    loaded.place("vae", *loaded.parts)
    seconds: list[float] = []
    for _ in range(2):
        started = time.perf_counter()
        pictures = draw_or_none(
            loaded, pipeline_of(loaded), **words(loaded, ["mega man"] * batch, ["blurry"] * batch),
            num_inference_steps=25, guidance_scale=7.5, width=resolution, height=resolution,
            generators=[torch.Generator().manual_seed(seed) for seed in range(batch)],
        )  # fmt: skip
        seconds.append(time.perf_counter() - started)
    return {
        "picture_s": round(seconds[-1] / batch, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "finite": None not in pictures,
    }


def main() -> None:
    """Every setting in turn; leaves with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench_true_size")
    parser.add_argument("--kind", choices=[kind.folder for kind in KINDS], default="sd1")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--only", help="a part of the names of the settings to measure")
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    known, rest = parser.parse_known_args()
    kind = next(kind for kind in KINDS if kind.folder == known.kind)
    base = save_random_base(kind, known.work)
    if known.one is not None:
        made = measure_pictures(base, known.resolution, int(rest[-1])) if "--draw" in rest else None
        print(json.dumps(made or measure_steps(base, known.resolution, rest)))
        return
    settings = SETTINGS.get(known.kind, OF_SMALLER) | {
        f"drawing batch {batch}": f"--draw {batch}" for batch in (1, 4)
    }
    results: dict[str, Any] = {}
    for name, flags in settings.items():
        if known.only and known.only not in name:
            continue
        again = [sys.executable, __file__, f"--kind={known.kind}", f"--work={known.work}"]
        again += [f"--resolution={known.resolution}"]
        done = subprocess.run([*again, "--one", *flags.split()], capture_output=True, text=True)
        lines = done.stdout.splitlines()
        failed = {"failed": (done.stderr.splitlines() or ["?"])[-1]}
        results[name] = json.loads(lines[-1]) if done.returncode == 0 and lines else failed
        print(f"{name}: {results[name]}", flush=True)
    card = torch.cuda.get_device_name()
    told = {
        "bench": "gpu",
        "kind": known.kind,
        "card": card,
        "torch": torch.__version__,
        "resolution": known.resolution,
    }
    print(json.dumps(told | {"results": results}))
    sys.exit(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    main()
