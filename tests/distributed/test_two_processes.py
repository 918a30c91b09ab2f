"""Two processes train as one does with the same global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.faults import Faults
from support.ranks import losses, records, weights
from support.recipes import lora_section, recipe_config

PACKED = {"packed_sequence": {"packed_sequence_size": 96}}
WAYS = {
    "lora, fast layers, packed": {"peft": lora_section(), "model__fast_layers": "on", **PACKED},
    "lora, plain layers, token budget": {
        "peft": lora_section(),
        "model__fast_layers": "off",
        "step_scheduler__local_batch_tokens": 128,
    },
    "all weights, fast layers": {"model__fast_layers": "on"},
    "all weights, plain layers, no clipping": {"model__fast_layers": "off", "clip_grad_norm": {"max_norm": None}},
    "sharded optimizer, packed": {"distributed__strategy": "fsdp2", "model__fast_layers": "on", **PACKED},
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one_does(make_config, train, way, tmp_path):
    one, two = make_config("one", **WAYS[way]), make_config("two", **WAYS[way])
    assert train(one, 1) == [0]
    assert train(two, 2) == [0, 0], train.said("two")
    expected, found = records(one), records(two)
    assert len(found) == len(expected) == 5
    for record, other in zip(found, expected, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for key in ("step", "epoch", "lr", "num_label_tokens", "num_tokens_per_step"):
            assert record[key] == other[key]
    trained = weights(one)
    assert trained
    for name, weight in weights(two).items():
        torch.testing.assert_close(weight, trained[name], atol=1e-6, rtol=0, msg=name)
    assert any(not torch.equal(w, v) for w, v in zip(weights(two).values(), trained.values(), strict=True))
    assert train.said("two", 1) == ""
    assert (tmp_path / "two_logs" / "rank_1_out").read_text() == ""


def test_three_processes_do_too(make_config, train):
    settings = {"step_scheduler__global_batch_size": 12, "distributed__strategy": "fsdp2", "model__fast_layers": "on"}
    one, three = make_config("one", **settings), make_config("three", **settings)
    assert train(one, 1) == [0]
    assert train(three, 3) == [0, 0, 0], train.said("three")
    for record, other in zip(losses(three), losses(one), strict=True):
        assert record == pytest.approx(other, rel=1e-5)


def test_validation_takes_every_row_once(make_config, train, model_dirs, squad_dir):
    rows = {**recipe_config(model_dirs("llama"), squad_dir, Path())["dataset"], "split": "validation[:5]"}
    for name, size in (("one", 1), ("two", 2)):
        config = make_config(name, validation_dataset=rows, step_scheduler__max_steps=1, peft=lora_section())
        assert train(config, size) == [0] * size
    one, two = (records(make_config(name), "validation") for name in ("one", "two"))
    assert two[0]["val_loss"] == pytest.approx(one[0]["val_loss"], rel=1e-6)
    assert two[0]["num_label_tokens"] == one[0]["num_label_tokens"]


def test_a_process_without_memory_does_its_share_again_alone(make_config, train):
    settings = {"peft": lora_section(), "step_scheduler__local_batch_size": 4}
    one, two = make_config("one", **settings), make_config("two", **settings)
    assert train(one, 1) == [0]

    def arm(recipe, rank):
        if rank == 1:
            Faults(recipe.model.model.layers[0], "backward", lambda hidden: hidden.shape[0] > 2)

    assert train(two, 2, arm) == [0, 0]
    assert not (Path(two["checkpoint"]["checkpoint_dir"]) / "memory.json").exists()
    for record, other in zip(losses(two), losses(one), strict=True):
        assert record == pytest.approx(other, rel=1e-5)
    expected = weights(one)
    for name, weight in weights(two).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0, msg=name)


def test_an_optimizer_that_draws_random_numbers_draws_the_same_everywhere(make_config, train, tmp_path):
    def arm(recipe, rank):
        inner_step, inner_save = recipe.optimizer.step, recipe._save

        def step():
            inner_step()
            for parameter in recipe.model.parameters():
                parameter.data += 1e-3 * torch.randn_like(parameter) if parameter.requires_grad else 0

        def save(*args):
            torch.save([p.data for p in recipe.model.parameters() if p.requires_grad], tmp_path / f"weights_{rank}")
            inner_save(*args)

        recipe.optimizer.step, recipe._save = step, save

    assert train(make_config("run", peft=lora_section()), 2, arm) == [0, 0]
    first, second = (torch.load(tmp_path / f"weights_{rank}") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
