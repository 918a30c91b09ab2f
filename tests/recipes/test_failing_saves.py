"""A disk that fails while a run saves costs that save and nothing else; signals end a run with everything saved."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from checkpoint.tiny_run import in_child
from support.recipes import recipe_config, set_up_recipe

from nemo_automodel.components.checkpoint.layout import complete_checkpoints
from nemo_automodel.components.config.loader import load_yaml_config
from nemo_automodel.components.config.run_safely import run_safely
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction


class Limited(TrainFinetuneRecipeForNextTokenPrediction):
    """Lets files grow no further than a limit from a step on; -1 is no limit."""

    limits: dict[int, int]

    def train_step(self, batches):
        limit = self.limits.get(self.schedule.step - 1)
        if limit is not None:
            self.checkpointer.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return super().train_step(batches)


@pytest.fixture
def make_config(tmp_path, model_dirs, squad_dir):
    def make(run="run", validates=False, **overrides):
        config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / run, **overrides)
        if validates:
            config["validation_dataset"] = {**config["dataset"], "split": "validation"}
        return config

    return make


def records(run_dir, name="training"):
    return [json.loads(line) for line in (Path(run_dir) / f"{name}.jsonl").read_text().splitlines()]


def in_process_of_its_own(tmp_path, config, limits=None) -> tuple[int, str]:
    """Train as the command line does, forked; return exit status and output."""

    def work():
        output = os.open(tmp_path / "output", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        logging.getLogger().handlers = [logging.StreamHandler(sys.stderr)]

        def train():
            recipe = set_up_recipe(config, tmp_path / "forked.yaml")
            if limits is not None:
                recipe.__class__, recipe.limits = Limited, limits
            recipe.run_train_validation_loop()

        return run_safely(train)

    code, status = in_child(work)
    return code or status, (tmp_path / "output").read_text()


def test_a_save_that_fails_is_made_up_for_by_the_next(make_config, set_up, tmp_path):
    """From step 2 to 4 no file can be larger than 700 bytes: the save at step 3 and some records fail."""
    schedule = {"step_scheduler__max_steps": 8, "step_scheduler__ckpt_every_steps": 2}
    set_up(make_config("whole", **schedule)).run_train_validation_loop()
    status, output = in_process_of_its_own(tmp_path, make_config("cut", **schedule), {2: 700, 5: -1})
    assert status == 0, output
    run_dir = tmp_path / "cut"
    assert "epoch_0_step_3` was not saved; earlier ones are untouched." in output
    assert "The run goes on, and the next save tries again." in output
    names = [path.name for path in complete_checkpoints(run_dir)]
    assert names == ["epoch_0_step_1", "epoch_0_step_5", "epoch_0_step_7"]
    assert not list(run_dir.glob("*.reserving-*"))
    assert [r["step"] for r in records(run_dir)] == list(range(8))  # no record was lost either
    assert [r["loss"] for r in records(run_dir)] == [r["loss"] for r in records(tmp_path / "whole")]


@pytest.mark.parametrize("is_async", [False, True])
def test_only_a_last_save_that_fails_is_an_error(make_config, tmp_path, is_async):
    config = make_config(step_scheduler__max_steps=4, step_scheduler__ckpt_every_steps=2, checkpoint__is_async=is_async)
    status, output = in_process_of_its_own(tmp_path, config, {2: 20_000})
    assert status == 2, output
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"error: The checkpoint `{tmp_path / 'run' / 'epoch_0_step_3'}` was not saved")
    assert "File too large" in last
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["epoch_0_step_1"]


def test_saving_beside_training_changes_no_number(make_config, set_up, tmp_path):
    schedule = {"step_scheduler__max_steps": 6, "step_scheduler__ckpt_every_steps": 1}
    for name, is_async in (("plain", False), ("beside", True)):
        set_up(make_config(name, validates=True, checkpoint__is_async=is_async, **schedule)).run_train_validation_loop()
    plain, beside = (
        [[r["loss"], r["grad_norm"], r["lr"]] for r in records(tmp_path / name)] for name in ("plain", "beside")
    )
    assert plain == beside
    for step in range(6):
        weights = [
            tmp_path / name / f"epoch_0_step_{step}" / "model" / "model.safetensors" for name in ("plain", "beside")
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture
def set_up(tmp_path):
    return lambda config: set_up_recipe(config, tmp_path / "config.yaml")


def test_a_disk_too_small_for_all_checkpoints_is_said_before_step_0(make_config, set_up, tmp_path, monkeypatch, caplog):
    free = resource.getpagesize() * 256  # a megabyte; a checkpoint of the tiny model takes 0.7
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free, "total": usage.f_blocks})())
    set_up(make_config(step_scheduler__max_steps=10, step_scheduler__ckpt_every_steps=2))
    assert "This run will hold up to 5 checkpoints of about 0.54 MiB, but the disk of" in caplog.text
    assert "has room for 1." in caplog.text


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_exit_status_0(make_config, tmp_path, number):
    config = make_config(step_scheduler__max_steps=100_000, step_scheduler__num_epochs=100_000)
    log = tmp_path / "run" / "training.jsonl"

    def send():
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(int((tmp_path / "pid").read_text()), number)

    sender = threading.Thread(target=send)
    sender.start()
    status, output = in_process_of_its_own(tmp_path, config)
    sender.join()
    assert status == 0, output
    last = records(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "LATEST").resolve().name == f"epoch_{last['epoch']}_step_{last['step']}"
    assert f"{signal.Signals(number).name} received" in output
    assert ("Press Ctrl-C again to stop at once without it." in output) == (number == signal.SIGINT)


class StopsWhileLoading(TrainFinetuneRecipeForNextTokenPrediction):
    """Gets a signal while its model is loaded, with a helper of its own that was forked before."""

    number = signal.SIGTERM

    def build_model(self):
        reader, writer = os.pipe()
        self.helper = os.fork()
        if self.helper == 0:
            os.write(writer, b"!")  # Python forgets a signal that arrives while it forks
            time.sleep(20)
            os._exit(0)
        os.read(reader, 1)
        signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_the_run_in_one_line(make_config, tmp_path, capfd, number):
    config = make_config(step_scheduler__max_steps=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    recipe = StopsWhileLoading(load_yaml_config(tmp_path / "config.yaml"))
    recipe.number = number
    handlers = {other: signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    assert run_safely(recipe.setup) == 128 + number
    assert {other: signal.getsignal(other) for other in handlers} == handlers
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"{number.name} received before the first step: nothing was trained, so there is nothing to save, and "
        "checkpoints of before are untouched. The same command starts again."
    )
    os.kill(recipe.helper, number)  # which the helper does not take for its own
    assert os.waitstatus_to_exitcode(os.waitpid(recipe.helper, 0)[1]) == -number
    assert not complete_checkpoints(tmp_path / "run")


class StopsWhileValidating(TrainFinetuneRecipeForNextTokenPrediction):
    """Gets SIGTERM in the middle of a validation pass."""

    num_batches = 0

    def validate(self, name):
        engine, number = self.engine, len(list(self.val_loaders[name])) // 2
        evaluate = engine.evaluate

        def counting(batch):
            self.num_batches += 1
            if self.num_batches == number:
                signal.raise_signal(signal.SIGTERM)
            return evaluate(batch)

        engine.evaluate = counting
        try:
            return super().validate(name)
        finally:
            engine.evaluate = evaluate


def test_a_signal_breaks_off_a_validation_and_saves_that_step(make_config, set_up, tmp_path, caplog):
    config = make_config(validates=True, step_scheduler__max_steps=9, step_scheduler__val_every_steps=3)
    recipe = set_up(config)
    recipe.__class__ = StopsWhileValidating
    recipe.run_train_validation_loop()
    num_batches = len(list(recipe.val_loaders["default"]))
    assert recipe.num_batches == num_batches // 2 < num_batches
    assert "The validation after step 2 is broken off and has no result." in caplog.text
    assert (tmp_path / "run" / "LATEST").resolve().name == "epoch_0_step_2"
    assert not (tmp_path / "run" / "validation.jsonl").exists()
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1, 2]
