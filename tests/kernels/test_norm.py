"""RMSNorm: both forms against float64."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import DTYPES, assert_close, filled, in_wider_buffer, rms_norm_64

from nemo_automodel.kernels import fp8, norm
from nemo_automodel.kernels.jit import HAS_TRITON

SHAPES = [(2, 3), (3, 7), (5, 64), (2, 130), (4, 515)]
EPS = 1e-5
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
RUNS = [
    pytest.param(norm.rms_norm_reference, norm.rms_norm_backward_reference, id="torch"),
    pytest.param(norm.rms_norm_triton, norm.rms_norm_backward_triton, id="triton", marks=needs_triton),
]


@pytest.mark.parametrize(("forward", "backward"), RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(forward, backward, dtype, has_residual, shape):
    torch.manual_seed(shape[1])
    x, r, dy, dres = (in_wider_buffer(torch.randn(shape).to(dtype), extra) for extra in (0, 3, 5, 2))
    weight = torch.randn(shape[1]).to(dtype)
    total = (x.float() + r.float()).to(dtype) if has_residual else x.clone()
    leaf = total.double().requires_grad_()
    oracle = rms_norm_64(leaf, weight, EPS)
    oracle_dx = torch.autograd.grad(oracle, leaf, dy.double())[0] + (dres.double() if has_residual else 0)

    results = {}
    for name, fwd, bwd in (
        ("checked", forward, backward),
        ("plain", norm.rms_norm_reference, norm.rms_norm_backward_reference),
    ):
        work, out = x.clone(), in_wider_buffer(filled(*shape, dtype=dtype), 4)
        rstd = fwd(work, weight, EPS, r if has_residual else None, out)
        assert torch.equal(work, total), "the sum replaces x"
        dx, again = in_wider_buffer(filled(*shape, dtype=dtype), 1), filled(*shape, dtype=dtype)
        bwd(dy, total, weight, rstd, dres if has_residual else None, dx, again)
        assert torch.equal(again, out), "the backward pass makes the same output again"
        in_place = dy.clone()
        bwd(in_place, total, weight, rstd, dres if has_residual else None, in_place, None)
        assert torch.equal(in_place, dx)
        results[name] = out, dx, rstd
    assert_close(results["checked"][0], oracle.detach(), results["plain"][0])
    assert_close(results["checked"][1], oracle_dx, results["plain"][1])
    oracle_rstd = (total.double().pow(2).mean(-1) + EPS).rsqrt()
    assert_close(results["checked"][2], oracle_rstd)


@pytest.mark.parametrize(
    ("forward", "round_rows"),
    [
        pytest.param(norm.rms_norm_reference, fp8.quantize_rows_reference, id="torch"),
        pytest.param(norm.rms_norm_triton, fp8.quantize_rows_triton, id="triton", marks=needs_triton),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (4, 515)])
def test_rounding_in_the_norm_equals_two_steps(forward, round_rows, dtype, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    x[1] = 0
    one, two = fp8.Rounded.room(*shape, x.device), fp8.Rounded.room(*shape, x.device)
    out = in_wider_buffer(filled(*shape, dtype=dtype), 3)
    forward(x, weight, EPS, None, out, one)
    round_rows(out, None, two.data_MK, two.scale_M1)
    assert torch.equal(one.data_MK.view(torch.uint8), two.data_MK.view(torch.uint8))
    assert torch.equal(one.scale_M1, two.scale_M1)
