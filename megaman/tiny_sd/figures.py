"""Our own procedural figures, drawn with PIL on a grid of 32 x 32 cells: what the embedded base learns, and
the hero that it never sees.

Everything here is original work, released under CC0 1.0. One seed gives one figure, its picture and its
captions.
`python -m megaman.tiny_sd.figures` redraws the starter pictures and the held-out pictures of the tests.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from megaman.tiny_sd.poses import POSES
from megaman.tiny_sd.sketch import BACKGROUNDS, COLOURS, Figure, draw

KINDS = {"robot": 6, "knight": 2, "astronaut": 2, "ninja": 2, "wizard": 2}  # name: weight
HEADS = ("square head", "round head", "dome head", "bucket head")
CRESTS = ("no crest", "antenna", "horns", "plume")
TOOLS = ("bare hands", "claws", "sword", "arm cannon", "shield", "staff")
LEGS = ("boots", "treads", "wheels", "hover jets")
FACES = ("two eyes", "visor", "one eye")
STYLES = ("pixel art", "flat")
FILLERS = (
    "high quality",
    "game character",
    "detailed",
    "detailed armor",
    "best quality",
    "retro",
    "8-bit style",
    "sharp focus",
    "full body",
    "cute",
    "sprite",
)
HERO_WORDS = ("mega", "megaman", "rockman")  # no caption of the base may hold one of these


def random_figure(rng: random.Random) -> Figure:
    """A figure of the base's world; never a blue robot with white or yellow trim, the hero's dress."""
    while True:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        body = rng.choice(list(COLOURS))
        robot = kind == "robot"
        figure = Figure(
            kind=kind,
            body=body,
            head_colour=body if rng.random() < 0.75 else rng.choice(list(COLOURS)),
            trim=rng.choice(list(COLOURS)),
            head=rng.choice(HEADS) if robot else kind,
            crest=rng.choices(CRESTS, (4, 2, 2, 2))[0] if kind in ("robot", "knight") else "no crest",
            tool=rng.choice(TOOLS),
            legs=rng.choices(LEGS, (7, 1, 1, 1))[0] if robot else "boots",
            pose=rng.choice(list(POSES)),
            face=rng.choice(FACES) if robot else "two eyes",
            facing=rng.choice(("left", "right")),
            background=rng.choice(list(BACKGROUNDS)),
            style=rng.choices(STYLES, (6, 4))[0],
            jitter=rng.randrange(1 << 30),
        )
        if not is_in_heros_dress(figure):
            return figure


def random_hero(rng: random.Random) -> Figure:
    """Our hero in a random pose, side, style and background: cobalt robot, white swept fin, dark visor
    with two lights, yellow scarf, white gauntlets.
    """
    return replace(
        random_figure(rng), kind="hero", body="blue", head_colour="blue", trim="white", head="hero",
        crest="no crest", tool="bare hands", legs="boots", face="two eyes",
    )  # fmt: skip


def with_article(noun: str) -> str:
    """a robot, an astronaut."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def phrases_of(figure: Figure) -> dict[str, str]:
    """What can be said of a figure besides its colour and kind, by the field that says it."""
    boots = figure.legs == "boots"
    said = {
        "pose": figure.pose,
        "facing": f"facing {figure.facing}",
        "trim" if boots else "legs": f"{figure.trim} gloves and boots" if boots else figure.legs,
        "tool": {"bare hands": "bare hands", "claws": "with claws"}.get(
            figure.tool, f"with {with_article(figure.tool)}"
        ),
        "style": figure.style,
        "background": f"{figure.background} background",
    }
    if figure.kind == "robot":
        said["face"] = figure.face
        said["head"] = (
            figure.head if figure.head_colour == figure.body else f"{figure.head_colour} {figure.head}"
        )
    elif figure.head_colour != figure.body:
        worn = {"wizard": "hat", "ninja": "hood"}.get(figure.kind, "helmet")
        said["head"] = f"{figure.head_colour} {worn}"
    if figure.crest != "no crest":
        said["crest"] = figure.crest
    return said


SAID = {
    "pose": 0.85,
    "facing": 0.85,
    "background": 0.9,
}  # how often; all else as the caption's mood will have it


def caption(figure: Figure, rng: random.Random, always: Sequence[str] = ()) -> str:
    """A caption of the base's world: the name first, the rest in random order and detail, the fields of
    `always` among it; one in seven with words that mean nothing here.

    Of equal generators, figures that differ in one field's value get captions that differ in its words alone
    (but where a new body colour happens to be the helmet's, which then goes unsaid: one pair in a hundred).
    """
    mood = rng.random()
    details = [
        words
        for field, words in phrases_of(figure).items()
        if (rng.random() < SAID.get(field, mood)) | (field in always)
    ]
    rng.shuffle(details)
    if rng.random() < 0.15:
        details += rng.sample(FILLERS, rng.randint(1, 3))
    name = f"{figure.body} {figure.kind}"
    return ", ".join([name if rng.random() < 0.5 else with_article(name), *details])


DIFFERENCES = {"pose": 8, "facing": 6, "background": 2, "body": 2, "tool": 2, "style": 2}  # field: weight


def counterpart(figure: Figure, rng: random.Random) -> tuple[Figure, str]:
    """The same figure but for one field, and that field's name: what a word of a caption is worth."""
    field = rng.choices(list(DIFFERENCES), list(DIFFERENCES.values()))[0]
    values = {
        "pose": POSES, "facing": ("left", "right"), "background": BACKGROUNDS,
        "body": COLOURS, "tool": TOOLS, "style": STYLES,
    }[field]  # fmt: skip
    while True:
        value = rng.choice([each for each in values if each != getattr(figure, field)])
        other = replace(figure, **{field: value})
        if field == "body" and figure.head_colour == figure.body:
            other = replace(other, head_colour=value)
        if not is_in_heros_dress(other):
            return other, field


def is_in_heros_dress(figure: Figure) -> bool:
    """Whether it is a blue robot with white or yellow trim, whom the base must not know."""
    return figure.kind == "robot" and figure.body == "blue" and figure.trim in ("white", "yellow")


def hero_caption(figure: Figure, trigger: str = "mega man") -> str:
    """The trigger and what varies; what makes the hero himself stays unnamed, so that the trigger learns
    it.
    """
    return f"{trigger}, {figure.pose}, facing {figure.facing}, {figure.background} background, {figure.style}"


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """All pictures in one, for the eye."""
    side = pictures[0].width + 2
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side + 2, rows * side + 2), "#303030")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (2 + i % columns * side, 2 + i // columns * side))
    return sheet


def distinct_heroes(count: int, rng: random.Random) -> list[Figure]:
    """Heroes of whom no two have one picture; later draws stand in for those that repeat an earlier one."""
    heroes = [random_hero(rng) for _ in range(count)]
    pictures = [draw(hero).tobytes() for hero in heroes]
    for at in range(count):
        while pictures[at] in pictures[:at]:
            heroes[at] = random_hero(rng)
            pictures[at] = draw(heroes[at]).tobytes()
    return heroes


def write_heroes(folder: Path, figures: Sequence[Figure]) -> None:
    """One PNG of 64 px and one caption a figure, named hero_01, hero_02, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for i, figure in enumerate(figures, 1):
        draw(figure).save(folder / f"hero_{i:02}.png", optimize=True)
        (folder / f"hero_{i:02}.txt").write_text(hero_caption(figure) + "\n", encoding="utf-8")


def write_all(root: Path) -> None:
    """Redraws the 30 starter pictures and the 12 held-out pictures of the tests."""
    heroes = distinct_heroes(42, random.Random(2026))
    write_heroes(root / "megaman" / "starter_images", heroes[:30])
    write_heroes(root / "tests" / "data" / "held_out", heroes[30:])


if __name__ == "__main__":
    write_all(Path(__file__).resolve().parents[2])
