"""Prompts as people write them in a file: a line each, with kohya's options."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaman.common.console import Exit, UserError, check_text
from megaman.config.generate import LARGEST_SIDE
from megaman.config.parser import LARGEST_SEED

SHOWN = 40  # characters of a bad value that an error's line repeats
LINE_OPTIONS = {
    "n": ("negative_prompt", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("num_inference_steps", int),
    "l": ("guidance_scale", float),
}
RANGES = {"seed": (0, LARGEST_SEED - 1), "guidance_scale": (0, 1e6), "width": (1, LARGEST_SIDE)}
RANGES |= {"height": (1, LARGEST_SIDE), "num_inference_steps": (1, 10_000)}


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the settings of its own."""

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # by the flags' names


def read_prompts_file(path: Path) -> list[Prompt]:
    """Prompts with their own settings, in kohya's notation: `mega man --d 7 --w 512`.

    UserError (exit 3) with the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        reason = f"--prompts_file {path}: not UTF-8 at byte {error.start}; save it as UTF-8"
        raise UserError(reason, Exit.DATA) from error
    except OSError as error:
        raise UserError(f"--prompts_file {path}: can't be read ({error.strerror})", Exit.DATA) from error
    found = [
        (f"{path}, line {number}", line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not found:
        raise UserError(f"--prompts_file {path}: holds no prompts, only blank lines and comments", Exit.DATA)
    return [_parse_line(line, where) for where, line in found]


def _parse_line(line: str, where: str) -> Prompt:
    check_text(line, where, Exit.DATA)
    prompt, *options = re.split(r"(?:^|\s)--([A-Za-z_]+)(?=\s|$)", line)
    settings = dict(
        _option(name, value.strip(), where) for name, value in zip(options[::2], options[1::2], strict=True)
    )
    if not prompt.strip():
        raise UserError(f"{where}: options without a prompt", Exit.DATA)
    return Prompt(prompt.strip(), settings)


def _option(name: str, text: str, where: str) -> tuple[str, Any]:
    """A setting's name and value."""
    if name not in LINE_OPTIONS:
        known = ", ".join("--" + known for known in LINE_OPTIONS)
        raise UserError(f"{where}: unknown option --{name[:SHOWN]}; known are {known}", Exit.DATA)
    key, kind = LINE_OPTIONS[name]
    try:
        value = kind(text)
    except ValueError as error:
        raise UserError(f"{where}: --{name} {text[:SHOWN]!r} is not a number", Exit.DATA) from error
    least, most = RANGES.get(key, (None, None))
    if least is not None and not least <= value <= most:
        wanted = f"at least {least}" if value < least else f"at most {most:g}"
        raise UserError(f"{where}: --{name} {text[:SHOWN]} must be {wanted}", Exit.DATA)
    return key, value
