"""The first start: a folder for the user's pictures, and what to do next."""

import os
from pathlib import Path

from megaman.errors import say
from megaman.files import write_text
from megaman.pictures import find_pictures

GUIDE = Path(__file__).parent / "templates" / "megaman_images.md"


def welcome(folder: Path) -> None:
    """Makes the folder with its guide, if they are not there, and says in two lines what to do."""
    guide = folder / "README.md"
    if not os.path.lexists(guide):
        write_text(guide, GUIDE.read_text(encoding="utf-8"))
    say(
        f"{folder} is ready: put 15-100 pictures there, each with a caption in a .txt file of the same "
        f"name ({guide} tells more), and run this again."
    )
    say("To see it work first, without a GPU or a network: python megaman_lora.py --preset demo")


def is_first_start(folder: Path, preset: str | None, chosen: set[str]) -> bool:
    """Whether no data folder was named, and the default one is missing or empty."""
    named = "data_dir" in chosen or preset == "demo"
    return not named and not (folder.is_dir() and find_pictures(folder))
