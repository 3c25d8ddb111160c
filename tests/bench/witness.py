"""Did a rebuilding change anything that a user sees?

    python tests/bench/witness.py --save before.json       # on the code as it was
    python tests/bench/witness.py --against before.json    # on the code as it is: names what differs, exit 1

Runs both scripts as a user does, never imports them, and keeps a sum of every file and every line that comes
out: the demo's adapter, a stopped and resumed run, three pictures, the gallery, the data set's page, --help,
mistakes and their exit codes, a share of the studies of faults and of hostile input. Times, dates and the
working folder are masked. About four minutes on two cores; sums hold for one machine and thread count.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MASKS = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "DATE"),
    (r'("|&#34;)Seconds\1: [\d.]+', "SECONDS"),
    (r"[\d.]+ images/s · \d+:\d\d left", "PACE"),
    (r"drawing:.*\r?", ""),
    (r"in use by process \d+", "in use by process N"),
)
SMALL = ["--preset=demo", "--report_to=none", "--lora_rank=4", "--validation_steps=4", "--save_steps=2"]
MISTAKES = {
    "unknown flag": ["megaman_lora.py", "--lora_rnk", "3"],
    "bad number": ["megaman_lora.py", "--lora_rank", "many"],
    "bad choice": ["megaman_lora.py", "--mixed_precision", "fp8"],
    "out of range": ["megaman_lora.py", "--caption_dropout", "1.5"],
    "contradiction": ["megaman_lora.py", "--keep_tags", "2"],
    "two totals": ["megaman_lora.py", "--max_train_steps", "5", "--num_train_epochs", "3"],
    "no pictures": ["megaman_lora.py", "--data_dir", "WORK/nowhere"],
    "no base": ["megaman_lora.py", "--preset=demo", "--pretrained_model_name", "WORK/nowhere/base"],
    "odd size": ["megaman_lora.py", "--preset=demo", "--resolution", "60", "--crop", "center"],
    "no checkpoint": ["megaman_lora.py", "--preset=demo", "--resume_from_checkpoint", "latest"],
    "foreign folder": ["megaman_lora.py", "--preset=demo", "--output_dir", "WORK"],
    "no adapter": ["generate_megaman.py", "--lora_path", "WORK/nowhere"],
    "another base": ["generate_megaman.py", "--lora_path", "WORK/run/lora_weights", "--base_model", "a/b"],
    "bad sampler": ["generate_megaman.py", "--scheduler", "ddpm"],
    "foreign gallery": [
        "generate_megaman.py",
        "--lora_path",
        "WORK/run/lora_weights",
        "--output_dir",
        "WORK",
    ],
    "no gallery": ["generate_megaman.py", "--gallery_only", "--output_dir", "WORK/nowhere"],
}
STUDIES = """
import json, sys, tempfile
from pathlib import Path
sys.path[:0] = ["tests", "."]
import conftest
from bench import hostile
studies = (hostile.prompts_study, hostile.captions_study, hostile.prompt_files_study)
print(json.dumps([study(200, 1, Path(tempfile.mkdtemp())) for study in studies]))
"""
CHANCE = {"died", "exit 6", "ended before the signal"}  # hang on the machine's pace


class Witness:
    """Runs commands in a folder and keeps a sum of what they leave."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.environment = os.environ | {"XDG_CACHE_HOME": str(work / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(self, *words: str) -> str:
        """The exit code and every line of a command, without what changes from time to time."""
        command = [word.replace("WORK", str(self.work)) for word in words]
        ended = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            encoding="utf-8",
        )
        return self.masked(f"exit {ended.returncode}\n{ended.stdout}{ended.stderr}")

    def masked(self, text: str) -> str:
        """The text without times, dates and the name of the working folder."""
        for pattern, word in MASKS:
            text = re.sub(pattern, word, text)
        return text.replace(str(self.work), "WORK")

    def page(self, path: Path) -> str:
        """The sum of a page or of any text."""
        return _sum(self.masked(path.read_text(encoding="utf-8")).encode())

    def everything(self) -> Iterator[tuple[str, str]]:
        """What was seen, by name."""
        for script in ("megaman_lora.py", "generate_megaman.py"):
            yield f"{script} --help", self.run(script, "--help")
        yield "dry run", self.run("megaman_lora.py", "--preset=demo", "--dry_run", "--output_dir=WORK/dry")
        yield "dataset.html", self.page(self.work / "dry" / "dataset.html")
        yield from self.trained("demo", "--preset=demo", "--report_to=none")
        yield from self.trained("run", *SMALL, "--max_train_steps=4", "--lr_scheduler=constant")
        more = ("--max_train_steps=8", "--resume_from_checkpoint=latest", "--lr_scheduler=constant")
        yield from self.trained("run", *SMALL, *more)
        yield from self.drawn()
        for name, words in MISTAKES.items():
            yield f"mistake: {name}", self.run(*words)
        yield "hostile input", self.run("-c", STUDIES)
        yield "faults", self.faults()

    def trained(self, name: str, *flags: str) -> Iterator[tuple[str, str]]:
        """A training run's lines, and the sums of its files."""
        folder = self.work / name
        title = f"{name} {'resumed' if folder.exists() else 'trained'}"
        yield title, self.run("megaman_lora.py", *flags, f"--output_dir={folder}")
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in ("metrics.jsonl", "index.html", ".lock"):
                shown = path.relative_to(folder).as_posix()
                text = path.suffix in (".html", ".json", ".md")
                yield f"{title}: {shown}", self.page(path) if text else _sum(path.read_bytes())

    def drawn(self) -> Iterator[tuple[str, str]]:
        """Three pictures of the demo's adapter, with and without settings in them, and their gallery."""
        flags = (
            "--lora_path=WORK/demo/lora_weights",
            "--num_inference_steps=8",
            "--prompts",
            "mega man",
            "x, y",
        )
        yield "drawing", self.run("generate_megaman.py", "--output_dir=WORK/drawn", *flags, "a red wizard")
        plain = ("--output_dir=WORK/plain", "--no_metadata", "--lora_scale", "0.5", "1", "--compare_base")
        yield "plain drawing", self.run("generate_megaman.py", *flags, *plain)
        for path in sorted((self.work / "plain").glob("*.png")):
            yield f"picture {path.name}", _sum(path.read_bytes())
        for folder in ("drawn", "plain"):
            yield f"{folder}/index.html", self.page(self.work / folder / "index.html")

    def faults(self) -> str:
        """What the study of faults counts, but for what hangs on the machine's pace."""
        told = self.run("tests/bench/bench_faults.py", "--share=0.015", "--work=WORK/faults")
        counts = json.loads(next(line for line in told.splitlines() if line.startswith("{")))
        found = {name: part for name, part in counts.items() if isinstance(part, dict)}
        return json.dumps(
            {name: {k: n for k, n in part.items() if k not in CHANCE} for name, part in found.items()}
        )


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> None:
    """Saves what is seen, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--against", type=Path)
    flags = parser.parse_args()
    work = Path(tempfile.gettempdir()) / "megaman_witness"  # always the same: manifests' sums hang on it
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    found = dict(Witness(work).everything())
    if flags.save:
        flags.save.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    before = json.loads(flags.against.read_text(encoding="utf-8")) if flags.against else found
    changed = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    for name in changed:
        print(f"--- {name}\nwas: {before.get(name)}\nis:  {found.get(name)}")
    print(json.dumps({"bench": "witness", "seen": len(found), "changed": len(changed)}))
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
