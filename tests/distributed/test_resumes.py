"""A run of two processes goes on: with two bit for bit, with another number on the same rows."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from support.ranks import losses, wait_for, weights
from support.recipes import lora_section

WITH_DROPOUT = {"peft": {**lora_section(), "dropout": 0.2}, "step_scheduler__ckpt_every_steps": 3}


def checkpoint_of(config, step):
    (found,) = Path(config["checkpoint"]["checkpoint_dir"]).glob(f"epoch_*_step_{step}")
    return found


def all_files(config, step):
    checkpoint = checkpoint_of(config, step)
    names = [p.relative_to(checkpoint) for p in sorted(checkpoint.rglob("*")) if p.is_file()]
    same = [n for n in names if n.parts[0] in ("dataloader", "rng", "model", "step_scheduler.pt", "loss_guard.json")]
    return {str(name): (checkpoint / name).read_bytes() for name in same}


def optimizer_state(config, step):
    from nemo_automodel.components.checkpoint.dcp import Archive

    return Archive(checkpoint_of(config, step) / "optim").read({})["optim"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(make_config, train, strategy):
    settings = {**WITH_DROPOUT, "distributed__strategy": strategy}
    whole = make_config("whole", step_scheduler__max_steps=6, **settings)
    assert train(whole, 2) == [0, 0]
    parts = make_config("parts", step_scheduler__max_steps=3, **settings)
    assert train(parts, 2) == [0, 0]
    parts["step_scheduler"]["max_steps"] = 6
    assert train(parts, 2) == [0, 0]
    assert "Going on from" in train.said("parts")
    assert "bit for bit as at the save" in train.said("parts")
    assert losses(parts) == losses(whole)
    files = all_files(whole, 5)
    for name in ("dataloader/dataloader_dp_rank", "rng/rng_global_rank"):
        assert {f"{name}_0.pt", f"{name}_1.pt"} <= files.keys()
    assert files["rng/rng_global_rank_0.pt"] != files["rng/rng_global_rank_1.pt"]
    assert all_files(parts, 5) == files
    shards = (Path(whole["checkpoint"]["checkpoint_dir"]) / "LATEST" / "optim").glob("*.distcp")
    assert sorted(path.name for path in shards) == ["__0_0.distcp", "__1_0.distcp"][: 2 if strategy == "fsdp2" else 1]
    expected, found = optimizer_state(whole, 5), optimizer_state(parts, 5)
    assert found.keys() == expected.keys()
    assert sum(key.endswith(".exp_avg") for key in found) == 28
    for key, value in found.items():
        is_same = torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key]
        assert is_same, key


@pytest.mark.parametrize(("before", "after", "strategy"), [(2, 1, "fsdp2"), (1, 2, "fsdp2"), (1, 2, "ddp")])
def test_another_number_of_processes_goes_on_with_the_same_rows(make_config, train, before, after, strategy):
    settings = {
        "peft": lora_section(),
        "step_scheduler__ckpt_every_steps": 3,
        "distributed__strategy": strategy,
    }
    whole = make_config("whole", step_scheduler__max_steps=6, **settings)
    assert train(whole, 1) == [0]
    parts = make_config("parts", step_scheduler__max_steps=3, **settings)
    assert train(parts, before) == [0] * before
    parts["step_scheduler"]["max_steps"] = 6
    assert train(parts, after) == [0] * after
    text = train.said("parts")
    assert f"{before} process(es) → {after}: weights, optimizer and schedule are exact; the place in the data" in text
    assert "none is skipped or comes twice" in text
    for record, other in zip(losses(parts), losses(whole), strict=True):
        assert record == pytest.approx(other, rel=1e-5)
    expected = weights(whole)
    for name, weight in weights(parts).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0, msg=name)


def test_a_run_whose_processes_are_killed_again_and_again_is_the_undisturbed_one(make_config, train):
    """At moments that a clock decides: while data and model are made, in a step, in the middle of a save."""
    settings = {
        **WITH_DROPOUT,
        **{"step_scheduler__max_steps": 10, "step_scheduler__ckpt_every_steps": 2, "distributed__strategy": "fsdp2"},
    }
    whole, killed = make_config("whole", **settings), make_config("killed", **settings)
    assert train(whole, 2) == [0, 0]

    def slowly(recipe, rank):
        inner = recipe.train_step
        recipe.train_step = lambda batches: (time.sleep(0.05), inner(batches))[1]

    rng, num_kills = random.Random(3), 0
    for _ in range(50):
        (train.root / "killed_logs" / "rank_0").unlink(missing_ok=True)
        pids = train.start(killed, 2, slowly)
        if num_kills < 4:
            while "Experiment_details" not in train.said("killed"):  # before, it is the launcher's task
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.9))
            os.kill(rng.choice(pids), signal.SIGKILL)
        statuses = wait_for(pids)
        num_kills += 137 in statuses
        if statuses == [0, 0]:
            break
        assert set(statuses) <= {0, 4, 137}, train.said("killed")
    assert statuses == [0, 0]
    assert num_kills >= 2
    assert losses(killed) == losses(whole)
    assert all_files(killed, 9) == all_files(whole, 9)
    expected = optimizer_state(whole, 9)
    for key, value in optimizer_state(killed, 9).items():
        assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key], key
