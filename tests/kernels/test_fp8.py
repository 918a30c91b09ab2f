"""Quantisation by rows: both forms against the definition, bit for bit, and the product against fp32."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import DTYPES, in_wider_buffer

from nemo_automodel.kernels import fp8
from nemo_automodel.kernels.jit import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
RUNS = [
    pytest.param(fp8.quantize_rows_reference, id="torch"),
    pytest.param(fp8.quantize_rows_triton, id="triton", marks=needs_triton),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 130), (3, 4103), (2, 32771)])
@pytest.mark.parametrize("has_factor", [False, True])
def test_every_number_is_the_nearest_one(run, dtype, shape, has_factor):
    torch.manual_seed(shape[1])
    x = in_wider_buffer((torch.randn(shape) * torch.tensor([[1e-3], [1.0], [300.0]])[: shape[0]]).to(dtype), 3)
    x[0] = 0
    out = torch.full(shape, float("nan")).to(torch.float8_e4m3fn)
    scale = torch.full((shape[0], 1), float("nan"))
    factor = torch.rand(shape[1]) + 0.5 if has_factor else None
    run(x, factor, out, scale)
    x = x.float() if factor is None else x.float() * factor
    wanted_scale = x.abs().amax(1, keepdim=True) / 448
    wanted_scale[0] = 1
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    assert_nearest(out, x.double() / scale.double(), run is fp8.quantize_rows_triton)


def assert_nearest(out: torch.Tensor, wanted: torch.Tensor, is_interpreted: bool) -> None:
    """Hold every number against all positive E4M3 numbers: the nearest, to within a division's rounding."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    distances = (wanted.abs().unsqueeze(-1) - grid).abs()
    is_nearest = (out.double() - wanted).abs() <= distances.amin(-1) + wanted.abs() * 1e-6
    if is_interpreted:
        # the interpreter loses the carry when rounding up reaches a power of two, and cuts the numbers below 2⁻⁶ off;
        # a GPU is held to all of them
        is_nearest |= grid[distances.argmin(-1)].log2().frac() == 0
        is_nearest |= (wanted.abs() < 2.0**-6) & ((out.double() - wanted).abs() < 2.0**-9)
    assert is_nearest.all()


def test_product():
    torch.manual_seed(0)
    x, w = torch.randn(5, 32), torch.randn(7, 32)
    product = fp8.scaled_product(*fp8.quantize_rows(x), *fp8.quantize_rows(w), torch.float32)
    wanted = x @ w.t()
    assert 0 < float((product - wanted).norm() / wanted.norm()) < 0.06


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(fp8.quantize_by_reference, id="torch"),
        pytest.param(fp8.quantize_by_triton, id="triton", marks=needs_triton),
    ],
)
def test_one_scale_for_a_matrix(run):
    torch.manual_seed(2)
    x = in_wider_buffer(torch.randn(3, 4103), 5)
    scale = fp8.scale_of(fp8.largest(x))
    assert float(scale) == pytest.approx(float(x.abs().max()) / 448)
    assert float(fp8.scale_of(fp8.largest(torch.zeros(2, 2)))) == 1
    out = torch.full(x.shape, float("nan")).to(torch.float8_e4m3fn)
    run(x, out, scale * 2)
    whole = torch.full(x.shape, float("nan")).to(torch.float8_e4m3fn)
    run(x, whole, scale / 2)
    assert_nearest(out, x.double() / scale.double() / 2, run is fp8.quantize_by_triton)
    assert float(whole.float().abs().max()) == 448


@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (70, 3), (129, 65)])
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(fp8.transpose_bytes, id="torch"),
        pytest.param(fp8.transpose_bytes_triton, id="triton", marks=needs_triton),
    ],
)
def test_transposed_bytes(run, shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    out = torch.zeros(shape[::-1], dtype=torch.uint8).view(torch.float8_e4m3fn)
    run(x, out)
    assert torch.equal(out.view(torch.uint8), x.view(torch.uint8).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (5, 4103)])
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(fp8.dequantize_rows_reference, id="torch"),
        pytest.param(fp8.dequantize_rows_triton, id="triton", marks=needs_triton),
    ],
)
def test_rows_made_wide_again(run, dtype, shape):
    """One rounding, from the bytes and scales themselves."""
    torch.manual_seed(3)
    rounded = fp8.Rounded(*fp8.quantize_rows(torch.randn(shape)))
    out = in_wider_buffer(torch.full(shape, float("nan")).to(dtype), 3)
    run(rounded, out)
    wanted = rounded.data_MK.double() * rounded.scale_M1.double()
    torch.testing.assert_close(out.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
