"""The first start: a folder for the user's pictures, and what to do next."""

import os
import sys
from collections.abc import Collection
from pathlib import Path

from megaman.common.console import Exit, command_of, say
from megaman.common.files import write_text
from megaman.config.train import TrainConfig
from megaman.data.folder import find_pictures

GUIDE = Path(__file__).parents[1] / "templates" / "megaman_images.md"


def welcome(folder: Path) -> None:
    """Makes the folder with its guide, if they are not there, and says in two lines what to do."""
    guide = folder / "README.md"
    if not os.path.lexists(guide):
        write_text(guide, GUIDE.read_text(encoding="utf-8"))
    say(
        f"{folder} is ready: put 15-100 pictures there, each with a caption in a .txt file of the same "
        f"name ({guide} tells more), and run this again."
    )
    demo = f"{command_of('megaman_lora.py')} --preset demo"
    say(f"To see it work first, without a GPU or a network: {demo}")


def answer_first_start(cfg: TrainConfig, chosen: Collection[str]) -> None:
    """Welcomes the user and ends the program, where there is nothing to train on yet."""
    if cfg.adopt is None and is_first_start(Path(cfg.data_dir), cfg.preset, chosen):
        welcome(Path(cfg.data_dir))
        sys.exit(Exit.OK)


def is_first_start(folder: Path, preset: str | None, chosen: Collection[str]) -> bool:
    """Whether no data folder was named, and the default one is missing or empty."""
    named = "data_dir" in chosen or preset == "demo"
    return not named and not (folder.is_dir() and find_pictures(folder))
