"""The JSONL record: its form, and what survives kills, broken tails and resumes."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_automodel.components.loggers.metric_logger import MetricLogger, read_records, utc_timestamp, validation_file
from nemo_automodel.shared.errors import UserError

WRITER = """
import sys
from nemo_automodel.components.loggers.metric_logger import MetricLogger
log = MetricLogger(sys.argv[1])
step = 0
while True:
    log.log({"step": step, "loss": step / 7, "text": "x" * 500})
    print(step, flush=True)
    step += 1
"""


def test_every_finished_record_survives_kill_nine(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        finished = -1
        while finished < 300:
            finished = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        announced = [int(line) for line in writer.stdout.read().split("\n") if line]
    finished = max([finished, *announced])
    records = list(read_records(path))
    assert [record["step"] for record in records] == list(range(len(records)))
    assert len(records) >= finished + 1
    assert all(record["loss"] == record["step"] / 7 and record["text"] == "x" * 500 for record in records)


def test_numbers_that_are_not_finite_are_null_in_valid_json(tmp_path: Path) -> None:
    with MetricLogger(tmp_path / "a" / "log.jsonl") as log:
        log.log({"step": 0, "loss": float("nan"), "grad_norm": float("inf"), "lr": -0.0, "text": "zwölf\n"})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (tmp_path / "a" / "log.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 2
    assert lines[1] == b""
    assert json.loads(lines[0], parse_constant=refuse) == {
        "step": 0,
        "loss": None,
        "grad_norm": None,
        "lr": 0.0,
        "text": "zwölf\n",
    }


def test_the_file_is_continued_and_a_torn_last_line_removed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with MetricLogger(path) as log:
        log.log({"step": 0})
    torn = b'{"step": 1, "text": "' + b"y" * 10_000
    path.write_bytes(path.read_bytes() + torn)
    assert [record["step"] for record in read_records(path)] == [0]
    with MetricLogger(path) as log:
        log.log({"step": 1})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_file_of_one_torn_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step"')
    with MetricLogger(path) as log:
        log.log({"step": 0})
    assert path.read_text() == '{"step": 0}\n'


@pytest.mark.parametrize(("last", "kept"), [(-1, []), (2, [0, 1, 2]), (9, [0, 1, 2, 3, 4])])
def test_records_of_later_steps_are_dropped_on_resume(tmp_path: Path, last: int, kept: list[int]) -> None:
    path = tmp_path / "log.jsonl"
    with MetricLogger(path) as log:
        for step in range(5):
            log.log({"step": step, "loss": 1 / 3})
        log.truncate_after(last)
        log.log({"step": last + 1, "loss": 2 / 3})
    records = list(read_records(path))
    assert [record["step"] for record in records] == [*kept, last + 1]
    assert [record["loss"] for record in records] == [1 / 3] * len(kept) + [2 / 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\nhello\n')
    with pytest.raises(UserError, match=r"log\.jsonl`, line 2 is not a JSON object"):
        list(read_records(path))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/log\.jsonl` cannot be written") as caught:
        MetricLogger(tmp_path / "file" / "log.jsonl")
    assert "\n" not in str(caught.value)


def small_files(limit: int) -> None:
    """Let every write beyond ``limit`` bytes of a file fail, as a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_a_full_disk_costs_no_record_once_there_is_room_again(tmp_path: Path, caplog) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    path = tmp_path / "log.jsonl"
    try:
        with MetricLogger(path) as log, caplog.at_level("INFO"):
            log.log({"step": 0, "text": "x" * 100})
            small_files(150)  # in the middle of the next record
            for step in range(1, 4):
                log.log({"step": step, "text": "x" * 100})
            assert [record["step"] for record in read_records(path)] == [0]
            assert path.stat().st_size == 150
            small_files(old[1])
            log.log({"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert [record["step"] for record in read_records(path)] == [0, 1, 2, 3, 4]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"The log `{path}` cannot be written: File too large. Free some space or set `checkpoint.checkpoint_dir` to a "
        "directory you may write to. The run goes on; its records wait until there is room.",
        f"The log `{path}` can be written again; nothing is missing.",
    ]


def test_records_that_never_found_room_fail_the_end(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from nemo_automodel.components.loggers import metric_logger
log = metric_logger.MetricLogger(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5))
log.log({"step": 0})
try:
    log.close()
except metric_logger.UserError as error:
    print(error)
log.close()
"""
    path = str(tmp_path / "log.jsonl")
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"The log `{path}` cannot be written: File too large.")


def test_timestamps_and_file_names() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", utc_timestamp())
    assert validation_file("default") == "validation.jsonl"
    assert validation_file("squad") == "validation_squad.jsonl"
    assert validation_file("a/../b c") == "validation_a_.._b_c.jsonl"
