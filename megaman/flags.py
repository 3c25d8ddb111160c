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
    either_or: frozenset[str] = frozenset(),
) -> tuple[dict[str, Any], set[str]]:
    """The value of every field of the dataclasses, and the names that the user chose (not by a preset).

    Command line > --config FILE > --preset > default. Of the settings in `either_or`, which say the same
    thing, one source may give one, and it silences those of the sources below. A mistake is one line and
    exit code 2.
    """
    parser = _parser(groups, description)
    first = vars(parser.parse_args(argv))
    preset, config = first.get("preset"), first.get("config")
    sources: list[Mapping[str, Any]] = [(presets or {}).get(preset, {})] if preset else []
    if config is not None:
        values = _read_config(Path(config), {field.name for group in groups for field in fields(group)})
        parser.source = f"{config}: "
        defaults = {key: parser.get_default(key) for key in values}
        _refuse_empty(values, defaults, parser.source)
        parser.parse_args(_tokens(values))  # its mistakes are reported under its name
        parser.source = ""
        sources.append({key: value for key, value in values.items() if value is not None})
    named = _names(argv)
    sources.append(dict.fromkeys(named))
    for above, source in enumerate(sources, 1):
        if len(either_or & source.keys()) > 1:
            raise UserError(f"--{' and --'.join(sorted(either_or))} say the same thing; give one", USAGE)
        if any(either_or & later.keys() for later in sources[above:]):
            sources[above - 1] = {key: value for key, value in source.items() if key not in either_or}
    tokens = [token for source in sources[:-1] for token in _tokens(source)]
    chosen = named.union(*(source.keys() for source in sources[1 if preset else 0 : -1]))
    final = vars(parser.parse_args([*tokens, *argv]))
    _refuse_unwritable(final)
    return final, chosen


def _refuse_empty(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        if value == [] or (value is None and defaults[key] is not None):
            raise UserError(f"{where}{key} has no value; give one, or leave the line out", USAGE)


def _refuse_unwritable(values: Mapping[str, Any]) -> None:
    """Half characters (a terminal in another encoding) and NUL would fail later, in a tokenizer or a path."""
    for key, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (
                "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)
            ):
                raise UserError(f"--{key}: holds a character that is no text; type it as UTF-8", USAGE)


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
        if key in ("config", "preset"):
            raise UserError(
                f"--config {path}: a file holds settings; give --{key} on the command line", USAGE
            )
        if key not in known:
            raise UserError(f"--config {path}: unknown key {key!r}{_suggestion(key, known)}", USAGE)
    return values


def _suggestion(word: str, known: Sequence[str] | set[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
