"""The contract's lines word by word, the log format, masking, and bars that keep out of files."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from nemo_automodel.components.loggers.console import train_line, val_line
from nemo_automodel.components.loggers.log_utils import LineFormatter, mask_secrets, setup_logging
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import StepMetrics

METRICS = StepMetrics(
    loss=2.34567, grad_norm=1.2763, lr=1.25e-5, num_label_tokens=158, num_tokens=900, mem_gib=3.456, tps=1024.126
)


def test_train_line_is_the_contracts() -> None:
    assert train_line(7, 1, METRICS, num_processes=2) == (
        "step 7 | epoch 1 | loss 2.3457 | grad_norm 1.2763 | lr 1.25e-05 | mem 3.46 GiB | tps 1024.13(512.06/gpu) | "
        "num_label_tokens 158"
    )


def test_val_line_is_the_contracts() -> None:
    assert val_line("default", 9, 0, 1.5, 1e-6, 4321) == (
        '[val] name "default" | step 9 | epoch 0 | loss 1.5000 | lr 1.00e-06 | num_label_tokens 4321'
    )


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "LOGGING_LEVEL")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=base | environment)


LOG_TWO = """
import logging
from nemo_automodel.components.loggers.log_utils import setup_logging
setup_logging()
setup_logging()
logging.getLogger("a.b").info("hello %d", 3)
logging.getLogger("a.b").warning("token hf_verysecret and key wb_verysecret")
try:
    raise ValueError("hf_verysecret")
except ValueError:
    logging.getLogger("a.b").exception("failed")
"""


def test_lines_have_the_format_and_no_secrets() -> None:
    done = run_python(LOG_TWO, HF_TOKEN="hf_verysecret", WANDB_API_KEY="wb_verysecret")
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| INFO \| a\.b \| hello 3", lines[0])
    assert lines[1].endswith("| WARNING | a.b | token *** and key ***")
    assert lines[-1] == "ValueError: ***"
    assert "verysecret" not in done.stderr
    assert done.stdout == ""


def test_level_comes_from_the_environment() -> None:
    assert "hello" not in run_python(LOG_TWO, LOGGING_LEVEL="warning").stderr
    assert "token" in run_python(LOG_TWO, LOGGING_LEVEL="30").stderr


def test_an_unknown_level_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGGING_LEVEL", "loud")
    with pytest.raises(UserError, match="LOGGING_LEVEL is `LOUD`, which is no level"):
        setup_logging()


def test_other_ranks_are_silent() -> None:
    done = run_python(LOG_TWO, RANK="1", WORLD_SIZE="2")
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("environment", "is_coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colour_switches(environment: dict[str, str], is_coloured: bool) -> None:
    assert ("\x1b[32mINFO\x1b[0m" in run_python(LOG_TWO, **environment).stderr) == is_coloured


def test_short_values_are_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a")
    assert mask_secrets("a man a plan") == "a man a plan"


def test_colour_touches_the_level_only() -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "an INFO message", None, None)
    line = LineFormatter(colour=True).format(record)
    assert line.endswith(" | \x1b[32mINFO\x1b[0m | x | an INFO message")


TRAIN_TWO = """
import logging, sys, tempfile, time
from nemo_automodel.components.loggers.log_utils import setup_logging
from nemo_automodel.components.loggers.console import progress
from nemo_automodel.components.loggers.run_loggers import RunLoggers
from nemo_automodel.shared.types import StepMetrics
setup_logging()
with progress("Tokenising", total=2) as advance:
    advance(1)
with RunLoggers(tempfile.mkdtemp(), total_steps=3) as loggers:
    for step in range(3):
        loggers.train(step, 0, StepMetrics(1.5, 1.0, 1e-5, 10, 20, 0.0, 100.0))
        if step == 1:
            loggers.val("default", step, 0, 1.25, 1e-5, 30)
            with progress("Saving", total=None) as advance:
                advance(1)
        time.sleep(0.3)
print("done")
"""


def test_without_a_terminal_there_are_plain_lines_only() -> None:
    done = run_python(TRAIN_TWO)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "Tokenising ..."
    assert [line.split(" | ", 3)[-1].split(" | loss")[0] for line in lines[1:]] == [
        "step 0 | epoch 0",
        "step 1 | epoch 0",
        '[val] name "default" | step 1 | epoch 0',
        "Saving ...",
        "step 2 | epoch 0",
    ]
    assert "\x1b" not in done.stderr


def test_on_a_terminal_log_lines_stand_above_the_bar() -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        [sys.executable, "-c", TRAIN_TWO], stdout=subprocess.PIPE, stderr=slave, env=environment, text=True
    ) as process:
        os.close(slave)
        chunks = []
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"
    os.close(master)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(chunks).decode())
    for step in range(3):
        assert f"step {step} | epoch 0 | loss 1.5000 | grad_norm 1.0000" in text
    assert '[val] name "default" | step 1' in text
    assert re.search(r"Training .*2/3 +loss 1\.5000 +100 tok/s", text)
    assert "ETA" in text
    assert "Saving" in text
    assert "Tokenising ..." not in text
