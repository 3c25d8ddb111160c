"""A small seeded share of the long study of faults: kills, signals, full disks. bench/bench_faults.py does it
all.
"""

import json
import os
from pathlib import Path

import pytest
from conftest import run_script

GOOD = {"runs", "died", "chains", "limits", "disks", "exit 6", "ended before the signal", "skipped"}


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")
def test_no_fault_loses_what_was_saved_or_changes_the_final_bytes(tmp_path: Path) -> None:
    part = ["--share", "0.015", "--steps", "13"]
    result = run_script("tests/bench/bench_faults.py", "--work", str(tmp_path), *part)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    faults = {name: found for name, found in counts.items() if isinstance(found, dict)}
    assert len(faults) == 6
    for name, found in faults.items():
        assert not {what: n for what, n in found.items() if n and what not in GOOD}, (name, result.stderr)
    assert faults["kill -9 at random times"]["died"] >= 1
    assert faults["kill -9 at named phases"]["died"] == faults["kill -9 at named phases"]["runs"]
    assert faults["disk full (RLIMIT_FSIZE)"]["exit 6"] >= 1
