"""A run that is killed again and again ends as the undisturbed one does; the long form is the script itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_50.py"


def killed(tmp_path: Path, *options: str) -> dict:
    """Run the script and return its report."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), *options, "--keep", str(tmp_path / "runs"), "--out", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads(report.read_text())


def test_five_kills_one_in_each_phase_change_nothing(tmp_path):
    """Start-up, training, saving, publishing, validation: everything of the last checkpoint is equal bit for bit."""
    found = killed(tmp_path, "--kills", "5", "--steps", "80", "--seed", "1", "--adapter", "--async")
    assert found["verdict"] == "5 of 5"
    assert found["different"] == []
    assert set(found["by_phase"]) == {"start-up", "training", "saving", "publishing", "validation"}
    assert found["resumes_from_a_checkpoint"] >= 1


@pytest.mark.parametrize(
    ("data", "kills", "phases"),
    [
        ("packed", 2, {"tokenising", "start-up"}),
        ("streamed", 3, {"start-up", "training", "saving"}),
    ],
)
def test_kills_where_rows_come_in_other_ways(tmp_path, data, kills, phases):
    """Packs with the token cache half written, and a packed stream through two workers."""
    found = killed(tmp_path, "--data", data, "--kills", str(kills), "--steps", "50")
    assert found["verdict"] == f"{kills} of {kills}"
    assert set(found["by_phase"]) == phases
