"""Checkpoints: complete or absent, small adapters for good, state for the newest."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaman.common.console import UserError
from megaman.common.files import replacing
from megaman.common.output_folder import check_output, check_writable, claim, move_aside
from megaman.lora.load import read_adapter
from megaman.training.checkpoints import (
    MANIFEST,
    STATE_FILE,
    Checkpoint,
    find_checkpoint,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


def test_a_checkpoint_holds_adapter_moments_and_sums_and_old_ones_lose_only_their_state(
    train: Callable[..., Path],
) -> None:
    checkpoints = train("--save_steps", "1", "--checkpoints_total_limit", "2").parent / "checkpoints"
    names = [path.name for path in sorted(checkpoints.iterdir())]
    assert names == ["step-000001", "step-000002", "step-000003", "step-000004"]
    assert [(checkpoints / name / STATE_FILE).exists() for name in names] == [False, False, True, True]
    for number, name in enumerate(names, 1):
        assert read_adapter(checkpoints / name / "adapter.safetensors").metadata["steps"] == number
    progress = read_checkpoint(checkpoints / names[-1])
    assert (progress.step, progress.settings["lora_rank"]) == (4, 4)
    assert {key.partition(".")[0] for key in progress.tensors} == {
        "parameter",
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    assert {value.item() for key, value in progress.tensors.items() if key.startswith("step.")} == {4}


def some_progress(step: int) -> Checkpoint:
    tensors = {"parameter.a": torch.arange(6.0), "exp_avg.a": torch.zeros(6)}
    return Checkpoint(step, {"seed": 0}, {"pictures": "x"}, {"batch": 1, "scaler": None}, 2, tensors)


def test_a_failing_save_leaves_the_older_checkpoint_and_no_half_one(
    adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = read_adapter(adapter_folder)
    save_checkpoint(tmp_path, some_progress(1), adapter, keep=3)
    with monkeypatch.context() as patch:
        patch.setattr(
            "megaman.training.checkpoints.sha256_of", lambda _: (_ for _ in ()).throw(OSError(28, "No space"))
        )
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, some_progress(2), adapter, keep=3)
    assert latest_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, some_progress(3), adapter, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]  # no leftovers


def damages(whole: bytes) -> dict[str, bytes | None]:
    """The file gone, empty, halved, and with one bit turned at forty places."""
    found: dict[str, bytes | None] = {"missing": None, "empty": b"", "halved": whole[: len(whole) // 2]}
    rng = random.Random(len(whole))
    for place in rng.sample(range(len(whole)), 40):
        flipped = bytes([whole[place] ^ (1 << rng.randrange(8))])
        found[f"bit at {place}"] = whole[:place] + flipped + whole[place + 1 :]
    return found


@pytest.mark.parametrize("name", ["adapter.safetensors", STATE_FILE, MANIFEST])
def test_every_damage_to_every_file_is_seen_and_the_older_checkpoint_taken_aloud(
    adapter_folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, some_progress(step), read_adapter(adapter_folder), keep=3)
    assert latest_checkpoint(tmp_path).step == 2
    file = tmp_path / "step-000002" / name
    for what, damaged in damages(file.read_bytes()).items():
        whole = file.read_bytes()
        file.unlink() if damaged is None else file.write_bytes(damaged)
        capsys.readouterr()
        assert latest_checkpoint(tmp_path).step == 1, what
        assert re.search(rf"warning: .*step-000002 can't be resumed: .*{name}", capsys.readouterr().err), what
        with pytest.raises(UserError, match="step-000002") as error:
            find_checkpoint(str(tmp_path / "step-000002"), tmp_path)
        assert error.value.exit_code == 7
        file.write_bytes(whole)
    assert latest_checkpoint(tmp_path).step == 2


def test_where_no_checkpoint_is_whole_nothing_is_begun_in_silence(tmp_path: Path) -> None:
    for wanted in ("latest", str(tmp_path / "step-000001")):
        with pytest.raises(UserError, match="no ") as error:
            find_checkpoint(wanted, tmp_path)
        assert error.value.exit_code == 7


def test_one_folder_is_for_one_process(tmp_path: Path) -> None:
    lock, aside = claim(tmp_path / "out", fresh=True)
    assert aside is None
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}") as error:
        claim(tmp_path / "out", fresh=True)
    assert error.value.exit_code == 7
    with pytest.raises(UserError, match="in use"):
        check_output(tmp_path / "out", tmp_path / "pictures")
    lock.close()
    claim(tmp_path / "out", fresh=True)[0].close()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing in it was worth moving aside


def test_a_replacement_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_earlier_run_is_moved_to_the_first_free_number(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert move_aside(folder) is None
    for number in ("001", "002"):
        folder.mkdir()
        assert move_aside(folder) is None  # empty: nothing to keep
        (folder / "training_config.json").write_text(
            json.dumps(dict.fromkeys(("pretrained_model_name", "data_dir", "lora_rank", "lora_alpha"), 1))
        )
        assert move_aside(folder) == tmp_path / f"out.{number}"


def test_the_write_probe_makes_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
