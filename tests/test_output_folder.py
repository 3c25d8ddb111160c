"""Only what is ours by its content is deleted, renamed or overwritten; links stay where they were laid."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import commands
import pytest
from PIL import Image

import generate_megaman
import megaman_lora
from megaman.common import console, output_folder
from megaman.common.console import UserError, shell_quoted
from megaman.common.output_folder import RECORDED, OutputLock, check_output, claim, is_link
from megaman.config.parser import facts_of
from megaman.config.train import TrainConfig

OURS = json.dumps({"pretrained_model_name": "a", "data_dir": "b", "lora_rank": 1, "lora_alpha": 1})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lay(folder: Path, texts: Mapping[str, str]) -> dict[str, bytes]:
    """Writes the files and returns them as `contents` does."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return contents(folder)


# ---------------------------------------------------------------- training's folder
@pytest.mark.parametrize(
    "texts",
    [
        {"training_config.json": '{"model": "somebody else\'s"}', "model.bin": "x"},
        {"training_config.json": "[1]"},
        {"training_config.json": "no JSON"},
        {"dataset.html": "<h1>my page</h1>"},
        {"notes.txt": "mine"},
        {".lock": "poetry's"},
    ],
)
def test_a_run_begins_beside_no_file_that_is_not_ours(tmp_path: Path, texts: Mapping[str, str]) -> None:
    before = lay(tmp_path / "out", texts)
    with pytest.raises(UserError) as caught:
        check_output(tmp_path / "out", tmp_path / "pictures")
    assert caught.value.exit_code == console.Exit.STATE
    assert contents(tmp_path / "out") == before


def test_a_dry_run_overwrites_no_page_of_another(train_flags: list[str], tmp_path: Path) -> None:
    before = lay(tmp_path / "out", {"dataset.html": "<h1>my page</h1>"})
    with pytest.raises(UserError, match="is no page of ours"):
        megaman_lora.show_dataset(megaman_lora.read_config([*train_flags, "--dry_run"])[0])
    assert contents(tmp_path / "out") == before


def test_a_link_is_followed_and_what_it_leads_to_stays(train: Callable[..., Path], tmp_path: Path) -> None:
    target, link = tmp_path / "big disk" / "runs", tmp_path / "out"
    link.symlink_to(target, target_is_directory=True)  # leads nowhere yet
    for _ in range(3):
        weights = train("--max_train_steps=1", "--validation_steps=1")
        (target / "notes.txt").write_text("mine")
    assert link.is_symlink()
    assert link.resolve() == target.resolve()
    assert (weights / "megaman_lora.safetensors").is_file()
    kept = [target.with_name(f"runs.00{number}") for number in (1, 2)]
    for earlier in kept:
        assert (earlier / "lora_weights" / "megaman_lora.safetensors").is_file()
        assert output_folder.holds_run(earlier)
    assert sorted(path.name for path in target.parent.iterdir()) == ["runs", "runs.001", "runs.002"]
    assert (target / "notes.txt").read_text() == "mine"


def test_a_link_that_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    lock = OutputLock(tmp_path / "link").sign()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        claim(tmp_path / "target", fresh=True)
    lock.close()


def test_a_link_is_told_from_a_folder_below_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert is_link(tmp_path / "link")
    assert is_link(tmp_path / "real" / ".." / "link")
    assert not is_link(tmp_path / "link" / "below")
    monkeypatch.chdir(tmp_path / "link")
    assert not is_link(Path("below"))
    assert not is_link(Path("/"))


# ---------------------------------------------------------------- the gallery's folder
@pytest.mark.parametrize(
    "texts",
    [
        {"index.html": "<h1>my site</h1>", "style.css": "mine"},
        {"metadata.jsonl": '{"file_name": "a.png", "text": "mega man"}\n', "a.png": "x"},
        {"metadata.jsonl": "no JSON at all\n"},
        {"index.html": "<h1>my site</h1>"},
        {"megaman_01.txt": "mega man", "megaman_01.png": "x"},
        {"training_config.json": OURS, "metrics.jsonl": ""},
        {".lock": "poetry's"},
    ],
)
@pytest.mark.parametrize("further", [[], ["--gallery_only"]], ids=["drawing", "gallery_only"])
def test_pictures_go_beside_no_file_that_is_not_ours(
    adapter_folder: Path, tmp_path: Path, texts: Mapping[str, str], further: list[str]
) -> None:
    before = lay(tmp_path / "site", texts)
    drawing = [] if further else [f"--lora_path={adapter_folder}"]
    cfg = generate_megaman.read_config([f"--output_dir={tmp_path / 'site'}", *drawing, *further])
    with pytest.raises(UserError) as caught:
        generate_megaman.generate(cfg)
    assert caught.value.exit_code == console.Exit.STATE
    assert contents(tmp_path / "site") == before


def test_a_page_put_into_a_gallery_of_ours_is_not_overwritten(tmp_path: Path) -> None:
    lay(tmp_path, {".lock": "megaman 1", "index.html": "<h1>my page</h1>"})
    with pytest.raises(UserError, match="is no page of ours"):
        generate_megaman.generate(
            generate_megaman.read_config([f"--output_dir={tmp_path}", "--gallery_only"])
        )
    assert (tmp_path / "index.html").read_text() == "<h1>my page</h1>"


def test_nothing_is_drawn_among_the_pictures_that_were_trained_on(adapter_folder: Path) -> None:
    pictures = adapter_folder.parents[1] / "pictures"
    for folder in (pictures, pictures / "drawn"):
        flags = [f"--lora_path={adapter_folder}", f"--output_dir={folder}"]
        with pytest.raises(UserError) as caught:
            generate_megaman.generate(generate_megaman.read_config(flags))
        assert caught.value.exit_code == (console.Exit.STATE if folder == pictures else console.Exit.USAGE)
    assert not (pictures / "drawn").exists()


# ---------------------------------------------------------------- paths in flags and in commands
def test_another_programs_lock_with_a_number_is_not_ours(tmp_path: Path) -> None:
    lay(tmp_path / "code", {".lock": "4711"})
    with pytest.raises(UserError, match="is no lock of ours"):
        OutputLock(tmp_path / "code")
    assert (tmp_path / "code" / ".lock").read_text() == "4711"
    lay(tmp_path / "run", {".lock": "4711", "training_config.json": json.dumps(dict.fromkeys(RECORDED, 1))})
    OutputLock(tmp_path / "run").sign().close()  # a run of before had no mark in it
    assert (tmp_path / "run" / ".lock").read_text().startswith("megaman ")


def test_a_cache_within_the_output_folder_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for cache in (tmp_path / "out", tmp_path / "out" / "cache"):
        with pytest.raises(UserError, match="must not lie in --output_dir") as error:
            megaman_lora.read_config(["--output_dir", str(tmp_path / "out"), "--cache_dir", str(cache)])
        assert error.value.exit_code == 2


def test_home_is_meant_by_a_tilde_wherever_a_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "c.json").write_text(json.dumps({"cache_dir": "~/cache", "output_dir": "~/not this"}))
    names = ("data_dir", "output_dir", "logging_dir", "pretrained_model_name", "resume_from_checkpoint")
    cfg, _ = megaman_lora.read_config(["--config=~/c.json", *(f"--{name}=~/my {name}" for name in names)])
    assert {name: getattr(cfg, name) for name in names} == {name: f"{tmp_path}/my {name}" for name in names}
    assert cfg.cache_dir == f"{tmp_path}/cache"
    names = ("lora_path", "base_model", "prompts_file", "output_dir")
    drawing = generate_megaman.read_config([f"--{name}=~/my {name}" for name in names])
    assert {getattr(drawing, name) for name in names} == {f"{tmp_path}/my {name}" for name in names}


def test_a_name_that_begins_with_a_tilde_is_a_name_behind_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~" / "base").mkdir(parents=True)
    cfg, _ = megaman_lora.read_config(["--pretrained_model_name", "./~/base"])
    assert Path(cfg.pretrained_model_name).expanduser() == tmp_path / "~" / "base"


def test_every_flag_that_names_a_path_is_marked_as_one() -> None:
    for config in (TrainConfig, generate_megaman.GenerateConfig):
        marked = {name for name, facts in facts_of(config).items() if facts.is_path}
        ends = (
            "_dir",
            "_path",
            "_file",
            "_model",
            "_name",
            "_from_checkpoint",
            "init_lora",
            "config",
            "caption_with",
            "judge",
            "report",
            "adopt",
        )
        assert marked == {name for name in config.__dataclass_fields__ if name.endswith(ends)}


@pytest.mark.skipif(os.name == "nt", reason="asks a POSIX shell")
@pytest.mark.parametrize(
    "name",
    ["plain", "two words", "it's", 'a "b"', "ü 猫", "$HOME`id`", "new\nline", "\x1b[31m", "-dash", "~x"],
)
def test_a_told_path_pastes_into_a_shell_as_it_stands(name: str) -> None:
    shell = shutil.which("bash") or "sh"
    told = f"printf %s {shell_quoted(name)}"
    assert told.isprintable()
    answer = subprocess.run([shell, "-c", told], capture_output=True, check=True).stdout
    assert answer.decode() in (name, f"./{name}")


def test_a_told_name_that_begins_with_a_tilde_is_not_read_as_a_users_home() -> None:
    assert "./~/x" in shell_quoted(str(Path("./~/x")))


@pytest.mark.skipif(os.name == "nt", reason="asks a POSIX shell")
def test_a_told_path_pastes_also_from_a_terminal_that_lacks_its_letters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    told = f"printf %s {shell_quoted('ü 猫')}"
    assert told == r"printf %s $'\xc3\xbc \xe7\x8c\xab'"
    answer = subprocess.run([shutil.which("bash") or "sh", "-c", told], capture_output=True, check=True)
    assert answer.stdout.decode() == "ü 猫"


def test_the_next_command_and_the_one_that_goes_on_work_in_an_odd_folder(
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "my 'odd' \"ü\" $x"
    flags = [flag for flag in train_flags if not flag.startswith("--output_dir")]
    command = ["megaman_lora.py", *flags, f"--output_dir={output}", "--max_train_steps=1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        commands.run(commands.training)
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == 0, lines
    told = next(line for line in lines if line.startswith("next: "))
    words = shlex.split(told.removeprefix("next: python "))
    assert words == ["generate_megaman.py", "--lora_path", str(output / "lora_weights")]


def test_pictures_of_another_format_are_left_alone_when_checkpoints_are_pruned(tmp_path: Path) -> None:
    from megaman.training.checkpoints import _prune, _remove

    Image.new("RGB", (2, 2)).save(tmp_path / "picture.png")
    for number in (1, 2, 3):
        lay(tmp_path / f"step-{number:06}", {"state.safetensors": "mine", "manifest.json": "{}"})
    lay(tmp_path / ".step-000009.partial", {"state.safetensors": "ours", "notes.txt": "mine"})
    _prune(tmp_path, 1, None)
    _remove(tmp_path / ".step-000009.partial")
    assert len(list(tmp_path.glob("step-*/state.safetensors"))) == 3
    assert contents(tmp_path / ".step-000009.partial") == {"notes.txt": b"mine"}


def test_a_folder_that_was_filled_after_the_check_is_not_moved(tmp_path: Path) -> None:
    before = lay(tmp_path / "out", {"thesis.txt": "mine"})
    with pytest.raises(UserError, match="no run of ours"):
        claim(tmp_path / "out", fresh=True)
    assert {name: data for name, data in contents(tmp_path / "out").items() if name != ".lock"} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_lock_makes_no_gallery_of_a_folder(adapter_folder: Path, tmp_path: Path) -> None:
    before = lay(tmp_path / "code", {".lock": "", "main.rs": "mine"})
    flags = [f"--lora_path={adapter_folder}", f"--output_dir={tmp_path / 'code'}"]
    with pytest.raises(UserError, match="no run of ours"):
        generate_megaman.generate(generate_megaman.read_config(flags))
    assert contents(tmp_path / "code") == before


def test_a_data_sets_line_among_ours_is_never_dropped(tmp_path: Path) -> None:
    ours = json.dumps(dict.fromkeys(("prompt", "seed", "file", "job", "adapter_hash"), "x"))
    text = f'{ours}\n{{"file_name": "a.png", "text": "mega man"}}\n'
    lay(tmp_path, {".lock": "megaman 1", "metadata.jsonl": text})
    with pytest.raises(UserError, match=r"its metadata\.jsonl is not ours"):
        generate_megaman.generate(
            generate_megaman.read_config([f"--output_dir={tmp_path}", "--gallery_only"])
        )
    assert (tmp_path / "metadata.jsonl").read_text() == text


def test_a_run_s_folder_may_be_the_current_one(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for _ in range(2):
        train("--max_train_steps=1", "--validation_steps=1", "--output_dir=.")
        monkeypatch.chdir(tmp_path / "run")
    assert files_of(tmp_path / "run.001") == files_of(tmp_path / "run")


def files_of(folder: Path) -> set[str]:
    """The names of the files that a run leaves."""
    return {name for name in contents(folder) if name.startswith("lora_weights")}


def test_only_our_texts_leave_a_picture(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    from megaman.generation.records import strip_metadata

    info = PngInfo()
    for key in ("parameters", "megaman", "Author"):
        info.add_text(key, "x")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    strip_metadata(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"Author": "x"}
