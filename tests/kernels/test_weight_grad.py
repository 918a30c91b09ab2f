"""Gradients that are summed where they lie, against sums of separate products."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import in_wider_buffer

from nemo_automodel.kernels.weight_grad import add_grad, add_product_grad

ROWS = (3, 2, 4)


@pytest.mark.parametrize("before", ["nothing", "packed", "apart", "some", "strange"])
def test_products(before):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(n, 5)) for n in ROWS]
    wanted = [torch.zeros_like(weight) for weight in weights]
    old = torch.randn(sum(ROWS), 5)
    if before != "nothing":
        for weight, total, grad in zip(weights, wanted, old.split(ROWS), strict=True):
            if before == "some" and weight is weights[1]:
                continue
            total += grad
            weight.grad = {"packed": grad, "strange": grad.t().contiguous().t()}.get(before, grad.clone())
    for _ in range(3):
        x, dy = (in_wider_buffer(torch.randn(7, n), 2) for n in (5, sum(ROWS)))
        for total, part in zip(wanted, dy.split(ROWS, dim=1), strict=True):
            total += part.t() @ x
        add_product_grad(weights, dy, x)
    for weight, total in zip(weights, wanted, strict=True):
        torch.testing.assert_close(weight.grad, total)
    assert len({weight.grad.untyped_storage().data_ptr() for weight in weights}) == 1
    if before == "packed":
        assert weights[0].grad.data_ptr() == old.data_ptr(), "a matrix that is there is added to"


def test_vectors():
    weights = [torch.nn.Parameter(torch.randn(n, dtype=torch.bfloat16)) for n in ROWS]
    grads = [torch.randn(sum(ROWS)) for _ in range(2)]
    for grad in grads:
        add_grad(weights, grad)
    found = torch.cat([weight.grad for weight in weights])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (grads[0].bfloat16() + grads[1]).bfloat16())
