"""The walls of the house: who may import whom, and how large a room, a function, a nest may grow."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import run_script

from megaman.common.console import REQUIRED

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "common": set(),
    "config": {"common"},
    "data": {"common", "config"},
    "kernels": set(),
    "model": {"common", "config", "kernels"},
    "lora": {"common", "config", "kernels"},
    "training": {"common", "config", "data", "kernels", "model", "lora"},
    "generation": {"common", "config", "data", "kernels", "model", "lora"},
}  # whom each may import beside its own; the scripts all, and nobody the scripts
WITHOUT_TORCH = ("common", "config")
LONGEST_CHAIN, ROOMS_TO_WRITE_A_FILE = 9, 14
ROOMS = {
    f"{path.parent.name}.{path.stem}": path
    for floor in FLOORS
    for path in (ROOT / "megaman" / floor).glob("*.py")
    if path.stem != "__init__"
}
SCRIPTS = {path.stem: path for path in ROOT.glob("*.py")}
SOURCES = {**SCRIPTS, **ROOMS}
LINES = {"megaman_lora": 800, "generate_megaman": 450}
LIBRARIES_OF_OURS = {"megaman", *SCRIPTS}


@cache
def tree_of(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """Everything that a file imports, at its head or in a function, by its dotted name."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def rooms_of(path: Path) -> set[str]:
    """The rooms that a file imports."""
    names = {name.removeprefix("megaman.") for name in imports_of(path) if name.startswith("megaman.")}
    return {name for name in names if name in ROOMS}


ARROWS = {name: rooms_of(path) for name, path in ROOMS.items()}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_what_its_floor_may(name: str) -> None:
    floor = name.split(".")[0]
    assert {target.split(".")[0] for target in ARROWS[name]} <= FLOORS[floor] | {floor}
    libraries = {imported.split(".")[0] for imported in imports_of(ROOMS[name])}
    assert not libraries & SCRIPTS.keys()
    assert floor not in WITHOUT_TORCH or not libraries & {"torch", "diffusers", "transformers", "peft"}


def test_the_scripts_do_not_import_each_other() -> None:
    for name, path in SCRIPTS.items():
        assert not imports_of(path) & (SCRIPTS.keys() - {name})


def test_a_room_has_one_address_and_a_name_of_its_own() -> None:
    names = [name.split(".")[1] for name in ROOMS]
    assert sorted(names) == sorted(set(names))
    for package in (ROOT / "megaman").rglob("__init__.py"):
        assert len(tree_of(package).body) == 1, package  # its docstring, and no second door


def test_imports_make_no_circle_and_no_long_chain() -> None:
    left, lengths = dict(ARROWS), {}
    while left:
        ready = {name for name, targets in left.items() if targets <= lengths.keys()}
        assert ready, f"a circle among {sorted(left)}"
        lengths |= {name: 1 + max((lengths[target] for target in left[name]), default=0) for name in ready}
        left = {name: targets for name, targets in left.items() if name not in ready}
    assert max(lengths.values()) <= LONGEST_CHAIN


def closure_of(name: str) -> set[str]:
    """The other rooms that are loaded with one."""
    found, open_ends = set(), {name}
    while open_ends:
        found |= open_ends
        open_ends = {target for room in open_ends for target in ARROWS[room]} - found
    return found - {name}


def test_writing_an_adapter_loads_few_rooms_and_pages_know_no_gallery() -> None:
    assert len(closure_of("lora.save")) <= ROOMS_TO_WRITE_A_FILE
    assert closure_of("common.html") == {"common.console", "common.signals"}


def test_every_library_that_must_be_there_is_known_as_required() -> None:
    imported = {name.split(".")[0] for path in SOURCES.values() for name in imports_of(path)}
    optional = {"xformers", "bitsandbytes", "prodigyopt"}  # imported only where a flag asks for it
    indirect = {"tensorboard"}  # torch imports it
    assert imported - sys.stdlib_module_names - LIBRARIES_OF_OURS - optional | indirect == REQUIRED


@pytest.mark.parametrize("floor", WITHOUT_TORCH)
def test_the_lowest_floors_load_no_torch(floor: str) -> None:
    rooms = ", ".join(f"megaman.{name}" for name in ROOMS if name.startswith(f"{floor}."))
    result = run_script("-c", f"import sys, {rooms}; print('torch' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


# ---------------------------------------------------------------- budgets
DEEPER = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef, ast.Match)


def nests(node: ast.AST, depth: int = 0) -> Iterator[int]:
    """How deep the blocks in a function lie; an elif lies as deep as its if."""
    yield depth
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
            yield from nests(child, depth + (isinstance(child, DEEPER) and not is_elif))


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_and_its_functions_keep_their_budget(name: str) -> None:
    path = SOURCES[name]
    assert path.read_text(encoding="utf-8").count("\n") <= LINES.get(name, 450)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            arguments = [each.arg for each in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            assert node.end_lineno - node.lineno < 45, node.name
            assert max(nests(node)) <= 3, node.name
            assert len(arguments) - (arguments[:1] in (["self"], ["cls"])) <= 6, node.name
            assert node.returns is not None or node.name == "__init__", node.name


def kind_of(value: ast.expr) -> object:
    """What an expression does, without its arguments: twins do the same."""
    if isinstance(value, ast.Call):
        return value.func.attr if isinstance(value.func, ast.Attribute) else ast.unparse(value.func)
    if isinstance(value, ast.Name | ast.Attribute | ast.Subscript):
        return "a part of something"
    return "a constant" if isinstance(value, ast.Constant | ast.UnaryOp) else type(value)


@pytest.mark.parametrize("name", SOURCES)
def test_unrelated_assignments_never_share_a_line(name: str) -> None:
    """a, b = f(x), [] hides two statements. Twins (f(x), f(y)), parts of a thing and constants are one."""
    assignments = (node for node in ast.walk(tree_of(SOURCES[name])) if isinstance(node, ast.Assign))
    for node in assignments:
        if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
            assert len({kind_of(value) for value in node.value.elts}) == 1, f"line {node.lineno}"


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_loads_a_pickle(name: str) -> None:
    tree = tree_of(SOURCES[name])
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not names & {"pickle", "shelve", "marshal"}
    assert not calls & {"torch.load", "torch.save"}


def test_the_top_level_is_the_contract() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the project can't be told from what is the user's")
    listed = subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    scripts = "megaman_lora.py generate_megaman.py requirements_megaman_lora.txt"
    others = "megaman megaman_images tests README.md README.zh-TW.md .ci pyproject.toml .gitignore"
    assert {name.split("/")[0] for name in listed.splitlines()} <= {*scripts.split(), *others.split()}
