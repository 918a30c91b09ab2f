"""Adapters reach the stores in time, and all at once: counted in operations, compared with plain layers."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from support.fast_models import adapters_of, assert_same_step, fast_model, plain_model, tokens
from support.other_models import model_with_adapters
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_automodel._transformers.fast_linears import fuse_adapters


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.name()] += 1
        return func(*args, **(kwargs or {}))


def fused_model(family: str = "gemma"):
    model = model_with_adapters(family)
    fuse_adapters(model)
    return model


def pair(kind: str):
    if kind == "layers":
        return plain_model("llama", adapters_of()), fast_model("llama", adapters_of())
    return model_with_adapters("gemma"), fused_model()


def run(model) -> torch.Tensor:
    return model(input_ids=tokens(1, 6) % 90 + 4, use_cache=False).logits


def assert_same(plain, fast) -> None:
    assert_same_step(plain, fast, 1e-5, input_ids=tokens(2, 7) % 90 + 4)


@pytest.mark.parametrize("kind", ["layers", "linears"])
def test_an_optimizer_step_is_followed_by_one_copy_of_everything(kind):
    plain, fast = pair(kind)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (plain, fast)]
    for _ in range(2):
        assert_same(plain, fast)
        for optimizer in optimizers:
            optimizer.step()
        with Count() as first:
            run(fast)
        with Count() as second:
            run(fast)
        assert (first.of["aten::_foreach_copy_"], first.of["aten::_foreach_mul.ScalarList"]) == (1, 1)
        assert (second.of["aten::_foreach_copy_"], second.of["aten::_foreach_mul.ScalarList"]) == (0, 0)
    assert_same(plain, fast)


@pytest.mark.parametrize("kind", ["layers", "linears"])
def test_every_way_to_change_adapters_is_seen(kind):
    plain, fast = pair(kind)
    assert_same(plain, fast)
    state = {n: torch.full_like(p, 0.02) for n, p in plain.named_parameters() if "lora_" in n}
    for model in (plain, fast):
        model.load_state_dict(state, strict=False)
    assert_same(plain, fast)
    exchanged = {n: torch.full_like(p, -0.03) for n, p in state.items()}
    for model in (plain, fast):
        model.load_state_dict({n: v.clone() for n, v in exchanged.items()}, strict=False, assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    assert_same(plain, fast)
    for model in (plain, fast):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.add_(0.01)
    assert_same(plain, fast)


@pytest.mark.parametrize("kind", ["layers", "linears"])
def test_a_call_that_fails_leaves_nothing_fresh(kind):
    plain, fast = pair(kind)

    def fail(*_: object) -> None:
        raise ArithmeticError

    hook = (fast.model.layers[1] if kind == "layers" else fast.model.layers[1].mlp).register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        run(fast)
    hook.remove()
    stores = [store for m in fast.modules() for store in stores_of(m)]
    assert stores
    assert not any(store.is_fresh for store in stores)
    for model in (plain, fast):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = parameter.data * 2
    assert_same(plain, fast)


def stores_of(module) -> tuple:
    if "fast_core" in vars(module):
        return module.fast_core.stores
    return (module.fused_core.store,) if "fused_core" in vars(module) else ()


def test_layers_called_without_their_model_look_for_themselves():
    plain, fast = pair("linears")
    for model in (plain, fast):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(3)
    x = torch.randn(3, 32)
    values = [model.model.layers[0].mlp(x) for model in (plain, fast)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_model_has_stores_of_its_own():
    fast = fused_model()
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    base = model_with_adapters("gemma")
    values = [run(fast), run(base)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    assert (run(twin) - run(fast)).abs().max() > 1e-3
