"""Adapters fused with their linear layers, against plain ones and against PEFT: every family, step by step in fp32."""

from __future__ import annotations

import pytest
import torch
from support.other_models import OTHERS, adapters_of, model_with_adapters, under_peft

from nemo_automodel._transformers.assemble import recompute_activations
from nemo_automodel._transformers.fast_linears import fuse_adapters
from nemo_automodel.components._peft.lora import lora_layers

TOLERANCE = 1e-5
NUM_STEPS = 3


def tokens(step: int) -> torch.Tensor:
    return torch.randint(4, 96, (2, 13), generator=torch.Generator().manual_seed(step))


def train(model: torch.nn.Module, adapters: dict[str, torch.Tensor]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Return loss and gradients of every step; two micro-batches a step, the second one shorter."""
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    found = []
    for step in range(NUM_STEPS):
        ids, total = tokens(step), 0.0
        for rows in (ids, ids[:1, :7]):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            total += loss.item()
        found.append((total, {name: p.grad.clone() for name, p in adapters.items()}))
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_same(found: list, expected: list) -> None:
    assert expected[-1][0] != pytest.approx(expected[0][0], rel=1e-4), "nothing changed"
    for step, ((loss, grads), (other_loss, other_grads)) in enumerate(zip(found, expected, strict=True)):
        assert loss == pytest.approx(other_loss, rel=TOLERANCE), f"loss of step {step}"
        assert grads.keys() == other_grads.keys()
        scale = max(float(grad.norm()) for grad in other_grads.values())
        for name, grad in other_grads.items():
            error = (grads[name] - grad).norm() / max(float(grad.norm()), 1e-2 * scale)
            assert error <= TOLERANCE, f"step {step}: {name} differs by {error:.1e} of its norm"


def fused(family: str, recompute: str = "none"):
    model = model_with_adapters(family)
    assert fuse_adapters(model, recompute) == len(lora_layers(model)) > 0
    return model


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_trains_as_under_peft_and_as_with_plain_adapters(family):
    model, plain = fused(family), model_with_adapters(family)
    peft, peft_adapters = under_peft(family, plain)
    found = train(model, adapters_of(model))
    assert_same(found, train(plain, adapters_of(plain)))
    assert_same(found, train(peft, peft_adapters))


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("family", ["gemma2", "phi", "gpt_neox", "mixtral"])
def test_layers_that_are_recomputed(family, policy):
    model, plain = fused(family, policy), model_with_adapters(family)
    recompute_activations(model, policy)
    assert_same(train(model, adapters_of(model)), train(plain, adapters_of(plain)))


def test_selective_recomputation_repeats_no_product_of_the_base(monkeypatch):
    """What Transformers' policy keeps are whole products: x·Wᵀ comes back on the way back, in the memory it had."""
    model = fused("gemma", "selective")
    recompute_activations(model, "selective")
    results: dict[str, list[torch.Tensor]] = {}
    for name, layer in lora_layers(model).items():
        store = layer.fused_core.store

        def recorded(x, low, product=store.base_outputs, name=name):
            results.setdefault(name, []).append(product(x, low))
            return results[name][-1]

        monkeypatch.setattr(store, "base_outputs", recorded)
    model(input_ids=tokens(0), use_cache=False).logits.sum().backward()
    again = {name: outputs for name, outputs in results.items() if "down_proj" not in name}  # nothing needs that one
    assert len(again) == 12
    for name, (first, second) in again.items():
        assert first.data_ptr() == second.data_ptr(), name


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 4), (0, 3)])
def test_shapes_of_inputs(shape):
    layer = lora_layers(fused("phi"))["model.layers.0.mlp.fc1"]
    plain = lora_layers(model_with_adapters("phi"))["model.layers.0.mlp.fc1"]
    results = []
    for module in (layer, plain):
        x = torch.randn(*shape, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = module(x.transpose(0, 1) if len(shape) > 1 else x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), dx))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_evaluation_sees_every_write_to_an_adapter():
    """Also one through `.data`, which leaves no trace, and a loaded state."""
    model, plain = fused("granite"), model_with_adapters("granite")
    for write in (0.5, 0.0):
        for other in (model, plain):
            for name, parameter in other.named_parameters():
                if "lora_B" in name:
                    parameter.data.mul_(write)
        with torch.no_grad():
            values = [other.eval()(input_ids=tokens(0), use_cache=False).logits for other in (model, plain)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    state = {name: torch.full_like(p, 0.01) for name, p in adapters_of(plain).items()}
    for other in (model, plain):
        other.load_state_dict(state, strict=False)
    values = [other(input_ids=tokens(0), use_cache=False).logits for other in (model, plain)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


def test_generation_with_a_cache_is_the_same():
    texts = [
        model.eval().generate(input_ids=tokens(0)[:1, :5], max_new_tokens=8, do_sample=False)
        for model in (fused("olmo2"), model_with_adapters("olmo2"))
    ]
    assert torch.equal(*texts)


def test_autocast_and_other_dtypes_take_the_plain_way():
    model, plain = fused("gemma"), model_with_adapters("gemma")
    losses = []
    for other in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = other(input_ids=tokens(0), labels=tokens(0), use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for name, parameter in adapters_of(model).items():
        assert torch.equal(parameter.grad, adapters_of(plain)[name].grad)


def test_a_model_that_moves_and_changes_dtype_is_followed():
    model, plain = fused("stablelm").double(), model_with_adapters("stablelm").double()
    values = [other(input_ids=tokens(0), use_cache=False).logits for other in (model, plain)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


def test_less_is_kept_for_the_way_back():
    """One input and R numbers a token for each layer, instead of everything that the written-out form makes."""

    def kept(layer: torch.nn.Module) -> int:
        seen = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(100, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        return sum(seen.values())

    fused_bytes = kept(lora_layers(fused("phi"))["model.layers.0.mlp.fc1"])
    assert fused_bytes == 100 * (32 + 64) * 4  # x, and x·Aᵀ with ranks rounded up to 64
