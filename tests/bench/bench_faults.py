"""What survives when a run is killed, stopped, starved of disk, or its files are damaged?

    python tests/bench/bench_faults.py [--work FOLDER] [--share 1] [--steps 21]

A tiny model is imported once; each run is a forked child of this process, so hundreds of them take minutes.
Every child runs the real command. After each fault: does every finished file load, was anything lost beyond
the last save, and does the resumed run end with the very bytes of an unbroken one? Prints a table, then one
JSON line. --share does a part of it, such as 0.03, without the hostile input. Not for Windows, which cannot
fork.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # a forked child must not inherit a pool of threads

import commands  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_models import save_tiny  # noqa: E402

import megaman_lora  # noqa: E402
from megaman.common import console, output_folder  # noqa: E402
from megaman.common.kinds import SD1  # noqa: E402
from megaman.lora.load import read_adapter  # noqa: E402
from megaman.model.stable_diffusion import load_base  # noqa: E402
from megaman.training import checkpoints, resume, validation  # noqa: E402

torch.set_num_threads(1)
gc.freeze()  # no child looks for garbage among what is imported
validation.SAMPLE_STEPS = 4  # of 20, so that most random faults hit training and saving
SAVE = 4  # steps
DIED = "killed"
WEIGHTS = ("adapter_model.safetensors", "megaman_lora.safetensors")
Prepare = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or `killed`, and what it told."""

    code: int | str
    told: str


def in_child(main: Callable[[], None], argv: list[str], prepare: Prepare, kill_at_s: float | None = None,
             by: int = signal.SIGKILL) -> Ended:  # fmt: skip
    """Runs a script's main in a forked child after `prepare`; sends it a signal after so many seconds."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(writing, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        sys.argv = argv
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        code = 99
        try:
            prepare()
            commands.run(main)
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    if kill_at_s is not None:
        time.sleep(kill_at_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, by)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    return Ended(DIED if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), told)


def nothing() -> None:
    """No fault."""


class Bench:
    """The folders of the bench and the commands that run in them. steps: of an unbroken run."""

    def __init__(self, work: Path, steps: int) -> None:
        self.steps, self.work, self.out = steps, work, work / "out"
        self.base, self.data = work / "base", work / "pictures"
        if not self.base.exists():
            pid = os.fork()  # drawing random weights here would start torch's threads
            if pid == 0:
                save_tiny(SD1, self.base)
                os._exit(0)
            os.waitpid(pid, 0)
        self.data.mkdir(exist_ok=True)
        for i, size in enumerate([(40, 48), (80, 40), (40, 80), (64, 64), (40, 48), (30, 30), (50, 50)]):
            path = self.data / f"megaman_{i}.png"
            Image.new("RGB", size, (30 * i, 200 - 20 * i, 90)).save(path)
            path.with_suffix(".txt").write_text(f"mega man, tag {i}, blue, running", encoding="utf-8")

    def flags(self, *more: str) -> list[str]:
        """Of a run with accumulation, buckets, dropped and shuffled captions, sample pictures."""
        return [
            "megaman_lora.py", f"--pretrained_model_name={self.base}", f"--data_dir={self.data}",
            f"--output_dir={self.out}", f"--cache_dir={self.work / 'cache'}", "--resolution=32",
            f"--max_train_steps={self.steps}", f"--save_steps={SAVE}", "--validation_steps=10",
            "--train_batch_size=1", "--gradient_accumulation_steps=2", "--caption_dropout=0.3",
            "--shuffle_tags", "--mixed_precision=no", "--lora_rank=4", "--learning_rate=1e-3",
            "--report_to=none",
            *more,
        ]  # fmt: skip

    def train(self, prepare: Prepare = nothing, *more: str, **fault: Any) -> Ended:
        """One training command."""
        return in_child(commands.training, self.flags(*more), prepare, **fault)

    def draw(self, prepare: Prepare = nothing, **fault: Any) -> Ended:
        """One generation command, on the unbroken run's adapter."""
        argv = [
            "generate_megaman.py", f"--lora_path={self.work / 'kept' / 'lora_weights'}",
            f"--base_model={self.base}", f"--output_dir={self.work / 'drawn'}", "--num_inference_steps=2",
            "--prompts", "mega man", "a boss", "a robot", "--batch_size=1",
        ]  # fmt: skip
        return in_child(commands.drawing, argv, prepare, **fault)

    def clear(self) -> None:
        """No output."""
        for path in self.work.glob("out*"):
            shutil.rmtree(path)
        shutil.rmtree(self.work / "drawn", ignore_errors=True)

    def unbroken(self) -> tuple[str, float]:
        """The sum of an unbroken run's weights, and its seconds; its adapter is kept for drawing."""
        self.clear()
        self.train()
        started = time.monotonic()
        self.clear()
        ended = self.train()
        seconds = time.monotonic() - started
        if ended.code != 0:
            raise SystemExit(f"the unbroken run failed:\n{ended.told}")
        shutil.rmtree(self.work / "kept", ignore_errors=True)
        shutil.copytree(self.out, self.work / "kept")
        return self.weights(), seconds

    def weights(self) -> str:
        """The sum of the final files."""
        files = [self.out / "lora_weights" / name for name in WEIGHTS]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def saved(self) -> Path:
        """Where a child writes each step whose checkpoint was complete."""
        return self.work / "saved_steps"

    def note_saves(self) -> None:
        """In the child: remembers each save that returned, beyond any kill."""
        honest = checkpoints.save_checkpoint

        def noted(folder: Path, progress: Any, adapter: Any, **how: Any) -> Path:
            made = honest(folder, progress, adapter, **how)
            handle = os.open(self.saved(), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, f"{progress.step}\n".encode())
            os.close(handle)
            return made

        checkpoints.save_checkpoint = noted

    def verdict(self, wanted: str, counts: Counter[str]) -> None:
        """Looks at what a fault has left, then lets the run go on and compares its end."""
        folder = self.out / "checkpoints"
        steps = sorted(folder.glob("step-*"))
        loaded = [step for step in steps if is_whole(step)]
        counts["checkpoints that do not load"] += len(steps) - len(loaded)
        for file in (self.out / "lora_weights").glob("*.safetensors"):
            counts["final files that do not load"] += not loads(lambda file=file: read_adapter(file))
        done = [int(line) for line in self.saved().read_text().split()] if self.saved().exists() else [0]
        newest = int(loaded[-1].name[5:]) if loaded else 0
        counts["saves lost"] += newest < max(done, default=0)
        ended = self.train(nothing, *(["--resume_from_checkpoint=latest"] if loaded else []))
        counts["resumed runs that fail"] += ended.code != 0
        counts["other final bytes"] += ended.code == 0 and self.weights() != wanted
        if ended.code != 0:
            print(ended.told, file=sys.stderr)
        self.saved().unlink(missing_ok=True)


def is_whole(step: Path) -> bool:
    """Whether a checkpoint loads; one whose state was dropped by rotation still has its adapter."""
    if (step / checkpoints.STATE_FILE).exists():
        return loads(lambda: checkpoints.read_checkpoint(step))
    return loads(lambda: read_adapter(step / output_folder.ADAPTER_FILE))


def loads(read: Callable[[], object]) -> bool:
    """Whether it can be read."""
    try:
        read()
    except (console.UserError, checkpoints.Damaged):
        return False
    return True


# ---------------------------------------------------------------- faults


def tripwire(place: str, number: int, when: str) -> Prepare:
    """In the child: dies at the `number`-th call of `module:attribute`, before or after it did its work."""

    def prepare() -> None:
        module, _, path = place.partition(":")
        holder: Any = importlib.import_module(module)
        *parts, name = path.split(".")
        for part in parts:
            holder = getattr(holder, part)
        honest, calls = getattr(holder, name), iter(range(1, 10**9))

        def wired(*args: Any, **kwargs: Any) -> Any:
            is_last = next(calls) == number
            if is_last and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = honest(*args, **kwargs)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(holder, name, wired)

    return prepare


PHASES = {
    "scan": ("megaman.data.scan:scan", 1, "before"),
    "cache": ("megaman.training.encoding:_posteriors", 3, "after"),
    "encoded": ("megaman.training.encoding:encode", 1, "after"),
    "lock": ("megaman.training.resume:claim", 1, "after"),
    "step": ("megaman_lora:accumulate", 5, "before"),
    "optimizer": ("torch.optim:AdamW.step", 5, "after"),
    "adapter write": ("megaman.training.checkpoints:write_kohya", 2, "before"),
    "state write": ("megaman.training.checkpoints:save_tensors", 2, "before"),
    "state written": ("megaman.training.checkpoints:save_tensors", 2, "after"),
    "sums": ("megaman.training.checkpoints:sha256_of", 3, "before"),
    "fsync": ("os:fsync", 9, "before"),
    "folder fsync": ("megaman.training.checkpoints:_sync", 9, "before"),
    "rename": ("pathlib:Path.rename", 2, "before"),
    "renamed": ("pathlib:Path.rename", 2, "after"),
    "prune": ("megaman.training.checkpoints:_prune", 4, "before"),
    "pruned": ("megaman.training.checkpoints:_prune", 4, "after"),
    "sample": ("megaman.training.validation:_draw", 2, "before"),
    "sample picture": ("PIL.Image:Image.save", 2, "after"),
    "sample page": ("megaman.training.tracker:renew_page", 2, "after"),
    "metrics": ("megaman.training.tracker:Tracker._show", 1, "before"),
    "final export": ("megaman.training.adoption:write_adapter", 1, "before"),
    "final file": ("megaman.lora.save:save_tensors", 5, "after"),
    "exported": ("megaman.training.adoption:write_adapter", 1, "after"),
}
DRAWING = {
    "picture": ("PIL.Image:Image.save", 2, "before"),
    "picture written": ("PIL.Image:Image.save", 2, "after"),
    "picture named": ("pathlib:Path.replace", 2, "after"),
    "metadata": ("megaman.generation.records:write_records", 1, "before"),
    "gallery": ("megaman.generation.gallery:render_gallery", 2, "after"),
}


def killed_at_random(bench: Bench, wanted: str, seconds: float, count: int) -> dict[str, int]:
    """kill -9 at random times of a whole run."""
    rng, counts = random.Random(1), Counter({"runs": count})
    for _ in range(count):
        bench.clear()
        ended = bench.train(bench.note_saves, kill_at_s=rng.uniform(0, seconds))
        counts["died"] += ended.code == DIED
        bench.verdict(wanted, counts)
    return dict(counts)


def killed_at_phases(bench: Bench, wanted: str, share: float) -> dict[str, int]:
    """kill -9 at every named phase, of training and of drawing."""
    training, drawing = (some([*phases.items()], share) for phases in (PHASES, DRAWING))
    counts: Counter[str] = Counter({"runs": len(training) + len(drawing)})
    for name, wire in training:
        bench.clear()
        if name in ("cache", "encoded"):
            shutil.rmtree(bench.work / "cache", ignore_errors=True)
        ended = bench.train(lambda wire=wire: (bench.note_saves(), tripwire(*wire)())[0])
        counts["died"] += ended.code == DIED
        if ended.code != DIED:
            print(f"the wire at {name!r} was never touched: {ended.code}", file=sys.stderr)
        bench.verdict(wanted, counts)
    for name, wire in drawing:
        bench.clear()
        ended = bench.draw(tripwire(*wire))
        counts["died"] += ended.code == DIED
        if ended.code != DIED:
            print(f"the wire at {name!r} was never touched: {ended.code}\n{ended.told}", file=sys.stderr)
        look_at_pictures(bench, counts)
    return dict(counts)


def look_at_pictures(bench: Bench, counts: Counter[str]) -> None:
    """Every picture opens and is listed once the command is repeated; what was finished is not redrawn."""
    drawn = bench.work / "drawn"
    before = {path: path.stat().st_mtime_ns for path in drawn.glob("*.png")}
    for path in before:
        counts["pictures that do not open"] += not opens(path)
    again = bench.draw()
    counts["repeated commands that fail"] += again.code != 0
    pictures = list(drawn.glob("*.png"))
    page = (drawn / "index.html").read_text(encoding="utf-8")
    listed = all(path.name in page for path in pictures)
    counts["pictures missing in the gallery"] += len(pictures) != 3 or not listed


def opens(path: Path) -> bool:
    """Whether a picture is whole."""
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return False
    return True


def stopped(bench: Bench, wanted: str, seconds: float, count: int) -> dict[str, int]:
    """SIGINT and SIGTERM at random times: the state is saved, the code is the signal's."""
    rng, counts = random.Random(2), Counter({"runs": count})
    for i in range(count):
        bench.clear()
        by = (signal.SIGINT, signal.SIGTERM)[i % 2]
        ended = bench.train(bench.note_saves, kill_at_s=rng.uniform(0.01, seconds), by=by)
        counts["ended before the signal"] += ended.code == 0
        counts["other exit codes"] += ended.code not in (0, 128 + by)
        counts["tracebacks"] += "Traceback" in ended.told
        if ended.code not in (0, 128 + by):
            print(ended, file=sys.stderr)
        bench.verdict(wanted, counts)
    return dict(counts)


def cut_everywhere(bench: Bench, wanted: str, cuts: list[list[int]]) -> dict[str, int]:
    """Stopped after the given steps, one after the other, and resumed each time."""
    counts: Counter[str] = Counter({"chains": len(cuts)})
    for chain in cuts:
        bench.clear()
        for i, step in enumerate(chain):
            wire = stop_in_step(step)
            more = ["--resume_from_checkpoint=latest"] if i else []
            counts["stops that fail"] += bench.train(wire, *more).code != 128 + signal.SIGTERM
        bench.verdict(wanted, counts)
    return dict(counts)


def stop_in_step(step: int) -> Prepare:
    """In the child: SIGTERM comes in the middle of a step."""

    def prepare() -> None:
        honest = megaman_lora.forward_backward

        def interrupted(run: Any, positions: Any, number: int) -> Any:
            if number + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return honest(run, positions, number)

        megaman_lora.forward_backward = interrupted

    return prepare


def once_begun(fault: Prepare) -> Prepare:
    """In the child: the fault comes when the run has its folder, after all that is probed before."""

    def prepare() -> None:
        honest = resume.claim

        def claim(*args: Any, **kwargs: Any) -> Any:
            claimed = honest(*args, **kwargs)
            fault()
            return claimed

        resume.claim = claim

    return prepare


def disk_full(bench: Bench, wanted: str, sizes: list[int]) -> dict[str, int]:
    """No file may grow beyond a limit: exit 6, and whatever was finished stays whole."""
    counts: Counter[str] = Counter({"limits": 2 * len(sizes)})

    def limit(size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    for size in sizes:
        for report_to in ("none", "tensorboard"):
            bench.clear()
            late = once_begun(lambda size=size: limit(size))
            ended = bench.train(lambda late=late: (bench.note_saves(), late())[0], f"--report_to={report_to}")
            look_at_full_disk(bench, ended, wanted, counts)
    return dict(counts)


def look_at_full_disk(bench: Bench, ended: Ended, wanted: str, counts: Counter[str]) -> None:
    """Exit 0 or 6, no traceback, and the run goes on once there is room."""
    counts["exit 6"] += ended.code == console.Exit.RESOURCES
    counts["other exit codes"] += ended.code not in (0, console.Exit.RESOURCES)
    counts["tracebacks"] += "Traceback" in ended.told
    if ended.code not in (0, console.Exit.RESOURCES):
        print(ended.told, file=sys.stderr)
    bench.verdict(wanted, counts)


def small_disks(bench: Bench, wanted: str, free_kb: list[int]) -> dict[str, int]:
    """The output on a file system of its own with so many kilobytes left once the run has begun; skipped
    where this user may not mount one.
    """
    counts: Counter[str] = Counter()
    for free in free_kb:
        bench.clear()
        bench.out.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(bench.out)]
        if subprocess.run(mount, capture_output=True).returncode:
            return {"skipped": 1}

        def fill(free: int = free) -> None:
            room = shutil.disk_usage(bench.out).free - free * 1024
            (bench.out / "filler").write_bytes(b"\0" * max(0, room))

        late = once_begun(fill)
        ended = bench.train(lambda late=late: (bench.note_saves(), late())[0])
        kept = bench.work / "copy"
        shutil.copytree(bench.out, kept)
        subprocess.run(["umount", str(bench.out)], check=True)
        shutil.rmtree(bench.out)
        kept.rename(bench.out)
        counts["disks"] += 1
        look_at_full_disk(bench, ended, wanted, counts)
    return dict(counts)


# ---------------------------------------------------------------- the bench


def some(things: list[Any], share: float) -> list[Any]:
    """An evenly spread share of them, at least one."""
    count = max(1, round(share * len(things)))
    return [things[(2 * i + 1) * len(things) // (2 * count)] for i in range(count)]


def every(bench: Bench, share: float) -> Iterator[tuple[str, dict[str, int]]]:
    """The faults and their counts. share: of the full counts."""
    wanted, seconds = bench.unbroken()
    print(f"an unbroken run takes {seconds:.2f} s", file=sys.stderr)
    yield "kill -9 at random times", killed_at_random(bench, wanted, seconds, max(1, round(200 * share)))
    yield "kill -9 at named phases", killed_at_phases(bench, wanted, share)
    yield "SIGINT and SIGTERM", stopped(bench, wanted, seconds, max(1, round(50 * share)))
    chains = [[cut] for cut in range(1, bench.steps)] + [[1, 4, 9], [2, 3, 5], [5, 6, 7]]
    yield "resumed after each step", cut_everywhere(bench, wanted, some(chains, share))
    sizes = [int(300 * 1.4**i) for i in range(20)]
    yield "disk full (RLIMIT_FSIZE)", disk_full(bench, wanted, some(sizes, share))
    yield "disk full (tmpfs)", small_disks(bench, wanted, some([4, 16, 40, 80, 120, 200, 400], share))


def hostile_input(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Texts, adapters and models that mean harm; see hostile*.py. A share of it is in the suite."""
    from bench import hostile, hostile_adapters, hostile_models

    shutil.rmtree(bench.work / "hostile", ignore_errors=True)
    base = load_base(str(bench.base), device=torch.device("cpu"), dtype=torch.float32)
    kept = bench.work / "kept" / "lora_weights"
    studies: dict[str, Callable[[Path], dict[str, Any]]] = {
        "hostile prompts": lambda folder: hostile.prompts_study(5_000, 1, folder),
        "hostile captions": lambda folder: hostile.captions_study(5_000, 1, folder),
        "prompts files": lambda folder: hostile.prompt_files_study(5_000, 1, folder),
        "mutated adapters": lambda folder: hostile_adapters.mutated_adapters(20_000, 1, folder, base),
        "wrong adapters": lambda folder: hostile_models.wrong_adapters_study(folder, base, bench.base),
        "payloads": lambda folder: hostile_models.payloads(folder, kept, bench.base),
    }
    for name, study in studies.items():
        folder = bench.work / "hostile" / name
        folder.mkdir(parents=True)
        yield name, study(folder)


def main() -> None:
    """Runs everything and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts")
    parser.add_argument("--steps", type=int, default=21, help="of each run: 13 or more, to touch every phase")
    flags = parser.parse_args()
    work = flags.work or Path(tempfile.mkdtemp(prefix="bench_faults_"))
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"bench": "faults", "torch": torch.__version__}
    bench = Bench(work, flags.steps)
    hostile = hostile_input(bench) if flags.share == 1 else ()
    for name, counts in itertools.chain(every(bench, flags.share), hostile):
        result[name] = counts
        print(f"{name:28} " + ", ".join(f"{key} {value}" for key, value in counts.items()), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
