"""QLoRA from a configuration, on the CPU in fp32: fast layers against plain ones, files, resuming, the log."""

from __future__ import annotations

import json
import logging

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.recipes import lora_section, recipe_config, set_up_recipe
from support.tiny import make_model_dir

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.settings import load_settings
from nemo_automodel.shared.errors import ConfigError, UserError

NF4 = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return make_model_dir(tmp_path_factory.mktemp("packed") / "qwen3", "qwen3", **sizes)


def run(tmp_path, model_dir, squad_dir, name, fast="on", steps=12, **overrides):
    """Train and return the recipe and its losses."""
    config = recipe_config(
        model_dir, squad_dir, tmp_path / name / "run", peft=lora_section(), model__fast_layers=fast,
        quantization=NF4, step_scheduler__max_steps=steps, **overrides,
    )  # fmt: skip
    recipe = set_up_recipe(config, tmp_path / name / "config.yaml")
    recipe.run_train_validation_loop()
    rows = [json.loads(line) for line in (tmp_path / name / "run" / "training.jsonl").read_text().splitlines()]
    return recipe, [row["loss"] for row in rows]


def test_a_run(tmp_path, model_dir, squad_dir, caplog):
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        fast, losses = run(tmp_path, model_dir, squad_dir, "fast")
    _, plain = run(tmp_path, model_dir, squad_dir, "plain", "off")
    assert losses[-1] < losses[0]
    assert max(abs(a - b) for a, b in zip(losses, plain, strict=True)) <= 1e-5
    assert "Decoder layers: fast (2 of 2, Qwen3DecoderLayer; weights: nf4; recomputed: none)." in caplog.messages
    line = next(m for m in caplog.messages if m.startswith("Parameters by dtype"))
    num_packed = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert f"4-bit {num_packed:,}" in line
    found = load_file(tmp_path / "fast/run/LATEST/model/adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in found} == {"weight"}
    assert all(".lora_A." in name or ".lora_B." in name for name in found)
    settings = peft.PeftConfig.from_pretrained(str(tmp_path / "fast/run/LATEST/model"))
    assert settings.r == fast.settings.peft.get("dim")


@pytest.mark.parametrize(
    "overrides", [{"packed_sequence__packed_sequence_size": 160}, {"distributed__activation_checkpointing": "full"}]
)
def test_ways_to_run(tmp_path, model_dir, squad_dir, overrides):
    losses = [run(tmp_path, model_dir, squad_dir, fast, fast, 6, **overrides)[1] for fast in ("on", "off")]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-5


def test_a_resumed_run_is_the_same_run(tmp_path, model_dir, squad_dir):
    whole = run(tmp_path, model_dir, squad_dir, "whole", steps=8)
    run(tmp_path, model_dir, squad_dir, "parts", steps=4)
    parts = run(tmp_path, model_dir, squad_dir, "parts", steps=8)
    assert parts[1] == whole[1]
    for (name, a), (_, b) in zip(whole[0].model.named_parameters(), parts[0].model.named_parameters(), strict=True):
        assert torch.equal(a, b) or "lora_" not in name


def test_the_key_is_part_of_the_schema(tmp_path, model_dir, squad_dir):
    values = {**NF4, "load_in_4bit": False, "load_in_8bit": True, "compute_in_fp8": True}
    config = recipe_config(model_dir, squad_dir, tmp_path, peft=lora_section(), quantization=values)
    with pytest.raises(ConfigError, match=r"`quantization\.compute_in_fp8: true` multiplies 4-bit weights"):
        load_settings(ConfigNode(config))


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory, model_dir):
    """A model that Transformers and bitsandbytes have packed and saved."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    packing = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=packing, dtype=torch.float32, device_map={"": "cpu"}
    )
    path = tmp_path_factory.mktemp("packed") / "nf4"
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {},
            "`{}` is stored in 4 bits, where weights cannot be trained. Add a `peft` section (QLoRA), or name the "
            "model as it was before it was packed.",
        ),
        (
            {"peft": lora_section(), "quantization": {"load_in_8bit": True}},
            "`quantization.load_in_8bit: true`, but `{}` is stored in 4 bits already, and they cannot be had back. Set "
            "`quantization.load_in_4bit: true` instead, or name the model as it was before.",
        ),
        (
            {"peft": lora_section(), "fp8": {"enabled": True, "emulate": True}},
            "`fp8.enabled: true` rounds weights of 16 bits, but `{}` is stored in 4. Set it to false, or name the "
            "model as it was before it was packed.",
        ),
    ],
)
def test_packed_files_stay_as_they_are(tmp_path, packed_dir, squad_dir, more, expected):
    config = recipe_config(packed_dir, squad_dir, tmp_path / "run", **more)
    with pytest.raises(UserError) as error:
        set_up_recipe(config, tmp_path / "config.yaml")
    assert str(error.value) == expected.format(packed_dir)


def test_details_of_packed_files_that_are_asked_for_in_vain_are_named(tmp_path, packed_dir, squad_dir, caplog):
    asked = {**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    config = recipe_config(packed_dir, squad_dir, tmp_path / "run", peft=lora_section(), quantization=asked)
    set_up_recipe(config, tmp_path / "config.yaml")
    found = [message for message in caplog.messages if "has no effect" in message]
    assert found == [f"`quantization.bnb_4bit_quant_type` has no effect: in `{packed_dir}` it is nf4."]


def test_dora_wants_weights_that_are_not_packed():
    config = recipe_config("nowhere", "nowhere", "run", peft={**lora_section(), "use_dora": True}, quantization=NF4)
    with pytest.raises(ConfigError, match="needs the lengths of the weight rows, which a quantised base does not keep"):
        load_settings(ConfigNode(config))
