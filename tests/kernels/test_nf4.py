"""Matrices in 4 bits: codes and numbers against bitsandbytes, kernels against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import filled

from nemo_automodel.kernels import nf4
from nemo_automodel.kernels.jit import HAS_TRITON

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
FORWARD = [
    pytest.param(nf4.dequantize_reference, id="torch"),
    pytest.param(nf4.dequantize_triton, id="triton", marks=needs_triton),
]
TRANSPOSED = [
    pytest.param(nf4.dequantize_transposed_reference, id="torch"),
    pytest.param(nf4.dequantize_transposed_triton, id="triton", marks=needs_triton),
]
# rows of whole blocks; blocks across rows; an odd number of numbers; more blocks than a magnitude's block
SHAPES = [(3, 64), (130, 192), (7, 96), (5, 51), (300, 64)]


def weight(shape, dtype=torch.float32):
    torch.manual_seed(shape[0])
    rows = torch.logspace(-1, 1, shape[0]).unsqueeze(1)
    return (torch.randn(shape) * rows).to(dtype)


def numbers_64(packed):
    """Return what the format means, number by number in float64."""
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], 1).flatten()[: packed.shape[0] * packed.shape[1]]
    tops = packed.absmax_Q
    if packed.is_nested:
        outer = packed.nested_absmax.double().repeat_interleave(256)[: tops.numel()]
        tops = nf4.dynamic_map(CPU).double()[tops.long()] * outer + packed.offset.double()
    numbers = nf4.values_of(packed.quant_type, CPU).double()[codes.long()]
    return (numbers * tops.double().repeat_interleave(packed.block_size)[: codes.numel()]).view(packed.shape)


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 256), (33, 1000), (300, 64)])
def test_codes_and_numbers_are_those_of_bitsandbytes(quant_type, dtype, shape):
    theirs = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(nf4.dynamic_map(CPU), theirs.create_dynamic_map())
    assert torch.equal(nf4.values_of(quant_type, CPU), theirs.get_4bit_type(quant_type, device="cpu"))
    values = weight(shape, dtype)
    codes, state = theirs.quantize_4bit(values, compress_statistics=False, quant_type=quant_type)
    packed = nf4.quantize(values, quant_type, is_nested=False)
    assert torch.equal(packed.codes, codes.flatten())
    assert torch.equal(packed.absmax_Q, state.absmax)
    nested = nf4.quantize(values, quant_type)
    _, state = theirs.quantize_4bit(values, compress_statistics=True, quant_type=quant_type)
    assert torch.equal(nested.offset, state.offset)
    assert torch.equal(nested.nested_absmax, state.state2.absmax)
    # bitsandbytes looks magnitudes up by a coarse table first, and then some are off by one; ours must be as near
    scaled = (packed.absmax_Q - state.offset).double() / state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    grid = nf4.dynamic_map(CPU).double()
    ours, others = ((scaled - grid[q.long()]).abs() for q in (nested.absmax_Q, state.absmax))
    assert (nested.absmax_Q.int() - state.absmax.int()).abs().max() <= 1
    assert (ours <= others + 1e-7).all()
    assert (nested.absmax_Q != state.absmax).double().mean() < 0.05
    same = nf4.Packed(codes.flatten(), state.absmax, state.state2.absmax, state.offset, shape, quant_type)
    assert torch.equal(nf4.dequantize(same, filled(*shape, dtype=dtype)), theirs.dequantize_4bit(codes, state))


@pytest.mark.parametrize("run", FORWARD)
@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(run, is_nested, shape, monkeypatch):
    monkeypatch.setattr(nf4, "_CHUNK_BLOCKS", 4)  # so that PyTorch's chunks end in the middle
    packed = nf4.quantize(weight(shape), "nf4" if shape[0] % 2 else "fp4", is_nested)
    buffer = filled(shape[0], shape[1] + 5, dtype=torch.float32)
    run(packed, buffer[:, : shape[1]], None)
    assert_close(buffer[:, : shape[1]], numbers_64(packed), packed)
    assert buffer[:, shape[1] :].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_is_the_nearest(shape, monkeypatch):
    values = weight(shape)
    whole = nf4.quantize(values, is_nested=False)
    monkeypatch.setattr(nf4, "_CHUNK_BLOCKS", 4)
    packed = nf4.quantize(values, is_nested=False)
    assert torch.equal(packed.codes, whole.codes)
    tops = whole.absmax_Q.double().repeat_interleave(64)[: values.numel()].view(shape)
    errors = (values.double() - numbers_64(packed)).abs()
    grid = nf4.values_of("nf4", CPU).double() * tops.unsqueeze(-1)
    assert (errors <= (values.double().unsqueeze(-1) - grid).abs().amin(-1) + 1e-7 * tops).all()


@pytest.mark.parametrize("run", FORWARD)
@pytest.mark.parametrize("shape", SHAPES)
def test_e4m3(run, shape):
    packed = nf4.quantize(weight(shape))
    scales = nf4.channel_scales(packed)
    wanted = numbers_64(packed)
    tops = wanted.abs().amax(1) / 448
    if shape[1] % 64 == 0:
        assert_close(scales, tops, packed)
    assert (scales >= tops - 1e-6 * float(packed.offset)).all()
    out = torch.full(shape, float("nan")).to(torch.float8_e4m3fn)
    run(packed, out, scales)
    assert_nearest_e4m3(out, wanted / scales.double().unsqueeze(1), run is nf4.dequantize_triton)


@pytest.mark.parametrize("run", TRANSPOSED)
@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("shape", [(3, 64), (130, 192)])
def test_e4m3_transposed(run, is_nested, shape):
    packed = nf4.quantize(weight(shape), is_nested=is_nested)
    scales = nf4.channel_scales(packed)
    buffer = torch.full((shape[1], shape[0] + 3), float("nan")).to(torch.float8_e4m3fn)
    out = buffer[:, : shape[0]]
    run(packed, out, scales)
    wanted = numbers_64(packed) / scales.double().unsqueeze(1)
    assert_nearest_e4m3(out, wanted.t(), run is nf4.dequantize_transposed_triton)
    assert buffer[:, shape[0] :].float().isnan().all()


def assert_close(found, wanted, packed):
    """Compare; a small magnitude is the difference of two large numbers, and fp32 rounds those."""
    size = float(packed.offset + packed.nested_absmax.max()) if packed.is_nested else 0.0
    torch.testing.assert_close(found.double(), wanted, rtol=3e-7, atol=1e-7 * size)


def assert_nearest_e4m3(out, wanted, is_interpreted):
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    distances = (wanted.abs().unsqueeze(-1) - grid).abs()
    is_nearest = (out.double() - wanted).abs() <= distances.amin(-1) + wanted.abs() * 1e-6
    if is_interpreted:  # the interpreter loses the carry when rounding up reaches a power of two
        is_nearest |= grid[distances.argmin(-1)].log2().frac() == 0
    assert is_nearest.all()


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("is_nested", [True, False])
def test_random_weights_have_the_deviation_asked_for(quant_type, is_nested):
    generator = torch.Generator().manual_seed(0)
    packed = nf4.random_packed((256, 512), 0.02, CPU, quant_type, is_nested, generator)
    numbers = numbers_64(packed)
    assert float(numbers.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(numbers.mean())) < 0.1 * 0.02
    assert packed.to("cpu").codes.numel() == 256 * 512 // 2


def test_zeros():
    packed = nf4.quantize(torch.zeros(4, 64))
    assert torch.equal(nf4.dequantize(packed, filled(4, 64, dtype=torch.float32)), torch.zeros(4, 64))
    assert torch.equal(nf4.channel_scales(packed), torch.ones(4))
