"""Flags from dataclasses: both spellings, presets, configuration files, and one line for every mistake."""

import argparse
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from megaman.common.console import Exit, UserError, is_text, leave

FACTS = "facts"  # of a field's metadata
LARGEST_SEED = 2**63  # torch takes no more
TRUE = ("true", "t", "yes", "y", "1", "on")
FALSE = ("false", "f", "no", "n", "0", "off")
PRECISIONS = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16"} | dict.fromkeys(
    ("fp32", "float32", "full", "none"), "no"
)  # other spellings of --mixed_precision
NEAR = 0.8  # how alike a misspelling is to a flag's name: below, a hint misleads


Publish = Literal["whole", "name", "never"]


@dataclass(frozen=True)
class Facts:
    """What is known of a flag beside its name, type and default."""

    help: str
    least: float = -math.inf  # the numbers that it takes
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    multiple_of: int = 1  # of a whole number
    spellings: Mapping[str, str] = field(default_factory=dict)  # others of a choice that mean the same
    remark: str = ""  # on a value that is no number
    is_square: bool = False  # 512,512 is 512
    is_path: bool = False  # ~ is the user's home
    published: Publish | None = None  # in the adapter's files; a path never, unless it says otherwise
    is_free: bool = False  # a resumed run may change it
    is_of_one_command: bool = False  # no setting of the run
    before: Any = None  # what runs did that were made before it was a setting; untold where nothing changes

    def __post_init__(self) -> None:
        usual: Publish = "never" if self.is_path else "whole"
        object.__setattr__(self, "published", self.published or usual)

    @property
    def wanted(self) -> str:
        """The numbers that it takes, in words."""
        ends = (self.least, self.most, self.above, self.below)
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"between {self.least:g} and {self.most:g}"
        words = ("0 or more" if self.least == 0 else "at least {}", "at most {}", "above {}", "below {}")
        told = [f"a multiple of {self.multiple_of}"] if self.multiple_of > 1 else []
        told += [
            word.format(_short(end)) for word, end in zip(words, ends, strict=True) if math.isfinite(end)
        ]
        return " and ".join(told) or "a finite number"

    def wanted_of(self, number: float) -> str:
        """What to say of a number that it doesn't take: infinity is above 0 too."""
        is_finite = isinstance(number, int) or math.isfinite(number)
        return self.wanted if is_finite else ", ".join(dict.fromkeys(("a finite number", self.wanted)))

    def takes(self, number: float) -> bool:
        """Whether the number is in range; NaN and infinity never are."""
        is_inside = self.least <= number <= self.most and self.above < number < self.below
        return (
            is_inside and math.isfinite(number) and (self.multiple_of == 1 or number % self.multiple_of == 0)
        )


def _short(number: float) -> str:
    """2^63 for 9223372036854775808."""
    power = int(number).bit_length() - 1
    return f"2^{power}" if number > 2**20 and number == 2**power else f"{number:g}"


def flag(default: Any, help: str, **facts: Any) -> Any:
    """A field of a dataclass of settings. facts: those of Facts. A mutable default is copied."""
    metadata = {FACTS: Facts(help, **facts)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def facts_of(settings: type) -> dict[str, Facts]:
    """The facts of every flag of a dataclass, by name."""
    return {each.name: each.metadata[FACTS] for each in fields(settings)}


def require(holds: bool, complaint: str) -> None:
    """UserError (exit 2) with the complaint unless it holds."""
    if not holds:
        raise UserError(complaint, Exit.USAGE)


def check_numbers(settings: Any) -> None:
    """UserError (exit 2) unless every number of the settings is one that its flag takes."""
    for name, facts in facts_of(type(settings)).items():
        value = getattr(settings, name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int | float) and not isinstance(each, bool):
                require(facts.takes(each), f"--{name} {each}: must be {facts.wanted_of(each)}")


# ---------------------------------------------------------------- the command line
@dataclass(frozen=True)
class Flag:
    """A flag of the command line and a key of configuration files: one field of a dataclass."""

    name: str
    kind: type  # of one value
    choices: tuple[str, ...] | None
    takes_several: bool
    default: Any
    facts: Facts

    @classmethod
    def of(cls, field: Field[Any], hint: Any) -> "Flag":
        """The flag that a field with this type stands for."""
        kind = hint
        several = False
        if get_origin(kind) in (UnionType, Union):  # X | None
            kind = next(each for each in get_args(kind) if each is not NoneType)
        if get_origin(kind) is list:
            kind = get_args(kind)[0]
            several = True
        choices = get_args(kind) if get_origin(kind) is Literal else None
        default = field.default if field.default_factory is MISSING else field.default_factory()
        return cls(field.name, str if choices else kind, choices, several, default, field.metadata[FACTS])

    def of_code(self, value: Any) -> Any:
        """A default's or a preset's value as `read` would give it: 32 of a float is 32.0, and lists are
        nobody else's.
        """
        if isinstance(value, list):
            return [self.of_code(each) for each in value]
        return float(value) if self.kind is float and isinstance(value, int) else value

    def read(self, text: str) -> Any:
        """The value that a word of a command line or a file means. ArgumentTypeError if it means none."""
        if self.kind is bool:
            return _yes_or_no(text)
        if self.kind in (int, float):
            return self._number(_side_of(text) if self.facts.is_square else text)
        if self.choices:
            spelling = re.sub(r"[ -]+", "_", text.strip().lower())
            meant = self.facts.spellings.get(spelling, spelling)
            return meant if meant in self.choices else text
        return _expanded(text) if self.facts.is_path else text

    def _number(self, text: str) -> Any:
        try:
            return self.kind(text)
        except ValueError as error:
            wanted = "a whole number" if self.kind is int else "a number"
            remark = self.facts.remark and f": {self.facts.remark}"
            raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}{remark}") from error


def _side_of(text: str) -> str:
    """512 of 512,512 and 512x512, as other trainers write a square. ArgumentTypeError of another shape."""
    sides = re.split(r"[,x]", text.replace(" ", ""))
    if len(sides) > 1 and len(set(sides)) > 1:
        reason = "give one side, of a square of that many pixels; pictures keep their shape (--crop bucket)"
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}")
    return sides[0]


def _expanded(path: str) -> str:
    """The path with the user's home for its ~, which shells leave behind = and in quotes. ArgumentTypeError
    if nothing is named: an unset variable of a shell would mean the current folder.
    """
    if not path.strip():
        raise argparse.ArgumentTypeError("is empty; name a path, or leave the flag out")
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise argparse.ArgumentTypeError(f"{path!r}: no such user's home; a name with ~ is written ./{path}")
    is_name = str(Path(expanded)).startswith("~")  # ./~x, whose ./ a Path drops
    return os.path.abspath(expanded) if is_name else expanded


def _yes_or_no(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in TRUE


class _OneLineParser(argparse.ArgumentParser):
    """Leaves with one line for a mistake, and hands out just what was given, no defaults."""

    def __init__(
        self, groups: Mapping[str, Sequence[Flag]], description: str, elsewhere: Mapping[str, str]
    ) -> None:
        """elsewhere: what flags of other programs are called here."""
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        for title, flags in groups.items():
            group = self.add_argument_group(title)
            for flag in flags:
                group.add_argument(*_spellings(flag.name), **_settings(flag))
        self.elsewhere = elsewhere
        self.spellings = [
            word for flags in groups.values() for flag in flags for word in _spellings(flag.name)
        ]

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.split()[0].split("=")[0]
            hint = _hint(flag, self.spellings, self.elsewhere)
            message = f"{flag}: unknown flag{hint}; --help lists all"
        leave(message.removeprefix("argument "), Exit.USAGE)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _settings(flag: Flag) -> dict[str, Any]:
    default = str(flag.default).replace("%", "%%")
    settings: dict[str, Any] = {"help": f"{flag.facts.help} (default: {default})", "type": flag.read}
    if flag.choices:
        settings["choices"] = flag.choices
    if flag.takes_several:
        settings["nargs"] = "+"
    if flag.kind is bool:
        settings |= {"nargs": "?", "const": True}
    return settings


class Parsed(NamedTuple):
    """The settings, and the names of those that stand on the command line and in the configuration file."""

    values: dict[str, Any]
    given: set[str]
    in_file: set[str]

    @property
    def chosen(self) -> set[str]:
        """The names of the settings that the user chose, not by a preset."""
        return self.given | self.in_file


def parse_flags(
    groups: Sequence[type[Any]],
    argv: Sequence[str],
    *,
    description: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    either_or: frozenset[str] = frozenset(),
    elsewhere: Mapping[str, str] | None = None,
) -> Parsed:
    """The value of every field of the dataclasses, and where it comes from.

    Command line > --config FILE > --preset > default. Of the settings in `either_or`, which say the same
    thing, one source may give one, and it silences those of the sources below. A mistake is one line and
    exit code 2.
    """
    flags = {group.title: _flags_of(group) for group in groups}
    known = {flag.name: flag for group in flags.values() for flag in group}
    names = elsewhere or {}
    given = vars(_OneLineParser(flags, description, names).parse_args(argv))
    preset = {
        name: known[name].of_code(value)
        for name, value in (presets or {}).get(given.get("preset", ""), {}).items()
    }
    file = _read_config(given["config"], known, names) if "config" in given else {}
    values = {flag.name: flag.of_code(flag.default) for flag in known.values()}
    for source in (preset, file, given):
        rivals = either_or & source.keys()
        if len(rivals) > 1:
            raise UserError(f"--{' and --'.join(sorted(rivals))} contradict each other; give one", Exit.USAGE)
        if rivals:
            values |= {name: known[name].of_code(known[name].default) for name in either_or}
        values |= source
    _refuse_unwritable(values)
    return Parsed(values, set(given), set(file))


def _flags_of(group: type) -> list[Flag]:
    hints = get_type_hints(group)
    return [Flag.of(field, hints[field.name]) for field in fields(group)]


def _refuse_unwritable(values: Mapping[str, Any]) -> None:
    """Half characters (a terminal in another encoding) and NUL would fail later, in a tokenizer or a path."""
    for key, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not is_text(text):
                raise UserError(f"--{key}: holds a character that is no text; type it as UTF-8", Exit.USAGE)


# ---------------------------------------------------------------- configuration files
_LOADERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}


def _read_config(path: str, known: Mapping[str, Flag], elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """The settings that a file gives. UserError (exit 2) that names the file and the key."""
    suffix = Path(path).suffix
    if suffix not in _LOADERS:
        raise UserError(f"--config {path}: the name must end in .json, .toml or .yaml", Exit.USAGE)
    try:
        values = _LOADERS[suffix](Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}; save it as UTF-8"
        raise UserError(f"--config {path}: {reason}", Exit.USAGE) from error
    except OSError as error:
        reason = str(error.strerror).lower()
        raise UserError(f"--config {path}: can't be read ({reason})", Exit.USAGE) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}", Exit.USAGE) from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold settings, a name and a value each", Exit.USAGE)
    settings: dict[str, Any] = {}
    for key, value in ((str(key).replace("-", "_"), value) for key, value in values.items()):
        if key in ("config", "preset"):
            raise UserError(
                f"--config {path}: a file holds settings; give --{key} on the command line", Exit.USAGE
            )
        if key not in known:
            hint = _hint(key, known, elsewhere).replace("--", "")
            raise UserError(f"--config {path}: unknown key {key!r}{hint}", Exit.USAGE)
        if value == [] or (value is None and known[key].default is not None):
            raise UserError(f"{path}: {key} has no value; give one, or leave the line out", Exit.USAGE)
        if value is not None:
            settings[key] = _typed(value, known[key], path)
    return settings


def _typed(value: Any, flag: Flag, path: str) -> Any:
    """A file's value, read as if it stood on the command line: PyYAML takes 1e-4 for a text."""
    if flag.facts.is_square and isinstance(value, list) and all(each == value[0] for each in value):
        value = value[0]  # [512, 512], as other trainers write a square
    if flag.kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    several = value if isinstance(value, list) else [value]
    try:
        if any(isinstance(each, list | dict) for each in several) or (value is several) > flag.takes_several:
            raise argparse.ArgumentTypeError(f"takes {'texts' if flag.takes_several else 'one value'}")
        read = [flag.read(str(each)) for each in several]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{path}: {flag.name}: {error}", Exit.USAGE) from error
    for each in read:
        if flag.choices and each not in flag.choices:
            choices = ", ".join(flag.choices)
            raise UserError(
                f"{path}: {flag.name}: invalid choice: {each!r} (choose from {choices})", Exit.USAGE
            )
    return read if flag.takes_several else read[0]


def _hint(word: str, known: Collection[str], elsewhere: Mapping[str, str]) -> str:
    """What an unknown flag or key may be meant as: what other programs call so, else a near spelling."""
    if ours := elsewhere.get(word.lstrip("-").replace("-", "_")):
        return f" (here it is {ours})" if ours.startswith("--") else f" ({ours})"
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=NEAR)
    return f" (did you mean {near[0]}?)" if near else ""
