"""What the planner says of optimizers, against the optimizers themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo_automodel._transformers.outline import _Ledger
from nemo_automodel.components.plan.optimizers import bytes_of

NUM_WEIGHTS = 20_000
CASES = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("Adam", {"foreach": True}),
    ("AdamW", {"foreach": True, "amsgrad": True}),
    ("AdamW", {"fused": True}),
    ("AdamW", {"foreach": False}),
    ("Adagrad", {}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adadelta", {}),
    ("Adamax", {}),
    ("RAdam", {}),
    ("ASGD", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {' '.join(o)}" for n, o in CASES])
def test_an_optimizer_needs_what_the_table_says(name, options):
    weights = nn.ParameterList([nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(20)])
    # on a GPU torch takes all weights at once unless told otherwise
    how = {} if "fused" in options or "foreach" in options else {"foreach": True}
    optimizer = getattr(torch.optim, name)(weights.parameters(), lr=1e-3, **options, **how)
    for _ in range(2):  # the first step makes the state
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        with _Ledger([*weights, *(weight.grad for weight in weights), *kept]) as ledger:
            optimizer.step()
    found = bytes_of(f"torch.optim.{name}", options, 2)
    assert found.is_known
    assert found.state == pytest.approx(sum(t.nbytes for t in kept) / NUM_WEIGHTS, abs=0.03)
    # one weight after the other: a few numbers for a twentieth of them
    assert found.step == pytest.approx(ledger.peak / NUM_WEIGHTS, abs=0.31)


def test_other_sources():
    assert bytes_of("torch.optim.AdamW", {"lr": 1e-4}, 2).step == 0, "this project fuses it"
    assert bytes_of("bitsandbytes.optim.AdamW8bit", {}, 4).state == 2.03
    ours = bytes_of("nemo_automodel.components.optim.stochastic.adamw", {}, 2)
    assert (ours.state, ours.step, ours.is_known) == (4, 0, True)
    unknown = bytes_of("somewhere.Lamb", {}, 2)
    assert (unknown.state, unknown.is_known) == (4, False)
