"""A run that is killed again and again ends as the undisturbed one does; the long form is the script itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_50.py"


def test_five_kills_one_in_each_phase_change_nothing(tmp_path):
    """Start-up, training, saving, publishing, validation: everything of the last checkpoint is equal bit for bit."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--steps", "80", "--seed", "1", "--adapter", "--async"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--keep", str(tmp_path / "runs"), "--out", str(report)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(report.read_text())
    assert found["verdict"] == "5 of 5"
    assert found["different"] == []
    assert set(found["by_phase"]) == {"start-up", "training", "saving", "publishing", "validation"}
    assert found["resumes_from_a_checkpoint"] >= 1
