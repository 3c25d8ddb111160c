"""Which checkpoint, what strength: gathers what the drawings are compared with, ranks the cells, and tells
it: recommend.html, recommend.json, a line.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaman.common.console import Exit, UserError, command_of, count, say, shell_quoted
from megaman.common.files import followed, path_from, write_text
from megaman.common.html import SMALL_PX, check_page, render, script_of
from megaman.common.output_folder import ADAPTER_FILE, CHECKPOINTS, STEP_FOLDER, RunFolder, step_name
from megaman.config.generate import TRIGGER, GenerateConfig
from megaman.generation import judge, seeing
from megaman.generation.candidates import Candidate, record_of_run
from megaman.generation.comparison import Drawings, Task, drawings_of, tell_size
from megaman.generation.features import Look, features_of
from megaman.generation.ranking import (
    NEAR,
    RULES,
    Cell,
    Ranked,
    Reason,
    Rule,
    percent,
    ranked,
    reasons_for,
    told,
)
from megaman.generation.records import Job, read_records
from megaman.generation.seeing import CellFiles, Seen, size_of
from megaman.generation.trained_on import (
    TrainingPictures,
    find_training_pictures,
    held_out_losses,
    rise_at,
)
from megaman.lora.adapter import Adapter
from megaman.model.hub import is_local
from megaman.model.stable_diffusion import StableDiffusion

PAGE, NUMBERS = "recommend.html", "recommend.json"
MARK, MAKER = "made_by", "megaman_lora"  # in the numbers: by it they are known for ours
MEANINGS = {
    "likeness": "How much nearer to your training pictures the drawings are than the base's, by the features "
    "of what looks at them and by the colours of the middle, the mean of both: 0 % as far as the base's, 100 "
    "% as near as your pictures are to each other.",
    "copies": "The share of drawings that lie nearer to a training picture than half of what a training "
    "picture usually lies from its nearest other, in the VAE's latents.",
    "obedience": "Whether prompts still decide: how much of the base's answer to the prompts is left, in "
    "the VAE's latents, beside what seeds change.",
    "leakage": "How far pictures of prompts without the trigger have moved from the base's of the same "
    "seeds, measured by what another seed changes.",
    "damage": "The share of drawings that are missing, whose burnt channels, contrast or colour lie outside "
    "of what the training pictures and the base show, or that are noise: neighbouring spots differ over "
    "twice as much as in any of those.",
    "loss_rise": "How far the loss on pictures that were never trained on lies above its smallest until "
    "then; one number a checkpoint, at strength 1.",
}
NO_PLAIN: Reason = ("Leakage is left out: no prompt lacks the trigger.", "")
NO_SEEDS: Reason = (
    "Obedience and leakage are left out: they need two seeds (--num_images_per_prompt 2).",
    "",
)
NO_PROMPTS: Reason = (
    "Obedience is left out: it needs two prompts with the trigger, of two seeds each.",
    "",
)
NOT_DRAWN: Reason = (
    "Obedience is left out: the base could not draw all of its pictures, or they were changed since.",
    "",
)
NO_ANSWER: Reason = (
    "Obedience is left out: what prompts change in the base's own drawings is lost in what seeds change.",
    "",
)
NO_LOSS: Reason = ("No held-out loss was measured in this run.", "")


@dataclass(frozen=True)
class Evidence:
    """What the drawings are compared with, and what looks at them."""

    lora_path: Path
    trigger: str
    training: TrainingPictures
    losses: Mapping[int, float]  # held-out, by step
    look: Look | None  # a judge's; None: the base's own UNet


def gather(
    tasks: Sequence[Task], cfg: GenerateConfig, lora_path: Path, adapter: Adapter, base: StableDiffusion
) -> Evidence:
    """Says how much is drawn, and looks up what it takes to recommend, before a picture is drawn. UserError
    if the judge can't be had (exit 4) or the page can't be written (exit 7).
    """
    tell_size(tasks)
    check_page(Path(cfg.output_dir) / PAGE)
    check_numbers(Path(cfg.output_dir) / NUMBERS)
    look = None if cfg.judge is None else judge.load_judge(cfg.judge, base.device)
    side = adapter.metadata.get("resolution", base.native_resolution)
    training = find_training_pictures(lora_path, side, base.cell_px)
    if training.missing is not None:
        say(f"note: {told(training.missing)}")
    trigger = adapter.metadata.get("trigger", TRIGGER)
    return Evidence(lora_path, trigger, training, held_out_losses(lora_path), look)


# ---------------------------------------------------------------- the cells
@dataclass(frozen=True)
class Row:
    """A cell with its drawings and its place; of the base there is no place."""

    drawings: Drawings
    files: CellFiles
    cell: Cell
    ranked: Ranked | None


def rows_of(
    drawings: Sequence[Drawings], files: Sequence[CellFiles], evidence: Evidence, seen: Seen
) -> list[Row]:
    """The cells, the recommended one first, and behind them the base, whose drawings come first."""
    cells = []
    for each, own in zip(drawings, files, strict=True):
        step = step_of(each.candidate) if each.strength else 0
        rise = rise_at(step, evidence.losses) if each.strength else None
        found = seeing.measured(own, files[0], seen, rise)
        cells.append(Cell(each.candidate.name, step, each.strength, found))
    place_of = {id(cell): place for place, cell in enumerate(cells)}
    rows = []
    for each_ranked in ranked(cells[1:]):
        place = place_of[id(each_ranked.cell)]
        rows.append(Row(drawings[place], files[place], each_ranked.cell, each_ranked))
    return [*rows, Row(drawings[0], files[0], cells[0], None)]


def step_of(candidate: Candidate) -> int:
    """The step of its run that an adapter is from: by its folder's name, else by its metadata; 0 where
    nothing tells, or where it lies in no run of ours: steps of elsewhere say nothing beside its name.
    """
    if record_of_run(candidate.place) is None:
        return 0
    folder = STEP_FOLDER.fullmatch(candidate.name)
    steps = int(folder[1]) if folder else candidate.adapter.metadata.get("steps")
    return steps if isinstance(steps, int) else 0


def next_command(chosen: Row, lora_path: Path) -> str:
    """What to type next: to make a checkpoint of a run of ours its adapter, or to draw at the strength."""
    candidate = chosen.drawings.candidate
    strength = f"{chosen.cell.strength:g}"
    run = RunFolder.of_adapter(candidate.place)
    is_checkpoint = STEP_FOLDER.fullmatch(candidate.name) and candidate.place.parent.name == CHECKPOINTS
    name = candidate.name if is_checkpoint else step_name(chosen.cell.step)
    is_there = (run.checkpoints / name / ADAPTER_FILE).is_file()
    is_ours = is_there and record_of_run(candidate.place) is not None
    if is_ours and (is_checkpoint or strength != "1"):
        which = name if strength == "1" else f"{name}:{strength}"
        place = shell_quoted(path_from(Path(), run.path) or str(run.path))
        return f"{command_of('megaman_lora.py')} --adopt {which} --output_dir {place}"
    place = shell_quoted(str(lora_path if candidate.is_chosen else candidate.place))
    return f"{command_of('generate_megaman.py')} --lora_path {place} --lora_scale {strength}"


def notes_on(base: Row, evidence: Evidence) -> list[Reason]:
    """What could not be measured, and why. base: the base's own row."""
    notes: list[Reason] = []
    if evidence.training.missing is not None:
        notes.append(evidence.training.missing)
    if base.cell.measures.obedience is None:
        notes.append(_why_no_obedience(base))
    if not base.drawings.plain:
        notes.append(NO_PLAIN)
    return notes if evidence.losses else [*notes, NO_LOSS]


def _why_no_obedience(base: Row) -> Reason:
    comparable = sum(len(row) > 1 for row in base.files.named)
    if comparable < 2:
        return NO_PROMPTS if comparable else NO_SEEDS
    return NOT_DRAWN if any(None in row for row in base.files.named) else NO_ANSWER


# ---------------------------------------------------------------- telling
def shot_told(job: Job, file: str | None, seen: Seen) -> dict[str, Any]:
    """A drawing as the page and the numbers tell it."""
    nearest = seen.nearest[seen.rows[file]] if file is not None and seen.nearest else None
    return {
        "file": file,
        "prompt": job.prompt,
        "seed": job.seed,
        "width": job.width,
        "height": job.height,
        "nearest": None if nearest is None else nearest.picture,
        "distance": None if nearest is None else round(nearest.distance, 4),
        "is_copy": nearest is not None and nearest.is_copy,
    }


def row_told(row: Row, place: int, seen: Seen) -> dict[str, Any]:
    """A cell as the page and the numbers tell it."""
    shots = {
        name: [
            shot_told(task.job, file, seen)
            for line, names in zip(tasks, files, strict=True)
            for task, file in zip(line, names, strict=True)
        ]
        for name, tasks, files in (
            ("named", row.drawings.named, row.files.named),
            ("plain", row.drawings.plain, row.files.plain),
        )
    }
    return {
        "id": f"cell-{place}",
        "adapter": row.cell.name,
        "label": ("step {n}", str(row.cell.step)) if row.cell.step else ("{n}", row.cell.name),
        "step": row.cell.step,
        "strength": row.cell.strength,
        "score": None if row.ranked is None else round(row.ranked.score, 4),
        "points": {} if row.ranked is None else row.ranked.points,
        "measures": asdict(row.cell.measures),
        **shots,
    }


def cost_of(rule: Rule) -> str:
    """What a rule costs, as a sum that can be checked."""
    bound = percent(rule.bound)
    beyond = f"{bound} − x" if rule.is_good else f"x − {bound}"
    return f"{rule.weight:g} × ({beyond})"


def recommend(tasks: Sequence[Task], cfg: GenerateConfig, base: StableDiffusion, evidence: Evidence) -> Path:
    """Measures what is drawn, writes recommend.html and recommend.json, and says which checkpoint at which
    strength, why, and what to type next. The page.
    """
    output = Path(cfg.output_dir)
    there = _drawn(tasks, output)
    drawings = drawings_of(tasks, evidence.trigger)
    files = [files_of(each, there) for each in drawings]
    sizes = {there[task.digest]: task.job for task in tasks if task.digest in there}
    drawn = {file: (job.height, job.width) for file, job in sizes.items()}
    pictures = seeing.pictures_of(drawn, output, evidence.training)
    found = features_of(pictures, base, evidence.look)
    seen = seeing.see(list(drawn), files[0], found, len(evidence.training.mirrored))
    rows = rows_of(drawings, files, evidence, seen)
    reasons = reasons_for([row.ranked for row in rows if row.ranked is not None])
    facts: dict[str, Any] = {
        "base": base.name,
        "trigger": evidence.trigger,
        "judge": Path(cfg.judge).name if cfg.judge and is_local(cfg.judge) else cfg.judge,
        "reasons": reasons,
        "notes": notes_on(rows[-1], evidence),
        "command": next_command(rows[0], evidence.lora_path),
        "rows": [row_told(row, place, seen) for place, row in enumerate(rows)],
    }
    write_numbers(output / NUMBERS, facts, [picture.name for picture in evidence.training.pictures])
    write_page(output / PAGE, facts, evidence.training)
    say(f"recommended: {named(rows[0].cell)}: {'; '.join(map(told, reasons))}")
    say(f"next: {facts['command']}")
    return output / PAGE


def _drawn(tasks: Sequence[Task], output: Path) -> dict[str, str]:
    """The file of each task that is drawn, by its digest; none that somebody has cropped or scaled since."""
    wanted = {task.digest: task.job for task in tasks}
    records = [record for record in read_records(output) if record.job in wanted]
    sizes = {digest: (job.width, job.height) for digest, job in wanted.items()}
    whole = [each for each in records if size_of(output / each.file) == sizes[each.job]]
    if changed := len(records) - len(whole):
        say(f"note: {count(changed, 'picture')} of another size than drawn, left out; delete to draw anew")
    return {record.job: record.file for record in whole}


def files_of(drawings: Drawings, there: Mapping[str, str]) -> CellFiles:
    """The files of a cell's drawings, by their digests."""
    named, plain = (
        [[there.get(task.digest) for task in row] for row in shots]
        for shots in (drawings.named, drawings.plain)
    )
    return CellFiles(named, plain, [[task.job.seed for task in row] for row in drawings.named])


def named(cell: Cell) -> str:
    """A cell in words."""
    step = f", step {cell.step}" if cell.step and not STEP_FOLDER.fullmatch(cell.name) else ""
    return f"{cell.name}{step} at strength {cell.strength:g}"


def check_numbers(path: Path) -> None:
    """UserError (exit 7) if something of that name is there that no recommendation of ours made."""
    if not os.path.lexists(path):
        return
    try:
        is_ours = json.loads(path.read_text(encoding="utf-8"))[MARK] == MAKER
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{path}: no recommendation of ours. Name another --output_dir.", Exit.STATE)


def write_numbers(path: Path, facts: Mapping[str, Any], training: Sequence[str]) -> None:
    """Every number of the page as JSON."""
    rules = [asdict(rule) for rule in RULES]
    text = json.dumps({MARK: MAKER, **facts, "rules": rules, "training": training}, indent=1, allow_nan=False)
    write_text(followed(path), text + "\n")


def write_page(path: Path, facts: Mapping[str, Any], training: TrainingPictures) -> None:
    """The page, which works without JavaScript."""
    sides = [max(picture.crop.whole or (SMALL_PX + 1,)) for picture in training.pictures]
    page = render(
        "recommend.html.j2",
        **facts,
        pictures=sum(len(row["named"]) + len(row["plain"]) for row in facts["rows"]),
        training=training.pictures,
        is_small=max(sides, default=0) <= SMALL_PX,
        rules=RULES,
        near=NEAR,
        meanings=MEANINGS,
        cost_of=cost_of,
        percent=percent,
        script=script_of("recommend.js"),
    )
    check_page(path)
    write_text(followed(path), page.encode("utf-8", "backslashreplace").decode())
