"""The walls of the house: who may import whom, and how large a room, a function, a nest may grow."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    path.stem: path
    for path in (ROOT / "megaman").rglob("*.py")
    if "tiny_sd" not in path.parts and path.stem != "__init__"
}
SCRIPTS = {path.stem: path for path in ROOT.glob("*.py")}
SOURCES = [*SCRIPTS.values(), *ROOMS.values()]
LINES = {"megaman_lora": 900, "generate_megaman": 500}


def imports_of(path: Path) -> set[str]:
    """Our own modules that a file imports, at the top, in a function or lazily."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("megaman.")
        ):
            found.add(node.value)
    return {name.split(".")[2] if name.count(".") > 1 else name for name in found}


def test_no_room_imports_a_script_and_no_script_the_other() -> None:
    for path in ROOMS.values():
        assert not imports_of(path) & SCRIPTS.keys(), path
    assert "generate_megaman" not in imports_of(SCRIPTS["megaman_lora"])
    assert "megaman_lora" not in imports_of(SCRIPTS["generate_megaman"])


def test_imports_between_rooms_make_no_circle() -> None:
    edges = {name: imports_of(path) & ROOMS.keys() - {name} for name, path in ROOMS.items()}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert not edges


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_file_and_its_functions_keep_their_budget(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= LINES.get(path.stem, 450)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < (90 if node.name == "train" else 45), node.name
            assert len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) <= 7, (
                node.name
            )  # and self
            assert node.returns is not None or node.name == "__init__", node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_loads_a_pickle(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not names & {"pickle", "shelve", "marshal"}
    assert not calls & {"torch.load", "torch.save"}


def test_the_top_level_is_the_contract() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the project can't be told from what is the user's")
    listed = subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.split("/")[0] for name in listed.splitlines()} <= {
        *("megaman_lora.py", "generate_megaman.py", "megaman", "megaman_images", "tests"),
        *(
            "requirements_megaman_lora.txt",
            "README.md",
            "README.zh-TW.md",
            ".ci",
            "pyproject.toml",
            ".gitignore",
        ),
    }
