"""Matrices rounded and turned round at once, and weight gradients of them, against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import DTYPES, in_wider_buffer
from kernels.test_fp8 import assert_nearest, needs_triton

from nemo_automodel.kernels import fp8, fp8_grad

RUNS = [
    pytest.param(fp8_grad.quantize_transposed_reference, id="torch"),
    pytest.param(fp8_grad.quantize_transposed_triton, id="triton", marks=needs_triton),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (70, 3), (65, 130)])
@pytest.mark.parametrize("scales", ["rows", "columns", "one"])
def test_every_number_is_the_nearest_one_on_the_other_side(run, dtype, shape, scales):
    torch.manual_seed(shape[1])
    x = in_wider_buffer(torch.randn(shape).to(dtype), 3)
    size = {"rows": (shape[0], 1), "columns": (1, shape[1]), "one": (1, 1)}[scales]
    scale = (torch.rand(size) + 0.5) / 100  # some numbers are outside the range
    padded = -(-shape[0] // 16) * 16
    out = torch.full((shape[1], padded), float("nan")).to(torch.float8_e4m3fn)
    run(x, scale, out)
    wanted = (x.double() / scale.double()).clamp(-448, 448).t()
    assert_nearest(out[:, : shape[0]], wanted, run is fp8_grad.quantize_transposed_triton)
    assert not out[:, shape[0] :].double().any()


def test_scales_of_columns():
    x = torch.tensor([[1.0, 0, -3], [-2, 0, 1]])
    torch.testing.assert_close(fp8_grad.column_scales(x), torch.tensor([[2 / 448, 1, 3 / 448]]))


@pytest.mark.parametrize("by_rows", [False, True])
def test_weight_gradient_is_the_product_of_the_rounded_operands(by_rows):
    torch.manual_seed(1)
    dy, x = torch.randn(37, 24, dtype=torch.float64), torch.randn(37, 40, dtype=torch.float64)
    dy[:, 3], x[:, 5] = 0, x[:, 5] * 100
    found = fp8_grad.weight_grad(dy, x, by_rows)
    operands = []
    for matrix in (dy, x):
        top = matrix.abs().amax(0, keepdim=True) if by_rows else matrix.abs().amax().view(1, 1)
        scale = torch.where(top > 0, top.float() / 448, 1.0)
        operands.append((matrix.float() / scale).to(torch.float8_e4m3fn).double() * scale.double())
    torch.testing.assert_close(found, operands[0].t() @ operands[1], rtol=1e-12, atol=1e-12)
    exact = dy.t() @ x
    assert 0.005 < float((found - exact).norm() / exact.norm()) < 0.06
    assert not found[3].any()


def test_rounding_into_memory_that_is_there():
    x = torch.randn(5, 32)
    room = fp8.Rounded.room(5, 32, x.device)
    data, scale = fp8.quantize_rows(x, out=room)
    assert data.data_ptr() == room.data_MK.data_ptr()
    wanted, wanted_scale = fp8.quantize_rows(x)
    assert torch.equal(data.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scale, wanted_scale)
    again = fp8.quantize_by(x, scale[:1], out_MK=data)
    assert torch.equal(again.view(torch.uint8), fp8.quantize_by(x, scale[:1]).view(torch.uint8))
