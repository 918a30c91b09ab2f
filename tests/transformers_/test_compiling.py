"""`compile:` and `distributed.enable_compile`: what is compiled, how, and that it computes the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from support.recipes import lora_section, recipe_config, set_up_recipe

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.quantization.config import CompileConfig
from nemo_automodel.shared.errors import ConfigError, UserError
from nemo_automodel.shared.imports import is_available

GRAPHS: list[int] = []


def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **_: object):
    """Run a graph as it is and note how many operations it has."""
    GRAPHS.append(len(graph.graph.nodes))
    return graph.forward


torch._dynamo.register_backend(counted, name="counted")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    GRAPHS.clear()
    yield
    torch._dynamo.reset()


def run(directory: Path, model_dir: Path, squad_dir: Path, **overrides):
    config = recipe_config(model_dir, squad_dir, directory / "run", step_scheduler__max_steps=3, **overrides)
    recipe = set_up_recipe(config, directory / "config.yaml")
    recipe.run_train_validation_loop()
    rows = [json.loads(line) for line in (directory / "run" / "training.jsonl").read_text().splitlines()]
    return recipe, [row["loss"] for row in rows]


WHOLE = {"compile": {"enabled": True, "backend": "counted"}}
LAYERS = {"compile": {"backend": "counted"}, "distributed": {"enable_compile": True}}
PACKED_LORA = {"peft": lora_section(), "packed_sequence": {"packed_sequence_size": 64}}
RECOMPUTED = {**LAYERS, "distributed": {"enable_compile": True, "activation_checkpointing": "full"}}
CASES = [
    pytest.param(WHOLE, PACKED_LORA, "the whole model", id="whole, packed, LoRA"),
    pytest.param(LAYERS, {"peft": lora_section()}, "2 decoder layers, one by one", id="layers, LoRA"),
    pytest.param(RECOMPUTED, {}, "2 decoder layers, one by one", id="layers, recomputed", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("compiled", "more", "what"), CASES)
def test_a_compiled_run_is_the_same_run(tmp_path, model_dirs, squad_dir, compiled, more, what, caplog):
    caplog.set_level(logging.INFO, logger="nemo_automodel")
    _, exact = run(tmp_path / "exact", model_dirs("qwen3"), squad_dir, **more)
    assert not GRAPHS
    recipe, losses = run(tmp_path / "compiled", model_dirs("qwen3"), squad_dir, **compiled, **more)
    assert losses == pytest.approx(exact, rel=1e-5)
    assert max(GRAPHS) > 20
    assert f"Compiled: {what}, backend counted, mode default. The first steps are slow." in caplog.messages
    assert "Decoder layers: plain Transformers: the layers are compiled instead." in caplog.messages
    names = [name for name, _ in recipe.model.named_parameters()]
    assert not any("_orig_mod" in name for name in names)
    (saved,) = (tmp_path / "compiled" / "run").glob("epoch_0_step_2/model")
    assert (saved / ("adapter_config.json" if "peft" in more else "config.json")).is_file()


@pytest.mark.skipif(not is_available("torchao"), reason="torchao is not installed")
def test_rounding_that_begins_later_is_compiled_too(tmp_path, model_dirs, squad_dir):
    qat = {"qat": {"enabled": True, "fake_quant_after_n_steps": 1, "qat_config": {"groupsize": 16}}}
    _, exact = run(tmp_path / "exact", model_dirs("llama"), squad_dir, **qat)
    _, losses = run(tmp_path / "compiled", model_dirs("llama"), squad_dir, **qat, **LAYERS)
    assert losses == pytest.approx(exact, rel=1e-4)
    assert GRAPHS


def load(model_dir: Path, **keywords: object):
    return NeMoAutoModelForCausalLM.from_pretrained(str(model_dir), device="cpu", **keywords)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"backend": "nope"}, "`compile`: PyTorch refuses its settings: Invalid backend: 'nope', see "),
        ({"options": {"nope": 1}}, "`compile`: PyTorch refuses its settings: Unexpected optimization option nope. "),
    ],
)
def test_settings_that_pytorch_refuses(model_dirs, keys, message):
    with pytest.raises(UserError) as refused:
        load(model_dirs("llama"), compile_config=CompileConfig(enabled=True, **keys))
    assert str(refused.value).startswith(message)
    assert str(refused.value).endswith(". Change that key.")


def test_a_machine_without_a_compiler_is_told_so(model_dirs, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError) as refused:
        load(model_dirs("llama"), compile_layers=True)
    assert str(refused.value) == (
        "Compiling needs a C++ compiler, which this machine has not. Install g++, or set `compile.enabled` and "
        "`distributed.enable_compile` to false."
    )
    load(model_dirs("llama"), compile_layers=True, compile_config=CompileConfig(backend="counted"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"mode": "max-autotun"},
            "`compile.mode: max-autotun` is not known. Did you mean `max-autotune`? Use default, ",
        ),
        ({"mode": "max-autotune", "options": {"a": 1}}, "`compile.mode` and `compile.options` cannot both be set. "),
        ({"dynamo_cache_size_limit": 0}, "`compile.dynamo_cache_size_limit` is 0, but it must be at least 1. Use 256."),
    ],
)
def test_bad_settings(keys, message):
    with pytest.raises(ConfigError) as refused:
        CompileConfig(enabled=True, **keys)
    assert str(refused.value).startswith(message)


def test_fast_layers_and_compiling_exclude_each_other(model_dirs):
    with pytest.raises(UserError, match="cannot be: the layers are compiled instead"):
        load(model_dirs("llama"), compile_config=CompileConfig(enabled=True, backend="counted"), fast_layers="on")
