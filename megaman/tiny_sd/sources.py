"""Openly licensed pictures that widen the embedded base's world: robots, pixel people, emoji.

None of them is kept here. They are rendered from pinned packages when the base is rebuilt:

    pip install --no-deps robohash==2.0 resvg_py==0.5.0
    npm install --prefix FOLDER @dicebear/core@9.4.3 @dicebear/pixel-art@9.4.3 \\
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9

RoboHash set1 (c) Zikri Kader, CC BY 4.0; Pixel Art by DiceBear, CC0; Fluent Emoji (c) Microsoft, MIT; Noto
Emoji (c) Google, Apache-2.0. LICENSES/ holds the texts.
"""

import importlib.util
import io
import json
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw

from megaman.tiny_sd.figures import FILLERS, HERO_WORDS, caption, counterpart, random_figure, with_article
from megaman.tiny_sd.sketch import BACKGROUNDS, COLOURS, INK, Figure, draw

SIDE_PX = 64
PAINT_PX = 128  # pictures are put together at twice the size
SHARES = {"figures": 0.65, "robots": 0.15, "people": 0.10, "emoji": 0.10}
PEOPLE = 3_000  # pixel people are made ahead, by their own package
EMOJI_CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion")
EMOJI_SETS = {"fluent-emoji-flat": "fluent style", "noto": "noto style"}


@dataclass(frozen=True)
class Subject:
    """Something to draw on a background: its RGBA picture, its name, what else can be said of it."""

    picture: Image.Image
    name: str
    details: tuple[str, ...]


Picture = tuple[Image.Image, Callable[[random.Random], str]]  # and what gives a caption of it


def on_background(subject: Subject, background: str) -> Image.Image:
    """The subject, RGB, SIDE_PX a side, on one of the base's named backgrounds."""
    canvas = Image.new("RGBA", subject.picture.size, BACKGROUNDS[background])
    canvas.alpha_composite(subject.picture)
    return canvas.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)


def describe(subject: Subject, background: str, rng: random.Random) -> str:
    """A caption in the manner of the figures': the name first, the rest in random order and detail."""
    details = rng.sample(subject.details, rng.randint(0, len(subject.details)))
    if rng.random() < 0.9:
        details.insert(rng.randint(0, len(details)), f"{background} background")
    if rng.random() < 0.1:
        details.append(rng.choice(FILLERS))
    name = subject.name
    return ", ".join([with_article(name) if rng.random() < 0.5 else name, *details])


def pairs(
    count: int, shares: dict[str, float], rng: random.Random, packages: Path, always: Sequence[str] = ()
) -> Iterator[tuple[Picture, Picture]]:
    """`count` pairs of pictures that differ in one thing, which their captions name: figures in one field,
    everything else in its background. Equal generators describe both alike but for that.

    always: fields that every figure's caption names.
    """
    people = pixel_people(packages) if "people" in shares else []
    emoji = emoji_of(packages) if "emoji" in shares else []
    for source in rng.choices(list(shares), list(shares.values()), k=count):
        if source == "figures":
            figure = random_figure(rng)
            other, field = counterpart(figure, rng)
            yield _of_figure(figure, (*always, field)), _of_figure(other, (*always, field))
            continue
        if source == "robots":
            subject = cartoon_robot(rng)
        else:
            subject = rng.choice(people if source == "people" else emoji)
        first, second = (_of_subject(subject, each) for each in rng.sample(list(BACKGROUNDS), 2))
        yield first, second


def _of_figure(figure: Figure, always: Sequence[str]) -> Picture:
    return draw(figure, SIDE_PX), lambda rng: caption(figure, rng, always)


def _of_subject(subject: Subject, background: str) -> Picture:
    return on_background(subject, background), lambda rng: describe(subject, background, rng)


def nearest_colour(value: str) -> str:
    """The base's name for an HTML colour."""
    wanted = ImageColor.getrgb(value)[:3]

    def distance(name: str) -> int:
        known = ImageColor.getrgb(COLOURS[name][0])
        return sum((a - b) ** 2 for a, b in zip(wanted, known, strict=True))

    return min(COLOURS, key=distance)


# ---------------------------------------------------------------- shapes of nothing


def scrap(rng: random.Random) -> Image.Image:
    """A heap of boxes, discs, polygons and lines in any colours: what the VAE learns besides pictures, so
    that it can show what none of them holds. No caption goes with it, and the UNet never sees it.
    """
    scale = rng.choice((1, 8))  # "pixel art" and "flat", as the figures are drawn
    side = 32 * scale
    picture = Image.new("RGB", (side, side), rng.choice((*BACKGROUNDS.values(), _any_colour(rng))))
    canvas = ImageDraw.Draw(picture)
    for _ in range(rng.randint(8, 24)):
        x, y, reach = rng.uniform(0, side), rng.uniform(0, side), rng.choice((3, 6, 10, 16)) * scale
        corners = [
            (x + rng.uniform(-reach, reach), y + rng.uniform(-reach, reach)) for _ in range(rng.randint(3, 7))
        ]
        frame = [*map(min, zip(*corners[:2], strict=True)), *map(max, zip(*corners[:2], strict=True))]
        line = {"outline": INK, "width": max(1, scale * 3 // 4)} if rng.random() < 0.5 else {}
        kind, fill = rng.choice(("box", "disc", "polygon", "polygon", "line")), _any_colour(rng)
        if kind == "box":
            canvas.rectangle(frame, fill, **line)
        elif kind == "disc":
            canvas.ellipse(frame, fill, **line)
        elif kind == "polygon":
            canvas.polygon(corners, fill, **line)
        else:
            canvas.line(corners[:3], fill, max(1, rng.randint(1, 2) * scale))
    resample = Image.Resampling.NEAREST if scale == 1 else Image.Resampling.LANCZOS
    return picture.resize((SIDE_PX, SIDE_PX), resample)


def _any_colour(rng: random.Random) -> str:
    """Any hue; pure, pale or dark; black or white now and then."""
    if rng.random() < 0.2:
        return rng.choice((INK, "#ffffff", "#f2f3f5", "#000000"))
    return f"hsl({rng.randrange(360)}, {rng.randint(20, 100)}%, {rng.randint(15, 90)}%)"


# ---------------------------------------------------------------- RoboHash set1

ROBOT_COLOURS = ("brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")  # never blue
ROBOT_EYES = (
    "narrow eyes", "round eyes", "one eye", "slit", "one round eye",
    "dark eyes", "yellow eyes", "thin eyes", "visor", "blue visor",
)  # fmt: skip
ROBOT_EXTRAS = (
    "bolt", "cigar", "antenna", "knob", "dish", "moustache", "cap", "aerial", "feathers", "spike",
)  # fmt: skip
ROBOT_FACES = (
    "jaw head", "pebble head", "tall head", "egg head", "cylinder head",
    "bulb head", "triangle head", "hooked head", "cone head", "barrel head",
)  # fmt: skip


@cache
def _robot_part(colour: str, part: str, number: int) -> Image.Image:
    spec = importlib.util.find_spec("robohash")
    if spec is None or spec.origin is None:
        raise SystemExit("error: the robots come from a package: pip install --no-deps robohash==2.0")
    folder = Path(spec.origin).parent / "sets" / "set1" / colour
    file = next(folder.glob(f"*/*{part}-{number:02}.png"))
    picture = Image.open(file).convert("RGBA")
    return picture.resize((PAINT_PX, PAINT_PX), Image.Resampling.LANCZOS)


def cartoon_robot(rng: random.Random) -> Subject:
    """A robot of RoboHash's first set, bust only, its parts named."""
    colour = rng.choice(ROBOT_COLOURS)
    body, face, mouth, eyes, extra = (rng.randint(1, 10) for _ in range(5))
    picture = Image.new("RGBA", (PAINT_PX, PAINT_PX))
    parts = {"body": body, "face": face, "mouth": mouth, "eyes": eyes, "accessory": extra}
    for part, number in parts.items():
        picture.alpha_composite(_robot_part(colour, part, number))
    details = (ROBOT_FACES[face - 1], ROBOT_EYES[eyes - 1], f"with {ROBOT_EXTRAS[extra - 1]}", "portrait")
    return Subject(picture, f"{'gray' if colour == 'grey' else colour} cartoon robot", details)


# ---------------------------------------------------------------- pictures made of SVG


def _rendered(svg: str) -> Image.Image:
    import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=PAINT_PX, height=PAINT_PX))
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    canvas = Image.new("RGBA", (PAINT_PX, PAINT_PX))
    canvas.alpha_composite(picture, ((PAINT_PX - picture.width) // 2, (PAINT_PX - picture.height) // 2))
    return canvas


MAKE_PEOPLE = """
import {createAvatar} from '@dicebear/core'; import * as style from '@dicebear/pixel-art';
for (let i = 0; i < %d; i++) {
  const options = {seed: 'person ' + i, glassesProbability: 30, beardProbability: 20, hatProbability: 25};
  const {svg, extra} = createAvatar(style, options).toJson();
  console.log(JSON.stringify({svg, extra}));
}
"""


def pixel_people(packages: Path) -> list[Subject]:
    """Busts of DiceBear's Pixel Art, their clothes, hair, glasses and hats named with their colours."""
    command = ["node", "--input-type=module", "-e", MAKE_PEOPLE % PEOPLE]
    lines = subprocess.run(command, cwd=packages, check=True, capture_output=True, text=True).stdout
    people = []
    for line in lines.splitlines():
        made = json.loads(line)
        worn = made["extra"]
        length = "long" if worn.get("hair", "").startswith("long") else "short"
        details = [f"{nearest_colour(worn['clothingColor'])} shirt", "portrait"]
        details.append(f"{length} {nearest_colour(worn['hairColor'])} hair")
        if "glasses" in worn:
            details.append("sunglasses" if worn["glasses"].startswith("dark") else "glasses")
        if "beard" in worn:
            details.append("beard")
        if "hat" in worn:
            details.append(f"{nearest_colour(worn['hatColor'])} hat")
        people.append(Subject(_rendered(made["svg"]), "pixel person", tuple(details)))
    return people


def emoji_of(packages: Path) -> list[Subject]:
    """The emoji of three categories in two styles, named by their file names."""
    subjects = []
    for name, style in EMOJI_SETS.items():
        folder = packages / "node_modules" / "@iconify-json" / name
        icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        categories = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["categories"]
        for category in EMOJI_CATEGORIES:
            for icon in sorted(categories[category]):
                if icon not in icons["icons"] or any(word in icon for word in HERO_WORDS):
                    continue
                drawing = icons["icons"][icon]
                side = drawing.get("width", icons["width"]), drawing.get("height", icons["height"])
                svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side[0]} {side[1]}">'
                subjects.append(
                    Subject(
                        _rendered(f"{svg}{drawing['body']}</svg>"), icon.replace("-", " "), ("emoji", style)
                    )
                )
    return subjects
