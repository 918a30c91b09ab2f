"""The recipe with a base in 8 bits, emulated on the CPU: it learns as the exact one does, resumes and reports."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from support.recipes import lora_section, recipe_config, set_up_recipe

FP8 = {"enabled": True, "emulate": True}


def run(directory: Path, model_dir: Path, squad_dir: Path, fp8: dict | None, **overrides):
    """Train and return the recipe and the losses of its steps."""
    if fp8 is not None:
        overrides["fp8"] = fp8
    config = recipe_config(model_dir, squad_dir, directory / "run", peft=lora_section(), **overrides)
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
