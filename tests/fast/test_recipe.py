"""The recipe with `fast_layers: on` against `force_hf: true`, on the CPU in fp32: the same run, step by step."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from support.recipes import lora_section, recipe_config, set_up_recipe

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.settings import load_settings
from nemo_automodel.shared.errors import ConfigError

NUM_STEPS = 50


def run(tmp_path: Path, model_dir: Path, squad_dir: Path, fast: bool, name: str = "", **overrides):
    """Train and return the recipe, its losses and what it learned."""
    choice = {"model__fast_layers": "on"} if fast else {"model__force_hf": True}
    directory = tmp_path / (name or f"fast-{fast}")
    config = recipe_config(model_dir, squad_dir, directory / "run", **{"peft": lora_section(), **choice, **overrides})
    recipe = set_up_recipe(config, directory / "config.yaml")
    assert type(recipe.model.model.layers[0]).__name__.startswith("Fast") == fast
    recipe.run_train_validation_loop()
    rows = [json.loads(line) for line in (directory / "run" / "training.jsonl").read_text().splitlines()]
    learned = {n: p.detach() for n, p in recipe.model.named_parameters() if p.requires_grad}
    return recipe, [row["loss"] for row in rows], learned


def assert_same_run(one, other) -> None:
    _, losses, weights = one
    _, other_losses, other_weights = other
    assert len(losses) == len(other_losses)
    assert losses[-1] < losses[0] - 0.1, "nothing was learned: the comparison would prove nothing"
    assert max(abs(a - b) for a, b in zip(losses, other_losses, strict=True)) <= 1e-5
    for name, expected in weights.items():
        error = (other_weights[name] - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error <= 1e-5, f"{name} differs by {error:.1e} of its norm"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_fifty_steps(tmp_path, model_dirs, squad_dir, family):
    both = [run(tmp_path, model_dirs(family), squad_dir, fast) for fast in (False, True)]
    assert_same_run(*both)
    assert len(both[0][1]) == NUM_STEPS


@pytest.mark.parametrize(
    "overrides",
    [
        {"packed_sequence__packed_sequence_size": 160},
        {"step_scheduler__local_batch_size": 1},
        {"step_scheduler__local_batch_size": 4},
        {"distributed__activation_checkpointing": "full"},
        {"distributed__activation_checkpointing": "selective"},
        {"loss_fn": {"_target_": "nemo_automodel.components.loss.linear_ce.FusedLinearCrossEntropy"}},
    ],
    ids=["packed", "alone", "at once", "full", "selective", "fused loss"],
)
def test_ways_to_run(tmp_path, model_dirs, squad_dir, overrides):
    steps = {"step_scheduler__max_steps": 20}
    plain = run(tmp_path, model_dirs("qwen2"), squad_dir, False, **{**overrides, **steps})
    assert_same_run(plain, run(tmp_path, model_dirs("qwen2"), squad_dir, True, **{**overrides, **steps}))


@pytest.mark.parametrize(("policy", "tile"), [("sac1", 100), ("full_offload", None), ("full_offload", 64)])
def test_memory_policies(tmp_path, model_dirs, squad_dir, policy, tile, caplog):
    steps = {"step_scheduler__max_steps": 20, "packed_sequence__packed_sequence_size": 160}
    plain = run(tmp_path, model_dirs("qwen3"), squad_dir, False, **steps)
    memory = {"distributed": {"activation_checkpointing": policy, "mlp_tile_tokens": tile}}
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        assert_same_run(plain, run(tmp_path, model_dirs("qwen3"), squad_dir, True, **memory, **steps))
    tiles = "" if tile is None else f"; MLP in tiles of {tile} tokens"
    assert f"Decoder layers: fast (2 of 2, Qwen3DecoderLayer; recomputed: {policy}{tiles})." in caplog.messages


def test_a_resumed_run_is_the_same_run(tmp_path, model_dirs, squad_dir):
    whole = run(tmp_path, model_dirs("llama"), squad_dir, True, "whole", step_scheduler__max_steps=12)
    run(tmp_path, model_dirs("llama"), squad_dir, True, "parts", step_scheduler__max_steps=6)
    parts = run(tmp_path, model_dirs("llama"), squad_dir, True, "parts", step_scheduler__max_steps=12)
    assert parts[1] == whole[1]
    assert all(torch.equal(parts[2][name], whole[2][name]) for name in whole[2])
    files = [tmp_path / name / "run/LATEST/model/adapter_model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"packed_sequence__packed_sequence_size": 160},
        {"step_scheduler__local_batch_size": 1, "clip_grad_norm__max_norm": 0.1},
        {"distributed__activation_checkpointing": "full"},
        {"freeze_config__freeze_embeddings": True, "optimizer__foreach": True},
    ],
    ids=["plain", "packed", "alone", "full", "frozen embeddings"],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_full_training(tmp_path, model_dirs, squad_dir, overrides, family):
    common = {"peft": None, "step_scheduler__max_steps": 15, "optimizer__eps": 1e-4, **overrides}
    plain = run(tmp_path, model_dirs(family), squad_dir, False, **common)
    assert_same_run(plain, run(tmp_path, model_dirs(family), squad_dir, True, **common))


IN_BACKWARD = {
    "step_scheduler__local_batch_size": 4,
    "clip_grad_norm__max_norm": None,
    "optimizer__in_backward": True,
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_steps_in_the_backward_pass_are_the_same_steps(tmp_path, model_dirs, squad_dir, ties, fast):
    common = {"peft": None, "step_scheduler__max_steps": 15, "optimizer__eps": 1e-4}
    common["model__tie_word_embeddings"] = ties
    usual = {**IN_BACKWARD, "optimizer__in_backward": False}
    after = run(tmp_path, model_dirs("qwen2"), squad_dir, fast, "after", **common, **usual)
    within = run(tmp_path, model_dirs("qwen2"), squad_dir, fast, "within", **common, **IN_BACKWARD)
    assert_same_run(after, within)
    norms = [
        [json.loads(line)["grad_norm"] for line in (tmp_path / n / "run/training.jsonl").read_text().splitlines()]
        for n in ("after", "within")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert all(p.grad is None for p in within[0].model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"step_scheduler__local_batch_size": 2},
            "`optimizer.in_backward: true` updates weights in the backward pass, so a step has one micro-batch. Set "
            "`step_scheduler.local_batch_size` to `step_scheduler.global_batch_size`, without `local_batch_tokens`.",
        ),
        (
            {"clip_grad_norm__max_norm": 1.0},
            "`optimizer.in_backward: true` never has all gradients at once, and clipping is by the norm of all. Set "
            "`clip_grad_norm.max_norm: null`, or leave `in_backward` out.",
        ),
    ],
)
def test_steps_in_the_backward_pass_refuse_what_needs_all_gradients(tmp_path, squad_dir, changes, message):
    config = recipe_config(tmp_path / "nowhere", squad_dir, tmp_path / "run", **{**IN_BACKWARD, **changes})
    with pytest.raises(ConfigError) as refused:
        load_settings(ConfigNode(config))
    assert str(refused.value) == message


def test_a_resumed_full_run_is_the_same_run(tmp_path, model_dirs, squad_dir):
    common = {"peft": None, "optimizer__eps": 1e-4}
    whole = run(tmp_path, model_dirs("qwen2"), squad_dir, True, "whole", step_scheduler__max_steps=8, **common)
    run(tmp_path, model_dirs("qwen2"), squad_dir, True, "parts", step_scheduler__max_steps=4, **common)
    parts = run(tmp_path, model_dirs("qwen2"), squad_dir, True, "parts", step_scheduler__max_steps=8, **common)
    assert parts[1] == whole[1]
    assert all(torch.equal(parts[2][name], whole[2][name]) for name in whole[2])
    files = [tmp_path / name / "run/LATEST/model/model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_log_names_both_choices(tmp_path, model_dirs, squad_dir, caplog):
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        run(tmp_path, model_dirs("llama"), squad_dir, True, step_scheduler__max_steps=1)
    assert "Decoder layers: fast (2 of 2, LlamaDecoderLayer; recomputed: none)." in caplog.messages
    assert "Loss: in one step with the frozen output head." in caplog.messages


def test_force_hf_is_plain_in_every_part(tmp_path, model_dirs, squad_dir, caplog):
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        run(tmp_path, model_dirs("llama"), squad_dir, False, step_scheduler__max_steps=1)
    assert "Decoder layers: plain Transformers: `force_hf: true`." in caplog.messages
    assert not [message for message in caplog.messages if message.startswith("Loss: ")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model__fast_layers": "fast"},
            "`model.fast_layers: fast` is not known. Use auto, on, off.",
        ),
        (
            {"model__fast_layers": True, "model__force_hf": True},
            "`model.fast_layers: on` and `model.force_hf: true` exclude each other. Leave one of them out.",
        ),
        (
            {"model__autocast_dtype": "bfloat16"},
            "`model.autocast_dtype`: in a file this is `distributed.autocast_dtype`. Move it there.",
        ),
        ({"model__fast_layer": "on"}, "`model.fast_layer`: did you mean `fast_layers`? Correct or remove it."),
    ],
)
def test_mistakes_in_a_file_come_out_before_anything_is_loaded(tmp_path, squad_dir, overrides, message):
    config = recipe_config(tmp_path / "nowhere", squad_dir, tmp_path / "run", peft=lora_section(), **overrides)
    with pytest.raises(ConfigError) as refused:
        load_settings(ConfigNode(config))
    assert str(refused.value) == message


def test_autocast_keeps_transformers_layers(tmp_path, model_dirs, squad_dir, caplog):
    config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / "run", peft=lora_section())
    config["distributed"] = {"autocast_dtype": "bfloat16"}
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        set_up_recipe(config, tmp_path / "config.yaml")
    assert "Decoder layers: plain Transformers: `distributed.autocast_dtype: bfloat16`." in caplog.messages
