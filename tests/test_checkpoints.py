"""Checkpoints: complete or absent, small adapters for good, state for the newest."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaman.adapters import read_adapter
from megaman.checkpoints import save_checkpoint
from megaman.files import check_writable, moved_aside, replacing, sha256_of


def test_a_checkpoint_holds_adapter_moments_and_sums_and_old_ones_lose_only_their_state(
    train: Callable[..., Path],
) -> None:
    checkpoints = train("--save_steps", "1", "--checkpoints_total_limit", "2").parent / "checkpoints"
    names = [path.name for path in sorted(checkpoints.iterdir())]
    assert names == ["step-000001", "step-000002", "step-000003", "step-000004"]
    assert [(checkpoints / name / "state.safetensors").exists() for name in names] == [
        False,
        False,
        True,
        True,
    ]
    for number, name in enumerate(names, 1):
        assert read_adapter(checkpoints / name / "adapter.safetensors").metadata["steps"] == number
        manifest = json.loads((checkpoints / name / "manifest.json").read_text())
        assert manifest["step"] == number
        for file, digest in manifest["sha256"].items():
            if (checkpoints / name / file).exists():
                assert sha256_of(checkpoints / name / file) == digest
    state = load_file(checkpoints / names[-1] / "state.safetensors")
    moments = {key.split(".")[0] for key in state if not key.startswith("base_model")}
    assert moments == {"exp_avg", "exp_avg_sq", "step"}
    assert {state[key].item() for key in state if key.startswith("step.")} == {4}


def test_a_failing_save_leaves_the_older_checkpoint_and_no_half_one(
    adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = read_adapter(adapter_folder)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    save_checkpoint(tmp_path, 1, adapter, optimizer, keep=3)
    monkeypatch.setattr(
        "megaman.checkpoints.sha256_of", lambda _: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, adapter, optimizer, keep=3)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000001"]


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
    assert moved_aside(folder) is None
    for number in ("001", "002"):
        folder.mkdir()
        assert moved_aside(folder) is None  # empty: nothing to keep
        (folder / "file").touch()
        assert moved_aside(folder) == tmp_path / f"out.{number}"


def test_the_write_probe_makes_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
