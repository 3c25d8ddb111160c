"""What a mask spares, and what painting its black parts white costs: losses on held-out heroes.

    python tests/bench/bench_masks.py [--seeds 42 1 2] [--work FOLDER]

Thirty heroes, all on one background that no caption names, are trained on in three ways for 80 steps of 4:
without masks; with masks, the background painted white, as runs do it; with masks, the background left in
its place. Twelve held-out heroes on backgrounds of every colour tell by how much the loss on the figure and
the loss on its background change against the base. Prints a table, then one JSON line.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from bench.bench_learning import change, embedded_base, encoded_folder, losses, trained  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

from megaman.data.masks import MaskSource  # noqa: E402
from megaman.tiny_sd.figures import distinct_heroes, hero_caption  # noqa: E402
from megaman.tiny_sd.sketch import Figure, draw  # noqa: E402

WAYS = ("no masks", "painted white", "left in place")
SHORT = ["--max_train_steps", "80", "--train_batch_size", "4", "--preserve_weight", "0"]
SAME = 8  # of 255: what differs less on two backgrounds belongs to the figure


def mask_of(figure: Figure) -> Image.Image:
    """White where the figure is."""
    one, other = (np.asarray(draw(replace(figure, background=name)), int) for name in ("white", "mint"))
    return Image.fromarray(np.uint8(255) * (np.abs(one - other).max(-1) < SAME))


def write(folder: Path, figures: Sequence[Figure], captions: Sequence[str], part: str | None) -> Path:
    """Pictures, captions and masks of the figures or of their backgrounds; no masks if part is None."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (figure, caption) in enumerate(zip(figures, captions, strict=True)):
        draw(figure).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(caption, encoding="utf-8")
        mask = mask_of(figure)
        if part is not None:
            (mask if part == "figure" else ImageOps.invert(mask)).save(folder / f"{number:02}.mask.png")
    return folder


def main() -> None:
    """Runs everything and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp(prefix="bench_masks_")))
    flags = parser.parse_args()
    heroes = distinct_heroes(42, random.Random(2026))
    on_one = [replace(hero, background="rose") for hero in heroes[:30]]
    captions = [f"mega man, {hero.pose}, facing {hero.facing}, {hero.style}" for hero in on_one]
    data = {way: write(flags.work / way, on_one, captions, None if way == "no masks" else "figure")
            for way in WAYS}  # fmt: skip
    base, hide = embedded_base(), MaskSource.hide
    MaskSource.hide = lambda source, image: None
    named = [hero_caption(hero) for hero in heroes[30:]]
    held = {part: write(flags.work / f"held-out {part}", heroes[30:], named, part)
            for part in ("figure", "background")}  # fmt: skip
    sets = {part: encoded_folder(folder, base) for part, folder in held.items()}
    plain = {part: losses(base, encoded) for part, encoded in sets.items()}
    rows = []
    for seed in flags.seeds:
        for way in WAYS:
            MaskSource.hide = (lambda source, image: None) if way == "left in place" else hide
            output = flags.work / f"{way} {seed}"
            own = ["--cache_dir", str(flags.work / f"cache {way}"), "--seed", str(seed)]
            adapter = trained(data[way], output, *SHORT, *own)
            rows.append({"way": way, "seed": seed} | change(base, adapter, sets, plain))
            print(" | ".join(map(str, rows[-1].values())), flush=True)
    print(json.dumps({"bench": "masks", "change of the loss, percent": rows}))


if __name__ == "__main__":
    main()
