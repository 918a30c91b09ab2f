"""Steps taken in the backward pass: what is updated when, and what a sick step leaves alone."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from nemo_automodel.components.optim import stochastic
from nemo_automodel.components.optim.in_backward import StepInBackward
from nemo_automodel.recipes.base_recipe import BaseRecipe
from nemo_automodel.shared.errors import UserError


def make_model(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3)))


def test_it_is_the_step_after_the_backward_pass():
    models = [make_model(), make_model()]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    within = StepInBackward(optimizers[1])
    for seed in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        models[0](x).square().sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in models[0].parameters()])
        optimizers[0].step()
        optimizers[0].zero_grad()
        within.begin()
        models[1](x).square().sum().backward()
        assert all(p.grad is None for p in models[1].parameters())
        torch.testing.assert_close(within.finish(), norm)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_shared_weight_waits_for_the_end():
    model = make_model()
    shared = model[0].weight
    model[2].weight = shared
    twin = make_model()
    twin[2].weight = twin[0].weight
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    within = StepInBackward(optimizers[0], [shared])
    within.begin()
    before = shared.detach().clone()
    x = torch.randn(4, 6)
    model(x).square().sum().backward()
    assert torch.equal(shared, before)
    within.finish()
    twin(x).square().sum().backward()
    optimizers[1].step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_stays_once_it_is_dropped():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    within = StepInBackward(optimizer)
    within.begin()
    model(torch.randn(4, 6)).square().sum().backward()
    within.finish()
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    found = [weakref.ref(tensor) for tensor in tensors]
    assert len(found) == 6 + 6 * 3, "weights, and step and two moments of each"
    del model, optimizer, within, tensors
    gc.collect()
    assert [ref() for ref in found] == [None] * len(found)


def test_gradients_stay_once_it_is_dropped():
    model, twin = make_model(), make_model()
    within = StepInBackward(torch.optim.SGD(model.parameters(), lr=0.1))
    del within
    gc.collect()
    x = torch.randn(4, 6)
    for one in (model, twin):
        one(x).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sick_step_changes_nothing(value):
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    within = StepInBackward(torch.optim.AdamW(model.parameters()))
    within.begin()
    (model(torch.randn(4, 6)).sum() * value).backward()
    assert not torch.isfinite(within.finish())
    assert not within.has_updated
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def everything(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return copies of all weights and of all that the optimizer keeps of them."""
    found = []
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = optimizer.state.get(weight) or {}
            values = [weight, *(torch.as_tensor(state[key]) for key in sorted(state))]
            found += [value.dequantize() if hasattr(value, "codes") else value.detach() for value in values]
    return [value.clone() for value in found]


@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw8bit", "adamw8bit_sr"])
@torch.compiler.set_stance("force_eager")  # torchao compiles its steps, which takes seconds
def test_a_rehearsal_leaves_everything_as_it_was(name):
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3))).bfloat16()
    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    elif name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    elif name == "adamw8bit":
        optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=64)
    else:
        pytest.importorskip("torchao")
        optimizer = stochastic.adamw8bit(model.parameters(), lr=1e-2, block_size=64)
    within, x = StepInBackward(optimizer), torch.randn(4, 64).bfloat16()

    def step() -> None:
        model(x).square().sum().backward()
        within.finish()

    for number in range(2):  # without state, and with it
        before = everything(optimizer)
        with within.rehearsal():
            within.begin()
            step()
            assert not within.has_updated
            assert len(within._new_states) == (6 if number == 0 else 0), "their memory is held"
        after = everything(optimizer)
        assert len(after) == len(before)
        assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
        assert all(p.grad is None for p in model.parameters())
        within.begin()
        step()
        assert within.has_updated
        assert not all(torch.equal(one, other) for one, other in zip(everything(optimizer), before, strict=False))


def test_gradients_may_be_held_until_the_last_part():
    models = [make_model(), make_model()]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    within = StepInBackward(optimizers[1])
    x = torch.randn(4, 6)
    for rows in (x[:2], x[2:]):
        models[0](rows).square().sum().backward()
    optimizers[0].step()
    within.begin()
    for holds, rows in ((True, x[:2]), (False, x[2:])):
        within.hold(holds)
        models[1](rows).square().sum().backward()
        assert all((p.grad is not None) == holds for p in models[1].parameters())
    within.finish()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradients_that_are_sick_too_late_stop_the_run():
    recipe = BaseRecipe.__new__(BaseRecipe)
    recipe.schedule = SimpleNamespace(step=5)
    recipe._in_backward = SimpleNamespace(has_updated=True)
    recipe._check_in_backward(1.5)
    with pytest.raises(UserError) as refused:
        recipe._check_in_backward(float("nan"))
    assert str(refused.value) == (
        "Step 4 has gradients that are not finite below the output head, and `optimizer.in_backward` had updated the "
        "weights above them by then. Start again from the last checkpoint, without it or with a lower `optimizer.lr`."
    )
