"""Quantisation-aware training: the rounding against the formulae, torchao's own conversion, and whole runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from support.recipes import recipe_config, set_up_recipe
from support.tiny import tiny_config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.quantization.config import QATConfig
from nemo_automodel.components.quantization.qat import DelayedStart, create_quantizer, fake_quantize, rounding_layers
from nemo_automodel.shared.errors import ConfigError, UserError
from nemo_automodel.shared.imports import is_available

needs_torchao = pytest.mark.skipif(not is_available("torchao"), reason="torchao is not installed")
SCHEMES = [
    {"quantizer_type": "int8_dynact_int4weight", "groupsize": 16},
    {"quantizer_type": "int4_weight_only", "groupsize": 32, "inner_k_tiles": 2},
]


def model_of(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: object):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype)


def rounded_activations(x: torch.Tensor) -> torch.Tensor:
    """8 bits with an offset, both for each token; 0 is one of the numbers."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).eps)
    offset = (-128 - (low / scale).round()).clamp(-128, 127)
    return (((x / scale).round() + offset).clamp(-128, 127) - offset) * scale


def assert_nearest(found: torch.Tensor, weight: torch.Tensor, scheme: dict) -> None:
    """Hold every weight against the 16 numbers of its group: the nearest of them, either of two that are as near."""
    groups, rounded = (w.detach().float().unflatten(1, (-1, scheme["groupsize"])) for w in (weight, found))
    if scheme["quantizer_type"] == "int8_dynact_int4weight":
        step = groups.abs().amax(-1, keepdim=True) / 7.5  # from -8 to 7
        codes = rounded / step
        assert (codes - codes.round()).abs().max() < 1e-4
        assert -8 <= codes.round().min() <= codes.round().max() <= 7
        slack = 1e-3
    else:
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
        slack = 0.05  # scale and offset are numbers in bfloat16
    assert ((rounded - groups).abs() <= step * (0.5 + slack)).all()
    assert ((rounded - groups).abs() / step).mean() > 0.2
    assert max(len(group.unique()) for group in rounded.flatten(0, 1)) <= 16


@needs_torchao
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_round_as_the_formulae_say(scheme):
    model = model_of()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    fake_quantize(model, QATConfig(**scheme))
    assert dict(model.named_parameters()).keys() == weights.keys()
    layers = rounding_layers(model)
    assert len(layers) == 15
    torch.manual_seed(1)
    for name, layer in layers.items():
        x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        weight = layer.weight_fake_quantizer(layer.weight).detach()
        assert_nearest(weight, weights[f"{name}.weight"], scheme)
        has_activations = scheme["quantizer_type"] == "int8_dynact_int4weight"
        seen = rounded_activations(x) if has_activations else x
        torch.testing.assert_close(y, seen @ weight.t(), rtol=1e-4, atol=1e-5)
        assert (y - x @ weights[f"{name}.weight"].t()).norm() >= 5e-2 * y.norm(), name
        y.backward(dy)  # straight through what was rounded
        is_inside = layer.weight.grad != 0  # what was cut off at the end of the range has no gradient
        assert is_inside.float().mean() > 0.9
        torch.testing.assert_close(layer.weight.grad[is_inside], (dy.t() @ seen)[is_inside], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(leaf.grad, dy @ weight, rtol=1e-4, atol=1e-5)


@needs_torchao
def test_training_sees_what_the_conversion_makes():
    scheme = QATConfig(**SCHEMES[0])
    model, ids = model_of(), torch.randint(4, 448, (2, 7), generator=torch.Generator().manual_seed(0))
    exact = model(input_ids=ids).logits
    fake_quantize(model, scheme)
    with torch.no_grad():
        found = model(input_ids=ids).logits
        converted = create_quantizer(scheme).convert(model)(input_ids=ids).logits
    assert not list(rounding_layers(model))
    torch.testing.assert_close(found, converted, rtol=1e-4, atol=1e-5)
    assert (found - exact).norm() > 0.02 * exact.norm()


@needs_torchao
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_begins_at_a_step(scheme, caplog):
    caplog.set_level(logging.INFO, logger="nemo_automodel")
    model, ids = model_of("qwen3", torch.bfloat16), torch.tensor([[5, 6, 7]])
    exact = model(input_ids=ids).logits
    fake_quantize(model, QATConfig(**scheme))
    start = DelayedStart(model, 3)
    outputs = []
    for step in range(5):
        start.at_step(step)
        outputs.append(model(input_ids=ids).logits)
    assert all(torch.equal(found, exact) for found in outputs[:3])
    assert not torch.equal(outputs[3], exact)
    assert torch.equal(outputs[3], outputs[4])
    kind = "Int8DynActInt4Weight" if scheme["groupsize"] == 16 else "Int4WeightOnly"
    assert caplog.messages == [
        f"Fake quantisation: 15 of 15 linear layers ({kind}QATQuantizer).",
        "Fake quantisation is off until step 3.",
        "Fake quantisation is on.",
    ]


def run(directory: Path, model_dir: Path, squad_dir: Path, qat: dict | None, **overrides):
    if qat is not None:
        overrides["qat"] = {"enabled": True, **qat}
    config = recipe_config(model_dir, squad_dir, directory / "run", **overrides)
    recipe = set_up_recipe(config, directory / "config.yaml")
    recipe.run_train_validation_loop()
    rows = [json.loads(line) for line in (directory / "run" / "training.jsonl").read_text().splitlines()]
    return recipe, [row["loss"] for row in rows]


@needs_torchao
def test_a_run_begins_late_resumes_and_saves_an_ordinary_model(tmp_path, model_dirs, squad_dir):
    qat = {"qat_config": SCHEMES[0], "fake_quant_after_n_steps": 4}
    more = {"model__torch_dtype": "bfloat16", "optimizer__lr": 3e-3}
    plain = {"model__force_hf": True, "step_scheduler__max_steps": 8, **more}  # the head under the loss of logits, too
    _, exact = run(tmp_path / "exact", model_dirs("llama"), squad_dir, None, **plain)
    recipe, whole = run(tmp_path / "a", model_dirs("llama"), squad_dir, qat, step_scheduler__max_steps=8, **more)
    assert whole[:4] == exact[:4]
    assert all(a != b for a, b in zip(whole[4:], exact[4:], strict=True))
    assert whole[-1] == pytest.approx(exact[-1], rel=0.05)
    assert whole[-1] < whole[0]
    run(tmp_path / "b", model_dirs("llama"), squad_dir, qat, step_scheduler__max_steps=4, **more)
    _, parts = run(tmp_path / "b", model_dirs("llama"), squad_dir, qat, step_scheduler__max_steps=8, **more)
    assert parts == whole
    (saved,) = (tmp_path / "a" / "run").glob("epoch_0_step_7/model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for (name, ours), (other, theirs) in zip(recipe.model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name


@needs_torchao
def test_the_quantizer_may_be_named(tmp_path, model_dirs, squad_dir):
    target = "torchao.quantization.qat.Int8DynActInt4WeightQATQuantizer"
    named = {"quantizer": {"_target_": target, "groupsize": 16}}
    by_name = {"qat_config": {"groupsize": 16, "_target_": "nemo_automodel.components.quantization.qat.QATConfig"}}
    losses = [
        run(tmp_path / str(i), model_dirs("qwen2"), squad_dir, qat, step_scheduler__max_steps=4)[1]
        for i, qat in enumerate((named, by_name))
    ]
    assert losses[0] == losses[1]


MISTAKES = [
    (
        QATConfig(),
        {},
        "`qat`: Int8DynActInt4WeightQATQuantizer found no linear layer that it can round, because the group size must "
        "divide a layer's inputs, here 32, 64. Lower `groupsize`.",
    ),
    (
        QATConfig("int4_weight_only", 32),
        {},
        "`qat`: Int4WeightOnlyQATQuantizer refuses the model: Padding for QAT 4w is not supported yet. Its layers have "
        "32, 64 inputs; the group size must divide all of them, and for int4_weight_only 16 times `inner_k_tiles` as "
        "well. Lower `groupsize` or `inner_k_tiles`.",
    ),
    (
        7,
        {},
        "`qat`: a int cannot prepare a model. Use `qat_config`, or a quantizer such as "
        "torchao.quantization.qat.Int8DynActInt4WeightQATQuantizer.",
    ),
]


@needs_torchao
@pytest.mark.parametrize(("scheme", "overrides", "message"), MISTAKES)
def test_what_does_not_fit_is_told(scheme, overrides, message):
    with pytest.raises(UserError) as refused:
        fake_quantize(model_of(**overrides), scheme)
    assert str(refused.value) == message


@needs_torchao
def test_layers_left_out_are_counted(caplog):
    caplog.set_level(logging.INFO, logger="nemo_automodel")
    fake_quantize(model_of(), QATConfig(groupsize=64))
    assert caplog.messages == [
        "Fake quantisation: 2 of 15 linear layers (Int8DynActInt4WeightQATQuantizer); as they are: 13, the first is "
        "`model.layers.0.self_attn.q_proj`."
    ]


@needs_torchao
def test_fast_layers_give_way(caplog):
    caplog.set_level(logging.INFO, logger="nemo_automodel")
    config, scheme = tiny_config("llama"), QATConfig(groupsize=16)
    NeMoAutoModelForCausalLM.from_config(config, device="cpu", qat_config=scheme)
    assert "Decoder layers: plain Transformers: `qat` rounds weights in the linear layers." in caplog.messages
    with pytest.raises(UserError, match="cannot be: `qat` rounds weights"):
        NeMoAutoModelForCausalLM.from_config(config, device="cpu", qat_config=scheme, fast_layers="on")
    with pytest.raises(ConfigError, match="`qat_config` and `fp8_config` exclude each other"):
        NeMoAutoModelForCausalLM.from_config(config, device="cpu", qat_config=scheme, fp8_config={"enabled": True})


@pytest.mark.skipif(is_available("torchao"), reason="torchao is installed")
def test_without_torchao_it_is_named(tmp_path, model_dirs, squad_dir):
    with pytest.raises(UserError) as refused:
        run(tmp_path, model_dirs("llama"), squad_dir, {})
    assert str(refused.value) == (
        "`qat.enabled: true` needs the package `torchao`, which is not installed. Run: pip install torchao"
    )


BAD_SCHEMES = [
    (
        {"quantizer_type": "int8_dynact"},
        "`qat.qat_config.quantizer_type: int8_dynact` is not known. Did you mean "
        "`int8_dynact_int4weight`? Use int8_dynact_int4weight or int4_weight_only.",
    ),
    (
        {"quantizer_type": "int4_weight_only", "groupsize": 48},
        "`qat.qat_config.groupsize` is 48, but for int4_weight_only it must be one of 32, 64, 128, 256. Use 32.",
    ),
    (
        {"groupsize": 1},
        "`qat.qat_config.groupsize` is 1, but for int8_dynact_int4weight it must be at least 2. Use 32.",
    ),
    ({"inner_k_tiles": 3}, "`qat.qat_config.inner_k_tiles` is 3, but it must be 2, 4 or 8. Use 8."),
]


@pytest.mark.parametrize(("keys", "message"), BAD_SCHEMES)
def test_bad_schemes(keys, message):
    with pytest.raises(ConfigError) as refused:
        QATConfig(**keys)
    assert str(refused.value) == message
