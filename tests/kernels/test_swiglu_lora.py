"""SwiGLU with LoRA around it: both forms against float64."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import DTYPES, assert_close, filled, in_wider_buffer

from nemo_automodel.kernels import swiglu_lora
from nemo_automodel.kernels.jit import HAS_TRITON
from nemo_automodel.kernels.lora import Update, add_update_reference, add_update_triton

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
RUNS = [
    pytest.param(swiglu_lora.swiglu_lora_reference, swiglu_lora.swiglu_lora_backward_reference, id="torch"),
    pytest.param(
        swiglu_lora.swiglu_lora_triton, swiglu_lora.swiglu_lora_backward_triton, id="triton", marks=needs_triton
    ),
]
PARTS = [((0, 3), (3, 8)), ((0, 0), (0, 5)), ((0, 5), (5, 5)), ((0, 16), (16, 32))]
WIDTH = 32


def block_diagonal(columns: int, parts: tuple[tuple[int, int], ...], dtype: torch.dtype) -> torch.Tensor:
    """Return B of layers with ``columns`` outputs each: random at the ranks of each, zero elsewhere."""
    b = torch.zeros(columns * len(parts), WIDTH)
    for index, (first, to) in enumerate(parts):
        b[index * columns : (index + 1) * columns, first:to] = torch.randn(columns, to - first) * 0.3
    return in_wider_buffer(b.to(dtype), 3)


@pytest.mark.usefixtures("tile_height")
@pytest.mark.parametrize(("forward", "backward"), RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shape", [(3, 7), (33, 130), (4, 1029)])
def test_forward_and_backward(forward, backward, dtype, parts, shape):
    torch.manual_seed(shape[1])
    rows, width = shape
    gate_up = in_wider_buffer((torch.randn(rows, 2 * width) * 2).to(dtype), 5)
    low, dlow = (in_wider_buffer(torch.randn(rows, WIDTH).to(dtype), 2) for _ in range(2))
    b, a_rank = block_diagonal(width, parts, dtype), 6
    a = in_wider_buffer((torch.randn(WIDTH, width) * 0.1).to(dtype), 1)
    a[a_rank:] = 0
    dh = torch.randn(shape).to(dtype)
    leaf = gate_up.double().requires_grad_()
    gate, up = (leaf + low.double() @ b.double().t()).chunk(2, dim=-1)
    oracle_h = gate * torch.sigmoid(gate) * up
    oracle_d = torch.autograd.grad(oracle_h, leaf, dh.double() + dlow.double() @ a.double())[0]
    oracle_h = oracle_h.detach()

    update, dh_update = Update(low, b.t(), parts), Update(dlow, a, ((0, a_rank),))
    results = {}
    for name, fwd, bwd in (
        ("checked", forward, backward),
        ("plain", swiglu_lora.swiglu_lora_reference, swiglu_lora.swiglu_lora_backward_reference),
    ):
        h = in_wider_buffer(filled(*shape, dtype=dtype), 3)
        low_h = fwd(gate_up, h, update, a, a_rank)
        work, dh_work = gate_up.clone(), in_wider_buffer(dh, 2)
        product = bwd(dh_work, work, update, dh_update, b, parts)
        results[name] = h, work, dh_work, low_h, product
    oracles = oracle_h, oracle_d, oracle_h, oracle_h @ a.double().t(), oracle_d @ b.double()
    for checked, oracle, plain in zip(results["checked"], oracles, results["plain"], strict=True):
        assert_close(checked, oracle, plain)


@pytest.mark.usefixtures("tile_height")
@pytest.mark.parametrize(("forward", "backward"), RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (2, 130), (4, 1029)])
def test_every_product_can_be_left_out(forward, backward, dtype, shape):
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
        ("plain", swiglu_lora.swiglu_lora_reference, swiglu_lora.swiglu_lora_backward_reference),
    ):
        h = in_wider_buffer(filled(*shape, dtype=dtype), 3)
        assert fwd(gate_up, h, None, None, 0) is None
        work, dh_work = gate_up.clone(), in_wider_buffer(dh, 2)
        assert bwd(dh_work, work, None, None, None, ()) is None
        results[name] = h, work, dh_work
    oracles = oracle_h.detach(), oracle_d, oracle_h.detach()
    for checked, oracle, plain in zip(results["checked"], oracles, results["plain"], strict=True):
        assert_close(checked, oracle, plain)


@needs_triton
def test_more_ranks_than_a_tile_holds(monkeypatch):
    """The road a GPU takes for a large rank: updates in several tiles, products of low rank on their own."""
    monkeypatch.setattr(swiglu_lora, "runs_triton", lambda tensor: True)
    torch.manual_seed(0)
    rows, width, parts, ranks = 5, 37, ((0, 70), (70, 140)), 140
    gate_up, dh, h = torch.randn(rows, 2 * width), torch.randn(rows, width), filled(rows, width, dtype=torch.float32)
    low, dlow, a = torch.randn(rows, ranks), torch.randn(rows, ranks), torch.randn(ranks, width) * 0.1
    b = torch.zeros(2 * width, ranks)
    for index, (first, to) in enumerate(parts):
        b[index * width : (index + 1) * width, first:to] = torch.randn(width, to - first) * 0.1
    leaf = gate_up.double().requires_grad_()
    gate, up = (leaf + low.double() @ b.double().t()).chunk(2, dim=-1)
    oracle_h = gate * torch.sigmoid(gate) * up
    oracle_d = torch.autograd.grad(oracle_h, leaf, dh.double() + dlow.double() @ a.double())[0]
    oracle_h = oracle_h.detach()
    update, dh_update = Update(low, b.t(), parts), Update(dlow, a, ((0, ranks),))
    assert_close(swiglu_lora.swiglu_lora(gate_up, h, update, a, ranks), oracle_h @ a.double().t())
    assert_close(h, oracle_h)
    product = swiglu_lora.swiglu_lora_backward(dh, gate_up, update, dh_update, b, parts)
    assert_close(product, oracle_d @ b.double())
    assert_close(dh, oracle_h)
    assert_close(gate_up, oracle_d)


@pytest.mark.usefixtures("tile_height")
@pytest.mark.parametrize(
    "run", [add_update_reference, pytest.param(add_update_triton, id="triton", marks=needs_triton)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (67, 130, 17), (5, 259, 70)])
def test_update_in_place(run, dtype, has_residual, rows, columns, rank):
    torch.manual_seed(rank)
    low = in_wider_buffer(torch.randn(rows, rank).to(dtype), 3)
    b = (torch.randn(columns, rank) * 0.1).to(dtype)
    y, residual = (in_wider_buffer(torch.randn(rows, columns).to(dtype), 2) for _ in range(2))
    oracle = y.double() + low.double() @ b.double().t() + (residual.double() if has_residual else 0)
    update, plain = Update(low, b.t(), ((0, rank),)), y.clone()
    add_update_reference(plain, update, residual if has_residual else None)
    run(y, update, residual if has_residual else None)
    assert_close(y, oracle, plain)
