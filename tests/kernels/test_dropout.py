"""Masks: their distribution, and that kernels and plain PyTorch make the same ones; products and updates under them."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.oracle import DTYPES, assert_close, filled, in_wider_buffer

from nemo_automodel.kernels import dropped_products, lora, swiglu_lora
from nemo_automodel.kernels.dropout import Dropout
from nemo_automodel.kernels.jit import HAS_TRITON
from nemo_automodel.kernels.lora import Update

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
SEEDS = [0, 7, 2**31 + 5, 2**62 + 12345]
PROBABILITIES = [0.5, 0.1, 0.02, 0.001]
STANDARD_ERRORS = 5
GOLDEN = ["11011100111001011111100100010111", "10000110101100110101001111111010"]


def mask(seed: int, stream: int, probability: float, first_row: int = 0) -> Dropout:
    return Dropout(torch.tensor([seed]), stream, probability, first_row)


def centred(dropout: Dropout, rows: int, cols: int) -> torch.Tensor:
    """Return the mask with mean 0 and variance 1, if it is what it claims to be."""
    p = dropout.threshold / 2**16
    return ((~dropout.keeps(rows, cols)).float() - p) / math.sqrt(p * (1 - p))


# --- distribution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_rate_overall_and_by_rows_and_columns(seed, probability):
    rows, cols = 512, 2048
    x = centred(mask(seed, 3, probability), rows, cols)
    assert abs(float(x.mean())) * math.sqrt(rows * cols) < STANDARD_ERRORS
    for sums, number in ((x.sum(1) / math.sqrt(cols), rows), (x.sum(0) / math.sqrt(rows), cols)):
        chi_square = float(sums.square().sum())  # its mean is `number`, its variance a little over 2 · number
        assert abs(chi_square - number) < STANDARD_ERRORS * math.sqrt(2 * number * 1.1)


@pytest.mark.parametrize("probability", [0.5, 0.1])
@pytest.mark.parametrize("cols", [1000, 4096])
def test_no_two_elements_of_a_mask_are_related_at_any_distance(cols, probability):
    """All distances up to a quarter of the mask at once, by a Fourier transform."""
    count = 2**19 // cols * cols
    x = centred(mask(99, 1, probability), count // cols, cols).flatten()
    spectrum = torch.fft.rfft(torch.cat([x, torch.zeros_like(x)]))
    correlations = torch.fft.irfft(spectrum.abs().square())[1 : count // 4]
    scores = correlations / torch.sqrt(count - torch.arange(1, count // 4))
    assert float(scores.abs().max()) < 6  # the largest of 131,000 normal numbers is about 4.5


@pytest.mark.parametrize(
    "other", [(8, 0), (7, 1), (7 + 2**32, 0), (7 + 2**62, 0)], ids=["seed", "stream", "2^32", "2^62"]
)
def test_masks_of_other_seeds_and_streams_are_unrelated(other):
    x, y = centred(mask(7, 0, 0.1), 512, 1024), centred(mask(*other, 0.1), 512, 1024)
    assert abs(float((x * y).mean())) * math.sqrt(x.numel()) < STANDARD_ERRORS


def test_patterns_of_neighbours_come_as_often_as_they_should():
    keeps = mask(3, 2, 0.5).keeps(1024, 1000).view(-1, 8)
    counts = torch.bincount((keeps * 2 ** torch.arange(8)).sum(1), minlength=256).double()
    expected = len(keeps) / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < STANDARD_ERRORS * math.sqrt(2 * 255)


def test_the_probability_is_exact_to_16_bits():
    dropout = mask(0, 0, 0.1)
    assert dropout.threshold == 6554
    assert dropout.scale == pytest.approx(2**16 / (2**16 - 6554), rel=1e-12)
    assert mask(0, 0, 1 - 1e-9).threshold == 2**16 - 1  # one in 65,536 survives: the scale is finite
    factors = dropout.apply(torch.ones(5, 7, dtype=torch.float64)).unique()
    assert factors.tolist() == [0.0, dropout.scale]


def test_tiles_of_rows_are_under_the_mask_of_the_whole():
    whole = mask(5, 3, 0.4).keeps(50, 33)
    assert torch.equal(mask(5, 3, 0.4, first_row=20).keeps(30, 33), whole[20:])


def test_the_numbers_never_change():
    """A run that is resumed under a later version must drop the same elements."""
    bits = mask(2**62 + 12345, 5, 0.5).keeps(2, 32).int()
    assert ["".join(map(str, row)) for row in bits.tolist()] == GOLDEN


# --- kernels ---------------------------------------------------------------------------------------------------------

PARTS = [((0, 3), (3, 3), (3, 8)), ((0, 70),), ((0, 40), (40, 75)), ((2, 4),)]


def masks_for(parts, is_shared: bool) -> tuple[Dropout, ...]:
    return tuple(mask(11 + 2**40, 4 + i, 0.3, first_row=77) for i in range(1 if is_shared else len(parts)))


def factors_of(parts, masks, rows: int, cols: int) -> list[torch.Tensor]:
    """Return D of every part in float64."""
    ones = torch.ones(rows, cols, dtype=torch.float64)
    return [(masks[0] if len(masks) == 1 else masks[i]).apply(ones) for i in range(len(parts))]


@pytest.mark.usefixtures("tile_height")
@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (130, 67)])
def test_products(run, dtype, is_shared, parts, shape, monkeypatch):
    monkeypatch.setattr(dropped_products, "_NUM_PROGRAMS", 2)  # more than one tile a program, more than one piece
    torch.manual_seed(shape[0])
    rows, cols = shape
    ranks, masks = parts[-1][1] + 5, masks_for(parts, is_shared)
    x = in_wider_buffer(torch.randn(shape).to(dtype), 3)
    factor = in_wider_buffer((torch.randn(cols, ranks) * 0.3).to(dtype), 2)
    low = in_wider_buffer(torch.randn(rows, ranks).to(dtype), 1)
    by_low, by_grad = torch.zeros(rows, ranks).double(), torch.zeros(cols, ranks).double()
    for (first, to), factors in zip(parts, factors_of(parts, masks, rows, cols), strict=True):
        by_low[:, first:to] = (x.double() * factors) @ factor.double()[:, first:to]
        by_grad[:, first:to] = (x.double() * factors).t() @ low.double()[:, first:to]
    shares = dropped_products.shares_of(parts, masks)
    for name, other, oracle in (("dropped_low", factor, by_low), ("dropped_grad", low, by_grad)):
        result = getattr(dropped_products, f"{name}_{run}")(x, other, shares)
        plain = getattr(dropped_products, f"{name}_reference")(x, other, shares)
        assert_close(result, oracle, plain)


@pytest.mark.usefixtures("tile_height")
@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("has_residual", [True, False])
def test_update_in_place(run, dtype, is_shared, parts, has_residual):
    torch.manual_seed(parts[-1][1])
    rows, cols, masks = 67, 131, masks_for(parts, is_shared)
    low = in_wider_buffer(torch.randn(rows, parts[-1][1]).to(dtype), 3)
    factor = (torch.randn(parts[-1][1], cols) * 0.2).to(dtype)
    y, residual = (in_wider_buffer(torch.randn(rows, cols).to(dtype), 2) for _ in range(2))
    oracle = y.double() + (residual.double() if has_residual else 0)
    for (first, to), factors in zip(parts, factors_of(parts, masks, rows, cols), strict=True):
        oracle += low.double()[:, first:to] @ factor.double()[first:to] * factors
    update, plain = Update(low, factor, parts, masks), y.clone()
    lora.add_update_reference(plain, update, residual if has_residual else None)
    getattr(lora, f"add_update_{run}")(y, update, residual if has_residual else None)
    assert_close(y, oracle, plain)


def oracle_of_swiglu(gate_up, dh, update, dh_update, a, b, h_factors):
    leaf = gate_up.double().requires_grad_()
    gate, up = (leaf + update).chunk(2, dim=-1)
    h = gate * torch.sigmoid(gate) * up
    d = torch.autograd.grad(h, leaf, dh.double() + dh_update * h_factors)[0]
    h = h.detach()
    return h, d, h, (h * h_factors) @ a.double().t(), d @ b.double()


@pytest.mark.usefixtures("tile_height")
@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank"), [((3, 7), 3), ((67, 130), 3), ((5, 70), 70)])
def test_swiglu_with_its_update_under_a_mask(run, dtype, shape, rank, monkeypatch):
    """The sums are written over gate and up, rounded, and h and its product are made of them."""
    torch.manual_seed(shape[1])
    rows, width = shape
    parts, ranks = ((0, rank), (rank, 2 * rank)), 2 * rank + 2
    gate_up = in_wider_buffer((torch.randn(rows, 2 * width) * 2).to(dtype), 5)
    low, a = torch.randn(rows, ranks).to(dtype) * 0.3, torch.zeros(ranks, width)
    b = torch.zeros(2 * width, ranks)
    b[:width, :rank], b[width:, rank : 2 * rank] = torch.randn(width, rank) * 0.3, torch.randn(width, rank) * 0.3
    a[:rank] = torch.randn(rank, width) * 0.1
    a, b, over = a.to(dtype), b.to(dtype), mask(5, 13, 0.4, first_row=9)
    factors = over.apply(torch.ones(rows, 2 * width, dtype=torch.float64))
    oracle_sum = gate_up.double() + low.double() @ b.double().t() * factors
    gate, up = oracle_sum.chunk(2, dim=-1)
    oracle_h = gate * torch.sigmoid(gate) * up
    results = []
    for name in (run, "reference"):
        if name == "triton":
            monkeypatch.setattr(swiglu_lora, "runs_triton", lambda tensor: True)
        h, work = filled(*shape, dtype=dtype), gate_up.clone()
        low_h = swiglu_lora.swiglu_lora(work, h, Update(low, b.t(), parts, (over,)), a, rank)
        results.append((work, h, low_h))
        monkeypatch.undo()
    for checked, oracle, plain in zip(
        results[0], (oracle_sum, oracle_h, oracle_h @ a.double().t()), results[1], strict=True
    ):
        assert_close(checked, oracle, plain)


@pytest.mark.usefixtures("tile_height")
@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank"), [((3, 7), 3), ((33, 130), 3), ((5, 70), 70)])
def test_swiglu(run, dtype, shape, rank, monkeypatch):
    """Rank 70 takes the road of a GPU for ranks that do not fit a tile."""
    torch.manual_seed(shape[1])
    rows, width = shape
    parts, ranks = ((0, rank), (rank, 2 * rank)), 2 * rank + 2
    gate_up = in_wider_buffer((torch.randn(rows, 2 * width) * 2).to(dtype), 5)
    low, dlow = (torch.randn(rows, ranks).to(dtype) * 0.3 for _ in range(2))
    b, a = torch.zeros(2 * width, ranks), torch.zeros(ranks, width)
    b[:width, :rank], b[width:, rank : 2 * rank] = torch.randn(width, rank) * 0.3, torch.randn(width, rank) * 0.3
    a[:rank] = torch.randn(rank, width) * 0.1
    a, b, dh = a.to(dtype), b.to(dtype), torch.randn(shape).to(dtype)
    over_h = mask(5, 13, 0.4)
    oracles = oracle_of_swiglu(
        gate_up,
        dh,
        low.double() @ b.double().t(),
        dlow.double() @ a.double(),
        a,
        b,
        over_h.apply(torch.ones(shape, dtype=torch.float64)),
    )
    update, dh_update = Update(low, b.t(), parts), Update(dlow, a, ((0, rank),), (over_h,))
    results = []
    for name in (run, "reference"):
        if name == "triton":
            monkeypatch.setattr(swiglu_lora, "runs_triton", lambda tensor: True)
            monkeypatch.setattr(dropped_products, "runs_triton", lambda tensor: True)
        h, work, dh_work = filled(*shape, dtype=dtype), gate_up.clone(), in_wider_buffer(dh, 2)
        low_h = swiglu_lora.swiglu_lora(gate_up, h, update, a, rank, over_h)
        product = swiglu_lora.swiglu_lora_backward(dh_work, work, update, dh_update, b, parts)
        results.append((h, work, dh_work, low_h, product))
        monkeypatch.undo()
    for checked, oracle, plain in zip(results[0], oracles, results[1], strict=True):
        assert_close(checked, oracle, plain)
