"""Both scripts' commands in this process, on sys.argv, as their first and last lines run them."""

import sys
from collections.abc import Callable
from typing import NoReturn

import pytest

import generate_megaman
import megaman_lora
from megaman.common import console
from megaman.data import first_start
from megaman.generation import gallery


def training() -> None:
    """megaman_lora.py."""
    cfg, chosen = megaman_lora.read_config(sys.argv[1:])
    first_start.answer_first_start(cfg, chosen)
    megaman_lora.main(cfg, chosen)


def drawing() -> None:
    """generate_megaman.py."""
    cfg = generate_megaman.read_config(sys.argv[1:])
    gallery.answer_gallery_only(cfg)
    generate_megaman.main(cfg)


def run(command: Callable[[], object]) -> NoReturn:
    """Runs the command and leaves with its exit code."""
    with console.reported():
        command()
    sys.exit(0)


def exit_code_of(main: Callable[[], None], argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command with these arguments."""
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as left:
        run(main)
    return left.value.code
