"""What each form of adapter costs: parameters on Stable Diffusion 1.5, time of a training step.

    python tests/bench/bench_forms.py [--rounds 15]

The steps are the program's own, of the embedded base on one core of the CPU, batch 8 at 64 px, float32:
after a warm-up the forms take one each in turn, round after round, and the core's own time is counted, so
that other programs disturb little and all forms alike. Prints medians and quartiles, then one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()

import diffusers  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from adapted import inject_lora  # noqa: E402
from bench.bench_step import our_loop  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402

from megaman.config.train import TrainConfig  # noqa: E402

FORMS: dict[str, dict[str, object]] = {
    "attention": {},
    "attention+ff": {"lora_targets": "attention+ff"},
    "linear": {"lora_targets": "linear"},
    "conv": {"lora_targets": "conv"},
    "attention, rsLoRA": {"use_rslora": True},
    "attention, dropout 0.1": {"lora_dropout": 0.1},
    "attention, DoRA": {"use_dora": True},
    "conv, DoRA": {"lora_targets": "conv", "use_dora": True},
}
BATCH, WARM_UP = 8, 3
BASE = "--preset demo --preserve_weight 0 --lora_rank 8 --report_to none --output_dir nothing-is-written"


def parameters(form: dict[str, object]) -> int:
    """Trainable numbers on Stable Diffusion 1.5 at the default rank."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768).requires_grad_(False)
    return sum(parameter.numel() for parameter in inject_lora(unet, TrainConfig(**form)))


def stepper(form: dict[str, object]) -> Callable[[], float]:
    """A function that trains one step and returns the core's seconds."""
    flags = [word for name, value in form.items() for word in (f"--{name}", str(value)) if word != "True"]
    train_step, _ = our_loop([*BASE.split(), "--train_batch_size", str(BATCH), *flags])

    def step() -> float:
        started = time.process_time()
        train_step()
        return time.process_time() - started

    return step


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    steps = {name: stepper(form) for name, form in FORMS.items()}
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for number in range(WARM_UP + flags.rounds):
        for name, step in steps.items():
            seconds = step()
            if number >= WARM_UP:
                times[name].append(1000 * seconds)
    rows = {}
    for name, form in FORMS.items():
        low, median, high = statistics.quantiles(times[name], n=4)
        rows[name] = {
            "parameters": parameters(form),
            "ms": round(median),
            "spread": [round(low), round(high)],
        }
        print(f"{name:24} {rows[name]['parameters']:>12,} {median:7.0f} ms  ({low:.0f}-{high:.0f})")
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__}
    result = {"bench": "forms", "batch": BATCH, "threads": 1, "rounds": flags.rounds}
    print(json.dumps(result | {"forms": rows, "versions": versions}))


if __name__ == "__main__":
    main()
