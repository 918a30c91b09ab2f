"""The recipe with a base in 8 bits, emulated on the CPU: it learns as the exact one does, resumes and reports."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from support.recipes import lora_section, recipe_config, set_up_recipe

FP8 = {"enabled": True, "emulate": True}


def run(directory: Path, model_dir: Path, squad_dir: Path, fp8: dict | None, peft: bool = True, **overrides):
    """Train and return the recipe and the losses of its steps."""
    if fp8 is not None:
        overrides["fp8"] = fp8
    if peft:
        overrides["peft"] = lora_section()
    config = recipe_config(model_dir, squad_dir, directory / "run", **overrides)
    recipe = set_up_recipe(config, directory / "config.yaml")
    recipe.run_train_validation_loop()
    rows = [json.loads(line) for line in (directory / "run" / "training.jsonl").read_text().splitlines()]
    return recipe, [row["loss"] for row in rows]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_fifty_steps_learn_what_the_exact_base_learns(tmp_path, model_dirs, squad_dir, family, caplog):
    caplog.set_level(logging.INFO, logger="nemo_automodel")
    _, exact = run(tmp_path / "exact", model_dirs(family), squad_dir, None)
    recipe, losses = run(tmp_path / "fp8", model_dirs(family), squad_dir, FP8)
    assert exact[-1] < exact[0] - 0.1
    assert max(abs(a / b - 1) for a, b in zip(losses, exact, strict=True)) < 0.01
    assert "FP8 base: emulated in PyTorch, a scale for each row." in caplog.messages
    rows = json.loads((tmp_path / "fp8" / "run" / "fp8_quality.json").read_text())
    assert [row["stored"] for row in rows] == ["fp8"] * 8
    assert all(0.01 < row["output_error"] < 0.06 for row in rows)
    assert not (tmp_path / "exact" / "run" / "fp8_quality.json").exists()
    assert recipe.model.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn


def test_a_resumed_run_is_the_same_run(tmp_path, model_dirs, squad_dir):
    validation = {
        "validation_dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.squad.make_squad_dataset",
            "dataset_name": str(squad_dir),
            "split": "validation",
        },
        "step_scheduler__val_every_steps": 3,
    }
    whole = run(tmp_path / "a", model_dirs("llama"), squad_dir, FP8, step_scheduler__max_steps=8, **validation)[1]
    run(tmp_path / "b", model_dirs("llama"), squad_dir, FP8, step_scheduler__max_steps=4, **validation)
    parts = run(tmp_path / "b", model_dirs("llama"), squad_dir, FP8, step_scheduler__max_steps=8, **validation)[1]
    assert parts == whole
    assert (tmp_path / "a" / "run" / "validation.jsonl").is_file()


def test_one_scale_a_matrix_trains_too(tmp_path, model_dirs, squad_dir):
    fp8 = {**FP8, "recipe_name": "tensorwise", "filter_fqns": ["o_proj"], "first_last_down_proj_bf16": True}
    _, losses = run(tmp_path, model_dirs("llama"), squad_dir, fp8)
    assert losses[-1] < losses[0] - 0.1
    rows = json.loads((tmp_path / "run" / "fp8_quality.json").read_text())
    assert [row["stored"].partition(":")[0] for row in rows] == ["fp8", "dense", "fp8", "dense"] * 2


@pytest.mark.parametrize(
    ("fp8", "overrides"),
    [
        ({}, {"model__fast_layers": "on"}),
        ({"recipe_name": "rowwise", "weight_copies": 0}, {"model__fast_layers": "on"}),
        ({"recipe_name": "tensorwise"}, {"model__force_hf": True}),
        ({}, {"model__fast_layers": "off", "distributed__activation_checkpointing": "selective"}),
        ({}, {"optimizer__in_backward": True, "clip_grad_norm__max_norm": None, "model__fast_layers": "on"}),
    ],
)
def test_all_weights_learn_what_they_learn_exactly(tmp_path, model_dirs, squad_dir, fp8, overrides, caplog):
    caplog.set_level(logging.INFO, logger="nemo_automodel")
    sizes = {"step_scheduler__local_batch_size": 4, "step_scheduler__max_steps": 30}
    _, exact = run(tmp_path / "exact", model_dirs("qwen3"), squad_dir, None, False, **sizes, **overrides)
    recipe, losses = run(tmp_path / "fp8", model_dirs("qwen3"), squad_dir, {**FP8, **fp8}, False, **sizes, **overrides)
    assert exact[-1] < exact[0] - 0.3
    assert max(abs(a / b - 1) for a, b in zip(losses, exact, strict=True)) < 0.02
    assert losses != exact
    (first,) = [m for m in caplog.messages if m.startswith("FP8 training: emulated in PyTorch, a scale for each ")]
    assert first.endswith("in 8 bits." if "recipe_name" in fp8 else "in the dtype of the model.")
    is_fast = overrides.get("model__fast_layers") == "on"
    assert (
        "FP8 training: 14 of 15 linear layers in 8 bits; as it is: `lm_head`, the output head." in caplog.messages
    ) != is_fast
    assert (tmp_path / "fp8" / "run" / "fp8_quality.json").is_file() == is_fast
    assert {p.dtype for p in recipe.model.parameters()} == {torch.float32}


def test_a_resumed_run_of_all_weights_is_the_same_run(tmp_path, model_dirs, squad_dir):
    more = {"model__fast_layers": "on", "peft": False}
    whole = run(tmp_path / "a", model_dirs("llama"), squad_dir, FP8, step_scheduler__max_steps=8, **more)[1]
    run(tmp_path / "b", model_dirs("llama"), squad_dir, FP8, step_scheduler__max_steps=4, **more)
    recipe, parts = run(tmp_path / "b", model_dirs("llama"), squad_dir, FP8, step_scheduler__max_steps=8, **more)
    assert parts == whole
    (saved,) = (tmp_path / "b" / "run").glob("epoch_0_step_7/model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    for (name, ours), theirs in zip(recipe.model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
