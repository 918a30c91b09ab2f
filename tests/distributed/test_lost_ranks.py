"""A process that dies, raises or hangs ends the run with one message; a signal to one ends it well."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from recipes.test_sick_runs import poisoned, poisoned_squad
from support.ranks import records, wait_for, weights
from support.recipes import lora_section

from nemo_automodel.components.checkpoint import dcp
from nemo_automodel.components.checkpoint.layout import complete_checkpoints
from nemo_automodel.components.distributed import peer_watch
from nemo_automodel.components.training.step_dump import read_dump
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.processes import LAUNCHER


def before_step(recipe, step, action):
    """Do something in a process before it trains a step."""
    inner = recipe.train_step

    def train_step(batches):
        if recipe.schedule.step - 1 == step:
            action(batches)
        return inner(batches)

    recipe.train_step = train_step


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_says_who_and_ends(make_config, train, victim):
    def arm(recipe, rank):
        if rank == victim:
            before_step(recipe, 2, lambda batches: os.kill(os.getpid(), signal.SIGKILL))

    config = make_config("run", peft=lora_section())
    pids = train.start(config, 2, arm)
    start = time.monotonic()
    statuses = wait_for(pids)
    assert time.monotonic() - start < 60  # the default clock; measured: 2 s with the start
    assert statuses[victim] == 128 + signal.SIGKILL
    assert statuses[1 - victim] == 4
    (message,) = errors(train.said("run", 1 - victim))
    assert message == (
        f"error: Lost rank {victim} (process {pids[victim]}): it was killed, or ended without a word. Where memory ran "
        "out, `dmesg` says so. Every process ends; the last checkpoint is whole."
    )
    assert [record["step"] for record in records(config)] == [0, 1]


@pytest.mark.parametrize(("victim", "teller"), [(2, 0), (0, 1)])
def test_of_three_one_speaks_for_all_that_are_left(make_config, train, victim, teller):
    def arm(recipe, rank):
        if rank == victim:
            before_step(recipe, 2, lambda batches: os.kill(os.getpid(), signal.SIGKILL))

    config = make_config("run", peft=lora_section(), step_scheduler__global_batch_size=12)
    statuses = train(config, 3, arm)
    assert statuses == [137 if rank == victim else 4 for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        said = errors(train.said("run", rank))
        assert [line.partition(" (")[0] for line in said] == ([f"error: Lost rank {victim}"] if rank == teller else [])


def test_workers_of_a_loader_do_not_hide_that_their_process_was_killed(make_config, train):
    def arm(recipe, rank):
        if rank == 1:
            before_step(recipe, 2, lambda batches: os.kill(os.getpid(), signal.SIGKILL))

    start = time.monotonic()
    assert train(make_config("run", peft=lora_section(), dataloader={"num_workers": 2}), 2, arm) == [4, 137]
    assert len(errors(train.said("run"))) == 1
    assert time.monotonic() - start < 60


def test_what_a_process_raises_is_said_once_with_its_number(make_config, train):
    def arm(recipe, rank):
        def fail(batches):
            raise UserError("row 7 is empty. Mend it.")

        if rank == 1:
            before_step(recipe, 2, fail)

    assert train(make_config("run", peft=lora_section()), 2, arm) == [2, 2]
    assert errors(train.said("run")) == ["error: rank 1: row 7 is empty. Mend it."]
    assert train.said("run", 1) == ""


def test_processes_end_when_the_command_that_started_them_is_gone(make_config, train, monkeypatch):
    monkeypatch.setenv(LAUNCHER, "1")
    config = make_config("run", peft=lora_section())
    assert train(config, 2, lambda recipe, rank: before_step(recipe, 2, lambda batches: time.sleep(2))) == [4, 4]
    assert errors(train.said("run")) == ["error: The process that started this run is gone, so the run ends."]


def test_a_process_that_hangs_is_named_when_the_clock_runs_out(make_config, train, monkeypatch):
    monkeypatch.setattr(peer_watch, "GRACE_S", 1.0)

    def arm(recipe, rank):
        if rank == 1:
            before_step(recipe, 2, lambda batches: time.sleep(3600))

    config = make_config("run", peft=lora_section(), dist_env={"timeout_minutes": 0.05})
    pids = train.start(config, 2, arm)
    assert wait_for(pids[:1]) == [4]
    (message,) = errors(train.said("run"))
    assert message.startswith(f"error: Lost rank 1 (process {pids[1]}): no answer in time (adding up counts)")
    assert wait_for(pids[1:]) == [4]  # its main thread sleeps, so its watch ends it


@pytest.fixture
def sick_rows(tmp_path):
    """Row 17 has no finite loss: of step 2, where it goes to the second process."""
    return poisoned_squad(tmp_path / "squad", 48, 17)


def poison(recipe, rank):
    poisoned(recipe)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_is_named(make_config, train, sick_rows):
    config = make_config("run", dataset__dataset_name=str(sick_rows), dataloader={"shuffle": False})
    assert train(config, 2, poison) == [2, 2]
    (message,) = errors(train.said("run"))
    assert "Step 2 is not finite (loss nan, grad_norm nan); its update was not applied. " in message
    assert f"Rows whose loss is not finite: {sick_rows / 'train.jsonl'} line 18 (id train-17). " in message
    assert "error: " not in train.said("run", 1)
    dump = read_dump(Path(config["checkpoint"]["checkpoint_dir"]) / "debug" / "step_2")
    assert [batch["input_ids"].shape[0] for batch in dump.batches] == [2, 2]  # the share of the second process
    assert dump.facts.rows[0].where == f"{sick_rows / 'train.jsonl'} line 18 (id train-17)"


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_all_processes_leave_a_sick_step_out_or_go_back_together(make_config, train, sick_rows, policy):
    settings = {
        "dataset__dataset_name": str(sick_rows),
        "dataloader": {"shuffle": False},
        "loss_guard": {"on_nonfinite": policy},
        "step_scheduler__ckpt_every_steps": 1 if policy == "rollback" else 100,
        "peft": lora_section(),
    }
    one, two = make_config("one", **settings), make_config("two", **settings)
    assert train(one, 1, poison) == [0]
    assert train(two, 2, poison) == [0, 0], train.said("two")
    for record, other in zip(records(two), records(one), strict=True):
        assert (record["loss"] or 0) == pytest.approx(other["loss"] or 0, rel=1e-6)
    assert [record["loss"] is None for record in records(two)] == [False, False, True, False, False]
    for (name, weight), other in zip(weights(two).items(), weights(one).values(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_lets_all_save_and_leave(make_config, train, told):
    def arm(recipe, rank):
        if rank == told:
            before_step(recipe, 2, lambda batches: os.kill(os.getpid(), signal.SIGTERM))

    config = make_config("run", peft=lora_section())
    assert train(config, 2, arm) == [0, 0]
    assert [record["step"] for record in records(config)] == [0, 1, 2]
    assert "SIGTERM received: this step is the last one of this session." in train.said("run")
    checkpoint = Path(config["checkpoint"]["checkpoint_dir"]) / "epoch_0_step_2"
    assert sorted(path.name for path in (checkpoint / "rng").iterdir()) == [
        "rng_global_rank_0.pt",
        "rng_global_rank_1.pt",
    ]


def test_what_several_processes_cannot_do_is_refused_in_one_line(make_config, train):
    for settings, message in (
        (
            {"distributed": {"strategy": "megatron_fsdp"}},
            "error: `distributed.strategy: megatron_fsdp` on 2 devices is not supported yet. Set it to ddp.",
        ),
        (
            {"distributed": {"strategy": "ddp", "dp_size": 4}},
            "error: `distributed.dp_size` is 4, but the run was started as 2 process(es). Leave it out, or start the "
            "run with --nproc-per-node 4",
        ),
    ):
        assert train(make_config("run", **settings), 2) == [2, 2]
        assert errors(train.said("run")) == [message]
        assert train.said("run", 1) == ""


def fails_once(function):
    """Return a function that finds the disk full the first time."""
    calls = []

    def failing(*args, **keywords):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **keywords)

    return failing


SHARDED = {
    "peft": lora_section(),
    "distributed": {"strategy": "fsdp2"},
    "step_scheduler__ckpt_every_steps": 2,
}


@pytest.mark.parametrize("place", ["model", "shard"])
def test_a_save_that_fails_in_one_process_is_made_up_for_by_all(make_config, train, place):
    def arm(recipe, rank):
        if place == "model" and rank == 0:
            recipe.model_files.write_from = fails_once(recipe.model_files.write_from)
        if place == "shard" and rank == 1:
            dcp._Writer.write_data = fails_once(dcp._Writer.write_data)

    config = make_config("run", **SHARDED)
    assert train(config, 2, arm) == [0, 0], train.said("run")
    text = train.said("run")
    assert text.count("The run goes on, and the next save tries again.") == 1
    assert "has no room" in text
    run_dir = Path(config["checkpoint"]["checkpoint_dir"])
    assert [path.name for path in complete_checkpoints(run_dir)] == ["epoch_0_step_3", "epoch_0_step_4"]
    assert len(records(config)) == 5


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_while_all_save_leaves_the_last_checkpoint(make_config, train, victim):
    config = make_config("run", **SHARDED)

    def arm(recipe, rank):
        write = dcp._Writer.write_data

        def killed(*args):
            if recipe.schedule.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args)

        if rank == victim:
            dcp._Writer.write_data = killed

    statuses = train(config, 2, arm)
    assert statuses[victim] == 128 + signal.SIGKILL
    assert statuses[1 - victim] == 4
    (message,) = errors(train.said("run", 1 - victim))
    assert message.startswith(f"error: Lost rank {victim} (process ")
    run_dir = Path(config["checkpoint"]["checkpoint_dir"])
    assert [path.name for path in complete_checkpoints(run_dir)] == ["epoch_0_step_1"]
    assert train(config, 2) == [0, 0]
    assert [path.name for path in complete_checkpoints(run_dir)][-1] == "epoch_0_step_4"
    assert [record["step"] for record in records(config)] == list(range(5))
