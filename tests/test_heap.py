"""What malloc keeps of freed blocks, and what it gives back to Linux."""

import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import megaman_lora
from megaman.kernels import heap, onednn

ROOT = Path(__file__).resolve().parents[1]
FAULTS_OF_FORTY_ROUNDS = """
import resource, sys, torch
from megaman.kernels.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def make():
    return [torch.ones(2_000_000) for _ in range(8)]  # 8 MB each
make(), make(), make()
before = faults()
for _ in range(40):
    make()
print(faults() - before)
"""

RESIDENT_MIB_BEFORE_AND_AFTER = """
import psutil, torch
from megaman.kernels.heap import give_back, keep_freed_memory
keep_freed_memory()
kept = [torch.ones(2_000_000) for _ in range(40)]  # 8 MB each
del kept[:-1]
for _ in range(2):
    print(psutil.Process().memory_info().rss // 2**20)
    give_back()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone is told")
def test_freed_tensors_make_room_for_the_next_without_new_pages() -> None:
    def faults(way: str) -> int:
        command = [sys.executable, "-c", FAULTS_OF_FORTY_ROUNDS, way]
        return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < 1000 < faults("left alone")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone is told")
def test_what_was_freed_goes_back_to_linux_when_asked() -> None:
    command = [sys.executable, "-c", RESIDENT_MIB_BEFORE_AND_AFTER]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    before, after = map(int, told.split())
    assert before - after > 100


def test_a_run_gives_memory_back_before_its_first_step_and_after_its_previews(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noting(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        def noted(*arguments: Any, **others: Any) -> Any:
            done.append(name)
            return real(*arguments, **others)

        monkeypatch.setattr(module, name, noted)

    noting(heap, "give_back")
    noting(megaman_lora, "forward_backward")
    noting(megaman_lora, "draw_samples")
    monkeypatch.setattr(onednn, "lay_out", lambda *_: 0)  # which gives back too
    train("--max_train_steps", "2", "--validation_steps", "2")
    order = [name for name, _ in groupby(done)]
    previews = ["draw_samples", "give_back"]
    assert order == ["give_back", *previews, "forward_backward", *previews]
