"""Matrices in 4 bits, in the format of bitsandbytes: quantisation, and back to 16 bits or on to 8 in one launch.

A matrix ``[N, K]`` is read row by row and cut into blocks of 64 numbers. Each block keeps its largest magnitude, and
for each number the index of the nearest of 16 values between -1 and 1, two indices a byte, the earlier in the upper
half. NF4 (Dettmers et al. 2023, section 3) places the 16 values at quantiles of a normal distribution, FP4 at those of
a float with two bits of exponent. With double quantisation the magnitudes are stored in 8 bits themselves: less their
mean, in blocks of 256, by the nearest of the 256 values of the dynamic map (Dettmers et al. 2022, section 1.3). That is
0.516 bytes a number, 0.5625 without.

On the way back a number is ``value · magnitude`` in fp32, rounded once. `dequantize` writes it in any dtype, into rows
that may lie in a wider buffer; `dequantize_e4m3` divides it by a scale per row and writes E4M3, as it lies or
transposed, for the matrix units of 8 bits. Since every block holds a value of magnitude one, the scales follow from the
magnitudes alone (`channel_scales`). Both read half a byte and write one or two for each number: 2.53 bytes for 16 bits
and 1.53 for 8, so 70 billion numbers take about 60 and 36 ms at 3 TB/s.

Shapes: N rows, K columns, C = N·K numbers, Q blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from nemo_automodel.kernels.fp8 import E4M3_MAX
from nemo_automodel.kernels.jit import jit, runs_triton, tl

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
_CHUNK_BLOCKS = 2**12
"""Blocks that PyTorch handles at once on a CPU, so that its intermediate results stay below some 10 MB."""
_CHUNKS_ON_GPU = 16
"""How many times as many on a GPU, where each operation waits for a launch."""
_TILE_BYTES = 512
"""Packed bytes of a program."""
_TILE_N = 128
"""Rows of a transposed tile."""
_NUM_WARPS = 4

# NF4's are the constants of the paper's appendix E, FP4's the 16 bit patterns of its sign, two exponents and mantissa
_VALUES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * m / 12 + 0.0 for sign in (1.0, -1.0) for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
QUANT_TYPES = tuple(_VALUES)


@dataclass(frozen=True)
class Packed:
    """A matrix in 4 bits."""

    codes: torch.Tensor
    """Two indices a byte, uint8 ``[⌈C/2⌉]``."""
    absmax_Q: torch.Tensor
    """Magnitudes of the blocks: fp32, or uint8 indices into the dynamic map."""
    nested_absmax: torch.Tensor | None
    """Magnitudes of the magnitudes, fp32 ``[⌈Q/256⌉]``; None without double quantisation."""
    offset: torch.Tensor | None
    """Mean of the magnitudes, fp32 scalar; None without double quantisation."""
    shape: tuple[int, int]
    quant_type: str = "nf4"
    block_size: int = BLOCK_SIZE

    @property
    def is_nested(self) -> bool:
        """Whether the magnitudes are quantised too."""
        return self.nested_absmax is not None

    def to(self, device: torch.device | str) -> Packed:
        """Return the matrix on ``device``."""
        nested, offset = (None if t is None else t.to(device) for t in (self.nested_absmax, self.offset))
        return replace(
            self,
            codes=self.codes.to(device),
            absmax_Q=self.absmax_Q.to(device),
            nested_absmax=nested,
            offset=offset,
        )


@cache
def values_of(quant_type: str, device: torch.device) -> torch.Tensor:
    """Return the value of each index, fp32 ``[16]``. Shared: not to be written to."""
    return torch.tensor(_VALUES[quant_type], dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """Return the 256 values of the dynamic map, ascending, fp32. Shared: not to be written to.

    Seven decades with 1, 2, …, 64 values each, at the middles of equal parts of ``[0.1, 1]`` times the decade; both
    signs, zero and one.
    """
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        decades.append(10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2))
    magnitudes = torch.cat(decades)
    return torch.cat([-magnitudes, magnitudes, torch.tensor([0.0, 1.0])]).sort().values.to(device)


# --- quantisation ----------------------------------------------------------------------------------------------------


def quantize(
    weight_NK: torch.Tensor, quant_type: str = "nf4", is_nested: bool = True, block_size: int = BLOCK_SIZE
) -> Packed:
    """Return a matrix of any float dtype in 4 bits, on its device; a tie goes to the lower value.

    Codes are those of bitsandbytes. Magnitudes in 8 bits are the nearest, as on bitsandbytes' GPU path; its CPU path
    (0.50) takes the second nearest for some 2 in 1000.
    """
    order = values_of(quant_type, weight_NK.device).sort(stable=True)
    bounds = (order.values[:-1] + order.values[1:]) / 2
    indices = order.indices.to(torch.uint8)
    flat_C = weight_NK.detach().reshape(-1)
    num_blocks = -(-flat_C.numel() // block_size)
    absmax_Q = torch.empty(num_blocks, dtype=torch.float32, device=flat_C.device)
    codes = torch.empty(-(-flat_C.numel() // 2), dtype=torch.uint8, device=flat_C.device)
    chunk = _chunk_blocks(flat_C.device)
    for first in range(0, num_blocks, chunk):
        part = flat_C[first * block_size : (first + chunk) * block_size].float()
        padded = torch.nn.functional.pad(part, (0, -part.numel() % block_size)).view(-1, block_size)
        top = padded.abs().amax(dim=1)
        absmax_Q[first : first + len(top)] = top
        scaled = (padded * (1.0 / top.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).flatten()
        index = indices[torch.bucketize(scaled, bounds, out_int32=True)]
        pairs = (index[::2] << 4) | index[1::2]
        at = first * block_size // 2
        codes[at : at + -(-part.numel() // 2)] = pairs[: -(-part.numel() // 2)]
    packed = Packed(codes, absmax_Q, None, None, _matrix_shape(weight_NK), quant_type, block_size)
    return nest(packed) if is_nested else packed


def nest(packed: Packed) -> Packed:
    """Return the matrix with its magnitudes quantised to 8 bits."""
    offset = packed.absmax_Q.mean()
    centred = packed.absmax_Q - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    top = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / top.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).flatten()[: centred.numel()]
    table = dynamic_map(centred.device)
    index = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return replace(packed, absmax_Q=index, nested_absmax=top, offset=offset)


def random_packed(
    shape: tuple[int, int],
    std: float,
    device: torch.device,
    quant_type: str = "nf4",
    is_nested: bool = True,
    generator: torch.Generator | None = None,
) -> Packed:
    """Return a matrix of random codes whose numbers have the standard deviation ``std``, without making it first.

    Every code is as likely as any other, as NF4 intends, and magnitudes vary by a tenth around what the deviation asks.
    """
    num = shape[0] * shape[1]
    num_blocks = -(-num // BLOCK_SIZE)
    codes = torch.empty(-(-num // 2), dtype=torch.uint8, device=device).random_(0, 256, generator=generator)
    top = std / float(values_of(quant_type, device).double().square().mean().sqrt())
    spread = torch.rand(num_blocks, dtype=torch.float32, device=device, generator=generator)
    packed = Packed(codes, top * (0.9 + 0.2 * spread), None, None, shape, quant_type)
    return nest(packed) if is_nested else packed


def _chunk_blocks(device: torch.device) -> int:
    return _CHUNK_BLOCKS if device.type == "cpu" else _CHUNK_BLOCKS * _CHUNKS_ON_GPU


def _matrix_shape(weight_NK: torch.Tensor) -> tuple[int, int]:
    rows, columns = weight_NK.shape
    return rows, columns


# --- and back --------------------------------------------------------------------------------------------------------


def block_magnitudes(packed: Packed) -> torch.Tensor:
    """Return the magnitudes of the blocks, fp32 ``[Q]``."""
    if packed.nested_absmax is None or packed.offset is None:
        return packed.absmax_Q.float()
    outer = packed.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: packed.absmax_Q.numel()]
    return (dynamic_map(packed.codes.device)[packed.absmax_Q.int()] * outer).add_(packed.offset)


def channel_scales(packed: Packed) -> torch.Tensor:
    """Return the scale of every row for E4M3: its largest magnitude over 448, 1 for a row of zeros; fp32 ``[N]``.

    Where a block belongs to two rows, the smaller row's scale may be larger than it need be.
    """
    num_rows, num_cols = packed.shape
    tops = block_magnitudes(packed).abs()
    if num_cols % packed.block_size == 0:
        top_N = tops.view(num_rows, -1).amax(dim=1)
    else:
        starts = torch.arange(num_rows, device=tops.device) * num_cols
        first, last = starts // packed.block_size, (starts + num_cols - 1) // packed.block_size
        top_N = torch.stack([tops[a : b + 1].amax() for a, b in zip(first.tolist(), last.tolist(), strict=True)])
    return torch.where(top_N > 0, top_N / E4M3_MAX, 1.0)


def dequantize(packed: Packed, out_NK: torch.Tensor) -> torch.Tensor:
    """Write the matrix into ``out_NK``, of any float dtype, and return it. Rows may lie in a wider buffer."""
    assert out_NK.shape == packed.shape
    assert out_NK.stride(1) == 1, "columns are dense"
    run = dequantize_triton if runs_triton(out_NK) else dequantize_reference
    run(packed, out_NK, None)
    return out_NK


def dequantize_e4m3(
    packed: Packed, scale_N: torch.Tensor, out: torch.Tensor, is_transposed: bool = False
) -> torch.Tensor:
    """Write the matrix over ``scale_N``, `channel_scales`, in E4M3: as ``[N, K]``, or as ``[K, N]`` if transposed.

    Transposed needs K to be a multiple of the block size. The last dimension of ``out`` is dense.
    """
    num_rows, num_cols = packed.shape
    assert out.shape == ((num_cols, num_rows) if is_transposed else (num_rows, num_cols))
    assert out.stride(1) == 1, "the last dimension is dense"
    if is_transposed:
        assert num_cols % packed.block_size == 0, "no block belongs to two rows"
        run = dequantize_transposed_triton if runs_triton(out) else dequantize_transposed_reference
        run(packed, out, scale_N)
    else:
        (dequantize_triton if runs_triton(out) else dequantize_reference)(packed, out, scale_N)
    return out


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def dequantize_reference(packed: Packed, out_NK: torch.Tensor, scale_N: torch.Tensor | None) -> None:
    """Do what `dequantize` and, with scales, `dequantize_e4m3` say in plain operations, some rows at a time."""
    num_rows, num_cols = packed.shape
    tops, values = block_magnitudes(packed), values_of(packed.quant_type, packed.codes.device)
    rows_at_once = max(1, _chunk_blocks(out_NK.device) * packed.block_size // max(num_cols, 1))
    rows_at_once += rows_at_once % 2  # an odd number of numbers would end inside a byte
    for first in range(0, num_rows, rows_at_once):
        last = min(first + rows_at_once, num_rows)
        start, end = first * num_cols, last * num_cols
        codes = packed.codes[start // 2 : -(-end // 2)].int()
        numbers = values[torch.stack([codes >> 4, codes & 15], dim=1).flatten()][: end - start]
        blocks = tops[start // packed.block_size : -(-end // packed.block_size)]
        numbers *= blocks.repeat_interleave(packed.block_size)[start % packed.block_size :][: end - start]
        part_NK = numbers.view(last - first, num_cols)
        if scale_N is not None:
            part_NK = (part_NK / scale_N[first:last].unsqueeze(1)).clamp_(-E4M3_MAX, E4M3_MAX)
        out_NK[first:last].copy_(part_NK)


def dequantize_transposed_reference(packed: Packed, out_KN: torch.Tensor, scale_N: torch.Tensor) -> None:
    """Do what `dequantize_e4m3` says of the transposed matrix."""
    out_NK = out_KN.new_empty(packed.shape)
    dequantize_reference(packed, out_NK, scale_N)
    out_KN.copy_(out_NK.t())


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def _magnitudes(absmax_ptr, nested_ptr, map_ptr, offset_ptr, blocks, mask, IS_NESTED: tl.constexpr):
    """Return the magnitudes of ``blocks``, fp32; what `block_magnitudes` does."""
    if IS_NESTED:
        index = tl.load(absmax_ptr + blocks, mask=mask, other=0).to(tl.int32)
        outer = tl.load(nested_ptr + blocks // 256, mask=mask, other=0.0)
        tops = tl.load(map_ptr + index) * outer + tl.load(offset_ptr)
    else:
        tops = tl.load(absmax_ptr + blocks, mask=mask, other=0.0)
    return tops


@jit
def _two_numbers(codes, values_ptr):
    """Return the values of the upper and the lower index of each byte. The table stays in the first-level cache."""
    codes = codes.to(tl.int32)
    return tl.load(values_ptr + (codes >> 4)), tl.load(values_ptr + (codes & 15))


@jit
def _to_range(x, LARGEST: tl.constexpr):
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@jit
def _nf4_kernel(
    codes_ptr,
    absmax_ptr,
    nested_ptr,
    map_ptr,
    offset_ptr,
    values_ptr,
    scale_ptr,
    out_ptr,
    num_numbers,
    num_bytes,
    num_cols,
    out_row,
    IS_NESTED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    LARGEST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    tops = _magnitudes(absmax_ptr, nested_ptr, map_ptr, offset_ptr, blocks, blocks * SIZE < num_numbers, IS_NESTED)
    at = blocks[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    upper, lower = _two_numbers(tl.load(codes_ptr + at, mask=at < num_bytes, other=0), values_ptr)
    upper, lower = upper * tops[:, None], lower * tops[:, None]
    if HAS_SCALE and IS_ALIGNED:
        rows = blocks * SIZE // num_cols
        scales = tl.load(scale_ptr + rows, mask=blocks * SIZE < num_numbers, other=1.0)
        upper, lower = upper / scales[:, None], lower / scales[:, None]
        upper, lower = _to_range(upper, LARGEST), _to_range(lower, LARGEST)
    numbers = blocks[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = numbers < num_numbers
    if IS_ALIGNED:  # a block lies in one row
        start = blocks * SIZE
        out_at = (start // num_cols * out_row + start % num_cols)[:, None] + tl.arange(0, SIZE)[None, :]
        y = tl.interleave(upper.to(out_ptr.dtype.element_ty), lower.to(out_ptr.dtype.element_ty))
    else:
        out_at = numbers // num_cols * out_row + numbers % num_cols
        y = tl.interleave(upper, lower)
        if HAS_SCALE:
            y = _to_range(y / tl.load(scale_ptr + numbers // num_cols, mask=mask, other=1.0), LARGEST)
        y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at, y, mask=mask)


@jit
def _nf4_transposed_kernel(
    codes_ptr,
    absmax_ptr,
    nested_ptr,
    map_ptr,
    offset_ptr,
    values_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    num_cols,
    out_row,
    IS_NESTED: tl.constexpr,
    LARGEST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < num_rows
    blocks = rows * (num_cols // SIZE) + tl.program_id(0)
    tops = _magnitudes(absmax_ptr, nested_ptr, map_ptr, offset_ptr, blocks, mask, IS_NESTED)
    scales = tl.load(scale_ptr + rows, mask=mask, other=1.0)
    at = blocks[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    upper, lower = _two_numbers(tl.load(codes_ptr + at, mask=mask[:, None], other=0), values_ptr)
    y = tl.interleave(upper * tops[:, None], lower * tops[:, None]) / scales[:, None]
    y = tl.trans(_to_range(y, LARGEST).to(out_ptr.dtype.element_ty))
    cols = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + cols[:, None] * out_row + rows[None, :], y, mask=mask[None, :])


def _pointers(packed: Packed, scale_N: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return the tensors that the kernels take; what is not there is stood in for."""
    stand_in = packed.absmax_Q
    nested, offset = packed.nested_absmax, packed.offset
    return (
        packed.codes,
        packed.absmax_Q,
        stand_in if nested is None else nested,
        dynamic_map(packed.codes.device),
        stand_in if offset is None else offset,
        values_of(packed.quant_type, packed.codes.device),
        stand_in if scale_N is None else scale_N,
    )


def dequantize_triton(packed: Packed, out_NK: torch.Tensor, scale_N: torch.Tensor | None) -> None:
    """Do what `dequantize` and, with scales, `dequantize_e4m3` say, a few blocks a program."""
    num_rows, num_cols = packed.shape
    blocks = max(1, _TILE_BYTES * 2 // packed.block_size)
    _nf4_kernel[(-(-packed.absmax_Q.numel() // blocks),)](
        *_pointers(packed, scale_N),
        out_NK,
        num_rows * num_cols,
        packed.codes.numel(),
        num_cols,
        out_NK.stride(0),
        IS_NESTED=packed.is_nested,
        HAS_SCALE=scale_N is not None,
        IS_ALIGNED=num_cols % packed.block_size == 0,
        LARGEST=E4M3_MAX,
        SIZE=packed.block_size,
        BLOCKS=blocks,
        num_warps=_NUM_WARPS,
    )


def dequantize_transposed_triton(packed: Packed, out_KN: torch.Tensor, scale_N: torch.Tensor) -> None:
    """Do what `dequantize_e4m3` says of the transposed matrix, a tile a program."""
    num_rows, num_cols = packed.shape
    _nf4_transposed_kernel[(num_cols // packed.block_size, -(-num_rows // _TILE_N))](
        *_pointers(packed, scale_N),
        out_KN,
        num_rows,
        num_cols,
        out_KN.stride(0),
        IS_NESTED=packed.is_nested,
        LARGEST=E4M3_MAX,
        SIZE=packed.block_size,
        BLOCK_N=_TILE_N,
        num_warps=_NUM_WARPS,
    )
