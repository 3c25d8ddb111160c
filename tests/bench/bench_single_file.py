"""A single file of a kind's true shape, random weights: is it known, loaded and trained on offline, and how
much memory does it take?

    python tests/bench/bench_single_file.py [--kind sd1|sd2|xl] [--file FILE] [--steps 3]

Writes the file where it isn't there (half precision: 2.1, 2.6 or 6.9 GB), tells its kind by the header, loads
it in processes of their own with every way to the network shut, and trains some steps at 256 px (--steps 0:
none). Prints what it found, then a JSON line. Memory is anonymous memory, beyond the libraries': pages of the
file don't count, since the system takes them back when it needs them.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()

import diffusers  # noqa: E402
import torch  # noqa: E402
from single_files import write_true_shape  # noqa: E402

from megaman.common.kinds import KINDS  # noqa: E402

PIECE = 2**22  # values
NOISE = torch.randn(PIECE, generator=torch.Generator().manual_seed(0))
SHUT = """
import socket
def refuse(*_, **__): raise OSError("the network is shut")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""
LOAD = """
import json, sys, threading, time, torch
sys.path.insert(0, {root!r})
from megaman.common.console import quiet_libraries
quiet_libraries()
from diffusers.utils import logging
logging.disable_progress_bar()
from megaman.model.single_file import kind_in, load_file
from pathlib import Path
def anonymous_gib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20
peak, file, dtype = 0.0, Path({file!r}), torch.{dtype}
def watch():
    global peak
    while True:
        peak = max(peak, anonymous_gib())
        time.sleep(0.005)
before = anonymous_gib()
threading.Thread(target=watch, daemon=True).start()
started = time.monotonic()
kind = kind_in(file)
told = time.monotonic() - started
pipeline = load_file(file, kind, dtype)
loaded, stored = time.monotonic() - started - told, anonymous_gib()
for part in (pipeline.unet, *(getattr(pipeline, encoder.part) for encoder in kind.encoders)):
    part.to(dtype)
found = {{"kind": kind.name, "header_s": round(told, 4), "load_s": round(loaded, 2)}}
found |= {{"loaded_gib": round(stored - before, 2), "in_dtype_gib": round(anonymous_gib() - before, 2)}}
print(json.dumps(found | {{"peak_gib": round(peak - before, 2)}}))
"""


def random_bytes(key: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    """A tensor's numbers as a fresh network has them, in half precision: norms one, biases zero, weights by
    their inputs.
    """
    count = math.prod(shape)
    if len(shape) < 2:
        yield torch.full((count,), float(not key.endswith("bias"))).half().numpy().tobytes()
        return
    own = NOISE.roll(zlib.crc32(key.encode()) % PIECE)  # much faster than to draw billions
    scaled = (own / math.sqrt(math.prod(shape[1:]))).half().numpy().tobytes()
    for begin in range(0, count, PIECE):
        yield scaled[: 2 * min(PIECE, count - begin)]


def run(code: str) -> tuple[str, float]:
    """What the code printed in a process of its own, its seconds."""
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SHUT + code], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip(), round(time.monotonic() - before, 1)


def train(file: Path, work: Path, steps: int) -> float:
    """Seconds of the whole command, without a network."""
    flags = [
        *(f"--pretrained_model_name={file}", f"--data_dir={ROOT / 'megaman' / 'starter_images'}"),
        *(f"--output_dir={work / 'out'}", f"--cache_dir={work / 'cache'}", "--resolution=256"),
        *(f"--max_train_steps={steps}", "--gradient_accumulation_steps=1", "--mixed_precision=bf16"),
        *("--validation_steps=99", "--validation_split=0", "--report_to=none"),
    ]
    script = f"import runpy, sys; sys.argv[1:] = {flags!r}; "
    script += f"runpy.run_path({str(ROOT / 'megaman_lora.py')!r}, run_name='__main__')"
    return run(script)[1]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=[kind.folder for kind in KINDS], default="sd1")
    parser.add_argument("--file", type=Path, help="written if it isn't there")
    parser.add_argument("--steps", type=int, default=3)
    flags = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench_single_file_"))
    file = flags.file or work / f"random_{flags.kind}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = next(kind for kind in KINDS if kind.folder == flags.kind)
        write_true_shape(kind, file.with_suffix(".part"), random_bytes).replace(file)
    found: dict[str, object] = {"bench": "single_file", "file_gb": round(file.stat().st_size / 1e9, 2)}
    found |= {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
    for dtype in ("float16", "bfloat16"):  # as stored, and as most cards compute
        found[dtype] = json.loads(run(LOAD.format(root=str(ROOT), file=str(file), dtype=dtype))[0])
        print(f"{dtype}: {found[dtype]}", flush=True)
    if flags.steps:
        found["train_s"] = train(file, work, flags.steps)
        print(f"{flags.steps} steps at 256 px: {found['train_s']} s")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
