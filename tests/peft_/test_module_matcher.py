"""Which layers a PEFT section means."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.tiny import tiny_config
from torch import nn

from nemo_automodel.components._peft.lora import PeftConfig, apply_lora, lora_layers
from nemo_automodel.components._peft.module_matcher import is_adaptable, matches
from nemo_automodel.shared.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def config():
    return tiny_config("llama", num_hidden_layers=2)


def chosen(config, **settings) -> set[str]:
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = apply_lora(model, PeftConfig(dim=1, **settings))
    names = set(lora_layers(model))
    assert count == len(names)
    return names


ATTENTION = {f"model.layers.{i}.self_attn.{c}_proj" for i in (0, 1) for c in "qkvo"}
MLP = {f"model.layers.{i}.mlp.{c}_proj" for i in (0, 1) for c in ("gate", "up", "down")}


def test_rules(config):
    assert chosen(config) == ATTENTION | MLP
    assert chosen(config, target_modules=None) == ATTENTION | MLP
    assert chosen(config, target_modules="*_proj") == ATTENTION | MLP
    assert chosen(config, match_all_linear=True) == ATTENTION | MLP  # never the head
    assert chosen(config, target_modules=["*.mlp.*"]) == MLP
    assert chosen(config, target_modules=["o_proj", "lm_head"]) == {n for n in ATTENTION if "o_proj" in n} | {"lm_head"}
    assert chosen(config, target_modules="model.layers.1.self_attn.q_proj") == {"model.layers.1.self_attn.q_proj"}
    assert chosen(config, exclude_modules=["lm_head", "*.mlp.*"]) == ATTENTION
    assert chosen(config, exclude_modules="*_proj") == {"lm_head"}


def test_patterns_are_regular_expressions_with_a_star():
    assert matches("a.b.q_proj", "q_proj")
    assert matches("a.b.q_proj", "*.q_proj")
    assert matches("a.b.q_proj", "a.*")
    assert matches("aXb", "a.b")  # the dot is not escaped
    assert not matches("a.b.q_proj", "b.q_proj")
    assert not matches("a.b.q_proj", "proj")


def test_a_target_that_matches_nothing_lists_what_is_there(config):
    with pytest.raises(UserError) as error:
        chosen(config, target_modules=["q_prj"])
    message = str(error.value)
    assert message.startswith("`peft.target_modules` `q_prj` matches no linear layer. Did you mean `q_proj`?")
    assert "down_proj, gate_proj" in message
    with pytest.raises(UserError, match="leaves no linear layer"):
        chosen(config, exclude_modules="*")


def test_one_of_several_targets_that_matches_nothing_is_said(config, caplog):
    chosen(config, target_modules=["q_proj", "qkv_proj"])
    assert "`qkv_proj` matches no linear layer" in caplog.text


def test_an_unreadable_pattern_is_one_line(config):
    with pytest.raises(ConfigError, match=r"module pattern `\(q`"):
        chosen(config, target_modules="(q")


def test_only_layers_that_are_called_can_be_adapted():
    attention = nn.MultiheadAttention(8, 2)
    assert not is_adaptable(attention.out_proj)
    assert is_adaptable(nn.Linear(2, 2))
    assert not is_adaptable(nn.Embedding(4, 2))
