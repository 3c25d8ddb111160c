"""The page of a run, OUTPUT/index.html: what it has learned so far, in curves and pictures, and what to type
next. Made of the run's files alone, so that it can be made anew at any time; needs no torch.

Beside losses, rates and norms metrics.jsonl tells of samples and of strengths:
    {"step": 0, "dataset": {"pictures": 30, …}}
    {"step": 200, "block_strengths": {"unet.mid_block": 0.021, …}, "strength": 0.018}
    {"step": 200, "samples": ["a prompt", …]}     samples/step-000200/01.png, … in that order
"""

import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

from megaman.common.console import Exit, UserError, command_of, say, shell_quoted
from megaman.common.files import followed, path_from, write_text
from megaman.common.html import check_page, is_page, render, script_of
from megaman.common.output_folder import (
    CONTENT,
    LAST_STEP,
    PAGE,
    RunFolder,
    holds_run,
    read_rows,
    step_folders,
    step_name,
)
from megaman.config.parser import require
from megaman.config.record import recorded
from megaman.config.train import FACTS, DataFlags, TrainConfig
from megaman.training.curves import HEIGHT, WIDTH, Chart, Line, Series, chart_of, number_of, shown, smoothed

SCRIPT = "run.js"
RATE = "Learning rate"  # falls to 0, which no logarithm shows
KOHYA_FILE = "megaman_lora.safetensors"  # as lora.load names it, which needs torch
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
# Of the weights' size, on the embedded base. At 0.01 a picture differs from the base's by a sixteenth of what
# it does at the demo's end, at 0.25; a run at 3e-3 on 8 pictures is at 0.35 after 200 steps, 0.38 after 400.
HARDLY, STRONG = 0.01, 0.30
WORDS = ("hardly anything", "usual", "strong")


# ---------------------------------------------------------------- what the files tell


def sample_names(step: int, count: int) -> list[str]:
    """The files of a step's samples below samples/, in the order of their prompts."""
    return [f"{step_name(step)}/{number:02}.png" for number in range(1, count + 1)]


def samples_of(
    run: RunFolder, rows: Sequence[Mapping[str, Any]], usual: Sequence[str]
) -> dict[int, list[str]]:
    """The prompts of each step whose samples are complete, by step, ascending: metrics.jsonl tells of them.
    Runs of before had a page of their own for them, of the usual prompts.
    """
    found = {}
    page = run.samples / "index.html"
    listed = page.read_text(encoding="utf-8", errors="replace") if is_page(page) else ""
    for step, folder in step_folders(run.samples).items():
        count = len([*folder.glob("[0-9]*.png")])
        if f"{folder.name}/" in listed and count == len(usual):
            found[step] = list(usual)
    for row in rows:
        if prompts := _texts(row.get("samples")):
            found[row["step"]] = prompts
    return dict(sorted(found.items()))


def _texts(value: object) -> list[str]:
    is_known = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return list(value) if is_known and isinstance(value, list) else []


def _png_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a PNG; None where there is none."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError:
        return None
    is_whole = head.startswith(PNG_BEGINS) and len(head) == 24
    return (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) if is_whole else None


@dataclass(frozen=True)
class Sample:
    """A sample picture of one step."""

    step: int
    file: str  # beside the page
    size: tuple[int, int]


@dataclass(frozen=True)
class Strength:
    """How much a block's weights are changed."""

    name: str
    share: float  # of the weights' size

    @property
    def percent(self) -> str:
        """In few letters."""
        return shown(float(f"{100 * self.share:.2g}"))

    @property
    def word(self) -> str:
        """What to make of it."""
        return WORDS[(self.share >= HARDLY) + (self.share > STRONG)]


@dataclass(frozen=True)
class RunStory:
    """What the files of a run tell."""

    run: RunFolder
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, run: RunFolder) -> "RunStory":
        """Of the run in a folder."""
        try:
            record = json.loads(run.record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            record = {}
        return cls(run, record if isinstance(record, dict) else {}, read_rows(run.metrics))

    def series(self, name: str) -> Series:
        """A number's course; a gap where a line says that there was none."""
        found = {row["step"]: number_of(row[name]) for row in self.rows if name in row}
        return dict(sorted(found.items()))

    @cached_property
    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        return [*step_folders(self.run.checkpoints)]

    @property
    def step(self) -> int:
        """The last step that anything is told of."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def total(self) -> int:
        """The steps that the run was to take."""
        wanted = self.settings.get("max_train_steps")
        return max(self.step, wanted if type(wanted) is int and wanted <= LAST_STEP else 0)

    @property
    def is_finished(self) -> bool:
        """Whether all its steps are done, and its adapter is written."""
        return 0 < self.total == self.step and (self.run.weights / KOHYA_FILE).is_file()

    @property
    def base(self) -> str:
        """The base's name, without its folders."""
        name = self.settings.get("pretrained_model_name")
        return _without_folders(name) if isinstance(name, str) else ""

    @property
    def speed(self) -> str:
        """Images a second, of the middle one of its lines; "" where none tells."""
        rates = sorted(rate for rate in self.series("images_per_s").values() if rate is not None)
        return shown(rates[len(rates) // 2]) if rates else ""

    @property
    def best(self) -> tuple[int, str] | None:
        """The checkpoint with the smallest held-out loss, and that loss."""
        losses = self.series("validation_loss")
        known = {step: loss for step in self.checkpoints if (loss := losses.get(step)) is not None}
        best = min(known, key=known.__getitem__, default=None)
        return None if best is None else (best, shown(known[best]))

    @property
    def charts(self) -> list[Chart]:
        """The run's curves."""
        loss = self.series("loss")
        kinds = {
            "Loss": (Line("each line of the log", "raw", loss), Line("smoothed", "smooth", smoothed(loss))),
            "Held-out loss": (Line("held-out loss", "held", self.series("validation_loss"), has_dots=True),),
            RATE: (
                Line("UNet", "smooth", self.series("lr")),
                Line("text encoders", "held", self.series("lr_text_encoder")),
            ),
            "Gradient norm": (Line("gradient norm", "smooth", self.series("grad_norm")),),
        }
        drawn = (
            chart_of(title, lines, self.total, self.checkpoints, is_even=title == RATE)
            for title, lines in kinds.items()
        )
        return [chart for chart in drawn if chart is not None]

    @property
    def previews(self) -> dict[str, list[Sample]]:
        """The samples of each prompt, by step; the prompts of the last step first."""
        usual = self.settings.get("validation_prompt")
        samples = samples_of(self.run, self.rows, _texts(usual))
        found: dict[str, list[Sample]] = {}
        for step, prompts in reversed(samples.items()):
            for prompt, name in zip(prompts, sample_names(step, len(prompts)), strict=True):
                size = _png_size(self.run.samples / name)
                if size is not None:
                    found.setdefault(prompt, []).insert(0, Sample(step, f"samples/{name}", size))
        return found

    @property
    def strengths(self) -> tuple[int, list[Strength]] | None:
        """The last step whose change was measured; the whole change, and each block's."""
        for row in reversed(self.rows):
            whole = number_of(row.get("strength"))
            blocks = row.get("block_strengths")
            if whole is not None and isinstance(blocks, dict):
                shares = {name: number_of(share) for name, share in blocks.items()}
                found = [Strength(name, share) for name, share in shares.items() if share is not None]
                return row["step"], [Strength("", whole), *found]
        return None

    @property
    def dataset(self) -> dict[str, Any]:
        """What the run told of its pictures when it began."""
        told = (row["dataset"] for row in self.rows if isinstance(row.get("dataset"), dict))
        return {name: value for name, value in next(told, {}).items() if name != CONTENT}

    @property
    def has_dataset_page(self) -> bool:
        """Whether dataset.html is there."""
        return is_page(self.run.path / PAGE)

    def told_settings(self) -> tuple[dict[str, str], dict[str, str]]:
        """The settings that are not the usual ones, and all others."""
        usual = recorded(TrainConfig())
        chosen: dict[str, str] = {}
        others: dict[str, str] = {}
        for name, value in self.settings.items():
            is_usual = name in usual and value == usual[name]
            is_path = name in FACTS and FACTS[name].is_path
            told = _without_folders(value) if is_path and isinstance(value, str) else _spelled(value)
            (others if is_usual else chosen)[name] = told
        return chosen, others

    def commands(self) -> Iterator[tuple[str, str]]:
        """What to type next, each with what it does; the run's folder is seen from where the page is made."""
        run = RunFolder(Path(path_from(Path(), self.run.path) or self.run.path))
        if not self.is_finished and self.checkpoints:
            yield "Go on with the training, if it is no longer running:", run.resume_command
        if (run.weights / KOHYA_FILE).is_file():
            yield "Draw with it:", draw_command(run)
        if self.checkpoints:
            lora = run.weights if self.is_finished else run.checkpoint(self.checkpoints[-1])
            draw = f"{command_of('generate_megaman.py')} --lora_path {shell_quoted(str(lora))}"
            yield "Draw the same pictures with every checkpoint:", f"{draw} --compare_checkpoints"
            yield "Find out which checkpoint to take, and at what strength:", f"{draw} --recommend"
        if self.is_finished and len(self.checkpoints) > 1:
            flags = f"--adopt {step_name(self.checkpoints[-2])} --output_dir {shell_quoted(str(run.path))}"
            yield "Take an earlier checkpoint, such as this one:", f"{command_of('megaman_lora.py')} {flags}"
        anew = f"{command_of('megaman_lora.py')} --report {shell_quoted(str(run.path))}"
        yield "Make this page anew:", anew


def _without_folders(place: str) -> str:
    """A hub's name whole, of a path its last part: folders tell of their user, and a page may be shared."""
    return place if HUB_NAME.fullmatch(place) else PureWindowsPath(place).name or place


def _spelled(value: object) -> str:
    if isinstance(value, list):
        return " | ".join(str(each).strip() or '""' for each in value)
    return "–" if value is None else "on" if value is True else "off" if value is False else str(value)


def draw_command(run: RunFolder) -> str:
    """The command that draws with what a run has made."""
    is_usual = str(run.path) == str(Path(DataFlags.output_dir))
    flag = "" if is_usual else f" --lora_path {shell_quoted(str(run.weights))}"
    return f"{command_of('generate_megaman.py')}{flag}"


# ---------------------------------------------------------------- the page


def render_run(run: RunFolder) -> str:
    """The page of the run in a folder. Works without JavaScript as a plain page."""
    story = RunStory.of(run)
    chosen, others = story.told_settings()
    html = render(
        "run.html.j2",
        story=story,
        chosen=chosen,
        others=others,
        width=WIDTH,
        height=HEIGHT,
        hardly=HARDLY,
        strong=STRONG,
        script=script_of(SCRIPT),
    )
    return html.encode("utf-8", "backslashreplace").decode()  # names of folders may be any bytes


def renew_page(run: RunFolder) -> None:
    """Writes the page of a run that goes on; leaves what is none of ours in its place."""
    if is_page(run.page) or not os.path.lexists(run.page):
        write_text(followed(run.page), render_run(run))


def answer_report(cfg: TrainConfig, chosen: Collection[str]) -> None:
    """Makes a run's page anew and ends the program, if that is all that is asked."""
    if cfg.report is not None:
        beside = ", --".join(sorted(set(chosen) - {"report"}))
        require(not beside, f"--report {cfg.report} makes a page and trains nothing: leave --{beside} out")
        say(f"done: open {report(RunFolder(Path(cfg.report)))} in a browser")
        sys.exit(Exit.OK)


def report(run: RunFolder) -> Path:
    """Makes the page of a run anew, which may be going on, and returns it. UserError (exit 7) where no run of
    ours lies, or another's index.html.
    """
    if not holds_run(run.path):
        above = RunFolder.of_adapter(run.path).path
        hint = f"; did you mean {above}?" if holds_run(above) else ""
        reason = "holds no training run of ours; name the folder that one was written to (its --output_dir)"
        raise UserError(f"{run.path}: {reason}{hint}", Exit.STATE)
    check_page(run.page)
    write_text(followed(run.page), render_run(run))
    return run.page
