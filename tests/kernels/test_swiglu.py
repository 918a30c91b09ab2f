"""SwiGLU: both forms against float64."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import DTYPES, assert_close, filled, in_wider_buffer

from nemo_automodel.kernels import swiglu
from nemo_automodel.kernels.jit import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
RUNS = [
    pytest.param(swiglu.swiglu_reference, swiglu.swiglu_backward_reference, id="torch"),
    pytest.param(swiglu.swiglu_triton, swiglu.swiglu_backward_triton, id="triton", marks=needs_triton),
]


@pytest.mark.parametrize(("forward", "backward"), RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (2, 130), (4, 1029)])
def test_forward_and_backward(forward, backward, dtype, shape):
    torch.manual_seed(shape[1])
    rows, width = shape
    gate_up = in_wider_buffer((torch.randn(rows, 2 * width) * 3).to(dtype), 5)
    gate_up[0, 0] = 200.0  # exp overflows on one side
    gate_up[-1, 0] = -200.0
    dh = torch.randn(shape).to(dtype)
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    oracle_h = gate * torch.sigmoid(gate) * up
    oracle_d = torch.autograd.grad(oracle_h, leaf, dh.double())[0]

    results = {}
    for name, fwd, bwd in (
        ("checked", forward, backward),
        ("plain", swiglu.swiglu_reference, swiglu.swiglu_backward_reference),
    ):
        h = in_wider_buffer(filled(*shape, dtype=dtype), 3)
        fwd(gate_up, h)
        work, dh_work = gate_up.clone(), in_wider_buffer(dh, 2)
        bwd(dh_work, work)
        results[name] = h, work, dh_work
    for checked, oracle, plain in zip(
        results["checked"], (oracle_h.detach(), oracle_d, oracle_h.detach()), results["plain"], strict=True
    ):
        assert_close(checked, oracle, plain)
