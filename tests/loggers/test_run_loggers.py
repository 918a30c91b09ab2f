"""One call a step reaches the files, the console and the trackers; trackers are read back with their own readers."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_automodel.components.loggers.config import MLflowConfig, TensorBoardConfig, WandbConfig
from nemo_automodel.components.loggers.run_loggers import RunLoggers
from nemo_automodel.components.loggers.trackers import flatten
from nemo_automodel.shared import imports
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import StepMetrics

TRAIN_KEYS = [
    "step", "epoch", "timestamp", "loss", "grad_norm", "lr", "mem", "tps", "tps_per_gpu", "num_tokens_per_step",
    "num_label_tokens", "mfu",
]  # fmt: skip
VAL_KEYS = ["step", "epoch", "timestamp", "val_loss", "lr", "num_label_tokens", "mem"]
CONFIG = {"model": {"name": "tiny", "kwargs": {"a": 1}}, "seed": 7}


def metrics(step: int) -> StepMetrics:
    return StepMetrics(
        loss=3.0 / (step + 1), grad_norm=1.0 + step, lr=1e-5 * step, num_label_tokens=10 + step, num_tokens=100,
        mem_gib=0.5, tps=1000.0,
    )  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_have_the_contracts_keys_and_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with RunLoggers(tmp_path, total_steps=2) as loggers:
        for step in range(2):
            loggers.train(step, 0, metrics(step))
        loggers.val("default", 1, 0, 1.5, 1e-5, 33, mem_gib=0.25)
        loggers.val("squad", 1, 0, math.nan, 1e-5, 44)
    train, default, squad = (
        read(tmp_path / name) for name in ("training.jsonl", "validation.jsonl", "validation_squad.jsonl")
    )
    assert [list(record) for record in train] == [TRAIN_KEYS] * 2
    assert [list(record) for record in default + squad] == [VAL_KEYS] * 2
    assert [record["loss"] for record in train] == [3.0, 1.5]
    assert train[1]["num_tokens_per_step"] == 100
    assert train[1]["num_label_tokens"] == 11
    assert (default[0]["val_loss"], default[0]["num_label_tokens"], default[0]["mem"]) == (1.5, 33, 0.25)
    assert squad[0]["val_loss"] is None
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1].startswith("step 1 | epoch 0 | loss 1.5000 | grad_norm 2.0000 | lr 1.00e-05 | mem 0.50 GiB")
    assert lines[2].startswith('[val] name "default" | step 1')
    assert lines[3].startswith('[val] name "squad" | step 1 | epoch 0 | loss nan')


def test_rates_are_divided_by_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with RunLoggers(tmp_path, total_steps=None) as loggers:
        loggers.train(0, 0, metrics(0))
    assert read(tmp_path / "training.jsonl")[0]["tps_per_gpu"] == 250.0


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with RunLoggers(tmp_path / "run", total_steps=1, tensorboard=TensorBoardConfig()) as loggers:
        loggers.truncate_after(-1)
        loggers.train(0, 0, metrics(0))
        loggers.val("default", 0, 0, 1.0, 1e-5, 1)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_repeats_no_step_in_any_file(tmp_path: Path) -> None:
    for first in (0, 2):
        with RunLoggers(tmp_path, total_steps=5) as loggers:
            loggers.truncate_after(first - 1)
            for step in range(first, 5):
                loggers.train(step, 0, metrics(step))
                loggers.val("hard", step, 0, float(first), 1e-5, 1)
    assert [record["step"] for record in read(tmp_path / "training.jsonl")] == [0, 1, 2, 3, 4]
    assert [record["val_loss"] for record in read(tmp_path / "validation_hard.jsonl")] == [0.0, 0.0, 2.0, 2.0, 2.0]


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (0, 4):  # the second process repeats step 4 and 5
        with RunLoggers(
            tmp_path, total_steps=6, tensorboard=TensorBoardConfig(), log_remote_every_steps=2, config=CONFIG
        ) as loggers:
            for step in range(first, 6):
                loggers.train(step, 0, metrics(step))
            loggers.val("default", 5, 0, 1.25, 1e-5, 33)
            loggers.val("hard", 5, 0, 2.25, 1e-5, 33)
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert loss == [(0, 3.0), (2, 1.0), (4, pytest.approx(0.6))]
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(5, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("val_loss/hard")] == [(5, 2.25)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load("\n".join(line[4:] for line in text.splitlines())) == CONFIG


def test_a_missing_package_is_one_line_with_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "is_available", lambda package: False)
    for section in ({"tensorboard": TensorBoardConfig()}, {"wandb": WandbConfig()}, {"mlflow": MLflowConfig()}):
        (name,) = section
        with pytest.raises(UserError, match=rf"The `{name}:` section .* pip install 'nemo-automodel\[{name}\]'$"):
            RunLoggers(tmp_path, total_steps=1, **section)


def test_trackers_are_not_imported_unless_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; from nemo_automodel.components.loggers.run_loggers import RunLoggers;"
        "RunLoggers(sys.argv[1], total_steps=1);"
        "print([m for m in ('torch', 'wandb', 'mlflow', 'tensorboard', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


WANDB_RUN = """
import sys
from nemo_automodel.components.loggers.config import WandbConfig
from nemo_automodel.components.loggers.run_loggers import RunLoggers
settings = WandbConfig(init_kwargs={"mode": "offline"})
with RunLoggers(sys.argv[1], total_steps=1, wandb=settings, run_name="tiny-name") as loggers:
    loggers.val("default", 0, 0, 1.25, 1e-5, 33)
"""


def test_wandb_works_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    subprocess.run([sys.executable, "-c", WANDB_RUN, str(tmp_path)], check=True, capture_output=True)
    (run_file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = run_file.read_bytes()
    assert b"val_loss" in content
    assert b"1.25" in content
    assert b"tiny-name" in content


def test_wandb_refusal_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(UserError, match=r"wandb does not start: .*no_such_argument") as caught:
        RunLoggers(tmp_path, total_steps=1, wandb=WandbConfig(init_kwargs={"mode": "offline", "no_such_argument": 1}))
    assert "\n" not in str(caught.value)


def test_mlflow_keeps_its_numbers_in_sqlite_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    settings = MLflowConfig(tags={"team": "a"}, description="why")
    for step in range(2):
        with RunLoggers(run_dir, total_steps=2, mlflow=settings, config=CONFIG, run_name="tiny") as loggers:
            loggers.train(step, 0, metrics(step))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run_dir / 'mlflow.db'}")
    run_id = (run_dir / "mlflow_run_id").read_text().strip()
    run = client.get_run(run_id)
    assert [(entry.step, entry.value) for entry in client.get_metric_history(run_id, "loss")] == [(0, 3.0), (1, 1.5)]
    assert run.data.params == {"model.name": "tiny", "model.kwargs": "{'a': 1}", "seed": "7"}
    assert (run.data.tags["team"], run.data.tags["mlflow.note.content"]) == ("a", "why")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert not (tmp_path / "mlruns").exists()


def test_mlflow_refusal_is_one_line_and_hides_the_password(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(UserError, match=r"mlflow does not start with `tracking_uri: nonsense://\*\*\*@host`") as caught:
        RunLoggers(tmp_path, total_steps=1, mlflow=MLflowConfig(tracking_uri="nonsense://me:word@host"))
    assert "\n" not in str(caught.value)


def test_a_tracker_that_fails_later_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mlflow")
    with RunLoggers(tmp_path, total_steps=2, mlflow=MLflowConfig(tracking_uri=f"sqlite:///{tmp_path}/m.db")) as loggers:
        loggers.val("a name that mlflow refuses: \N{SNOWMAN}*", 0, 0, 1.0, 1e-5, 1)
        for step in range(2):
            loggers.train(step, 0, metrics(step))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line for line in warnings if line.startswith("mlflow no longer takes numbers (")] == warnings[-1:]
    assert len(read(tmp_path / "training.jsonl")) == 2


def test_flatten_stops_at_its_depth() -> None:
    nested = {"a": {"b": {"c": 1}}, "d": 2, "e": {}}
    assert flatten(nested, 0) == nested
    assert flatten(nested, 1) == {"a.b": {"c": 1}, "d": 2, "e": {}}
    assert flatten(nested, 5) == {"a.b.c": 1, "d": 2, "e": {}}
