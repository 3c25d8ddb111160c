"""Our own procedural figures, drawn with PIL on a grid of 32 x 32 cells: what the embedded base learns, and
the hero that it never sees.

Everything here is original work, released under CC0 1.0. One seed gives one figure, its picture and its
captions.
`python -m megaman.tiny_sd.figures` redraws the starter pictures and the held-out pictures of the tests.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

GRID = 32  # cells a side; "pixel art" paints them 1:1, "flat" at eight times the size
INK = "#14151a"
SKIN = ("#f6d2ae", "#e0ac7c", "#b57b4d", "#7c4f2e")
COLOURS = {  # name: (light, shade)
    "red": ("#d8302f", "#8f1a1f"), "orange": ("#f08a24", "#a85410"), "yellow": ("#f6cf3a", "#b3901a"),
    "green": ("#3fae4a", "#1f6a2c"), "teal": ("#16a596", "#0b645b"), "blue": ("#2f6fe0", "#173f94"),
    "purple": ("#8b4fd0", "#552c87"), "pink": ("#f07fb4", "#ab4477"), "brown": ("#8d5a34", "#56351c"),
    "gray": ("#a3a9b2", "#646a74"), "white": ("#f2f3f5", "#b4b8c0"), "black": ("#33363d", "#15171b"),
}  # fmt: skip
BACKGROUNDS = {
    "white": "#ffffff", "black": "#0c0d10", "gray": "#8d939b", "sky": "#9fd3ff",
    "mint": "#b4ecc2", "sand": "#ecdcb4", "rose": "#ffc9de", "violet": "#cdbdf5",
}  # fmt: skip
KINDS = {"robot": 6, "knight": 2, "astronaut": 2, "ninja": 2, "wizard": 2}  # name: weight
HEADS = ("square head", "round head", "dome head", "bucket head")
CRESTS = ("no crest", "antenna", "horns", "plume")
TOOLS = ("bare hands", "claws", "sword", "arm cannon", "shield", "staff")
LEGS = ("boots", "treads", "wheels", "hover jets")
POSES = ("standing", "running", "jumping", "arms raised", "crouching")
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


@dataclass(frozen=True)
class Figure:
    """What one picture shows. Every field but `jitter` can be named in a caption."""

    kind: str
    body: str
    head_colour: str
    trim: str
    head: str
    crest: str
    tool: str
    legs: str
    pose: str
    face: str
    facing: str
    background: str
    style: str
    jitter: int


def random_figure(rng: random.Random) -> Figure:
    """A figure of the base's world; never a blue robot with white trim, which is the hero's dress."""
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
            legs=rng.choices(LEGS, (4, 2, 2, 2))[0] if robot else "boots",
            pose=rng.choice(POSES),
            face=rng.choice(FACES) if robot else "two eyes",
            facing=rng.choice(("left", "right")),
            background=rng.choice(list(BACKGROUNDS)),
            style=rng.choices(STYLES, (6, 4))[0],
            jitter=rng.randrange(1 << 30),
        )
        if not (robot and body == "blue" and figure.trim in ("white", "yellow")):
            return figure


def random_hero(rng: random.Random) -> Figure:
    """Our hero in a random pose, side, style and background: cobalt robot, white swept fin, dark visor
    with two lights, yellow scarf, white gauntlets.
    """
    return replace(
        random_figure(rng), kind="hero", body="blue", head_colour="blue", trim="white", head="hero",
        crest="no crest", tool="bare hands", legs="boots", face="two eyes",
    )  # fmt: skip


class Pen:
    """Draws in cells of the 32 x 32 grid, mirrored for figures that face left and shifted by the figure's
    jitter.
    """

    def __init__(self, figure: Figure) -> None:
        rng = random.Random(figure.jitter)
        self.scale = 1 if figure.style == "pixel art" else 8
        self.mirrored = figure.facing == "left"
        self.dx = rng.randint(-1, 1)
        self.dy = rng.randint(0, 1) + {"jumping": -2, "crouching": 2}.get(figure.pose, 0)
        side = GRID * self.scale
        self.image = Image.new("RGB", (side, side), BACKGROUNDS[figure.background])
        self.canvas = ImageDraw.Draw(self.image)
        self.ink = "#000000" if figure.background == "black" else INK

    def _x(self, x: float) -> float:
        x += self.dx
        return GRID - 1 - x if self.mirrored else x

    def _frame(self, cells: Sequence[float]) -> list[float]:
        x0, y0, x1, y1 = cells
        left, right = sorted((self._x(x0), self._x(x1)))
        s = self.scale
        return [left * s, (y0 + self.dy) * s, (right + 1) * s - 1, (y1 + self.dy + 1) * s - 1]

    def box(self, cells: Sequence[float], fill: str, *, outlined: bool = False, radius: int = 0) -> None:
        """A rectangle over the cells (x0, y0, x1, y1), both ends included."""
        line = {"outline": self.ink if outlined else None, "width": max(1, self.scale * 3 // 4)}
        self.canvas.rounded_rectangle(self._frame(cells), radius * self.scale, fill=fill, **line)

    def disc(self, cells: Sequence[float], fill: str, *, outlined: bool = False) -> None:
        """An ellipse over the cells (x0, y0, x1, y1), both ends included."""
        line = {"outline": self.ink if outlined else None, "width": max(1, self.scale * 3 // 4)}
        self.canvas.ellipse(self._frame(cells), fill=fill, **line)

    def shape(self, points: Sequence[tuple[float, float]], fill: str) -> None:
        """A filled polygon through the centres of the cells."""
        s = self.scale
        self.canvas.polygon([((self._x(x) + 0.5) * s, (y + self.dy + 0.5) * s) for x, y in points], fill=fill)


def draw(figure: Figure, side_px: int = 64) -> Image.Image:
    """The figure's picture, RGB, side_px x side_px."""
    pen = Pen(figure)
    shoulder = 9 if figure.pose == "arms raised" else 15
    _draw_legs(pen, figure)
    _draw_back_arm(pen, figure, shoulder)
    _draw_torso(pen, figure)
    _draw_front_arm(pen, figure, shoulder)
    (_HEAD_OF_KIND.get(figure.kind) or _HEAD_OF_ROBOT[figure.head])(pen, figure)
    if figure.kind == "robot":
        _draw_face(pen, figure)
    _draw_crest(pen, figure)
    resample = Image.Resampling.NEAREST if figure.style == "pixel art" else Image.Resampling.LANCZOS
    return pen.image.resize((side_px, side_px), resample)


def _draw_legs(pen: Pen, figure: Figure) -> None:
    shade = COLOURS[figure.body][1]
    trim = COLOURS[figure.trim][0]
    if figure.legs == "treads":
        pen.box((8, 23, 23, 28), "#4a4d55", outlined=True, radius=2)
        for x in (10, 14, 18):
            pen.disc((x, 25, x + 2, 27), "#9aa0aa")
    elif figure.legs == "wheels":
        for x in (9, 17):
            pen.disc((x, 22, x + 5, 28), "#3b3d44", outlined=True)
            pen.disc((x + 2, 24, x + 3, 26), "#b8bcc4")
    elif figure.legs == "hover jets":
        pen.box((10, 21, 21, 22), shade)
        for x in (10, 17):
            pen.shape([(x, 23), (x + 4, 23), (x + 2, 28)], "#ffb02e")
    else:
        spread = {
            "standing": (0, 0),
            "arms raised": (-1, 1),
            "running": (-3, 3),
            "jumping": (-2, 1),
            "crouching": (-2, 2),
        }
        for shift, x in zip(spread[figure.pose], (11, 17), strict=True):
            lift = (
                2
                if (figure.pose == "running" and shift > 0) or (figure.pose == "jumping" and shift < 0)
                else 0
            )
            sole = (26 if figure.pose == "crouching" else 28) - lift
            pen.box((x + shift / 2, 21, x + 3 + shift / 2, sole - 3), shade)
            pen.box((x + shift - 1, sole - 3, x + shift + 4, sole), trim, outlined=True, radius=1)


def _draw_back_arm(pen: Pen, figure: Figure, shoulder: int) -> None:
    shade = COLOURS[figure.body][1]
    hand = SKIN[_skin(figure)] if figure.kind == "ninja" else COLOURS[figure.trim][1]
    pen.box((7, shoulder, 10, shoulder + 5), shade)
    if figure.pose == "arms raised":
        pen.box((6, shoulder - 3, 9, shoulder), hand, outlined=True, radius=1)
    else:
        pen.box((6, shoulder + 4, 9, shoulder + 7), hand, outlined=True, radius=1)


def _draw_torso(pen: Pen, figure: Figure) -> None:
    body, shade = COLOURS[figure.body]
    trim = COLOURS[figure.trim][0]
    if figure.kind == "wizard":
        pen.shape([(12, 14), (19, 14), (24, 27), (7, 27)], body)
        pen.box((8, 26, 23, 27), trim)
    pen.box((10, 14, 21, 22), body, outlined=True, radius=2)
    if figure.kind == "hero":
        pen.shape([(16, 16), (13, 20), (15, 20), (14, 22), (19, 18), (16, 18), (18, 16)], "#f6cf3a")
    elif figure.kind == "ninja":
        pen.box((11, 20, 20, 21), trim)
    else:
        pen.box((14, 16, 17, 19), trim)
        pen.box((11, 21, 20, 21), shade)


def _draw_front_arm(pen: Pen, figure: Figure, shoulder: int) -> None:
    body = COLOURS[figure.body][0]
    trim, trim_shade = COLOURS[figure.trim]
    raised = figure.pose == "arms raised"
    grip = shoulder - 3 if raised else shoulder + 4
    pen.box((22, shoulder, 24, shoulder + 4), body)
    if figure.kind == "hero":
        pen.box((21, grip - 1, 27, grip + 4), trim, outlined=True, radius=2)
        pen.box((23, grip + 1, 25, grip + 2), "#4fd8e8")
        return
    if figure.tool == "arm cannon":
        pen.box((21, grip - 2, 29, grip + 3), trim, outlined=True, radius=1)
        pen.box((28, grip - 1, 29, grip + 2), "#0d0e11")
        return
    pen.box(
        (22, grip, 25, grip + 3),
        SKIN[_skin(figure)] if figure.kind == "ninja" else trim,
        outlined=True,
        radius=1,
    )
    if figure.tool == "sword":
        pen.box((24, grip - 10, 25, grip - 1), "#dfe6ee")
        pen.box((22, grip - 1, 27, grip - 1), "#c9a227")
    elif figure.tool == "staff":
        pen.box((26, grip - 9, 26, grip + 10), "#7a4b22")
        pen.disc((24, grip - 12, 28, grip - 8), "#ff5fd2", outlined=True)
    elif figure.tool == "shield":
        pen.disc((21, grip - 4, 29, grip + 6), trim_shade, outlined=True)
        pen.disc((23, grip - 2, 27, grip + 4), trim)
    elif figure.tool == "claws":
        for y in (grip - 1, grip + 1, grip + 3):
            pen.box((26, y, 29, y), "#8a8f98")


def _draw_square_head(pen: Pen, figure: Figure) -> None:
    pen.box((9, 3, 22, 13), COLOURS[figure.head_colour][0], outlined=True, radius=1)


def _draw_round_head(pen: Pen, figure: Figure) -> None:
    pen.disc((8, 2, 23, 14), COLOURS[figure.head_colour][0], outlined=True)


def _draw_dome_head(pen: Pen, figure: Figure) -> None:
    light, shade = COLOURS[figure.head_colour]
    pen.disc((9, 2, 22, 16), light, outlined=True)
    pen.box((8, 11, 23, 13), shade, outlined=True)


def _draw_bucket_head(pen: Pen, figure: Figure) -> None:
    light, shade = COLOURS[figure.head_colour]
    pen.shape([(11, 3), (20, 3), (23, 12), (8, 12)], light)
    pen.box((8, 12, 23, 13), shade)


def _draw_knight_head(pen: Pen, figure: Figure) -> None:
    pen.disc((9, 2, 22, 14), "#b9bec7", outlined=True)
    pen.box((15, 2, 16, 13), COLOURS[figure.head_colour][0])
    pen.box((12, 7, 22, 9), "#15171b")


def _draw_astronaut_head(pen: Pen, figure: Figure) -> None:
    pen.disc((7, 1, 24, 15), COLOURS[figure.head_colour][0], outlined=True)
    pen.disc((10, 4, 22, 13), "#bfe8ff", outlined=True)
    pen.disc((12, 5, 21, 13), SKIN[_skin(figure)])
    _eyes(pen, "#222222")


def _draw_ninja_head(pen: Pen, figure: Figure) -> None:
    pen.disc((9, 2, 22, 14), COLOURS[figure.head_colour][0], outlined=True)
    pen.shape([(9, 6), (4, 4), (5, 9)], COLOURS[figure.trim][0])
    pen.box((12, 6, 22, 10), SKIN[_skin(figure)], radius=1)
    _eyes(pen, "#222222")


def _draw_wizard_head(pen: Pen, figure: Figure) -> None:
    light, shade = COLOURS[figure.head_colour]
    pen.disc((10, 4, 21, 14), SKIN[_skin(figure)], outlined=True)
    pen.shape([(12, 11), (21, 11), (18, 18), (15, 18)], "#eceef2")
    pen.shape([(7, 6), (24, 6), (16, -3), (12, -3)], light)
    pen.box((6, 6, 25, 7), shade)
    _eyes(pen, "#222222", top=9)


def _draw_hero_head(pen: Pen, figure: Figure) -> None:
    light, shade = COLOURS["blue"]
    pen.shape([(10, 14), (2, 15), (0, 19), (4, 18), (3, 21), (11, 17)], "#f6cf3a")  # scarf, blown back
    pen.shape([(13, 4), (4, -1), (7, 6)], "#f2f3f5")  # the fin sweeps back from the brow
    pen.disc((8, 2, 23, 14), light, outlined=True)
    pen.box((8, 11, 11, 13), shade)
    pen.box((12, 6, 23, 10), "#10131c", radius=2)
    for x in (15, 19):
        pen.box((x, 7, x + 1, 9), "#7dfcff")
    pen.shape([(13, 3), (19, 1), (17, 4)], "#f2f3f5")
    pen.box((10, 13, 21, 15), "#f6cf3a", radius=1)


_HEAD_OF_ROBOT = {
    "square head": _draw_square_head, "round head": _draw_round_head,
    "dome head": _draw_dome_head, "bucket head": _draw_bucket_head,
}  # fmt: skip
_HEAD_OF_KIND = {
    "knight": _draw_knight_head, "astronaut": _draw_astronaut_head, "ninja": _draw_ninja_head,
    "wizard": _draw_wizard_head, "hero": _draw_hero_head,
}  # fmt: skip


def _eyes(pen: Pen, colour: str, top: int = 7) -> None:
    for x in (15, 19):
        pen.box((x, top, x + 1, top + 2), colour)


def _draw_face(pen: Pen, figure: Figure) -> None:
    if figure.face == "visor":
        pen.box((12, 6, 23, 9), "#e0312e" if figure.head_colour == "yellow" else "#ffd23e", outlined=True)
    elif figure.face == "one eye":
        pen.disc((14, 5, 20, 10), "#ffffff", outlined=True)
        pen.disc((17, 6, 19, 9), "#dd2222")
    else:
        _eyes(pen, INK if figure.head_colour in ("white", "yellow", "gray", "pink") else "#ffffff")


def _draw_crest(pen: Pen, figure: Figure) -> None:
    if figure.crest == "antenna":
        pen.box((15, 0, 15, 3), "#666a72")
        pen.disc((14, -2, 16, 0), "#ff4d4d")
    elif figure.crest == "horns":
        pen.shape([(10, 5), (6, -1), (13, 3)], "#f3e7c9")
        pen.shape([(21, 5), (25, -1), (18, 3)], "#f3e7c9")
    elif figure.crest == "plume":
        pen.shape([(17, 3), (7, -2), (7, 7), (12, 3)], COLOURS[figure.trim][0])


def _skin(figure: Figure) -> int:
    return zlib.crc32(str(figure.jitter).encode()) % len(SKIN)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(figure: Figure, rng: random.Random) -> str:
    """A caption of the base's world: the name first, the rest in random order and detail; one in seven
    with words that mean nothing here.
    """
    details = [
        figure.pose,
        f"facing {figure.facing}",
        f"{figure.trim} gloves and boots" if figure.legs == "boots" else figure.legs,
        {"bare hands": "bare hands", "claws": "with claws"}.get(figure.tool, f"with {_a(figure.tool)}"),
    ]
    if figure.kind == "robot":
        details += [
            figure.face,
            figure.head if figure.head_colour == figure.body else f"{figure.head_colour} {figure.head}",
        ]
    elif figure.head_colour != figure.body:
        details.append(
            {"wizard": f"{figure.head_colour} hat", "ninja": f"{figure.head_colour} hood"}.get(
                figure.kind, f"{figure.head_colour} helmet"
            )
        )
    if figure.crest != "no crest":
        details.append(figure.crest)
    if rng.random() < 0.5:
        details.append(figure.style)
    rng.shuffle(details)
    details = details[: rng.randint(0, len(details))]
    if rng.random() < 0.85:
        details.insert(rng.randint(0, len(details)), f"{figure.background} background")
    if rng.random() < 0.15:
        details += rng.sample(FILLERS, rng.randint(1, 3))
    name = f"{figure.body} {figure.kind}"
    return ", ".join([name if rng.random() < 0.5 else _a(name), *details])


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
