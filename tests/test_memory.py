"""How freed memory is used again."""

import subprocess
import sys

import pytest
from conftest import ROOT

FAULTS_OF_FORTY_ROUNDS = """
import resource, sys, torch
from megaman.model.memory import keep_freed_memory
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone is told")
def test_freed_tensors_make_room_for_the_next_without_new_pages() -> None:
    def faults(way: str) -> int:
        command = [sys.executable, "-c", FAULTS_OF_FORTY_ROUNDS, way]
        return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < 1000 < faults("left alone")
