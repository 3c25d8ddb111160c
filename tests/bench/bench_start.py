"""From the command to the first step, the first picture and the saved files: real processes, watched.

    python tests/bench/bench_start.py [--kind sd1|sd2|xl|embedded|tiny] [--repeats 3] [--steps 1]
        [--resolution 256] [--pictures 8] [--parts cold,warm,draw,imports] [--flags "--attention sdpa"]

Cold: nothing is encoded yet; warm: all of it is. (What the system keeps of files on the disk is left as it
is.) Metrics are written for ten steps at a time and at the end, so the first step is seen when it is the
only one: --steps 1. Then generate_megaman.py to its first picture, and how long which library takes to be
imported in a whole run of training, by python -X importtime. Prints tables, then one JSON line.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import environ
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()

from bench.setting import Setting, add_arguments, machine, parsed, pictures_at, setting_of  # noqa: E402

LOOK_S = 0.005  # between two looks at the files
LIBRARIES = ("megaman", "megaman_lora", "torch", "diffusers", "transformers", "peft", "accelerate")
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| +(\S+)")
ROWS = 15  # of the modules' table
Event = Callable[[], bool]


def has_loss(metrics: Path) -> bool:
    """Whether a step was recorded."""
    return metrics.exists() and '"loss"' in metrics.read_text(errors="replace")


def watch(command: list[str], device: str, events: Mapping[str, Event]) -> dict[str, Any]:
    """Seconds from a command's start to each event, to each of its lines and to its end. SystemExit with its
    last line if it fails.
    """
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ | hidden | {"PYTHONUNBUFFERED": "1"}, text=True, errors="replace",
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    lines: list[tuple[float, str]] = []

    def listen() -> None:
        for line in process.stderr or ():
            lines.append((round(time.monotonic() - started, 3), line.rstrip()))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    seen: dict[str, float] = {}
    while process.poll() is None:
        for name, has_happened in events.items():
            if name not in seen and has_happened():
                seen[name] = round(time.monotonic() - started, 3)
        time.sleep(LOOK_S)
    ended = round(time.monotonic() - started, 3)
    listener.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command[:2])}: {lines[-1][1] if lines else process.returncode}")
    for name, has_happened in events.items():
        if name not in seen and has_happened():
            seen[name] = ended
    return {"seconds": seen | {"ended": ended}, "lines": lines}


# ---------------------------------------------------------------- the commands
def train_command(setting: Setting, output: Path, steps: int, flags: str) -> list[str]:
    """A run of so many steps."""
    own = [*setting.flags(str(output)), "--max_train_steps", str(steps)]
    return [sys.executable, str(ROOT / "megaman_lora.py"), *own, *flags.split()]


def training_events(output: Path) -> dict[str, Event]:
    """What a run of training writes, in its order."""
    return {
        "first picture": (output / "samples" / "step-000000" / "01.png").exists,
        "first step": lambda: has_loss(output / "metrics.jsonl"),
        "saved": (output / "lora_weights" / "megaman_lora.safetensors").exists,
    }


def drawing(setting: Setting, adapter: Path, output: Path, steps: int) -> dict[str, Any]:
    """One picture by generate_megaman.py."""
    device = "auto" if setting.device == "cuda" else "cpu"
    command = [
        *(sys.executable, str(ROOT / "generate_megaman.py"), f"--lora_path={adapter}"),
        *(f"--output_dir={output}", f"--device={device}", "--prompts", "mega man"),
        *("--num_inference_steps", str(steps)),
    ]
    if setting.kind != "embedded":
        command.append(f"--base_model={setting.base}")
    events = {"first picture": lambda: any(output.glob("*.png")), "page": (output / "index.html").exists}
    return watch(command, setting.device, events)


def imports_of(setting: Setting, output: Path, flags: str) -> dict[str, Any]:
    """Seconds that libraries take to be imported in a run of one step, of which python's own counting is a
    part: all modules of each, and the modules that take longest with all that they bring along.
    """
    command = train_command(setting, output, 1, flags)
    told = watch([command[0], "-X", "importtime", *command[1:]], setting.device, {})
    own: Counter[str] = Counter()
    whole: dict[str, float] = {}
    for _, line in told["lines"]:
        found = IMPORT.match(line)
        if found is not None:
            own[found[3].split(".")[0]] += int(found[1])
            whole[found[3]] = int(found[2]) / 1e6
    named = [name for name in whole if name.split(".")[0] in LIBRARIES]
    longest = sorted(named, key=lambda name: -whole[name])[:ROWS]
    return {
        "all": round(own.total() / 1e6, 2),
        "libraries": {name: round(us / 1e6, 3) for name, us in own.most_common(ROWS)},
        "modules": {name: round(whole[name], 3) for name in longest},
    }


# ---------------------------------------------------------------- the bench
def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each event."""
    names = runs[0]["seconds"]
    return {name: round(statistics.median(run["seconds"][name] for run in runs), 2) for name in names}


def measure(setting: Setting, flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All parts that are asked for."""
    parts, more = flags.parts.split(","), (flags.flags or [""])[0]
    runs: dict[str, list[dict[str, Any]]] = {}
    adapter = folder / "run 0 warm"
    for number in range(flags.repeats):
        filled = number if "cold" in parts else 0  # the cache that a cold run has filled
        own = replace(setting, cache=str(folder / f"cache {filled}"))
        for part in ("cold", "warm"):
            output = folder / f"run {number} {part}"
            if part in parts or (part, number) == ("cold", 0):  # without it nothing is warm
                command = train_command(own, output, flags.steps, more)
                runs.setdefault(part, []).append(watch(command, setting.device, training_events(output)))
                adapter = output / "lora_weights"
        if "draw" in parts:
            drawn = drawing(setting, adapter, folder / f"drawn {number}", flags.draw_steps)
            runs.setdefault("draw", []).append(drawn)
    found: dict[str, Any] = {part: medians(each) for part, each in runs.items()}
    found["lines"] = {part: each[-1]["lines"] for part, each in runs.items()}
    if "imports" in parts:
        warm = replace(setting, cache=str(folder / "cache 0"))
        found["imports"] = imports_of(warm, folder / "run of imports", more)
    return found


def show(found: dict[str, Any]) -> None:
    """The tables."""
    for part in ("cold", "warm", "draw"):
        if part in found:
            print(f"{part:6}", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found[part].items()))
    if "imports" in found:
        print(f"\nimports: {found['imports']['all']} s in all")
        for title in ("libraries", "modules"):
            print(f"\n{title}")
            for name, seconds in found["imports"][title].items():
                print(f"  {name:50} {seconds:8.3f} s")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of training")
    parser.add_argument("--draw_steps", type=int, default=25, help="of the picture")
    parser.add_argument("--pictures", type=int, help="to train on; 8, with the embedded base the demo's")
    parser.add_argument("--parts", default="cold,warm,draw,imports", help="which, with commas")
    parser.add_argument("--flags", action="append", help="further flags of megaman_lora.py")
    flags = parsed(parser)
    setting = setting_of(flags)
    if flags.pictures:
        setting = replace(setting, pictures=str(pictures_at(flags.work, flags.pictures)))
    folder = Path(tempfile.mkdtemp(prefix="bench_start_", dir=flags.work))
    try:
        found = measure(setting, flags, folder)
    finally:
        shutil.rmtree(folder)
    show(found)
    told = {"bench": "start", **setting.facts, **machine(setting.device), "steps": flags.steps}
    told |= {"draw_steps": flags.draw_steps, "repeats": flags.repeats, "flags": flags.flags}
    print(json.dumps(told | found))


if __name__ == "__main__":
    main()
