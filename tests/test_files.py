"""Files on disks that people have: some know no fsync of a folder, no locks, no permissions."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaman.common import files
from megaman.common.console import UserError
from megaman.common.files import path_from, save_tensors, write_text
from megaman.common.output_folder import OutputLock

fcntl = pytest.importorskip("fcntl")


def refusing(number: int) -> Callable[..., None]:
    """A system call that this file system does not know."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture
def poor_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Takes fsync, locks and permissions away from every disk."""
    monkeypatch.setattr(files, "_told", set())

    def take_away(number: int) -> None:
        monkeypatch.setattr(os, "fsync", refusing(number))
        monkeypatch.setattr(os, "chmod", refusing(number))
        monkeypatch.setattr(fcntl, "flock", refusing(number))

    return take_away


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.EPERM, errno.ENOSYS])
def test_a_run_goes_on_where_the_disk_lacks_a_courtesy_and_says_so_once(
    train: Callable[..., Path],
    poor_disk: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    poor_disk(number)
    weights = train("--max_train_steps=2", "--save_steps=1", "--validation_steps=2")
    assert (weights / "megaman_lora.safetensors").is_file()
    said = capsys.readouterr().err
    for what in ("fsync", "locks", "permissions"):
        assert said.count(f"note: the disk has no {what} ({os.strerror(number)})") == 1


def test_a_full_disk_is_no_missing_courtesy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSPC, errno.EIO):
        monkeypatch.setattr(os, "fsync", refusing(number))
        with pytest.raises(OSError) as caught:
            write_text(tmp_path / "a.txt", "x")
        assert caught.value.errno == number
        assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_process_has_is_refused_as_ever(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path).sign()
    with pytest.raises(UserError, match="in use by process"):
        OutputLock(tmp_path)
    lock.close()


def test_tensors_of_any_layout_come_back_as_they_were(tmp_path: Path) -> None:
    grid = torch.arange(6.0).reshape(2, 3)
    save_tensors({"turned": grid.T, "one": torch.tensor(3.0)}, tmp_path / "a.safetensors", {})
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["turned"], grid.T)
    assert read["one"].shape == ()


def test_the_way_to_a_place_is_told_unless_it_cannot_be_written(tmp_path: Path) -> None:
    assert path_from(tmp_path / "gallery", tmp_path / "out" / "lora") == "../out/lora"
    assert path_from(tmp_path, tmp_path) == "."
    assert path_from(tmp_path / "gallery", tmp_path / "\udcff" / "lora") == ""
