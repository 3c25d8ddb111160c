"""Prompts as people write them in a file: a line each, with kohya's options."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaman.common.console import Exit, UserError, check_text
from megaman.config.generate import LARGEST_SIDE
from megaman.config.parser import LARGEST_SEED
from megaman.model.prompt_syntax import without_lora_tags

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


NUMBERED = "".join(letter for letter, (_, kind) in LINE_OPTIONS.items() if kind is not str) + "WH"
LETTERS = "".join(LINE_OPTIONS)
LETTERS += LETTERS.upper()
COMMAS = ",;，；、"
BEGIN = rf"(?<![^\s{COMMAS}])"  # a comma's space is forgotten at times
ONE_DASH = "[—–−―‐‑‒－]"  # what word processors make of two, and look-alikes of one
MEANT = re.compile(
    rf"{BEGIN}(?:--\s*|-|{ONE_DASH})([{NUMBERED}])(?:=|\s*)(?=-?\.?\d)"
)  # -w 128, --w=128, —w128, -W 128, -- w 128
WITH_SIGN = re.compile(rf"{BEGIN}(?:--|{ONE_DASH})([A-Za-z_]+)=")  # --n=blurry
OPTION = re.compile(rf"{BEGIN}--([A-Za-z_]+)(?!\S)")
DOUBTFUL = re.compile(
    rf"{BEGIN}(?:--\S+|(?:-|--\s+|{ONE_DASH})[{LETTERS}](?!\S)|(?:-|{ONE_DASH})\s+[{NUMBERED}]\s*\d)"
)  # rock -n roll, --3d, -- n blurry, - w 128
OTHER_FORMATS = (".toml", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the settings of its own."""

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # by the flags' names


def read_prompts_file(path: Path) -> list[Prompt]:
    """Prompts with their own settings, in kohya's notation: `mega man --d 7 --w 512`.

    UserError (exit 3) with the line's number.
    """
    if path.suffix.lower() in OTHER_FORMATS:
        reason = f"{path.suffix} prompt files are not read; write a prompt a line into a .txt"
        raise UserError(f"--prompts_file {path}: {reason}", Exit.DATA)
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


def _is_of_json(line: str) -> bool:
    """Whether the line is an object of JSON, or nothing but its brackets; {red|blue} is a web UI's."""
    try:
        return not line.strip("{}[], ") or isinstance(json.loads(line.rstrip(",")), dict)
    except (ValueError, RecursionError):
        return False


def _parse_line(line: str, where: str) -> Prompt:
    check_text(line, where, Exit.DATA)
    if _is_of_json(line):
        reason = "JSON is not read; write the prompt alone, with options as in --w 512"
        raise UserError(f"{where}: {reason}", Exit.DATA)
    plain = WITH_SIGN.sub(r"--\1 ", MEANT.sub(lambda found: f"--{found[1].lower()} ", line))
    if doubtful := DOUBTFUL.search(OPTION.sub("", plain)):
        reason = f"is {doubtful[0][:SHOWN]!r} an option? Write --n, --w, --h, --d, --s or --l and a space"
        raise UserError(f"{where}: {reason}", Exit.DATA)
    prompt, *options = OPTION.split(plain)
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
        value = kind(text if kind is str else text.rstrip(COMMAS))
    except ValueError as error:
        raise UserError(f"{where}: --{name} {text[:SHOWN]!r} is not a number", Exit.DATA) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: --{name} {text[:SHOWN]} must be a finite number", Exit.DATA)
    least, most = RANGES.get(key, (None, None))
    if least is not None and not least <= value <= most:
        wanted = f"at least {least}" if value < least else f"at most {most:g}"
        raise UserError(f"{where}: --{name} {text[:SHOWN]} must be {wanted}", Exit.DATA)
    return key, value


def plain_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as they are drawn: without the web UIs' <lora:…>. UserError (exit 2) if nothing is left."""
    plain = []
    for prompt in prompts:
        settings = dict(prompt.settings)
        if "negative_prompt" in settings:
            settings["negative_prompt"] = without_lora_tags(settings["negative_prompt"])
        text = without_lora_tags(prompt.text)
        if not text:
            reason = "holds nothing but names of LoRAs; --lora_path says what is drawn with"
            raise UserError(f"the prompt {prompt.text[:SHOWN]!r} {reason}", Exit.USAGE)
        plain.append(Prompt(text, settings))
    return plain


def texts_of(prompts: Sequence[Prompt], negative: str | None) -> list[str]:
    """Every text that these prompts have read, negative ones too."""
    own = (prompt.settings.get("negative_prompt") for prompt in prompts)
    return [text for text in (*(prompt.text for prompt in prompts), negative, *own) if text]
