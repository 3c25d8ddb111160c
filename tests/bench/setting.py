"""What the benches of speed work on: bases of true shape, pictures, the flags of a run, the machine."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

import torch  # noqa: E402

from megaman.common.kinds import KINDS, SD1  # noqa: E402
from megaman.config.train import EMBEDDED  # noqa: E402

TINY = "tiny"  # a model of milliseconds, to rehearse with
KIND_NAMES = ("embedded", *(kind.folder for kind in KINDS), TINY)
RESOLUTIONS = {"embedded": 64, TINY: 32}  # in pixels; of the others 256
BATCHES = {"embedded": 8}  # the demo's; of the others 1
PICTURES = 8


@dataclass(frozen=True)
class Setting:
    """What all contestants train or draw with."""

    kind: str
    base: str
    pictures: str  # folder
    cache: str  # folder
    resolution: int
    batch: int
    precision: str  # no, bf16 or fp16
    device: str  # cpu or cuda

    @property
    def facts(self) -> dict[str, Any]:
        """What a result names; no path."""
        paths = ("base", "pictures", "cache")
        return {name: value for name, value in asdict(self).items() if name not in paths}

    def flags(self, output: str) -> list[str]:
        """The flags of a training run of ours."""
        own = ["--preset", "demo"]
        if self.kind != "embedded":
            own = [f"--pretrained_model_name={self.base}", f"--data_dir={self.pictures}"]
            own += ["--gradient_accumulation_steps", "1", "--validation_split", "0"]
        return [
            *own,
            *(f"--output_dir={output}", f"--cache_dir={self.cache}", "--report_to", "none"),
            *("--resolution", str(self.resolution), "--train_batch_size", str(self.batch)),
            *("--mixed_precision", self.precision),
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every bench of speed has."""
    parser.add_argument("--kind", choices=KIND_NAMES, default="embedded")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench_true_size")
    parser.add_argument("--resolution", type=int, help="in pixels; 256, of small bases their own")
    parser.add_argument("--batch", type=int, help="pictures a step; 1, of the embedded base the demo's 8")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's values. What follows --flags or --against_flags is a value, whatever it begins
    with.
    """
    words = iter(sys.argv[1:])
    joined = [
        f"{word}={next(words, '')}" if word in ("--flags", "--against_flags") else word for word in words
    ]
    return parser.parse_args(joined)


def setting_of(flags: argparse.Namespace) -> Setting:
    """What the flags ask for; the base and the pictures are written where they are not there yet."""
    device = flags.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Setting(
        kind=flags.kind,
        base=base_at(flags.kind, flags.work),
        pictures=str(pictures_at(flags.work, PICTURES)),
        cache=str(flags.work / "cache"),
        resolution=flags.resolution or RESOLUTIONS.get(flags.kind, 256),
        batch=flags.batch or BATCHES.get(flags.kind, 1),
        precision=flags.precision,
        device=device,
    )


def base_at(kind: str, work: Path) -> str:
    """A base of this name, as --pretrained_model_name takes it, written where it isn't there yet by a process
    of its own, whose memory nobody inherits.
    """
    if kind == "embedded":
        return EMBEDDED
    tests = ROOT / "tests"
    build = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tests)!r}]; from bench.setting import build; "
    build += f"build({kind!r}, {str(work)!r})"
    told = subprocess.run([sys.executable, "-c", build], stdout=subprocess.PIPE, text=True, check=True)
    return told.stdout.splitlines()[-1]


def build(kind: str, work: str) -> None:
    """Writes a base where it isn't there yet, and prints where."""
    folder = Path(work, TINY)
    if kind == TINY:
        from tiny_models import save_tiny

        print(folder if (folder / "model_index.json").exists() else save_tiny(SD1, folder))
        return
    from bench.bench_true_size import save_random_base

    print(save_random_base(next(each for each in KINDS if each.folder == kind), Path(work)))


def pictures_at(work: Path, count: int) -> Path:
    """A folder of the first so many starter pictures, with their captions."""
    folder = work / f"pictures_{count}"
    folder.mkdir(parents=True, exist_ok=True)
    for picture in sorted((ROOT / "megaman" / "starter_images").glob("*.png"))[:count]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, folder)
    return folder


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "card": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def synchronize() -> None:
    """Waits for the card, if there is one: what was asked of it is done then."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
