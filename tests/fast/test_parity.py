"""The fast layers against Transformers' own, number by number in float64: every family, target, policy and shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.fast_models import PROJECTIONS, adapters_of, assert_same_step, fast_model, plain_model, tokens

from nemo_automodel._transformers.fast_layers import FastRequest, use_fast_layers
from nemo_automodel.components._peft.lora import LinearLoRA, PeftConfig, lora_layers

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
POLICIES = ["none", "selective", "full"]
TOLERANCE = 1e-11
SUBSETS = [list(s) for n in range(1, 8) for s in itertools.combinations(PROJECTIONS, n)]


def compare(family: str, peft: PeftConfig, recompute: str = "none", shape: tuple[int, int] = (2, 7), **overrides):
    plain = plain_model(family, peft, **overrides)
    fast = fast_model(family, peft, recompute=recompute, **overrides)
    assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(*shape))


@pytest.mark.parametrize("part", range(8))
def test_every_subset_of_the_projections(part):
    """127 subsets, spread over the policies."""
    for number in range(part, len(SUBSETS), 8):
        compare("llama", adapters_of(SUBSETS[number]), POLICIES[number % 3], (1, 5), num_hidden_layers=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", POLICIES)
def test_every_family_under_every_policy(family, recompute):
    for targets in (PROJECTIONS, ["q_proj", "v_proj"], ["o_proj"], ["k_proj", "up_proj"], ["down_proj"]):
        compare(family, adapters_of(targets), recompute)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6, "hidden_size": 21, "intermediate_size": 50},
        {"rms_norm_eps": 0.1, "num_hidden_layers": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    ],
    ids=["mha", "mqa", "odd", "eps", "rope"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shapes_and_settings_of_models(family, overrides):
    compare(family, adapters_of(), **overrides)


@pytest.mark.parametrize("shape", [(1, 1), (3, 13), (5, 2)])
def test_shapes_of_batches(shape):
    compare("qwen2", adapters_of(), shape=shape)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"dim": 70}, {"dim": 1, "alpha": 0.5}])
def test_ranks_and_scales(settings):
    compare("qwen3", adapters_of(**settings))


def test_ranks_scales_and_exclusions_by_name():
    compare(
        "qwen2",
        adapters_of(
            rank_pattern={"*.layers.1.*.down_proj": 9, "k_proj": 1, "gate_proj": 5},
            alpha_pattern={"v_proj": 2, "up_proj": 7},
        ),
    )
    compare("llama", adapters_of([], exclude_modules=["lm_head", "o_proj", "*.layers.0.mlp.*"]))


def test_targets_may_differ_between_layers():
    compare("llama", adapters_of(["*.layers.1.mlp.*_proj", "*.layers.0.self_attn.v_proj"]))
    compare("llama", adapters_of("*.layers.0.mlp.down_proj"))


def test_ranks_may_differ_between_modules():
    models = []
    for make in (plain_model, plain_model):
        model = make("qwen2", adapters_of("o_proj"))
        for number, name in enumerate(PROJECTIONS):
            for block in model.model.layers:
                linear = block.get_submodule(("mlp." if number > 3 else "self_attn.") + name)
                if not isinstance(linear, LinearLoRA):
                    LinearLoRA.attach(linear, adapters_of(dim=1 + 2 * number, alpha=number + 0.5))
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B.weight, std=0.1, generator=torch.Generator().manual_seed(3))
            torch.nn.init.normal_(layer.lora_A.weight, std=0.1, generator=torch.Generator().manual_seed(4))
        models.append(model)
    plain, fast = models
    for module in fast.modules():
        module.__dict__.pop("forward", None)
    assert use_fast_layers(fast, FastRequest("on", adapters_of()))
    assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(2, 7))


def test_nothing_below_the_lowest_adapter_is_computed_backwards():
    """An adapter at the end of the last layer alone leaves the embedding's output without a gradient."""
    fast = fast_model("llama", adapters_of("*.layers.1.mlp.down_proj"))
    seen = []
    fast.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    fast(input_ids=tokens(1, 5), use_cache=False).logits.sum().backward()
    assert seen == [False]


def test_evaluation_computes_the_same():
    fast = fast_model("qwen3", adapters_of())
    trained = fast(input_ids=tokens(2, 9), use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(fast(input_ids=tokens(2, 9), use_cache=False).logits, trained)
        assert torch.equal(fast.eval()(input_ids=tokens(2, 9), use_cache=False).logits, trained)


def test_gradients_add_up():
    fast = fast_model("llama", adapters_of())
    singly, at_once = [], tokens(4, 6)
    for rows in (at_once, at_once[:1], at_once[1:3], at_once[3:]):
        fast(input_ids=rows, use_cache=False).logits.square().sum().backward()
        if rows is at_once:
            singly = [p.grad.clone() for p in fast.parameters() if p.requires_grad]
            fast.zero_grad()
    for expected, p in zip(singly, (p for p in fast.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)


def test_fp32():
    peft = adapters_of(dtype="float32")
    plain, fast = plain_model("qwen3", peft, torch.float32), fast_model("qwen3", peft, torch.float32)
    assert_same_step(plain, fast, 3e-6, input_ids=tokens(2, 9))


def test_a_second_backward_pass_is_refused():
    loss = fast_model("llama", adapters_of())(input_ids=tokens(1, 5), use_cache=False).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError) as refused:
        loss.backward()
    assert str(refused.value) == (
        "A fast decoder layer overwrites what it kept, so its backward pass runs once. Run the forward pass again, or "
        "load the model with `force_hf: true`."
    )
