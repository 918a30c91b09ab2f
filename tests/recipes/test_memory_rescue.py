"""Steps that do not fit are done again in parts: the weights are those of a device with enough memory."""

from __future__ import annotations

import json
import logging
import weakref

import pytest
import torch
from support.faults import Faults, more_positions_than
from support.recipes import lora_section, recipe_config, set_up_recipe

from nemo_automodel._transformers.recompute import known_policies
from nemo_automodel.recipes import memory_rescue
from nemo_automodel.recipes.memory_rescue import Limits, split_rows
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.memory import Memory

NUM_STEPS = 4
PACKED = {"packed_sequence": {"packed_sequence_size": 96}, "data_check": False}


@pytest.fixture
def set_up(tmp_path, model_dirs, squad_dir):
    """Return a function that sets up a run of four rows a micro-batch, two a step."""

    def make(run="run", **overrides):
        settings = {
            "step_scheduler__max_steps": NUM_STEPS,
            "step_scheduler__global_batch_size": 8,
            "step_scheduler__local_batch_size": 4,
            **overrides,
        }
        config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / run, **settings)
        return set_up_recipe(config, tmp_path / "config.yaml")

    return make


def train(recipe):
    """Run to the end and return the trained weights and the records."""
    recipe.run_train_validation_loop()
    weights = {name: p.detach().clone() for name, p in recipe.model.named_parameters() if p.requires_grad}
    lines = (recipe.run_directory.path / "training.jsonl").read_text().splitlines()
    return weights, [json.loads(line) for line in lines]


def assert_same_run(found, expected, tolerance=1e-6):
    for name, weight in expected[0].items():
        torch.testing.assert_close(found[0][name], weight, atol=tolerance, rtol=0, msg=name)
    for record, other in zip(found[1], expected[1], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for key in ("step", "epoch", "lr", "num_label_tokens", "num_tokens_per_step"):
            assert record[key] == other[key]


def layer_of(recipe, number=0):
    return recipe.model.model.layers[number]


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize(
    "more",
    [{}, {"peft": lora_section()}, PACKED, {"clip_grad_norm__max_norm": 0.1}, {"model__fast_layers": "on"}],
    ids=["sft", "lora", "packed", "clipped", "fast"],
)
def test_weights_are_those_of_a_device_with_enough_memory(set_up, place, more):
    expected = train(set_up("large", **more))
    recipe = set_up("small", **more)
    longest = 96 if "packed_sequence" in more else 60
    faults = Faults(layer_of(recipe), place, more_positions_than(2 * longest))
    assert_same_run(train(recipe), expected)
    assert faults.num_raised == 1, "later batches are cut before they fail"
    assert max(rows for rows, _ in faults.shapes[1:]) == 2


def test_a_micro_batch_is_halved_until_one_row_is_left(set_up):
    expected = train(set_up("large", **PACKED))
    recipe = set_up("small", **PACKED)
    faults = Faults(layer_of(recipe), "backward", more_positions_than(96))
    assert_same_run(train(recipe), expected)
    assert faults.shapes[:3] == [(4, 96), (2, 96), (1, 96)]
    assert faults.num_raised == 2


def test_a_failure_in_the_second_micro_batch_counts_the_first_once(set_up):
    expected = train(set_up("large", peft=lora_section()))
    recipe = set_up("small", peft=lora_section())
    calls = []

    def third_call(hidden):
        calls.append(hidden)
        return len(calls) == 4

    Faults(layer_of(recipe, 1), "backward", third_call)
    assert_same_run(train(recipe), expected)


def test_a_row_that_does_not_fit_is_computed_again_and_shorter_ones_are_not(set_up, caplog):
    more = {"step_scheduler__local_batch_size": 1, "peft": lora_section(), "model__fast_layers": "on"}
    expected = train(set_up("large", **more))
    recipe = set_up("small", **more)
    lengths = sorted({len(row["input_ids"]) for row in recipe.train_loader.dataset})
    limit, seen = lengths[-2], []

    def needs_full(hidden):
        policy = layer_of(recipe).fast_core.recompute
        seen.append((hidden.shape[1], policy))
        return hidden.shape[1] > limit and policy != "full"

    Faults(layer_of(recipe), "forward", needs_full)
    assert_same_run(train(recipe), expected)
    assert {policy for length, policy in seen if length <= limit} == {"none"}
    last = [policy for length, policy in seen if length > limit]
    known = known_policies(is_fast=True)
    tried = list(known[: known.index("full") + 1])
    assert last[: len(tried)] == tried
    assert set(last[len(tried) :]) <= {"full"}
    assert "--distributed.activation_checkpointing selective" in caplog.text


def test_layers_of_transformers_change_their_policy_too(set_up):
    more = {"step_scheduler__local_batch_size": 1, "model__force_hf": True}
    expected = train(set_up("large", **more))
    recipe = set_up("small", **more)
    layer = layer_of(recipe)
    Faults(layer.mlp, "forward", lambda hidden: not layer.gradient_checkpointing)
    found = train(recipe)
    assert_same_run(found, expected)
    assert layer.gradient_checkpointing


def test_one_row_that_fits_under_no_policy_ends_the_run(set_up):
    recipe = set_up(step_scheduler__local_batch_size=2, peft=lora_section())
    before = {name: p.detach().clone() for name, p in recipe.model.named_parameters()}
    Faults(layer_of(recipe), "backward", lambda hidden: True)
    with pytest.raises(UserError) as error:
        recipe.run_train_validation_loop()
    said = str(error.value)
    assert said.startswith("1 row × ")
    assert "did not fit in memory (recomputed: full; another 2.00 GiB refused), and there is nothing left" in said
    assert "By the plan most memory is taken by layer at work, loss (" in said
    assert said.endswith("--quantization.load_in_4bit true, or a larger GPU; `automodel plan` says what would fit.")
    for name, p in recipe.model.named_parameters():
        assert torch.equal(p, before[name])


def test_the_event_is_told_once_with_advice(set_up, caplog):
    recipe = set_up(**PACKED)
    Faults(layer_of(recipe), "forward", more_positions_than(96))
    with caplog.at_level(logging.WARNING):
        recipe.run_train_validation_loop()
    said = [r.getMessage() for r in caplog.records if "did not fit" in r.getMessage()]
    assert len(said) == 2
    assert said[0].startswith(
        "4 rows × 96 tokens did not fit in memory (recomputed: none; another 2.00 GiB refused), so the step is done "
        "again with at most 2 of such rows at once, and later ones are computed so at once. Its update stays the same "
        "up to the order of sums. By the plan most memory is taken by "
    )
    assert said[0].endswith(
        "To have it so from the start: --step_scheduler.local_batch_size 2; or let the planner choose what is computed "
        "again: --memory auto"
    )
    assert said[1].endswith(
        "so the step is done again with at most 1 of such rows at once, and later ones are computed so at once."
    )


def test_without_rescue_the_run_ends_with_the_advice(set_up):
    recipe = set_up(memory={"rescue": False}, **PACKED)
    Faults(layer_of(recipe), "forward", more_positions_than(96))
    with pytest.raises(UserError, match=r"^4 rows × 96 tokens did not fit .*\. Set `memory.rescue: true`, .* or "):
        recipe.run_train_validation_loop()


def test_what_the_failed_attempt_held_is_gone_before_the_next(set_up):
    recipe = set_up(**PACKED)
    held, alive = [], []

    def check(hidden):
        if hidden.shape[0] == 4:
            return True
        alive.extend(reference() is not None for reference in held)
        held.clear()
        return False

    layer_of(recipe, 0).mlp.register_forward_hook(lambda m, a, out: held.append(weakref.ref(out)))
    Faults(layer_of(recipe, 1), "forward", check)
    recipe.train_step(next(iter(recipe.schedule))[1][:1])
    assert alive[0] is False


def test_evaluation_is_split_and_leaves_gradients_alone(set_up):
    recipe = set_up(**PACKED)
    _, batches = next(iter(recipe.schedule))
    expected = recipe.engine.evaluate(batches[0])
    recipe.engine.forward_backward(batches, 10)
    grads = [p.grad.clone() for p in recipe.model.parameters()]
    raised = []

    def refuse(module, args):
        if args[0].shape[0] > 1:
            raised.append(args[0].shape[0])
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = layer_of(recipe).register_forward_pre_hook(refuse)
    loss, num_label_tokens = recipe.engine.evaluate(batches[0])
    handle.remove()
    assert raised == [4, 2]
    assert num_label_tokens == expected[1]
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    for p, grad in zip(recipe.model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


def test_rows_that_the_host_cannot_hold_are_split_before_anything_is_locked(set_up, monkeypatch):
    more = {**PACKED, "model__fast_layers": "on", "distributed": {"activation_checkpointing": "full_offload"}}
    expected = train(set_up("large", **more))
    recipe = set_up("small", **more)
    hidden, num_layers = recipe.model.config.hidden_size, len(recipe.model.model.layers)
    row_bytes = num_layers * 4 * 96 * hidden  # float32, and a power of two times three
    free = num_layers * 4 * 256 * hidden  # two rows take this much, as the allocator rounds up
    assert 2 * row_bytes <= free < 4 * row_bytes
    found = Memory(total=20 * free, available=2 * free, free=0, cached=0)
    monkeypatch.setattr(memory_rescue, "read_memory", lambda: found)
    faults = Faults(layer_of(recipe), "forward", lambda hidden: False)
    assert_same_run(train(recipe), expected)
    assert {rows for rows, _ in faults.shapes} == {2}


def test_one_row_that_the_host_cannot_hold_ends_the_run(set_up, monkeypatch):
    more = {**PACKED, "model__fast_layers": "on", "distributed": {"activation_checkpointing": "full_offload"}}
    recipe = set_up(**more)
    found = Memory(total=20, available=2, free=0, cached=0)
    monkeypatch.setattr(memory_rescue, "read_memory", lambda: found)
    with pytest.raises(UserError) as error:
        recipe.run_train_validation_loop()
    assert str(error.value).startswith(
        "1 row × 96 tokens did not fit in memory (recomputed: full_offload; another 0.00 GiB of the host's memory "
        "refused), and there is nothing left to split or to compute again. "
    )


# --- random numbers, resuming ----------------------------------------------------------------------------------------


def dropped(**more):
    return {"peft": {**lora_section(), "dropout": 0.1}, **PACKED, **more}


def test_a_rescued_run_and_a_resumed_one_are_those_that_were_split_from_the_start(set_up, tmp_path):
    """The failed attempt draws nothing, and what it found out is kept for a resume: bit for bit, with dropout."""
    recipe = set_up("rescued", **dropped())
    faults = Faults(layer_of(recipe), "backward", more_positions_than(2 * 96))
    rescued, records = train(recipe)
    assert faults.num_raised == 1
    found = json.loads((tmp_path / "rescued" / "memory.json").read_text())
    assert found["most_positions"] == {"none": 2 * 96}
    assert found["machine"] == "CPU"

    known = set_up("known", **dropped())
    known.memory_record.most_positions.update({"none": 2 * 96})
    weights, _ = train(known)
    assert all(torch.equal(weights[name], rescued[name]) for name in rescued)

    first = set_up("resumed", **dropped(step_scheduler__max_steps=2))
    Faults(layer_of(first), "backward", more_positions_than(2 * 96))
    train(first)
    second = set_up("resumed", **dropped())
    faults = Faults(layer_of(second), "backward", more_positions_than(2 * 96))
    weights, resumed = train(second)
    assert faults.num_raised == 0
    assert [r["loss"] for r in resumed] == [r["loss"] for r in records]
    assert all(torch.equal(weights[name], rescued[name]) for name in rescued)


def test_a_damaged_record_is_one_line(set_up, tmp_path):
    train(set_up(step_scheduler__max_steps=1))
    (tmp_path / "run" / "memory.json").write_text("{")
    with pytest.raises(UserError, match=r"memory.json` is damaged, so nobody knows how this run was computed. Remove"):
        set_up()


# --- updates within the backward pass --------------------------------------------------------------------------------

IN_BACKWARD = {
    "optimizer__in_backward": True,
    "clip_grad_norm": {"max_norm": None},
    "step_scheduler__global_batch_size": 4,
    "model__fast_layers": "on",
}


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_step_within_the_backward_pass_is_computed_again_before_it_is_split(set_up, place):
    expected = train(set_up("large", **IN_BACKWARD))
    recipe = set_up("small", **IN_BACKWARD)
    core = layer_of(recipe, 0).fast_core
    faults = Faults(layer_of(recipe, 0), place, lambda hidden: core.recompute == "none")
    assert_same_run(train(recipe), expected, tolerance=0)
    assert faults.num_raised == 1
    assert {rows for rows, _ in faults.shapes} == {4}
    assert core.recompute == "selective"


def test_a_step_within_the_backward_pass_is_split_where_no_policy_is_enough(set_up):
    expected = train(set_up("large", **IN_BACKWARD))
    recipe = set_up("small", **IN_BACKWARD)
    faults = Faults(layer_of(recipe, 0), "backward", lambda hidden: hidden.shape[0] > 2)
    assert_same_run(train(recipe), expected)
    known = known_policies(is_fast=True)
    assert [rows for rows, _ in faults.shapes].count(4) == faults.num_raised == len(known)
    assert {rows for rows, _ in faults.shapes} == {4, 2}
    assert layer_of(recipe).fast_core.recompute == known[-1]


def test_a_rehearsal_changes_no_bit_and_comes_before_larger_steps_only(set_up, caplog):
    more = {**IN_BACKWARD, "step_scheduler__local_batch_size": 4, "optimizer___target_": "adamw"}
    plain = set_up("plain", memory={"rescue": False}, **more)
    expected = train(plain)
    recipe = set_up("rehearsed", **more)
    faults = Faults(layer_of(recipe), "forward", lambda hidden: False)
    with caplog.at_level(logging.INFO):
        assert_same_run(train(recipe), expected, tolerance=0)
    largest, num_passes = 0, []
    lengths = [length for _, length in faults.shapes]
    while lengths:
        times = 2 if lengths[0] > largest else 1
        assert lengths[:times] == [lengths[0]] * times
        largest, lengths = max(largest, lengths[0]), lengths[times:]
        num_passes.append(times)
    assert len(num_passes) == NUM_STEPS
    assert num_passes[0] == 2
    assert caplog.text.count("steps larger than any before are rehearsed first.") == 1


def test_weights_that_were_updated_cannot_be_taken_back(set_up):
    """Memory that was there in the rehearsal may be gone: another process took it."""
    recipe = set_up(**IN_BACKWARD)
    calls = []

    def second_call(hidden):
        calls.append(hidden)
        return len(calls) == 2

    Faults(layer_of(recipe), "backward", second_call)
    with pytest.raises(UserError, match=r"`optimizer.in_backward` had updated some weights by then, so the step"):
        recipe.run_train_validation_loop()


def test_nothing_is_rehearsed_without_rescue(set_up):
    recipe = set_up(memory={"rescue": False}, **IN_BACKWARD)
    faults = Faults(layer_of(recipe), "backward", lambda hidden: True)
    with pytest.raises(UserError, match=r"`optimizer.in_backward` had updated some weights by then, so the step"):
        recipe.run_train_validation_loop()
    assert faults.num_raised == 1


# --- parts -----------------------------------------------------------------------------------------------------------


def test_parts_hold_every_row_once_in_order():
    batch = {"input_ids": torch.arange(35).view(7, 5), "seq_lens": torch.arange(14).view(7, 2)}
    for num_parts in range(1, 10):
        parts = split_rows(batch, num_parts)
        sizes = [len(part["input_ids"]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for key, value in batch.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), value)


def test_limits_count_positions():
    limits = Limits(("none", "selective", "full"))
    assert limits.choose(8, 100) == ("none", 1)
    assert limits.lower(8, 100, "none")
    assert limits.choose(8, 100) == ("none", 2)
    assert limits.choose(16, 50) == ("none", 2)
    assert limits.choose(1, 400) == ("none", 1)
    assert limits.choose(1, 401) == ("selective", 1)
    assert limits.lower(1, 300, "none")
    assert limits.choose(2, 299) == ("none", 2)
    assert limits.choose(2, 300) == ("selective", 1)
    assert limits.lower(1, 300, "selective")
    assert not limits.lower(1, 300, "full")
    assert limits.choose(2, 300) == ("full", 2)


def test_limits_that_cut_last():
    limits = Limits(("none", "full"), cuts_last=True)
    assert limits.lower(4, 100, "none")
    assert limits.choose(4, 100) == ("full", 1)
    assert limits.choose(3, 133) == ("none", 1)
    assert limits.lower(4, 100, "full")
    assert limits.choose(4, 100) == ("full", 2)
    assert limits.choose(3, 133) == ("none", 1)
    assert limits.lower(2, 100, "full")
    assert limits.choose(4, 100) == ("full", 4)
    assert not limits.lower(1, 100, "full")
