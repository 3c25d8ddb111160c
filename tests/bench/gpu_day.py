"""All that a card can show in ten minutes: tests, seconds a step, memory, a whole run, pictures a second.

    bash tests/bench/gpu_day.sh [--out DIR] [--work FOLDER] [--minutes 9.5] [--only steps] [--device cpu]

The parts run in the order of their worth, each in processes of its own with a limit of time, and after each
one OUT/gpu_day.json and OUT/gpu_day.md (tables for README) are written anew: whatever ends it, what was
measured is there. A form that fails is a line. --device cpu rehearses everything with a tiny model. Ends
with one JSON line.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
FORMS = ("", "--cuda_graph", "--compile", "--gradient_checkpointing", "--attention xformers")
FLAGS = (*(f"--flags={form}" for form in FORMS), "--rounds", "6", "--steps", "5")
CARD = ("--kind", "sd1", "--resolution", "512")
ENDING_S = 8  # kept back to write the files, and for a part to tell what it has before it is stopped
IMPORTS_S = 12  # before a bench begins to count its own time
LEAST_S = 30  # no part begins with less


@dataclass(frozen=True)
class Part:
    """A command of the day."""

    name: str
    command: tuple[str, ...]  # of python; {work} is where the base lies
    limit_s: float
    needs_base: bool = True
    can_stop: bool = False  # whether it takes --limit_s, and then tells what it has
    is_beside: bool = False  # runs beside what follows, until the base is needed


def bench(name: str, script: str, *flags: str, limit_s: float) -> Part:
    """A part that one of the benches is."""
    command = (str(BENCH / script), *CARD, "--work={work}", *flags)
    return Part(name, command, limit_s, can_stop=script != "bench_start.py")


def steps(precision: str, batch: int, *flags: str, limit_s: float) -> Part:
    """Our step in every form, and kohya's."""
    own = ("--precision", precision, "--batch", str(batch), "--together", *FLAGS, *flags)
    return bench(f"steps {precision} batch {batch}", "bench_step.py", *own, limit_s=limit_s)


BUILD = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; from bench.setting import build; "
BUILD += "build('sd1', '{work}')"
TESTS = ("-m", "pytest", "tests/test_gpu.py", "-q", "-rs")
RUN = ("--steps", "1000", "--pictures", "20", "--repeats", "1", "--parts", "cold", "--precision", "fp16")
RUN += ("--flags=--cuda_graph",)
DRAW = ("--batches", "1,4,8", "--samplers", "dpm++", "--rounds", "2", "--precision", "fp16")
QUICK = ("--no_profile", "--only", "ours,B")
PARTS = (
    Part("base", ("-c", BUILD), 150, needs_base=False, is_beside=True),
    Part("tests", TESTS, 170, needs_base=False),
    steps("fp16", 1, limit_s=140),
    bench("run of 1000 steps", "bench_start.py", *RUN, limit_s=170),
    bench("pictures", "bench_generate.py", *DRAW, limit_s=100),
    steps("fp16", 8, *QUICK, limit_s=90),
    steps("bf16", 1, *QUICK, limit_s=80),
    steps("bf16", 8, *QUICK, limit_s=90),
)
REHEARSED = {
    "bench_step.py": ("--rounds", "2", "--steps", "1", "--warm_up", "1"),
    "bench_start.py": ("--steps", "20"),
    "bench_generate.py": ("--steps", "2"),
}  # what a part of a rehearsal is also told; the last word counts
HELD = ("peak_gib", "reserved_gib")  # of memory, if there was time to ask
SLOWER = 4  # times as long as on a card a part of a rehearsal may take


def rehearsed(part: Part) -> Part:
    """The same with a tiny model, a few steps and no card."""
    own = REHEARSED.get(Path(part.command[0]).name)
    command = tuple(word.replace("'sd1'", "'tiny'") for word in part.command)
    if own is not None:
        command += ("--kind", "tiny", "--resolution", "32", "--device", "cpu", *own)
    return replace(part, command=command, limit_s=SLOWER * part.limit_s)


# ---------------------------------------------------------------- running
def started(part: Part, work: Path, limit_s: float, log: Path, device: str) -> subprocess.Popen[str]:
    """The part's process, the first of a group of its own."""
    words = [word.replace("{work}", str(work)) for word in part.command]
    if part.can_stop:
        words.append(f"--limit_s={max(1, limit_s - ENDING_S - IMPORTS_S):.0f}")
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    with log.open("w") as errors:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=os.environ | hidden, stdout=subprocess.PIPE,
            stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip


def ended(process: subprocess.Popen[str], limit_s: float, log: Path) -> dict[str, Any]:
    """What a part said, once it is done or its time is up."""
    began = time.monotonic()
    try:
        told, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it, and what it has started
        told, _ = process.communicate()
    lines = [line for line in told.splitlines() if line.strip()]
    found: dict[str, Any] = {"rc": process.returncode, "seconds": round(time.monotonic() - began, 1)}
    if lines and lines[-1].startswith("{"):
        return found | {"result": json.loads(lines[-1])}
    errors = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return found | {"said": (lines or errors or ["nothing"])[-1][:300]}


def run_all(parts: Sequence[Part], work: Path, out: Path, seconds: float, device: str) -> dict[str, Any]:
    """Every part for which there is time, written down after each."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {}
    beside: list[tuple[Part, subprocess.Popen[str], Path]] = []

    def meet(part: Part, process: subprocess.Popen[str], log: Path) -> None:
        limit = min(part.limit_s, end - time.monotonic() - ENDING_S)
        found[part.name] = ended(process, max(1.0, limit), log)
        write(found, out)
        told = found[part.name]
        print(f"{part.name}: {told['seconds']} s, {told.get('said', 'measured')}", flush=True)

    for part in parts:
        while part.needs_base and beside:
            meet(*beside.pop())
        left = end - time.monotonic() - ENDING_S
        if left < LEAST_S:
            found[part.name] = {"said": "no time was left"}
            continue
        log = out / f"{part.name.replace(' ', '_')}.log"
        process = started(part, work, min(part.limit_s, left), log, device)
        if part.is_beside:
            beside.append((part, process, log))
        else:
            meet(part, process, log)
    while beside:
        meet(*beside.pop())
    write(found, out)
    return found


# ---------------------------------------------------------------- telling
def step_rows(found: dict[str, Any]) -> list[str]:
    """Markdown of the parts about steps."""
    rows = []
    for told in found.values():
        result = told.get("result", {})
        if result.get("bench") != "step":
            continue
        where = f"| {result['card'] or result['processor']} | {result['torch']} "
        for form, seconds in result["step_s"].items():
            held = (result["memory"].get(form) or {}).get("peak_gib")
            precision = result["facts"][form]["precision"]
            rows.append(
                f"{where}| {precision} | {result['batch']} | {form} | {seconds['median']:.4f} | "
                f"{result['images_per_s'][form]:.2f} | {held} |"
            )
        for form, reason in result["failed"].items():
            rows.append(f"{where}| {result['precision']} | {result['batch']} | {form} | {reason} | | |")
    return rows


def other_lines(found: dict[str, Any]) -> list[str]:
    """Markdown of all other parts."""
    lines = []
    for name, told in found.items():
        result = told.get("result")
        if (result is None and told.get("rc") != 0) or name == "tests":
            lines.append(f"- {name}: {told['said']}")
        elif result is not None and result.get("profile"):
            counts = ", ".join(f"{result['profile'][each]} {each}" for each in ("kernels", "casts", "copies"))
            lines.append(f"- {name}, of our first form: {counts}")
        elif result is not None and result["bench"] == "start":
            events = ", ".join(f"{event} {seconds} s" for event, seconds in result["cold"].items())
            lines.append(f"- {name}, from the command on: {events}")
        elif result is not None and result["bench"] == "generate":
            for row in (row for row in result["rows"] if "ours" in row):
                held = "".join(f", {row['ours'][key]} GiB {key[:-4]}" for key in HELD if key in row["ours"])
                rate = f"{row['ours']['pictures_per_s']} pictures/s{held}"
                lines.append(f"- {row['sampler']}, {row['batch']} at a time: {rate}")
    return lines


def write(found: dict[str, Any], out: Path) -> None:
    """Both files, anew."""
    (out / "gpu_day.json").write_text(json.dumps(found, indent=1))
    head = [
        "| on | torch | precision | batch | form | seconds a step | images/s | peak GiB |",
        "|---" * 8 + "|",
    ]
    (out / "gpu_day.md").write_text("\n".join([*head, *step_rows(found), "", *other_lines(found)]) + "\n")


def main() -> None:
    """The day."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_day"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench_true_size")
    parser.add_argument("--minutes", type=float, help="for everything; 9.5, of a rehearsal 40")
    parser.add_argument("--only", default="", help="the parts whose names begin so, with commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    flags = parser.parse_args()
    for folder in (flags.out, flags.work):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = tuple(flags.only.split(","))
    parts = [part for part in PARTS if part.name.startswith(wanted) or part.is_beside]
    seconds = 60 * (flags.minutes or 9.5)
    if flags.device == "cpu":
        parts = [rehearsed(part) for part in parts]
        seconds = 60 * (flags.minutes or 40)
    found = run_all(parts, flags.work.resolve(), flags.out.resolve(), seconds, flags.device)
    print((flags.out / "gpu_day.md").read_text())
    print(json.dumps({"bench": "gpu_day", "device": flags.device, "parts": found}))


if __name__ == "__main__":
    main()
