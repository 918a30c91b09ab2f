"""Adapters against PEFT in fp32: outputs, every gradient, and files in both directions."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
import transformers
from support.tiny import tiny_config

from nemo_automodel.components._peft.adapter_state import (
    adapter_config,
    adapter_state_dict,
    automodel_peft_config,
    config_from_adapter,
    load_adapter_state_dict,
)
from nemo_automodel.components._peft.lora import LinearLoRA, PeftConfig, apply_lora, lora_layers
from nemo_automodel.shared.errors import ConfigError, UserError

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "kaiming": {"lora_A_init": "kaiming"},
    "pre": {"dropout_position": "pre"},
    "patterns": {
        "rank_pattern": {"down_proj": 7, "model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
}


def make_model(family="llama", **overrides):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    return model.train()


def make_pair(family="llama", targets=("q_proj", "down_proj"), **settings):
    """Return our model and PEFT's with the same base weights and the same non-zero adapters."""
    base = make_model(family)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    cfg = PeftConfig(target_modules=list(targets), dim=4, alpha=8, **settings)
    apply_lora(ours, cfg)
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", bias="none",
            lora_dropout=cfg.dropout, use_dora=cfg.use_dora, use_rslora=cfg.use_rslora,
            rank_pattern=cfg.rank_pattern, alpha_pattern=cfg.alpha_pattern,
        ),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: value + torch.randn(value.shape, generator=generator) * 0.1
        for name, value in adapter_state_dict(ours).items()
    }
    load_adapter_state_dict(ours, tensors)
    result = peft.set_peft_model_state_dict(theirs, tensors)
    assert not result.unexpected_keys
    return ours, theirs.train()


def token_loss(model, seed=5):
    ids = torch.randint(4, 400, (2, 11), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def peft_gradients(model):
    """PEFT's gradients under the names that it saves."""
    return {
        name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def our_gradients(model):
    return {f"base_model.model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_loss_and_every_gradient_equal_peft(variant, family):
    """Qwen2 has biases on its attention projections, Llama has none."""
    ours, theirs = make_pair(family, **VARIANTS[variant])
    loss, expected = token_loss(ours), token_loss(theirs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    ours_grad, theirs_grad = our_gradients(ours), peft_gradients(theirs)
    assert ours_grad.keys() == theirs_grad.keys()
    assert len(ours_grad) == (12 if variant == "dora" else 8)
    for name, grad in ours_grad.items():
        torch.testing.assert_close(grad, theirs_grad[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_dropout_of_inputs_equals_peft_draw_by_draw(variant):
    ours, theirs = make_pair(dropout=0.4, dropout_position="pre", **VARIANTS[variant])
    torch.manual_seed(7)
    loss = token_loss(ours)
    torch.manual_seed(7)
    expected = token_loss(theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(token_loss(ours.eval()), token_loss(theirs.eval()), rtol=1e-6, atol=0)
    assert not torch.allclose(loss, token_loss(ours))


def test_dropout_of_outputs_drops_the_update_and_keeps_its_mean():
    layer = torch.nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    LinearLoRA.attach(layer, PeftConfig(dim=4, alpha=4, dropout=0.5))
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    x = torch.randn(1, 16).expand(4000, 16)
    kept = layer.eval()(x)[0]
    dropped = layer.train()(x)
    is_zero = dropped == 0
    assert 0.45 < is_zero.float().mean() < 0.55
    torch.testing.assert_close(dropped[~is_zero], (2 * kept).expand_as(dropped)[~is_zero])


def test_five_adamw_steps_equal_peft():
    ours, theirs = make_pair()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, theirs)]
    for step in range(5):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = token_loss(model, seed=step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), step
    ours_state, theirs_state = adapter_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert ours_state.keys() == theirs_state.keys()
    for name, tensor in ours_state.items():
        torch.testing.assert_close(tensor, theirs_state[name], rtol=1e-3, atol=1e-6)


def test_a_fresh_adapter_changes_nothing_and_freezes_the_rest():
    base = make_model()
    adapted = copy.deepcopy(base)
    assert apply_lora(adapted, PeftConfig(target_modules="*_proj")) == 14
    assert torch.equal(token_loss(base), token_loss(adapted))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert all(".lora_" in name for name in trainable)
    assert {n for n, _ in base.named_parameters()} <= {n for n, _ in adapted.named_parameters()}


def test_initialisations():
    for init, expected_std in (("xavier", math.sqrt(2 / (400 + 100))), ("other", 1 / math.sqrt(3 * 400))):
        layer = LinearLoRA.attach(torch.nn.Linear(400, 50), PeftConfig(dim=100, lora_A_init=init))
        assert layer.lora_A.weight.std().item() == pytest.approx(expected_std, rel=0.02)
        is_bounded = layer.lora_A.weight.abs().max() <= 1 / math.sqrt(400)
        assert is_bounded == (init == "other")
        assert not layer.lora_B.weight.any()


@pytest.mark.parametrize(("lora_dtype", "stored"), [(None, torch.float32), ("bf16", torch.bfloat16)])
def test_adapters_are_stored_in_their_own_dtype_and_compute_in_the_base_dtype(lora_dtype, stored):
    layer = torch.nn.Linear(8, 6, dtype=torch.bfloat16)
    LinearLoRA.attach(layer, PeftConfig(dim=2, lora_dtype=lora_dtype))
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    y = layer(x)
    y.float().sum().backward()
    assert layer.lora_A.weight.dtype == layer.lora_A.weight.grad.dtype == stored
    assert y.dtype == torch.bfloat16
    low = x @ layer.lora_A.weight.bfloat16().T
    expected = x @ layer.weight.T + layer.bias + low @ layer.lora_B.weight.bfloat16().T * 16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_a_tied_head_named_as_target_keeps_the_embedding_as_it_is():
    model = make_model(tie_word_embeddings=True)
    apply_lora(model, PeftConfig(target_modules=["lm_head"], dim=2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.lora_B.weight.normal_()
    before = model.model.embed_tokens(torch.tensor([5]))
    token_loss(model).backward()
    assert model.lm_head.lora_A.weight.grad is not None
    assert model.model.embed_tokens.weight.grad is None
    assert torch.equal(before, model.model.embed_tokens(torch.tensor([5])))


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "patterns"])
def test_saved_adapter_loads_in_peft_and_peft_adapters_load_here(variant, tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    base = make_model()
    ours, _ = make_pair(**VARIANTS[variant])
    cfg = next(iter(lora_layers(ours).values())).peft_config
    save_file(adapter_state_dict(ours), tmp_path / "adapter_model.safetensors")
    config = adapter_config(ours, cfg, "some/base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(token_loss(ours.eval()), token_loss(theirs.eval()), rtol=1e-6, atol=0)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["target_modules"][0] == "model.layers.0.mlp.down_proj"

    theirs.save_pretrained(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    read = config_from_adapter(json.loads((tmp_path / "peft" / "adapter_config.json").read_text()), {}, tensors)
    again = copy.deepcopy(base)
    apply_lora(again, read)
    load_adapter_state_dict(again, tensors)
    assert torch.equal(token_loss(again.eval()), token_loss(ours))


def test_our_settings_survive_their_file():
    cfg = PeftConfig(target_modules="*_proj", dim=3, alpha=5, lora_dtype="torch.bfloat16", use_rslora=True)
    values = automodel_peft_config(cfg)
    assert "dim" not in values
    assert values["lora_dtype"] == "bfloat16"
    assert PeftConfig.from_dict({**values, "dim": 3, "alpha": 5}) == cfg
    assert PeftConfig.from_dict(cfg.to_dict()) == cfg


def test_layers_with_ranks_and_scales_of_their_own():
    model = make_model()
    cfg = PeftConfig(
        target_modules="*_proj",
        dim=4,
        alpha=8,
        use_rslora=True,
        rank_pattern={"*.layers.1.mlp.*": 9, "down_proj": 2},
        alpha_pattern={"k_proj": 5},
    )
    apply_lora(model, cfg)
    found = {name.removeprefix("model.layers."): layer for name, layer in lora_layers(model).items()}
    assert {name: layer.lora_A.out_features for name, layer in found.items() if layer.lora_A.out_features != 4} == {
        "0.mlp.down_proj": 2,
        "1.mlp.gate_proj": 9,
        "1.mlp.up_proj": 9,
        "1.mlp.down_proj": 9,
    }
    assert found["1.mlp.down_proj"].lora_B.weight.shape[1] == 9
    assert found["1.mlp.down_proj"].scaling == pytest.approx(8 / 3)
    assert found["0.self_attn.k_proj"].scaling == pytest.approx(5 / 2)
    config = adapter_config(model, cfg, "some/base")
    assert config["rank_pattern"] == {
        "model.layers.0.mlp.down_proj": 2,
        "model.layers.1.mlp.down_proj": 9,
        "model.layers.1.mlp.gate_proj": 9,
        "model.layers.1.mlp.up_proj": 9,
    }
    assert config["alpha_pattern"] == {f"model.layers.{i}.self_attn.k_proj": 5 for i in (0, 1)}


def test_a_rank_for_a_layer_without_an_adapter_is_refused():
    with pytest.raises(UserError) as refused:
        apply_lora(make_model(), PeftConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"k_proj": 2}))
    assert str(refused.value) == (
        "`peft.rank_pattern` `k_proj` matches no layer with an adapter. Did you mean `v_proj`? Layers with one: "
        "q_proj, v_proj."
    )


def test_an_adapter_of_another_model_is_refused():
    ours, _ = make_pair()
    other = make_model()
    apply_lora(other, PeftConfig(target_modules=["q_proj"], dim=4))
    with pytest.raises(UserError, match="does not fit"):
        load_adapter_state_dict(other, adapter_state_dict(ours))
    wider = make_model()
    apply_lora(wider, PeftConfig(target_modules=["q_proj", "down_proj"], dim=8))
    with pytest.raises(UserError, match=r"peft\.dim"):
        load_adapter_state_dict(wider, adapter_state_dict(ours))


@pytest.mark.parametrize("key", ["target_parameters", "modules_to_save"])
def test_adapters_with_more_than_lora_are_refused(key):
    with pytest.raises(UserError, match=key):
        config_from_adapter({"peft_type": "LORA", "r": 4, "lora_alpha": 8, key: {"x": 1}}, {}, {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": 0}, "`peft.dim` is 0"),
        ({"dim": 1.5}, "`peft.dim` is 1.5"),
        ({"alpha": -1}, "`peft.alpha` is -1"),
        ({"rank_pattern": {"q_proj": 0}}, "`peft.rank_pattern.q_proj` is 0"),
        ({"alpha_pattern": {"*.mlp.*": "x"}}, "`peft.alpha_pattern.*.mlp.*` is 'x'"),
        ({"dropout": 1.0}, "`peft.dropout` is 1.0"),
        ({"dropout_position": "middle"}, "Use pre or post"),
        ({"target_modules": [3]}, "`peft.target_modules` holds 3"),
        ({"target_modules": "a", "exclude_modules": "b"}, "only one of them"),
        ({"target_modules": "a", "match_all_linear": True}, "`peft.target_modules` cannot be given"),
        ({"exclude_modules": "a", "match_all_linear": True}, "`peft.exclude_modules` cannot be given"),
    ],
)
def test_bad_settings_are_one_line(settings, words):
    with pytest.raises(ConfigError) as error:
        PeftConfig(**settings)
    assert words in str(error.value)


def test_bad_dtype_and_unknown_keys_are_one_line():
    for dtype in ("bf61", "int8"):
        with pytest.raises(ConfigError, match=r"peft\.lora_dtype"):
            LinearLoRA.attach(torch.nn.Linear(2, 2), PeftConfig(lora_dtype=dtype))
    with pytest.raises(ConfigError, match="Did you mean `alpha`"):
        PeftConfig.from_dict({"alhpa": 3})


def test_keys_without_effect_are_said(caplog):
    caplog.set_level("INFO")
    apply_lora(make_model(), PeftConfig(use_triton=True, moe_rank_scaling=True, use_memory_efficient_lora=False))
    for words in ("names no layers", "use_triton: true` has no effect: it needs a GPU, not cpu", "moe_rank", "memory"):
        assert words in caplog.text
