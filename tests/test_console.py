"""The terminal: whatever its encoding, a run's lines are printed, and never a traceback in their place."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import commands
import pytest
from conftest import ROOT, flags_of_a_run, run_script, save_pictures

from megaman.common import console


class Terminal(io.TextIOWrapper):
    """A terminal of this encoding, which raises an error for every character that it lacks."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        """All that was printed."""
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@contextlib.contextmanager
def terminal_of(encoding: str) -> Iterator[Terminal]:
    """Inside, everything is printed on a terminal of this encoding."""
    terminal = Terminal(encoding)
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        yield terminal


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "latin-1"])
def test_a_terminal_without_utf8_shows_a_whole_run(
    encoding: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "洛克人 “×”"
    root.mkdir()
    pictures = save_pictures(root / "pictures")
    (pictures / "megaman_0.txt").write_text("洛克人 · mega man … " + "robot " * 90, encoding="utf-8")

    def exit_code(command: Callable[[], object], *flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["script.py", *flags])
        with pytest.raises(SystemExit) as left:
            commands.run(command)
        return left.value.code

    training = [*flags_of_a_run(tiny_folder, pictures, root / "out"), "--max_train_steps=1"]
    drawing = [
        "--lora_path",
        str(root / "out"),
        "--output_dir",
        str(root / "drawn"),
        "--num_inference_steps=1",
    ]
    with terminal_of(encoding) as terminal:
        trained = exit_code(commands.training, *training, "--validation_prompt", "× " * 90, "--max_tokens=75")
        drawn = exit_code(commands.drawing, *drawing, "--prompts", "洛 " * 90)
        refused = exit_code(commands.training, f"--data_dir={root}/“nowhere”")
    assert (trained, drawn, refused) == (0, 0, 3), terminal.shown
    for words in ("training: 100%", "drawing: 100%", "done: open", "is cut after 75", r"\u6d1b\u514b\u4eba"):
        assert words in terminal.shown
    assert '/"nowhere": no such folder' in terminal.shown.splitlines()[-1]


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r'"a" ... - x - \xfc \u6d1b \U0001f916'),
        ("cp437", r'"a" ... · x - ü \u6d1b \U0001f916'),
        ("latin-1", r'"a" ... · × - ü \u6d1b \U0001f916'),
        ("utf-8", "“a” … · × — ü 洛 🤖"),
    ],
)
def test_what_an_encoding_lacks_is_spelled_in_what_it_has(encoding: str, shown: str) -> None:
    with terminal_of(encoding) as terminal, console.reported():
        print("“a” … · × — ü 洛 🤖")
    assert terminal.shown == f"{shown}\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
@pytest.mark.parametrize("script", ["megaman_lora.py", "generate_megaman.py"])
def test_help_is_shown_on_any_terminal(script: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    result = run_script(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--output_dir OUTPUT_DIR" in result.stdout


@pytest.mark.parametrize(
    ("running", "told"),
    [
        ("megaman_lora.py", "python generate_megaman.py"),
        ("/my tools/megaman_lora.py", "python '/my tools/generate_megaman.py'"),
        ("../generate_megaman.py", "python ../generate_megaman.py"),
        ("pytest", "python generate_megaman.py"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="quotes of POSIX")
def test_a_told_command_names_the_script_from_where_the_user_stands(
    running: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [running])
    assert console.command_of("generate_megaman.py") == told


def test_a_name_with_a_newline_does_not_break_a_line_and_each_problem_has_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.say("done: open a\nb/index.html in a browser")
    for message in ("a\nb: no such folder", ["a\nb: damaged", "c: damaged"]):
        with pytest.raises(SystemExit), console.reported():
            raise console.UserError(message, console.Exit.DATA)
    assert capsys.readouterr().err.splitlines() == [
        r"done: open a\nb/index.html in a browser",
        r"error: a\nb: no such folder",
        r"error: a\nb: damaged",
        "c: damaged",
    ]


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
@pytest.mark.parametrize("flag", ["--output_dir", "--pretrained_model_name", "--data_dir", "--init_lora"])
def test_a_link_that_leads_to_itself_is_one_line(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    argv = ["megaman_lora.py", "--preset", "demo", flag, "loop"]
    assert commands.exit_code_of(commands.training, argv, monkeypatch) in (2, 3, 4, 6)
    assert "loop: " in capsys.readouterr().err.splitlines()[-1].replace("'", "")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_run_whose_lines_nobody_reads_any_more_goes_on(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    work = f"console.say('one'); console.say('two'); open({str(tmp_path / 'made')!r}, 'w').close()"
    code = f"from megaman.common import console\nwith console.reported(): {work}"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=write, cwd=ROOT)
    os.close(write)
    assert done.returncode == 0
    assert (tmp_path / "made").is_file()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA out of memory. Tried to allocate 2.00 MiB", True),
        ("could not create a primitive", True),
        ("could not execute a primitive", True),
        ("could not create a primitive descriptor for a matmul primitive", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_want_of_memory_is_known_by_its_words(message: str, expected: bool) -> None:
    assert console.is_out_of_memory(RuntimeError(message)) == expected
    assert not console.is_out_of_memory(ValueError(message))
