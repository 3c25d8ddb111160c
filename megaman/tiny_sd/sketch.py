"""Draws a figure with PIL on a grid of 32 x 32 cells: pen, limbs, heads, what it holds and wears."""

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageColor, ImageDraw

from megaman.tiny_sd.poses import POSES, Point, Pose

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
HERO_PARTS = ("fin", "scarf", "bolt", "gauntlets")
WHITE, YELLOW, CYAN = "#f2f3f5", "#f6cf3a", "#4fd8e8"  # of these parts
STEEL, SKY, GOLD, WOOD, EYE = "#b9bec7", "#bfe8ff", "#c9a227", "#7a4b22", "#222222"


@dataclass(frozen=True)
class Figure:
    """What one picture shows. Every field but the last two can be named in a caption."""

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
    without: tuple[str, ...] = ()  # of the hero's parts, for the judge that looks for each


class Pen:
    """Draws in cells of the grid, mirrored for figures that face left and shifted by the figure's jitter."""

    def __init__(self, figure: Figure) -> None:
        rng = random.Random(figure.jitter)
        self.scale = 1 if figure.style == "pixel art" else 8
        self.mirrored = figure.facing == "left"
        self.dx, self.dy = rng.randint(-1, 1), rng.randint(-1, 0)
        side = GRID * self.scale
        self.image = Image.new("RGB", (side, side), BACKGROUNDS[figure.background])
        self.canvas = ImageDraw.Draw(self.image)
        self.ink = "#000000" if figure.background == "black" else INK
        self.line_px = max(1, self.scale * 3 // 4)

    def _x(self, x: float) -> float:
        x += self.dx
        return GRID - 1 - x if self.mirrored else x

    def _frame(self, cells: Sequence[float]) -> list[float]:
        x0, y0, x1, y1 = cells
        left, right = sorted((self._x(x0), self._x(x1)))
        s = self.scale
        return [left * s, (y0 + self.dy) * s, (right + 1) * s - 1, (y1 + self.dy + 1) * s - 1]

    def _centres(self, points: Sequence[Point]) -> list[Point]:
        s = self.scale
        return [((self._x(x) + 0.5) * s, (y + self.dy + 0.5) * s) for x, y in points]

    def box(self, cells: Sequence[float], fill: str, *, outlined: bool = False, radius: int = 0) -> None:
        """A rectangle over the cells (x0, y0, x1, y1), both ends included."""
        line = {"outline": self.ink if outlined else None, "width": self.line_px}
        self.canvas.rounded_rectangle(self._frame(cells), radius * self.scale, fill=fill, **line)

    def disc(self, cells: Sequence[float], fill: str, *, outlined: bool = False) -> None:
        """An ellipse over the cells (x0, y0, x1, y1), both ends included."""
        line = {"outline": self.ink if outlined else None, "width": self.line_px}
        self.canvas.ellipse(self._frame(cells), fill=fill, **line)

    def shape(self, points: Sequence[Point], fill: str, *, outlined: bool = False) -> None:
        """A filled polygon through the centres of the cells."""
        line = {"outline": self.ink if outlined else None, "width": self.line_px}
        self.canvas.polygon(self._centres(points), fill=fill, **line)

    def limb(self, points: Sequence[Point], fill: str, width: int = 3) -> None:
        """A thick line through the centres of the cells, outlined."""
        for colour, px in ((self.ink, width * self.scale + 2 * self.line_px), (fill, width * self.scale)):
            self.canvas.line(self._centres(points), colour, px, joint="curve")


def draw(figure: Figure, side_px: int = 64) -> Image.Image:
    """The figure's picture, RGB, side_px x side_px."""
    pen, pose = Pen(figure), POSES[figure.pose]
    if pose.is_off_the_ground:
        pen.disc((9, 29, 23, 30), _darker(BACKGROUNDS[figure.background]))
    _draw_back(pen, figure, pose)
    _draw_arm(pen, figure, pose, 0)
    _draw_legs(pen, figure, pose)
    _draw_torso(pen, figure, pose)
    if figure.kind != "hero":
        _draw_tool(pen, figure, pose)
    _draw_arm(pen, figure, pose, 1)
    x, y = pose.head
    pen.dx, pen.dy = pen.dx + x, pen.dy + y  # the head moves as one
    (_HEAD_OF_KIND.get(figure.kind) or _HEAD_OF_ROBOT[figure.head])(pen, figure)
    if figure.kind == "robot":
        _draw_face(pen, figure)
    _draw_crest(pen, figure)
    resample = Image.Resampling.NEAREST if figure.style == "pixel art" else Image.Resampling.LANCZOS
    return pen.image.resize((side_px, side_px), resample)


def _darker(colour: str) -> str:
    red, green, blue = (part * 3 // 4 for part in ImageColor.getrgb(colour)[:3])
    return f"#{red:02x}{green:02x}{blue:02x}" if red > 20 else "#3a3c44"


def _skin(figure: Figure) -> str:
    return SKIN[zlib.crc32(str(figure.jitter).encode()) % len(SKIN)]


# ---------------------------------------------------------------- body


def _draw_back(pen: Pen, figure: Figure, pose: Pose) -> None:
    """What hangs on the back, by the kind: it tells front from back where a helmet does not."""
    x, y = pose.chest
    trim = COLOURS[figure.trim][0]
    if figure.kind == "robot":
        pen.box((6 + x, 14 + y, 10 + x, 20 + y), "#4a4d55", outlined=True)
    elif figure.kind == "astronaut":
        pen.box((5 + x, 13 + y, 10 + x, 21 + y), STEEL, outlined=True, radius=1)
    elif figure.kind == "knight":
        pen.shape([(12 + x, 14 + y), (3 + x, 26 + y), (11 + x, 26 + y)], trim, outlined=True)
    elif figure.kind == "hero" and "scarf" not in figure.without:
        hx, hy = pose.head
        ends = [(11, 13), (6, 12), (1, 16), (4, 17), (2, 21), (7, 19), (11, 18)]
        pen.shape([(px + hx, py + hy) for px, py in ends], YELLOW, outlined=True)


def _draw_arm(pen: Pen, figure: Figure, pose: Pose, side: int) -> None:
    """The back arm (side 0) or the front one (1), with its hand or glove."""
    colour = COLOURS[figure.body][1 - side]
    x, y = pose.hands[side]
    pen.limb([pose.shoulders[side], (x, y)], colour, 2)
    if figure.kind == "hero" and "gauntlets" not in figure.without:
        pen.box((x - 3, y - 3, x + 3, y + 3), WHITE, outlined=True, radius=2)
        pen.box((x - 1, y - 1, x + 1, y + 1), CYAN)
        return
    if side and figure.tool == "arm cannon" and figure.kind != "hero":
        _draw_cannon(pen, figure, pose)
        return
    hand = _skin(figure) if figure.kind == "ninja" else COLOURS[figure.trim][1 - side]
    hand = COLOURS[figure.body][1 - side] if figure.kind == "hero" else hand
    pen.box((x - 2, y - 2, x + 1, y + 1), hand, outlined=True, radius=1)


def _draw_legs(pen: Pen, figure: Figure, pose: Pose) -> None:
    drop = -3 if pose.is_off_the_ground else 0
    lean = 2 if figure.pose == "running" else 0
    if figure.legs != "boots" and figure.pose == "running":
        for y in (22, 25, 28):
            pen.box((0, y, 5, y), STEEL)  # speed
    if figure.legs == "treads":
        pen.box((8 + lean, 23 + drop, 23 + lean, 29 + drop), "#4a4d55", outlined=True, radius=2)
        for x in (10, 14, 18):
            pen.disc((x + lean, 25 + drop, x + 3 + lean, 28 + drop), "#9aa0aa")
    elif figure.legs == "wheels":
        for x in (8, 17):
            pen.disc((x + lean, 22 + drop, x + 6 + lean, 29 + drop), "#3b3d44", outlined=True)
            pen.disc((x + 2 + lean, 24 + drop, x + 4 + lean, 27 + drop), "#b8bcc4")
    elif figure.legs == "hover jets":
        pen.box((9 + lean, 22 + drop, 22 + lean, 24 + drop), COLOURS[figure.body][1], outlined=True)
        for x in (9, 17):
            pen.shape(
                [(x + lean, 25 + drop), (x + 5 + lean, 25 + drop), (x + 2 + lean, 30 + drop)], "#ffb02e"
            )
    else:
        for side in (0, 1):
            _draw_leg(pen, figure, pose, side)


def _draw_leg(pen: Pen, figure: Figure, pose: Pose, side: int) -> None:
    x, y = pose.feet[side]
    pen.limb([pose.hips[side], pose.knees[side], (x + 1, y - 2)], COLOURS[figure.body][1], 2)
    boot = COLOURS[figure.trim][1 - side]
    pen.box((x - 1, y - 3, x + 2, y), boot, outlined=True)
    pen.box((x - 1, y - 1, x + 5, y), boot, outlined=True)  # toes point where it faces


def _draw_torso(pen: Pen, figure: Figure, pose: Pose) -> None:
    x, y = pose.chest
    body, shade = COLOURS[figure.body]
    trim = COLOURS[figure.trim][0]
    if figure.kind == "wizard":
        (back, _), (front, _) = pose.feet
        hem = min(28, max(foot[1] for foot in pose.feet) - 1)
        robe = [(12 + x, 15 + y), (19 + x, 15 + y), (front + 3, hem), (back - 2, hem)]
        pen.shape(robe, body, outlined=True)
        pen.shape([(front + 2, hem - 1), (front + 3, hem), (back - 2, hem), (back - 1, hem - 1)], trim)
    pen.box((10 + x, 13 + y, 21 + x, 21 + y), body, outlined=True, radius=2)
    if figure.kind == "hero":
        if "bolt" not in figure.without:
            bolt = [(18, 14), (13, 18), (15, 18), (13, 22), (19, 17), (17, 17), (20, 14)]
            pen.shape([(px + x, py + y) for px, py in bolt], YELLOW)
    elif figure.kind == "ninja":
        pen.box((11 + x, 19 + y, 20 + x, 20 + y), trim)
        pen.shape([(12 + x, 14 + y), (19 + x, 14 + y), (16 + x, 18 + y)], shade)
    else:
        pen.box((15 + x, 15 + y, 19 + x, 18 + y), trim)
        pen.box((11 + x, 20 + y, 20 + x, 20 + y), shade)


# ---------------------------------------------------------------- tools


def _draw_cannon(pen: Pen, figure: Figure, pose: Pose) -> None:
    (x, y), (sx, sy) = pose.hands[1], pose.shoulders[1]
    reach = math.hypot(x - sx, y - sy)
    ux, uy = (x - sx) / reach, (y - sy) / reach
    near, far, end = ((x + ux * d, y + uy * d) for d in (-5, 2, 3))
    pen.limb([near, far], COLOURS[figure.trim][0], 5)
    pen.limb([far, end], "#0d0e11", 3)


def _draw_tool(pen: Pen, figure: Figure, pose: Pose) -> None:
    (x, y), (ux, uy) = pose.hands[1], pose.tool

    def along(distance: float, aside: float = 0) -> Point:
        return x + ux * distance + uy * aside, y + uy * distance - ux * aside

    if figure.tool == "sword":
        pen.limb([along(2), along(12)], "#dfe6ee", 2)
        pen.limb([along(2, -3), along(2, 3)], GOLD, 1)
    elif figure.tool == "staff":
        pen.limb([along(-7), along(10)], WOOD, 1)
        ox, oy = along(11)
        pen.disc((ox - 2, oy - 2, ox + 2, oy + 2), "#ff5fd2", outlined=True)
    elif figure.tool == "shield":
        light, shade = COLOURS[figure.trim]
        pen.disc((x - 5, y - 6, x + 4, y + 5), shade, outlined=True)
        pen.disc((x - 2, y - 3, x + 1, y + 2), light)
    elif figure.tool == "claws":
        for aside in (-2, 0, 2):
            end, tip = along(2, aside), along(6, aside)
            pen.box((*map(min, end, tip), *map(max, end, tip)), "#8a8f98")


# ---------------------------------------------------------------- heads


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
    pen.shape([(11, 3), (20, 3), (23, 12), (8, 12)], light, outlined=True)
    pen.box((8, 12, 23, 13), shade)


def _draw_knight_head(pen: Pen, figure: Figure) -> None:
    pen.disc((9, 2, 22, 14), STEEL, outlined=True)
    pen.shape([(10, 4), (14, 1), (18, 2), (14, 6)], COLOURS[figure.head_colour][0])
    pen.box((9, 9, 13, 13), COLOURS[figure.head_colour][0])
    pen.box((15, 6, 23, 8), "#15171b")
    pen.shape([(19, 9), (25, 11), (20, 13)], STEEL, outlined=True)


def _draw_astronaut_head(pen: Pen, figure: Figure) -> None:
    pen.disc((7, 1, 23, 15), COLOURS[figure.head_colour][0], outlined=True)
    pen.disc((12, 4, 24, 13), SKY, outlined=True)
    pen.disc((14, 5, 23, 13), _skin(figure))
    _eyes(pen, EYE)


def _draw_ninja_head(pen: Pen, figure: Figure) -> None:
    pen.shape([(9, 6), (3, 3), (5, 7), (3, 11)], COLOURS[figure.trim][0], outlined=True)
    pen.disc((9, 2, 22, 14), COLOURS[figure.head_colour][0], outlined=True)
    pen.box((14, 6, 22, 10), _skin(figure), radius=1)
    _eyes(pen, EYE)


def _draw_wizard_head(pen: Pen, figure: Figure) -> None:
    light, shade = COLOURS[figure.head_colour]
    pen.disc((10, 4, 21, 14), _skin(figure), outlined=True)
    pen.shape([(15, 11), (23, 11), (23, 18), (17, 15)], "#eceef2", outlined=True)
    pen.shape([(8, 6), (23, 6), (13, -1), (6, -2), (10, 1)], light, outlined=True)
    pen.box((6, 6, 25, 7), shade)
    _eyes(pen, EYE, top=9)


def _draw_hero_head(pen: Pen, figure: Figure) -> None:
    light, shade = COLOURS["blue"]
    if "fin" not in figure.without:  # it sweeps back from the brow
        pen.shape([(19, 2), (11, 0), (2, 1), (6, 4), (3, 8), (10, 8)], WHITE, outlined=True)
    pen.disc((8, 2, 23, 14), light, outlined=True)
    if "fin" not in figure.without:
        pen.shape([(19, 3), (11, 1), (5, 2), (9, 5)], WHITE)
    pen.box((9, 11, 12, 13), shade)
    pen.box((13, 6, 24, 10), "#10131c", radius=2)
    for x in (16, 20):
        pen.box((x, 7, x + 1, 9), "#7dfcff")
    if "scarf" not in figure.without:
        pen.box((10, 13, 21, 15), YELLOW, outlined=True, radius=1)


_HEAD_OF_ROBOT = {
    "square head": _draw_square_head, "round head": _draw_round_head,
    "dome head": _draw_dome_head, "bucket head": _draw_bucket_head,
}  # fmt: skip
_HEAD_OF_KIND = {
    "knight": _draw_knight_head, "astronaut": _draw_astronaut_head, "ninja": _draw_ninja_head,
    "wizard": _draw_wizard_head, "hero": _draw_hero_head,
}  # fmt: skip


def _eyes(pen: Pen, colour: str, top: int = 7) -> None:
    for x in (16, 20):
        pen.box((x, top, x + 1, top + 2), colour)


def _draw_face(pen: Pen, figure: Figure) -> None:
    if figure.face == "visor":
        pen.box((14, 6, 24, 9), "#e0312e" if figure.head_colour == "yellow" else "#ffd23e", outlined=True)
    elif figure.face == "one eye":
        pen.disc((16, 4, 23, 10), "#ffffff", outlined=True)
        pen.disc((19, 6, 22, 9), "#dd2222")
    else:
        _eyes(pen, INK if figure.head_colour in ("white", "yellow", "gray", "pink") else "#ffffff")
        pen.box((17, 11, 22, 11), INK if figure.head_colour != "black" else "#ffffff")  # a mouth


def _draw_crest(pen: Pen, figure: Figure) -> None:
    if figure.crest == "antenna":
        pen.box((12, -1, 12, 3), "#666a72")
        pen.disc((11, -2, 13, 0), "#ff4d4d")
    elif figure.crest == "horns":
        pen.shape([(10, 5), (6, -1), (13, 3)], "#f3e7c9", outlined=True)
        pen.shape([(21, 5), (25, -1), (18, 3)], "#f3e7c9", outlined=True)
    elif figure.crest == "plume":
        pen.shape([(17, 3), (7, -2), (4, 7), (11, 3)], COLOURS[figure.trim][0], outlined=True)
