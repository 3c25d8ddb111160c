"""What --compile changes: the demo's steps plain and compiled, in turn, and how far their results lie apart.

    python tests/bench/bench_compile.py [--steps 40]

On the first device there is. Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()

import torch  # noqa: E402

from megaman.training.schedule import peak_rates  # noqa: E402
from megaman_lora import Run, forward_backward, read_config, set_up  # noqa: E402

WARM_UP = 6  # steps that are not timed: compilation, caches


def step(run: Run, number: int) -> float:
    """One optimizer step; its seconds."""
    started = time.perf_counter()
    forward_backward(run, run.data.sampler.batch(number), number)
    run.step.update(peak_rates(run.cfg))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Both runs side by side, step after step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    runs, first, seconds = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in {"plain": [], "compiled": ["--compile"]}.items():
            argv = ["--preset", "demo", "--output_dir", f"{folder}/{name}", "--report_to", "none", *flags]
            runs[name] = set_up(read_config(argv)[0])
            started = time.perf_counter()
            for number in range(WARM_UP):
                step(runs[name], number)
            first[name], seconds[name] = time.perf_counter() - started, []
        for number in range(WARM_UP, WARM_UP + steps):
            for name, run in runs.items():
                seconds[name].append(step(run, number))
    pairs = zip(*(run.trainable.values() for run in runs.values()), strict=True)
    apart = max((a - b).abs().max().item() / a.abs().max().item() for a, b in pairs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name in runs:
        print(f"{name}: first {WARM_UP} steps {first[name]:.1f} s, then {medians[name]:.3f} s each")
    print(f"after {WARM_UP + steps} steps the parameters lie {apart:.1e} apart, of the largest\n")
    told = {
        "bench": "compile",
        "torch": torch.__version__,
        "first_s": first,
        "step_s": medians,
        "apart": apart,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
