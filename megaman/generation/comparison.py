"""What is drawn for a recommendation: its prompts, and the drawings of each checkpoint at each strength."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megaman.common.console import say
from megaman.config.generate import BUILT_IN_PROMPTS, TRIGGER
from megaman.data.captions import has_trigger, with_trigger_replaced
from megaman.generation.candidates import Candidate
from megaman.generation.prompts import Prompt
from megaman.generation.records import Job
from megaman.lora.adapter import Adapter

DRAWN = 6  # of the built-in prompts: poses and backgrounds that differ
PLAIN = 2  # prompts without the trigger
CLASS = "robot"  # in the trigger's place, where the adapter does not tell another


@dataclass(frozen=True)
class Task:
    """A job and the adapter that draws it."""

    job: Job
    candidate: Candidate
    digest: str  # job_hash


Shots = list[list[Task]]  # a row a prompt, a column a seed


@dataclass(frozen=True)
class Drawings:
    """The tasks of one adapter at one strength."""

    candidate: Candidate
    strength: float
    named: Shots  # of prompts with the trigger
    plain: Shots  # of those without

    @property
    def all(self) -> Iterator[Task]:
        """Every one."""
        return (task for row in (*self.named, *self.plain) for task in row)


def prompts_for(asked: Sequence[Prompt], adapter: Adapter) -> list[Prompt]:
    """The prompts of a recommendation: those that are asked for, else six of ours with the trigger; and,
    where all have it, two of them again with what the character is one of in its place.
    """
    trigger = adapter.metadata.get("trigger", TRIGGER)
    built_in = [Prompt(prompt.replace(TRIGGER, trigger)) for prompt in BUILT_IN_PROMPTS[:DRAWN]]
    prompts = list(asked) or built_in
    if not all(has_trigger(prompt.text, trigger) for prompt in prompts):
        return prompts
    config = adapter.metadata.get("config")
    told = config.get("preserve_class") if isinstance(config, dict) else None
    told = [str(name) for name in told] if isinstance(told, list) else []
    classes = [name for name in told if name.strip()] or [CLASS]
    names = [classes[i % len(classes)] for i in range(PLAIN)]
    return prompts + [
        replace(prompt, text=with_trigger_replaced([prompt.text], trigger, name)[0])
        for prompt, name in zip(prompts, names, strict=False)
    ]


def drawings_of(tasks: Sequence[Task], trigger: str) -> list[Drawings]:
    """The tasks cell by cell, the base's (strength 0) first. Where no prompt has the trigger, all count
    as the character's.
    """
    cells: dict[tuple[float, str], dict[Job, list[Task]]] = {}
    for task in tasks:
        scenes = cells.setdefault((task.job.lora_scale, task.candidate.digest), {})
        scenes.setdefault(replace(task.job, seed=0), []).append(task)
    prompts = {task.job.prompt for task in tasks}
    named = {prompt for prompt in prompts if has_trigger(prompt, trigger)} or prompts
    found = []
    for (strength, _), scenes in cells.items():
        rows = list(scenes.values())
        with_trigger = [row for row in rows if row[0].job.prompt in named]
        without = [row for row in rows if row[0].job.prompt not in named]
        found.append(Drawings(rows[0][0].candidate, strength, with_trigger, without))
    return sorted(found, key=lambda each: each.strength != 0)


def tell_size(tasks: Sequence[Task]) -> None:
    """Says how many pictures it takes, and what decides that."""
    cells = len({(task.job.lora_scale, task.candidate.digest) for task in tasks if task.job.lora_scale})
    say(
        f"recommend: {len(tasks)} pictures, {len(tasks) // (cells + 1)} each of the base and of {cells} "
        "checkpoints x strengths; fewer with --num_images_per_prompt, --prompts or --lora_scale"
    )
