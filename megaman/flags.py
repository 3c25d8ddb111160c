"""Flags from dataclasses: both spellings, presets, configuration files, and one line for every mistake."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from megaman.errors import USAGE, UserError, leave


def parse_flags(
    groups: Sequence[type],
    argv: Sequence[str],
    *,
    description: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], set[str]]:
    """The value of every field of the dataclasses, and the names that the user chose (command line or
    --config, not a preset).

    Command line > --config FILE > --preset > default. A mistake ends the process with one line and exit code
    2.
    """
    parser = _parser(groups, description)
    first = vars(parser.parse_args(argv))
    preset, config = first.get("preset"), first.get("config")
    tokens = _tokens((presets or {}).get(preset, {})) if preset else []
    chosen = _names(argv)
    if config is not None:
        values = _read_config(Path(config), known={field.name for group in groups for field in fields(group)})
        if "preset" in values and preset is None:
            raise UserError(
                f"{config}: a configuration file holds settings, not a preset; use --preset "
                f"{values['preset']}",
                USAGE,
            )
        parser.source = f"{config}: "
        parser.parse_args(_tokens(values))  # its mistakes are reported under its name
        parser.source = ""
        tokens += _tokens({key: value for key, value in values.items() if not _overridden(key, chosen)})
        chosen |= values.keys()
    return vars(parser.parse_args([*tokens, *argv])), chosen


def _overridden(key: str, chosen: set[str]) -> bool:
    """Steps and epochs say the same thing: the command line's choice of one silences the file's other."""
    return key in chosen or (
        key in ("max_train_steps", "num_train_epochs")
        and bool({"max_train_steps", "num_train_epochs"} & chosen)
    )


def _parser(groups: Sequence[type], description: str) -> Any:
    from transformers import HfArgumentParser  # half a second, and no torch

    class OneLineParser(HfArgumentParser):
        source = ""

        def error(self, message: str) -> NoReturn:
            unknown = message.removeprefix("unrecognized arguments: ")
            if unknown != message:
                flag = unknown.split()[0].split("=")[0]
                message = (
                    f"{flag}: unknown flag{_suggestion(flag, self._option_string_actions)}; --help lists all"
                )
            leave(f"{self.source}{message.removeprefix('argument ')}", USAGE)

    return OneLineParser(groups, description=description, allow_abbrev=False)


def _tokens(values: Mapping[str, Any]) -> list[str]:
    """The settings as they would stand on a command line."""
    tokens: list[str] = []
    for key, value in values.items():
        if isinstance(value, (list, tuple)):
            tokens += [f"--{key}", *map(str, value)] if value else []
        elif value is not None:
            tokens.append(f"--{key}={value}")
    return tokens


def _names(argv: Sequence[str]) -> set[str]:
    return {token[2:].split("=")[0].replace("-", "_") for token in argv if token.startswith("--")}


def _read_config(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: can't be read ({error})", USAGE) from error
    try:
        if path.suffix == ".toml":
            values = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            raise UserError(f"--config {path}: the name must end in .json, .toml or .yaml", USAGE)
    except ValueError as error:  # json's and tomllib's
        raise UserError(f"--config {path}: {_first_line(error)}", USAGE) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise UserError(f"--config {path}: {_first_line(error)}", USAGE) from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold settings, a name and a value each", USAGE)
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in values:
        if key not in known:
            raise UserError(f"--config {path}: unknown key {key!r}{_suggestion(key, known)}", USAGE)
    return values


def _suggestion(word: str, known: Sequence[str] | set[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
