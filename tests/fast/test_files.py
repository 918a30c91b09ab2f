"""Weights of fast layers keep their names and values: state dicts, files, other memory, copies, resumed runs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from support.fast_models import adapters_of, assert_same_step, fast_model, plain_model, tokens

from nemo_automodel._transformers.model_files import ModelFiles
from nemo_automodel.cli.held_out import without_adapter
from nemo_automodel.components._peft.adapter_state import adapter_state_dict, load_adapter_state_dict
from nemo_automodel.components._peft.lora import lora_layers

PEFT = adapters_of(dtype="float32")
FP32_TOLERANCE = 2e-5
IDS = {"input_ids": tokens(2, 6)}


def pair(family: str = "qwen2", **overrides: object):
    return plain_model(family, PEFT, torch.float32, **overrides), fast_model(family, PEFT, torch.float32, **overrides)


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_state_dicts_are_equal(family):
    plain, fast = pair(family)
    expected, found = plain.state_dict(), fast.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in plain.named_modules()]


def test_adapter_files_are_equal_byte_for_byte(tmp_path):
    for model, name in zip(pair(), ("plain", "fast"), strict=True):
        ModelFiles(model, None).write(tmp_path / name)
    assert_same_files(tmp_path / "plain", tmp_path / "fast")


@pytest.mark.parametrize("ties", [False, True])
def test_whole_models_are_saved_byte_for_byte(tmp_path, ties):
    for model, name in zip(pair(tie_word_embeddings=ties), ("plain", "fast"), strict=True):
        model.save_pretrained(tmp_path / name)
    assert_same_files(tmp_path / "plain", tmp_path / "fast")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "fast").architectures == ["Qwen2ForCausalLM"]


def test_loaded_weights_count():
    plain, fast = pair()
    other = plain_model("qwen2", PEFT, torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    for assign in (False, True):
        plain, fast = pair()
        fast(**IDS, use_cache=False)
        for model in (plain, fast):
            model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
            model.requires_grad_(False)
            for layer in lora_layers(model).values():
                layer.lora_A.requires_grad_(True)
                layer.lora_B.requires_grad_(True)
        assert_same_step(plain, fast, FP32_TOLERANCE, **IDS)


def test_a_biased_layer_notices_new_biases():
    plain, fast = pair()
    fast(**IDS, use_cache=False)
    for model in (plain, fast):
        bias = model.model.layers[0].self_attn.k_proj
        bias.bias = torch.nn.Parameter(torch.full_like(bias.bias, 0.7), requires_grad=False)
    assert_same_step(plain, fast, FP32_TOLERANCE, **IDS)


def test_models_may_move_and_change_their_dtype():
    fast = fast_model("qwen3", adapters_of())
    expected = fast(**IDS, use_cache=False).logits
    fast.float()
    torch.testing.assert_close(fast(**IDS, use_cache=False).logits.double(), expected, rtol=1e-4, atol=1e-4)
    plain = plain_model("qwen3", adapters_of(), torch.float64).float()
    for module in plain.modules():
        module.__dict__.pop("forward", None)
    assert_same_step(plain, fast, FP32_TOLERANCE, **IDS)


def test_copies_are_independent():
    fast = fast_model("qwen2", PEFT, torch.float32)
    before = fast(**IDS, use_cache=False).logits.detach()
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert torch.equal(fast(**IDS, use_cache=False).logits, before)
        assert not torch.allclose(twin(**IDS, use_cache=False).logits, before)
    plain = plain_model("qwen2", PEFT, torch.float32)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    assert_same_step(plain, twin, FP32_TOLERANCE, **IDS)


def test_adapters_can_be_taken_away():
    plain, fast = pair()
    with torch.no_grad():
        with without_adapter(plain), without_adapter(fast):
            base, found = (m(**IDS, use_cache=False).logits for m in (plain, fast))
        torch.testing.assert_close(found, base, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(fast(**IDS, use_cache=False).logits, base)


def test_transformers_modules_compute_from_the_same_memory():
    plain, fast = pair()
    x = torch.randn(2, 3, 32)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        one, other = (m.model.layers[1].get_submodule(name)(x) for m in (plain, fast))
        torch.testing.assert_close(other, one)


def test_adapters_written_behind_autograds_back_are_seen_in_evaluation():
    plain, fast = pair()
    fast(**IDS, use_cache=False)
    with torch.no_grad():
        for model in (plain, fast):
            for layer in lora_layers(model).values():
                layer.lora_B.weight.data.mul_(3)
        torch.testing.assert_close(*(m(**IDS, use_cache=False).logits for m in (fast, plain)), rtol=1e-5, atol=1e-5)


def test_loaded_adapters_are_seen_in_training():
    plain, fast = pair()
    fast(**IDS, use_cache=False)
    tensors = {name: value * 2 for name, value in adapter_state_dict(plain).items()}
    for model in (plain, fast):
        load_adapter_state_dict(model, tensors)
    assert_same_step(plain, fast, FP32_TOLERANCE, **IDS)
