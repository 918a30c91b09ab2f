"""DoRA on the fast layers against the plain path in float64 and against PEFT in fp32: loss and every gradient."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.fast_models import PROJECTIONS, adapters_of, assert_same_step, fast_model, plain_model, tokens

from nemo_automodel.components._peft.adapter_state import adapter_state_dict
from nemo_automodel.components._peft.lora import lora_layers
from nemo_automodel.components.fast import dora

TOLERANCE = 1e-11


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_same_as_the_plain_path(family, recompute, monkeypatch):
    monkeypatch.setattr(dora, "_CHUNK_ROWS", 20)
    for targets in (PROJECTIONS, ["q_proj", "v_proj"], ["o_proj"], ["k_proj", "up_proj"], ["down_proj"]):
        settings = adapters_of(targets, use_dora=True, use_rslora=True, rank_pattern={targets[0]: 5})
        plain, fast = (make(family, settings) for make in (plain_model, fast_model))
        if recompute != "none":
            fast = fast_model(family, settings, recompute=recompute)
        for model in (plain, fast):
            for number, layer in enumerate(lora_layers(model).values()):
                layer.lora_magnitude_vector.data.mul_(1 + 0.1 * number)
        assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(2, 7))


def test_scales_follow_the_optimizer_and_evaluation():
    settings = adapters_of(use_dora=True)
    models = plain_model("llama", settings), fast_model("llama", settings)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    for step in range(3):
        assert_same_step(*models, 1e-9, input_ids=tokens(2, 7, seed=step))
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        plain, fast = (model.eval()(input_ids=tokens(2, 7), use_cache=False).logits for model in models)
    torch.testing.assert_close(plain, fast, rtol=1e-9, atol=1e-9)


def test_loss_and_every_gradient_equal_peft():
    settings = adapters_of(dtype="float32", use_dora=True, dim=4, alpha=8)
    fast = fast_model("qwen2", settings, torch.float32)
    base = plain_model("qwen2", settings, torch.float32)
    tensors = adapter_state_dict(fast)
    for layer in lora_layers(base).values():  # PEFT's model is made of the base alone
        layer.__class__ = torch.nn.Linear
        del layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM", use_dora=True, lora_dropout=0.0
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    ids, losses, grads = tokens(2, 11), [], []
    for model in (fast, theirs.train()):
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    theirs_by_name = {
        n.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector"): g
        for n, g in grads[1].items()
    }
    assert grads[0].keys() == theirs_by_name.keys()
    for name, expected in theirs_by_name.items():
        error = (grads[0][name] - expected).norm() / expected.norm()
        assert error <= 2e-5, f"{name} differs by {error:.1e} of its norm"
