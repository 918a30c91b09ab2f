"""Workers of a loader that die, hang or find a mistake end the run with one line and exit status 2."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.recipes import recipe_config, set_up_recipe
from torch.utils.data import get_worker_info

from nemo_automodel.components.datasets.config import DataloaderConfig
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from nemo_automodel.shared.errors import ConfigError, UserError

TRAIN_FT = Path(sys.modules[TrainFinetuneRecipeForNextTokenPrediction.__module__].__file__)


@pytest.fixture
def make_config(tmp_path, model_dirs, squad_dir):
    def make(**overrides):
        loader = {"shuffle": False, "num_workers": 2, **overrides.pop("loader", {})}
        return recipe_config(model_dirs("llama"), squad_dir, tmp_path / "run", dataloader=loader, **overrides)

    return make


@pytest.fixture
def run(make_config, tmp_path):
    def go(**overrides) -> None:
        set_up_recipe(make_config(**overrides), tmp_path / "config.yaml").run_train_validation_loop()

    return go


@pytest.fixture
def plant(monkeypatch):
    """Return a function that lets ``act`` happen in the worker that reads row 13 (counted from 0)."""

    def at_row_13(act) -> None:
        read = TokenizedRows.__getitems__

        def planted(self, indices):
            if get_worker_info() is not None and 13 in indices:
                act()
            return read(self, indices)

        monkeypatch.setattr(TokenizedRows, "__getitems__", planted)

    return at_row_13


def test_a_killed_worker_is_named(run, plant):
    """Rows 12 and 13 are the seventh batch, which the first of two workers makes."""
    plant(lambda: os.kill(os.getpid(), signal.SIGKILL))
    message = (
        r"^Worker 0 of `dataloader` \(process \d+\) was killed \(SIGKILL\), often because memory ran out\. The run "
        r"stops; the last checkpoint is untouched\. Use fewer workers, --dataloader\.num_workers 1, and start again to "
        r"go on\.$"
    )
    others = multiprocessing.active_children()  # of tests before this one
    with pytest.raises(UserError, match=message):
        run()
    assert set(multiprocessing.active_children()) <= set(others)


def test_a_worker_that_ends_by_itself(run, plant):
    plant(lambda: os._exit(3))
    with pytest.raises(UserError, match=r"Worker 0 of `dataloader` \(process \d+\) ended with status 3, which only"):
        run()


def test_a_hung_worker_is_named_with_its_rows(run, plant, squad_dir):
    plant(lambda: time.sleep(1000))
    message = (
        rf"^Worker 0 of `dataloader` \(process \d+\) has brought no batch for 5 s\. It was to bring {squad_dir}"
        r"/train\.jsonl line 13 and 1 more\. The run stops; the last checkpoint is untouched\. Look at what these rows "
        r"wait for \(a network drive, a lock\), read without workers, --dataloader\.num_workers 0, or wait longer, "
        r"--dataloader\.timeout 30$"
    )
    others = multiprocessing.active_children()
    with pytest.raises(UserError, match=message):
        run(loader={"timeout": 5})
    assert set(multiprocessing.active_children()) <= set(others)


def test_a_slow_worker_is_no_hung_one(run, plant):
    plant(lambda: time.sleep(1.5))
    run(loader={"timeout": 0}, step_scheduler__max_steps=4)


def test_a_hung_worker_of_a_validation(run, plant, make_config):
    plant(lambda: time.sleep(1000))
    config = make_config()
    with pytest.raises(UserError, match=r"of `validation_dataloader` \(process \d+\) has brought no batch for 5 s\."):
        run(
            loader={"num_workers": 0},
            validation_dataset={**config["dataset"], "split": "validation"},
            validation_dataloader={"num_workers": 1, "timeout": 5},
            step_scheduler__val_every_steps=1,
        )


def test_a_mistake_in_the_data_is_the_line_it_would_be_without_workers(run, plant):
    def refuse():
        raise UserError("train.jsonl line 14 has no answer. Mend it.")

    plant(refuse)
    with pytest.raises(UserError, match=r"^train\.jsonl line 14 has no answer\. Mend it\.$"):
        run()


def test_a_defect_in_a_worker_keeps_its_traceback(run, plant):
    def fail():
        raise RuntimeError("no such thing")

    plant(fail)
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker process 0"):
        run()


def test_a_negative_time():
    with pytest.raises(ConfigError, match=r"`dataloader\.timeout` is -1, but a time cannot be negative\."):
        DataloaderConfig(timeout=-1)


def _start(path: Path, output) -> subprocess.Popen:
    """Start the program as the leader of its own group of processes, as a terminal and a cluster do."""
    return subprocess.Popen(
        [sys.executable, TRAIN_FT, "-c", path], stdout=output, stderr=output, start_new_session=True
    )


def _wait_for_records(log: Path, process: subprocess.Popen, num: int) -> None:
    while not (log.exists() and log.read_text().count("\n") > num):
        assert process.poll() is None, log.parent.with_name("output").read_text()
        time.sleep(0.05)


def test_a_signal_to_all_processes_leaves_a_checkpoint(make_config, tmp_path):
    """Ctrl-C of a terminal and the signal of a cluster reach workers too; those of a resumed run start earlier."""
    config = make_config(
        step_scheduler__max_steps=100_000, step_scheduler__num_epochs=100_000, optimizer__lr=0.0, lr_scheduler=None
    )
    path, log = tmp_path / "config.yaml", tmp_path / "run" / "training.jsonl"
    path.write_text(yaml.safe_dump(config))
    for number in (signal.SIGTERM, signal.SIGINT):
        num_before = log.read_text().count("\n") if log.exists() else 0
        with (tmp_path / "output").open("w") as output:
            process = _start(path, output)
            _wait_for_records(log, process, num_before + 2)
            os.killpg(process.pid, number)
            assert process.wait(timeout=60) == 0, (tmp_path / "output").read_text()
        last = json.loads(log.read_text().splitlines()[-1])
        assert (tmp_path / "run" / "LATEST").resolve().name == f"epoch_{last['epoch']}_step_{last['step']}"
    assert "bit for bit as at the save" in (tmp_path / "output").read_text()


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, "was killed (SIGKILL)"), (signal.SIGSTOP, "brought no batch for 2 s")]
)
def test_the_program_ends_with_one_line(make_config, tmp_path, number, said):
    """A stopped process does not even answer SIGTERM; the run ends all the same."""
    config = make_config(
        loader={"timeout": 2, "num_workers": 1},
        step_scheduler__max_steps=100_000,
        step_scheduler__num_epochs=100_000,
        optimizer__lr=0.0,
        lr_scheduler=None,
    )
    config["dataloader"]["persistent_workers"] = True
    path, log = tmp_path / "config.yaml", tmp_path / "run" / "training.jsonl"
    path.write_text(yaml.safe_dump(config))
    with (tmp_path / "output").open("w") as output:
        process = _start(path, output)
        _wait_for_records(log, process, 2)
        (worker,) = _children(process.pid)
        os.kill(worker, number)
        assert process.wait(timeout=60) == 2
    written = (tmp_path / "output").read_text()
    assert written.splitlines()[-1].startswith("error: ")
    assert said in written.splitlines()[-1]
    assert "Traceback" not in written
    assert not Path(f"/proc/{worker}").exists()


def test_workers_of_an_iteration_that_fails_at_its_start_do_not_keep_the_program():
    """They ignore SIGTERM, so nothing else would end them."""
    code = (
        "from torch.utils.data import IterableDataset\n"
        "from nemo_automodel.components.datasets.config import DataloaderConfig\n"
        "from nemo_automodel.components.datasets.loader import build_dataloader\n"
        "class Rows(IterableDataset):\n"
        "    def __iter__(self): return iter([{'input_ids': [1]}] * 9)\n"
        "options = {'local_batch_size': 1, 'collate_fn': list, 'seed': 0, 'is_training': True}\n"
        "loader = build_dataloader(Rows(), DataloaderConfig(num_workers=1), **options)\n"
        "state = {'epoch': 0, 'is_finished': False, 'stream': {'_snapshot': {'_main_snapshot': {'_num_workers': 2}}}}\n"
        "loader.load_state_dict(state)\n"
        "next(iter(loader))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert done.stderr.rstrip().splitlines()[-1].partition(":")[0] in ("KeyError", "AssertionError")
