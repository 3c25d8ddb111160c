"""A single file of Stable Diffusion 1.5's true shape, random weights: is it loaded and trained on offline?

    python tests/bench/bench_single_file.py [--work FOLDER]

Writes the file once (2 GB, half precision), tells its kind by the header, loads it in processes of their own
with every way to the network shut, and trains three steps at 256 px. Prints what it found, then a JSON line.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

SHUT = """
import socket
def refuse(*_, **__): raise OSError("the network is shut")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""
WRITE = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import torch
from bench_true_size import save_random_model
from single_files import write_single_file
work = Path({work!r})
base = save_random_model(work / "random_sd15", whole_vocabulary=True)
write_single_file(base, work / "random_v1-5.safetensors", torch.float16)
"""
LOAD = """
import sys, time, torch
sys.path.insert(0, {root!r})
from megaman.common.console import quiet_libraries
quiet_libraries()
from megaman.model.single_file import kind_in
from megaman.model.stable_diffusion import load_base
from pathlib import Path
started = time.monotonic()
name = kind_in(Path({file!r})).name
told = time.monotonic() - started
base = load_base({file!r}, device=torch.device("cpu"), dtype=torch.{dtype})
print(name, round(told, 4), round(time.monotonic() - started - told, 2), file=sys.stdout)
"""


def run(code: str, *arguments: str) -> tuple[str, float, float]:
    """What the code printed in a process of its own, its seconds, its peak memory in GiB."""
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SHUT + code, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return done.stdout.strip(), round(time.monotonic() - before, 1), round(peak, 2)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp(prefix="bench_single_file_")))
    work = parser.parse_args().work
    file = work / "random_v1-5.safetensors"
    if not file.is_file():  # by another process: a child's peak begins with its parent's memory
        subprocess.run([sys.executable, "-c", WRITE.format(path=sys.path[:3], work=str(work))], check=True)
    found: dict[str, object] = {"file_gb": round(file.stat().st_size / 1e9, 2)}
    for dtype in ("bfloat16", "float32"):  # the smaller first: a peak is of all that came before
        printed, _, peak = run(LOAD.format(root=str(ROOT), file=str(file), dtype=dtype))
        *name, told, loaded = printed.split()
        found |= {"kind": " ".join(name), "header_s": float(told), f"load_{dtype}_s": float(loaded)}
        found[f"load_{dtype}_peak_gib"] = peak
        print(f"{dtype}: {printed}, peak {peak} GiB", flush=True)
    flags = [
        *(f"--pretrained_model_name={file}", f"--data_dir={ROOT / 'megaman' / 'starter_images'}"),
        *(f"--output_dir={work / 'out'}", f"--cache_dir={work / 'cache'}", "--resolution=256"),
        *("--max_train_steps=3", "--gradient_accumulation_steps=1", "--mixed_precision=bf16"),
        *("--validation_steps=99", "--validation_split=0", "--report_to=none"),
    ]
    script = f"import runpy; runpy.run_path({str(ROOT / 'megaman_lora.py')!r}, run_name='__main__')"
    _, seconds, peak = run(script, *flags)
    found |= {"train_s": seconds, "train_peak_gib": peak}
    print(f"three steps at 256 px: {seconds} s, peak {peak} GiB")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
