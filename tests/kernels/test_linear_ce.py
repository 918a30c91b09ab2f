"""Cross-entropy with its head, frozen or trained: both forms against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernels.oracle import DTYPES, assert_close

from nemo_automodel.kernels import linear_ce
from nemo_automodel.kernels.jit import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
RUNS = [
    pytest.param(linear_ce.cross_entropy_reference, id="torch"),
    pytest.param(linear_ce.cross_entropy_triton, id="triton", marks=needs_triton),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 5), (5, 4097), (2, 9001)])
def test_losses_and_gradient(run, dtype, rows, vocab):
    torch.manual_seed(vocab)
    logits = (torch.randn(rows, vocab) * 5).to(dtype)
    labels = torch.randint(0, vocab, (rows,))
    labels[-1] = -100
    scale = torch.tensor(0.25)
    leaf = logits.double().requires_grad_()
    oracle = F.cross_entropy(leaf, labels, ignore_index=-100, reduction="none")
    oracle_grad = torch.autograd.grad(oracle.sum() * 0.25, leaf)[0]
    checked, plain = logits.clone(), logits.clone()
    losses = run(checked, labels, scale, -100)
    linear_ce.cross_entropy_reference(plain, labels, scale, -100)
    torch.testing.assert_close(losses.double(), oracle.detach(), rtol=1e-5, atol=1e-5)
    assert not checked[-1].any()
    if rows > 1:
        assert_close(checked, oracle_grad, plain)


def test_a_column_of_minus_infinity_changes_nothing():
    logits = torch.randn(2, 4099)
    logits[:, 7] = float("-inf")
    labels, scale = torch.tensor([3, 4098]), torch.tensor(1.0)
    wanted = F.cross_entropy(logits, labels, reduction="none")
    for run in RUNS if HAS_TRITON else RUNS[:1]:
        work = logits.clone()
        torch.testing.assert_close(run.values[0](work, labels, scale, -100), wanted)
        assert work.isfinite().all()


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_loss_of_hidden_states(monkeypatch, rows):
    monkeypatch.setattr(linear_ce, "CHUNK_ROWS", 6)
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 9, dtype=torch.float64)
    labels = torch.randint(0, 31, (rows,))
    labels[0] = -100
    scale = torch.tensor(0.5, dtype=torch.float64)
    wanted = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum") * 0.5
    (wanted_grad,) = torch.autograd.grad(wanted * 3, hidden)
    loss = linear_ce.frozen_head_loss(hidden, weight, labels, scale, -100)
    (grad,) = torch.autograd.grad(loss * 3, hidden)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, wanted_grad)


@pytest.mark.parametrize("rows", [1, 7, 9, 10, 20])
@pytest.mark.parametrize("learns", ["both", "head", "hidden"])
def test_loss_of_a_head_that_learns(rows, learns):
    """Up to 9 rows the gradient of the logits waits for the backward pass, above the head's does."""
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 9, dtype=torch.float64).requires_grad_(learns != "head")
    weight = torch.nn.Parameter(torch.randn(31, 9, dtype=torch.float64), requires_grad=learns != "hidden")
    labels = torch.randint(0, 31, (rows,))
    labels[0] = -100
    scale = torch.tensor(0.5, dtype=torch.float64)
    wanted = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum") * 0.5
    wanted_grads = torch.autograd.grad(wanted * 3, [leaf for leaf in (hidden, weight) if leaf.requires_grad])
    for times in (1, 2):
        hidden.grad = None
        loss = linear_ce.trained_head_loss(hidden, weight, labels, scale, -100, chunk_rows=4)
        (loss * 3).backward()
        torch.testing.assert_close(loss, wanted)
        found = [leaf.grad for leaf in (hidden, weight) if leaf.grad is not None]
        for leaf, grad, expected in zip(["hidden", "weight"][2 - len(found) :], found, wanted_grads, strict=True):
            is_weight = (len(found) == 1 and learns == "head") or (leaf == "weight" and learns != "hidden")
            torch.testing.assert_close(grad, expected * (times if is_weight else 1))
    if learns == "hidden":
        assert weight.grad is None
