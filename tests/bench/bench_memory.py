"""What recomputing saves and costs: the curve of memory against time, level by level, from cheap to dear.

    python tests/bench/bench_memory.py --count [--kind sd1|sd2|xl] [--targets attention]
    python tests/bench/bench_memory.py [--kind sd1|sd2|xl] [--work FOLDER] [--resolution 256] [--only largest]

--count needs no memory: it follows a step of 1024 x 1024 pixels in half precision on tensors without
numbers, adds up what lives at any time (the table in megaman/common/kinds.py), and the computing. Without it,
steps of a random base of the true shape are taken, of all levels in turn, round after round, and timed; the
peak of each level is that of a process of its own on a CPU (resident, above what it held before the first
step), and torch's own on a card. Prints a line a level, then one JSON line.
"""

import argparse
import ctypes
import gc
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
from counted import attention_of_a_card, base_of_true_shape, peak_bytes, step_of  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megaman.common.kinds import KINDS, Kind, Level  # noqa: E402
from megaman.config.train import TrainConfig  # noqa: E402
from megaman.model.recompute import recompute  # noqa: E402
from megaman_lora import Run, apply_memory_plan, forward_backward, read_config, set_up  # noqa: E402

GIB = 2**30
SIDE_PX = 1024  # of the picture that is counted
STRIDE = 8  # pixels a latent cell
ROUNDS = 5
PICTURES = 4


# ---------------------------------------------------------------- counting


def counted(kind: Kind, targets: Any, level: Level) -> tuple[float, float]:
    """GiB at the peak of a step beside weights and their gradients, and the step's computing in TFLOP."""
    base = base_of_true_shape(kind)
    run, parameters = step_of(base, TrainConfig(lora_targets=targets), SIDE_PX // STRIDE)
    recompute(base.unet, level)
    peak = peak_bytes(run)
    with attention_of_a_card(), FlopCounterMode(display=False) as computing:
        run()
    gradients = sum(each.numel() * each.element_size() for each in parameters)
    return (peak - gradients) / GIB, computing.get_total_flops() / 1e12


def count(kind: Kind, targets: str) -> dict[str, Any]:
    """Every level's memory and computing."""
    found: dict[str, Any] = {}
    for level in kind.steps:
        gib, tflop = counted(kind, targets, level)
        first = found.get("nothing", {"tflop": tflop})["tflop"]
        found[level] = {"gib": round(gib, 2), "tflop": tflop, "added_%": round(100 * (tflop / first - 1), 1)}
        print(f"{level:30} {gib:6.2f} GiB  {found[level]['added_%']:+5.1f} % computing", flush=True)
    return found


# ---------------------------------------------------------------- measuring


def run_of(base: Path, resolution: int, folder: Path) -> Run:
    """A run that is set up on a few pictures; in half precision, bf16 on a CPU."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for picture in sorted((ROOT / "megaman" / "starter_images").glob("*.png"))[:PICTURES]:
        shutil.copy(picture, pictures)
    flags = [f"--pretrained_model_name={base}", f"--output_dir={folder / 'run'}", f"--data_dir={pictures}"]
    flags += [f"--cache_dir={folder / 'cache'}", f"--resolution={resolution}", "--validation_split=0"]
    precision = "fp16" if torch.cuda.is_available() else "bf16"
    flags += ["--gradient_accumulation_steps=1", "--report_to=none", f"--mixed_precision={precision}"]
    return set_up(read_config(flags)[0])


def resident_gib(name: str) -> float:
    """What this process holds (VmRSS), or the most that it has held (VmHWM). Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 2**20


def forget_peak() -> None:
    """Gives all that is free back to the system, and lets VmHWM begin anew. (proc(5), malloc_trim(3).)"""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def timed_step(run: Run, level: Level, number: int) -> float:
    """Seconds of one step."""
    run.memory.recomputed = level
    apply_memory_plan(run)
    started = time.perf_counter()
    forward_backward(run, run.data.sampler.batch(number), number)
    run.optimizer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_of(run: Run, level: Level) -> float:
    """GiB that a step holds at most above what was held before them; of a process of its own on a CPU."""
    if not torch.cuda.is_available():
        timed_step(run, level, 0)  # the optimizer's moments and gradients stay
        forget_peak()
        before = resident_gib("VmRSS")
        timed_step(run, level, 1)
        return resident_gib("VmHWM") - before
    timed_step(run, level, 0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    timed_step(run, level, 1)
    return (torch.cuda.max_memory_allocated() - before) / GIB


def measure(kind: Kind, base: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Every level's seconds a step, in turn, and its peak."""
    levels = [level for level in kind.steps if not flags.only or level == flags.only]
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(base, flags.resolution, Path(folder))
        seconds: dict[Level, list[float]] = {level: [] for level in levels}
        for number in range(-1, ROUNDS):
            for level in levels:
                took = timed_step(run, level, max(number, 0))
                seconds[level] += [took] if number >= 0 else []  # the first round warms up
        peaks = {level: peak_of(run, level) for level in levels} if torch.cuda.is_available() else {}
    found: dict[str, Any] = {}
    for level in levels:
        again = [sys.executable, __file__, "--peak", level, "--kind", flags.kind, "--work", str(flags.work)]
        again += ["--resolution", str(flags.resolution)]
        if level not in peaks:
            peaks[level] = float(subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout)
        middle = statistics.median(seconds[level])
        slower = round(100 * (middle / statistics.median(seconds[levels[0]]) - 1), 1)
        spread = round(max(seconds[level]) - min(seconds[level]), 3)
        found[level] = {"step_s": round(middle, 3), "spread_s": spread, "slower_%": slower}
        found[level]["gib"] = round(peaks[level], 2)
        print(f"{level:30} {peaks[level]:6.2f} GiB  {middle:7.3f} s  {slower:+5.1f} %", flush=True)
    return found


def main() -> None:
    """Counts or measures every level."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=[kind.folder for kind in KINDS], default="sd1")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench_true_size")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--only", help="one level")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    kind = next(kind for kind in KINDS if kind.folder == flags.kind)
    told = {"bench": "memory", "kind": flags.kind, "torch": torch.__version__}
    if flags.count:
        print(json.dumps(told | {"targets": flags.targets, "counted": count(kind, flags.targets)}))
        return
    base = save_random_base(kind, flags.work)
    if flags.peak:
        with tempfile.TemporaryDirectory() as folder:
            print(peak_of(run_of(base, flags.resolution, Path(folder)), flags.peak))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    told |= {"device": device, "threads": torch.get_num_threads(), "resolution": flags.resolution}
    print(json.dumps(told | {"levels": measure(kind, base, flags)}))


if __name__ == "__main__":
    main()
