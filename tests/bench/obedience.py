"""What is asked for and what the judge sees: prompts that name kind, colour, pose, direction and background,
and how often each is obeyed, with 95 % intervals.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.classifier import Verdict

from megaman.tiny_sd.figures import KINDS, STYLES
from megaman.tiny_sd.poses import POSES
from megaman.tiny_sd.sketch import BACKGROUNDS, COLOURS, HERO_PARTS

SEEN = ("kind", "body", "background", "pose", "facing", "style")
TRIGGER = "mega man"
FOREIGN = (  # ten figures that a LoRA must leave alone: body, kind, what else is said
    ("red", "wizard", "with a staff"), ("red", "robot", "antenna"), ("green", "robot", "with claws"),
    ("purple", "ninja", ""), ("orange", "astronaut", ""), ("black", "knight", "plume"),
    ("yellow", "wizard", "with a sword"), ("pink", "ninja", "with a shield"), ("white", "astronaut", ""),
    ("teal", "knight", "with a sword"),
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A prompt and what a picture of it should show; an empty word where it says nothing of it."""

    prompt: str
    kind: str
    body: str
    background: str
    pose: str = ""
    facing: str = ""
    style: str = ""


def base_prompts(count: int = 400) -> list[Asked]:
    """Figures of the base's world, every pose, direction and background equally often."""
    rng, asked = random.Random(11), []
    for i in range(count):
        body, kind = rng.choice([*COLOURS]), rng.choice([*KINDS])
        pose, facing = [*POSES][i % len(POSES)], ("left", "right")[i // len(POSES) % 2]
        background = [*BACKGROUNDS][i // 10 % len(BACKGROUNDS)]
        style = rng.choice(("", *STYLES))
        told = [f"a {body} {kind}", pose, f"facing {facing}", f"{background} background", style]
        prompt = ", ".join(word for word in told if word)
        asked.append(Asked(prompt, kind, body, background, pose, facing, style))
    return asked


def hero_prompts() -> list[Asked]:
    """64 prompts: the trigger on every background, in every pose, to both sides."""
    asked = []
    for i in range(64):
        background, pose = [*BACKGROUNDS][i % len(BACKGROUNDS)], [*POSES][(i + i // 8) % len(POSES)]
        facing = ("left", "right")[(i // 8 + i // 2) % 2]
        prompt = f"{TRIGGER}, {pose}, facing {facing}, {background} background"
        asked.append(Asked(prompt, "hero", "blue", background, pose, facing))
    return asked


def foreign_prompts() -> list[Asked]:
    """80 prompts: each foreign figure on every background."""
    asked = []
    for background in BACKGROUNDS:
        for body, kind, detail in FOREIGN:
            told = [f"a {body} {kind}", detail, f"{background} background"]
            asked.append(Asked(", ".join(word for word in told if word), kind, body, background))
    return asked


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, in percent. Wilson 1927."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return round(100 * (middle - spread), 1), round(100 * (middle + spread), 1)


def share(hits: Sequence[bool]) -> float:
    """In percent."""
    return round(100 * sum(hits) / len(hits), 1)


def told(hits: Sequence[bool]) -> str:
    """A share with its interval, in percent: `97.5 (95.5-98.6)`."""
    low, high = wilson(sum(hits), len(hits))
    return f"{share(hits):g} ({low:g}-{high:g})"


def obeyed(asked: Sequence[Asked], verdicts: Sequence[Verdict], what: str) -> list[bool]:
    """Whether each picture shows what its prompt says of one thing; prompts that are silent are left out."""
    pairs = [(getattr(a, what), getattr(v, what)) for a, v in zip(asked, verdicts, strict=True)]
    return [wanted == seen for wanted, seen in pairs if wanted]


def obedience(asked: Sequence[Asked], verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Of everything that is asked for, how often it is seen."""
    named = [what for what in SEEN if any(getattr(each, what) for each in asked)]
    return {what: told(obeyed(asked, verdicts, what)) for what in named}


def by(
    group: str, what: Sequence[str], asked: Sequence[Asked], verdicts: Sequence[Verdict]
) -> dict[str, dict[str, float]]:
    """How often things are obeyed where the prompt says one value of `group`, by that value."""
    found = {}
    for value in dict.fromkeys(getattr(each, group) for each in asked):
        rows = [i for i, each in enumerate(asked) if getattr(each, group) == value]
        mine, seen = [asked[i] for i in rows], [verdicts[i] for i in rows]
        found[value] = {each: share(obeyed(mine, seen, each)) for each in what}
    return found


def parts_seen(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """How often each of the hero's parts is there, percent."""
    return {part: share([part in verdict.parts for verdict in verdicts]) for part in HERO_PARTS}


def kept(asked: Sequence[Asked], verdicts: Sequence[Verdict]) -> list[bool]:
    """Whether each figure has its colour and its kind."""
    return [(a.kind, a.body) == (v.kind, v.body) for a, v in zip(asked, verdicts, strict=True)]
