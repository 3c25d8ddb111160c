"""A checkpoint becomes the adapter: the files that a run which ended there would have written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
from adapted import weights_in
from conftest import EVERY_KIND
from safetensors import safe_open
from safetensors.torch import load_file

import generate_megaman
import megaman_lora
from megaman.common.console import UserError
from megaman.common.output_folder import OutputLock
from megaman.config.train import read_config
from megaman.lora.load import read_adapter
from megaman.training import adoption

FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "megaman_lora.safetensors",
    "pytorch_lora_weights.safetensors",
    "megaman_lora.json",
    "README.md",
}


def adopt(output: Path, wanted: str) -> Path:
    """The command's; returns lora_weights/."""
    cfg, chosen = read_config(["--output_dir", str(output), "--adopt", wanted])
    megaman_lora.main(cfg, chosen)
    return output / "lora_weights"


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def tensors_in(folder: Path) -> dict[str, dict[str, bytes]]:
    return {
        path.relative_to(folder).as_posix(): {
            key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()
        }
        for path in folder.rglob("*.safetensors")
    }


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The output folder of a run of four steps, with checkpoints after two and four."""
    return shutil.copytree(finished, tmp_path / "run")


@EVERY_KIND
@pytest.mark.parametrize(
    "flags", [[], ["--use_dora", "--use_rslora", "--ema_decay", "0.9"]], ids=["lora", "dora"]
)
def test_it_writes_what_a_run_that_ended_there_would_have_written(
    train: Callable[..., Path], tmp_path: Path, more_flags: list[str], flags: list[str]
) -> None:
    steady = ("--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--validation_steps", "2", *flags)
    steady += ("--text_encoder_stop", "1") if more_flags else ()
    ended = train(*steady, "--max_train_steps", "2", "--output_dir", str(tmp_path / "ended"))
    longer = train(*steady)
    last = bytes_in(longer)
    adopted = adopt(longer.parent, "step-000002")
    assert tensors_in(adopted) == tensors_in(ended)
    assert bytes_in(adopted).keys() == bytes_in(ended).keys()
    assert bytes_in(adopted)["adapter_config.json"] == bytes_in(ended)["adapter_config.json"]
    with_total = bytes_in(ended)["README.md"].replace(b"max_train_steps | 2", b"max_train_steps | 4")
    assert bytes_in(adopted)["README.md"] == with_total
    again = adopt(longer.parent, "latest")  # the end of the run, to the byte: nothing is lost by adopting
    assert bytes_in(again) == last
    (longer.parent / "checkpoints" / "step-000002" / "state.safetensors").unlink()  # as time goes on
    half = adopt(longer.parent, "2")
    for name in ("megaman_lora.safetensors", *(["pytorch_lora_weights.safetensors"] if not flags else [])):
        assert tensors_in(half)[name] == tensors_in(ended)[name]
    exact, rounded = (weights_in(each) for each in (ended, half))
    assert exact.keys() == rounded.keys()
    assert read_adapter(half).digest == read_adapter(ended).digest


def test_the_strength_stands_in_sidecar_and_card_and_is_drawn_with(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = adopt(run, "2:0.75")
    assert {path.name for path in weights.iterdir()} == FILES
    assert json.loads((weights / "megaman_lora.json").read_text())["preferred weight"] == 0.75
    card = (weights / "README.md").read_text(encoding="utf-8")
    assert "<lora:megaman_lora:0.75>" in card
    assert "The strength to draw with is **0.75**" in card
    assert "pipe.set_adapters(pipe.get_active_adapters(), 0.75)" in card
    assert "0.75" in capsys.readouterr().err
    with safe_open(weights / "megaman_lora.safetensors", framework="pt") as opened:
        told = opened.metadata()
    assert json.loads(told["megaman"])["preferred_weight"] == 0.75
    assert told["ss_steps"] == "2"
    assert json.loads(told["ss_dataset_dirs"]) == {"1_mega man": {"n_repeats": 1, "img_count": 6}}


def test_drawing_takes_the_strength_unless_another_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = adopt(run, "2:0.75")

    def drawn_at(*flags: str) -> list[float]:
        output = tmp_path / f"drawn{len(flags)}"
        few = ["--prompts", "mega man", "--num_inference_steps", "1", "--lora_path", str(weights), *flags]
        generate_megaman.generate(generate_megaman.read_config([*few, "--output_dir", str(output)]))
        lines = (output / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["lora_scale"] for line in lines]

    assert drawn_at() == [0.75]
    assert ", scale 0.75 (" in capsys.readouterr().err
    assert drawn_at("--lora_scale", "1") == [1.0]
    adopt(run, "4")
    assert drawn_at("--compare_base") == [0.0, 1.0]


def test_the_sample_of_the_step_is_its_preview(run: Path) -> None:
    weights = adopt(run, "step-000004")
    sample = run / "samples" / "step-000004" / "01.png"
    assert (weights / "megaman_lora.preview.png").read_bytes() == sample.read_bytes()
    assert not (adopt(run, "2") / "megaman_lora.preview.png").exists()  # of which none was drawn


# ---------------------------------------------------------------- what was there


def test_the_earlier_adapter_is_kept_once_whatever_is_adopted_after(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = bytes_in(run / "lora_weights")
    adopt(run, "2")
    assert bytes_in(run / "lora_weights.001") == last
    assert f"the earlier lora_weights is kept as {run / 'lora_weights.001'}" in capsys.readouterr().err
    early = bytes_in(run / "lora_weights")
    for _ in range(2):
        adopt(run, "4")
        adopt(run, "2")
    assert bytes_in(run / "lora_weights") == early
    kept = sorted(path.name for path in run.glob("lora_weights*"))
    assert kept == ["lora_weights", "lora_weights.001", "lora_weights.002"]
    assert [bytes_in(run / name) for name in kept[1:]] == [last, early]
    assert not list(run.glob(".lora*"))


def test_what_the_user_has_put_there_is_never_lost(run: Path) -> None:
    adopt(run, "4")
    (run / "lora_weights" / "notes.txt").write_text("mine", encoding="utf-8")
    (run / "lora_weights" / "megaman_lora.json").write_text('{"preferred weight": 0.6}', encoding="utf-8")
    adopt(run, "2")
    found = list(run.glob("lora_weights.*/notes.txt"))
    assert [path.read_text(encoding="utf-8") for path in found] == ["mine"]
    assert "0.6" in (found[0].parent / "megaman_lora.json").read_text(encoding="utf-8")
    shutil.copytree(found[0].parent, run / "lora_weights", dirs_exist_ok=True)
    shutil.copytree(run / "lora_weights", run / "lora_weights.007")
    before = bytes_in(run / "lora_weights")
    adopt(run, "4")  # what was there is kept twice now, since not all of it is ours
    assert bytes_in(run / "lora_weights.002") == bytes_in(run / "lora_weights.007") == before


def test_a_run_that_never_ended_gets_its_adapter(run: Path) -> None:
    shutil.rmtree(run / "lora_weights")
    assert read_adapter(adopt(run, "2")).digest
    assert not list(run.glob("lora_weights.*"))


RESUMED = ("--resume_from_checkpoint", "latest")


def test_a_resumed_run_keeps_the_adapter_that_was_adopted_and_says_so(
    train: Callable[..., Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    adopt(output, "2:0.75")
    chosen = bytes_in(output / "lora_weights")
    weights = train(*RESUMED)  # nothing is left to train: it writes what its end had written
    assert bytes_in(weights) == bytes_in(output / "lora_weights.001") == bytes_in(finished / "lora_weights")
    assert f"the earlier lora_weights is kept as {output / 'lora_weights.002'}" in capsys.readouterr().err
    assert bytes_in(output / "lora_weights.002") == chosen
    again = (*RESUMED, "--max_train_steps", "5")
    assert bytes_in(train(*again)).keys() == chosen.keys() | {"megaman_lora.preview.png"}
    assert len(list(output.glob("lora_weights*"))) == 3  # of its own earlier end nothing is kept


def test_an_adopted_end_of_before_is_kept_by_a_resume_too(
    train: Callable[..., Path], finished: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    longer = (*RESUMED, "--max_train_steps", "5")
    train(*longer)
    adopt(output, "4")  # as the run's own first end had written it
    train(*longer)
    assert bytes_in(output / "lora_weights.002") == bytes_in(finished / "lora_weights")


@pytest.mark.parametrize(
    ("file", "content", "is_kept"),
    [
        ("megaman_lora.json", '{"preferred weight": 0.6}', True),
        ("megaman_lora.json", "{", True),
        ("megaman_lora.safetensors", "another's", True),
        ("notes.txt", "mine", False),  # it stays where it is
    ],
)
def test_what_somebody_has_changed_in_an_adapter_outlives_a_resume(
    train: Callable[..., Path], finished: Path, tmp_path: Path, file: str, content: str, is_kept: bool
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    (output / "lora_weights" / file).write_text(content, encoding="utf-8")
    train(*RESUMED)
    assert (output / "lora_weights.001").is_dir() == is_kept
    place = "lora_weights.001" if is_kept else "lora_weights"
    assert (output / place / file).read_text(encoding="utf-8") == content


@pytest.mark.parametrize("at", ["lora.save.write_companions", "training.adoption._put_in_place"])
def test_the_earlier_one_is_whole_if_it_dies_or_fails(
    run: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    last = bytes_in(run / "lora_weights")

    class Died(BaseException):
        """As a kill: no handler of ours sees it."""

    def die(*_: Any) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(f"megaman.{at}", die)
        with pytest.raises(Died):
            adopt(run, "4:0.5")
    assert bytes_in(run / "lora_weights") == last
    weights = adopt(run, "2")  # what is left of the first try is no hindrance, and is not taken over
    assert {path.name for path in weights.iterdir()} == FILES  # not step 4's preview
    assert json.loads((weights / "megaman_lora.json").read_text())["preferred weight"] == 1.0
    assert not list(run.glob(".lora*"))


def test_a_disk_that_refuses_the_new_name_gives_the_old_one_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, honest = bytes_in(run / "lora_weights"), Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == adoption.PARTIAL:
            raise OSError(28, "No space left on device")
        return honest(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space"):
        adopt(run, "2")
    assert bytes_in(run / "lora_weights") == last
    assert not list(run.glob("lora_weights.*"))


# ---------------------------------------------------------------- what is named, and what is refused


def test_every_way_to_name_a_checkpoint_means_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run / "checkpoints" / "step-000002"
    monkeypatch.chdir(folder.parent)
    means = [
        ("step-000002", run), ("2", run), ("000002", run), (str(folder), run), (f"{folder}/", run),
        (str(folder), Path("./megaman_lora_output")), ("./step-000002", Path("megaman_lora_output")),
    ]  # fmt: skip
    choices = [adoption.choice_of(wanted, output) for wanted, output in means]
    assert {(choice.folder.resolve(), choice.strength) for choice in choices} == {(folder, None)}
    strong = [adoption.choice_of(f"{wanted}:1.25", output) for wanted, output in means]
    assert {(choice.folder.resolve(), choice.strength) for choice in strong} == {(folder, 1.25)}
    assert adoption.choice_of("latest", run).step == 4


@pytest.mark.parametrize(
    ("wanted", "complaint", "code"),
    [
        ("step-000003", "no checkpoint 'step-000003'; there are step-000002, step-000004", 7),
        ("best", "no checkpoint 'best'; there are", 7),
        ("2:strong", "'strong' must be a strength, a number above 0, such as 0.8", 2),
        ("2:0", "'0' must be a strength", 2),
        ("2:nan", "'nan' must be a strength", 2),
        ("/nowhere/checkpoints/step-000002", "belongs to the run in /nowhere", 2),
    ],
)
def test_what_is_not_there_is_one_line(run: Path, wanted: str, complaint: str, code: int) -> None:
    before = bytes_in(run)
    with pytest.raises(UserError, match=complaint) as error:
        adopt(run, wanted)
    assert error.value.exit_code == code
    assert bytes_in(run) == before


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("adapter.safetensors", "adapter.safetensors is damaged"),
        ("manifest.json", "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused(run: Path, file: str, complaint: str) -> None:
    before = bytes_in(run / "lora_weights")
    path = run / "checkpoints" / "step-000002" / file
    whole = bytearray(path.read_bytes())
    whole[-10] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match=complaint) as error:
        adopt(run, "2")
    assert error.value.exit_code == 7
    assert bytes_in(run / "lora_weights") == before


def test_a_damaged_state_leaves_the_small_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "step-000002" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert adopt(run, "2").is_dir()
    assert "state.safetensors is damaged; its small adapter, in half precision" in capsys.readouterr().err


def test_a_run_in_progress_is_left_alone(run: Path) -> None:
    lock = OutputLock(run).sign()
    with pytest.raises(UserError, match="in use by process") as error:
        adopt(run, "2")
    lock.close()
    assert error.value.exit_code == 7


def test_a_folder_without_a_run_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: holds no run of ours \(training_config.json\)") as error:
        adopt(tmp_path / "nothing", "2")
    assert error.value.exit_code == 7
    assert not (tmp_path / "nothing").exists()


def test_the_command_wants_no_pictures_and_no_further_flags(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    adopting = ["megaman_lora.py", "--adopt", "2:0.9", "--output_dir", str(run)]
    assert commands.exit_code_of(commands.training, adopting, monkeypatch) == 0
    assert not (tmp_path / "megaman_images").exists()
    said = capsys.readouterr().err
    assert "is the adapter of step 2 now, to be drawn at strength 0.9" in said
    assert f"next: python generate_megaman.py --lora_path {run / 'lora_weights'}" in said
    assert commands.exit_code_of(commands.training, [*adopting, "--lora_rank", "4"], monkeypatch) == 2
    assert "--adopt trains nothing: leave --lora_rank out" in capsys.readouterr().err
