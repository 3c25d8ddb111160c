"""README's two pictures, made of what the demo drew.

    python tests/bench/readme_pictures.py FOLDER/demo-1.png generated_megaman

The first: the sixteen leading pictures of a sheet of bench_learning.py. The second: a gallery's pictures with
the base alone, and below each the same prompt and seed with the LoRA.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from megaman.tiny_sd.figures import contact_sheet  # noqa: E402

TEMPLATES = ROOT / "megaman" / "templates"
SIDE_PX = 128  # of each picture, as bench_learning.py saves them
LINE_PX = 2  # between them


def leading(sheet: Image.Image, count: int) -> list[Image.Image]:
    """The pictures of the sheet's first row."""
    lefts = [LINE_PX + i * (SIDE_PX + LINE_PX) for i in range(count)]
    return [sheet.crop((left, LINE_PX, left + SIDE_PX, LINE_PX + SIDE_PX)) for left in lefts]


def base_and_lora(gallery: Path) -> list[Image.Image]:
    """A gallery's pictures of strength 0, then those of strength 1, in the order of its prompts."""
    lines = (gallery / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    of_base, of_lora = ([each for each in records if each["lora_scale"] == strength] for strength in (0, 1))
    jobs = ([(each["prompt"], each["seed"]) for each in part] for part in (of_base, of_lora))
    if len({*map(tuple, jobs)}) != 1 or not of_base:
        raise SystemExit(f"error: {gallery}: needs each prompt and seed once at strength 0 and once at 1")
    files = [gallery / record["file"] for record in (*of_base, *of_lora)]
    return [Image.open(file).convert("RGB").resize((SIDE_PX, SIDE_PX), 0) for file in files]


def main() -> None:
    """Writes both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sheet", type=Path)
    parser.add_argument("gallery", type=Path)
    flags = parser.parse_args()
    sheet = leading(Image.open(flags.sheet).convert("RGB"), 16)
    contact_sheet(sheet, 8).save(TEMPLATES / "demo.png", optimize=True)
    pictures = base_and_lora(flags.gallery)
    contact_sheet(pictures, len(pictures) // 2).save(TEMPLATES / "base_and_lora.png", optimize=True)


if __name__ == "__main__":
    main()
