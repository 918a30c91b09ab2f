"""Numbers in 8 bits with scales: quantisation, products of two such matrices, and their bytes transposed.

E4M3 (4 bits of exponent, 3 of mantissa, largest value 448): a row, or a whole matrix, is divided by its largest
magnitude over 448, so that rounding costs at most 1/16 of an element and about 2.6 % of a vector in the 2-norm. A row
may be multiplied by a factor for every column on the way, before its scale is taken: so the scale of a weight's output
channels is moved into the gradient that meets it.

Matrix units read both operands along their inner dimension, so a weight ``[N, K]`` that is used forward must be there
as ``[K, N]`` on the way back: `transpose_bytes` moves it at the speed of memory.

Shapes: M rows, K inner dimension, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_automodel.kernels.jit import jit, next_power_of_2, num_warps_for, runs_triton, tl

E4M3_MAX = 448.0
_LONGEST_ROW = 32768
"""Elements that a program holds in its registers; longer rows are read twice."""
_SCALE_BLOCK = 4096
_TILE = 128
"""Rows and columns of the tile that a program transposes."""


@dataclass(frozen=True)
class Rounded:
    """A matrix in E4M3, dense, and the scales of its rows, fp32: what `quantize_rows` returns, or room for it."""

    data_MK: torch.Tensor
    scale_M1: torch.Tensor

    @staticmethod
    def room(num_rows: int, num_cols: int, device: torch.device) -> Rounded:
        """Return memory, not initialised."""
        data_MK = torch.empty((num_rows, num_cols), dtype=torch.float8_e4m3fn, device=device)
        return Rounded(data_MK, torch.empty((num_rows, 1), dtype=torch.float32, device=device))


def quantize_rows(
    x_MK: torch.Tensor, factor_K: torch.Tensor | None = None, *, emulate: bool = False, out: Rounded | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x · factor / scale`` in E4M3, dense ``[M, K]``, and the scales of the rows, fp32 ``[M, 1]``.

    ``factor_K`` is fp32. A row of zeros has scale 1. ``emulate`` keeps to PyTorch, for GPUs that cannot make E4M3.
    ``out`` is memory for both.
    """
    out = Rounded.room(x_MK.shape[0], x_MK.shape[1], x_MK.device) if out is None else out
    run = quantize_rows_triton if runs_triton(x_MK) and not emulate else quantize_rows_reference
    run(x_MK, factor_K, out.data_MK, out.scale_M1)
    return out.data_MK, out.scale_M1


def quantize_matrix(x_MK: torch.Tensor, *, emulate: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x / scale`` in E4M3, dense ``[M, K]``, and the one scale, fp32 ``[1, 1]``. A matrix of zeros has 1."""
    scale_11 = scale_of(largest(x_MK))
    return quantize_by(x_MK, scale_11, emulate=emulate), scale_11


def largest(x_MK: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude, fp32, a scalar on the device."""
    top: torch.Tensor = torch.linalg.vector_norm(x_MK, float("inf"))
    return top.float()


def scale_of(top: torch.Tensor) -> torch.Tensor:
    """Return the scale ``[1, 1]`` that puts the largest magnitude ``top`` at the end of the range of E4M3."""
    return torch.where(top > 0, top / E4M3_MAX, 1.0).view(1, 1)


def quantize_by(
    x_MK: torch.Tensor, scale_11: torch.Tensor, *, emulate: bool = False, out_MK: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x / scale`` in E4M3, dense ``[M, K]``; what lies outside its range becomes the largest number."""
    if out_MK is None:
        out_MK = torch.empty(x_MK.shape, dtype=torch.float8_e4m3fn, device=x_MK.device)
    run = quantize_by_triton if runs_triton(x_MK) and not emulate else quantize_by_reference
    run(x_MK, out_MK, scale_11)
    return out_MK


def scaled_product(
    x_MK: torch.Tensor,
    x_scale: torch.Tensor,
    w_NK: torch.Tensor,
    w_scale: torch.Tensor,
    dtype: torch.dtype,
    emulate: bool = False,
    fast_accum: bool = True,
) -> torch.Tensor:
    """Return ``(x · x_scale) @ (w · w_scale)ᵀ`` as ``[M, N]``. Both operands are E4M3 and dense, K a multiple of 16.

    Scales belong to rows, ``[M, 1]`` and ``[N, 1]``, or both are ``[1, 1]``. On the CPU, and where ``emulate`` asks for
    it, the same numbers are multiplied in fp32 (float64 for float64). ``fast_accum`` adds in the matrix units alone,
    which on Hopper keep 14 bits of a sum.
    """
    if x_MK.is_cuda and not emulate:
        return torch._scaled_mm(
            x_MK, w_NK.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=dtype, use_fast_accum=fast_accum
        )
    return (dequantize(x_MK, x_scale, dtype) @ dequantize(w_NK, w_scale, dtype).t()).to(dtype)


def dequantize(x_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``x · scale`` in fp32 (float64 for float64)."""
    math_dtype = torch.promote_types(dtype, torch.float32)
    return x_MK.to(math_dtype) * scale.to(math_dtype)


def dequantize_rows(rounded: Rounded, out_MK: torch.Tensor) -> None:
    """Write ``data · scale`` to ``out_MK``, whose rows may lie in a wider buffer."""
    is_made_here = out_MK.is_cuda and torch.cuda.get_device_capability(out_MK.device) < (8, 9)
    run = dequantize_rows_triton if runs_triton(out_MK) and not is_made_here else dequantize_rows_reference
    run(rounded, out_MK)


def transpose_bytes(x_NK: torch.Tensor, out_KN: torch.Tensor) -> None:
    """Write the transpose of a dense matrix of one-byte numbers to ``out_KN``, dense too."""
    if runs_triton(x_NK):
        transpose_bytes_triton(x_NK, out_KN)
    else:
        out_KN.view(torch.uint8).copy_(x_NK.view(torch.uint8).t())


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def quantize_rows_reference(
    x_MK: torch.Tensor, factor_K: torch.Tensor | None, out_MK: torch.Tensor, scale_M1: torch.Tensor
) -> None:
    """Do what `quantize_rows` says in plain operations."""
    x = x_MK.float() if factor_K is None else x_MK.float() * factor_K
    top_M1 = x.abs().amax(dim=1, keepdim=True)
    scale_M1.copy_(torch.where(top_M1 > 0, top_M1 / E4M3_MAX, 1.0))
    out_MK.copy_((x / scale_M1).clamp(-E4M3_MAX, E4M3_MAX))


def quantize_by_reference(x_MK: torch.Tensor, out_MK: torch.Tensor, scale_11: torch.Tensor) -> None:
    """Do what `quantize_by` says in plain operations."""
    out_MK.copy_((x_MK.float() / scale_11).clamp(-E4M3_MAX, E4M3_MAX))


def dequantize_rows_reference(rounded: Rounded, out_MK: torch.Tensor) -> None:
    """Do what `dequantize_rows` says in plain operations."""
    out_MK.copy_(dequantize(rounded.data_MK, rounded.scale_M1, out_MK.dtype))


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def quantized(x, LARGEST: tl.constexpr):
    """Return a row divided by its scale, within the range of E4M3, and the scale."""
    top = tl.max(tl.abs(x), axis=0)
    scale = tl.where(top > 0, top / LARGEST, 1.0)
    return tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST), scale


@jit
def _load(x_ptr, factor_ptr, cols, mask, HAS_FACTOR: tl.constexpr):
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        x *= tl.load(factor_ptr + cols, mask=mask, other=0.0)
    return x


@jit
def _fp8_quantize_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    scale_ptr,
    num_cols,
    x_row,
    out_row,
    LARGEST: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    x, scale = quantized(_load(x_ptr + row * x_row, factor_ptr, cols, mask, HAS_FACTOR), LARGEST)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * out_row + cols, x.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _fp8_quantize_long_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    scale_ptr,
    num_cols,
    x_row,
    out_row,
    LARGEST: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tops = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load(x_ptr + row * x_row, factor_ptr, cols, cols < num_cols, HAS_FACTOR)
        tops = tl.maximum(tops, tl.abs(x))
    top = tl.max(tops, axis=0)
    scale = tl.where(top > 0, top / LARGEST, 1.0)
    tl.store(scale_ptr + row, scale)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < num_cols
        x = _load(x_ptr + row * x_row, factor_ptr, cols, mask, HAS_FACTOR) / scale
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        tl.store(out_ptr + row * out_row + cols, x.to(out_ptr.dtype.element_ty), mask=mask)


def quantize_rows_triton(
    x_MK: torch.Tensor, factor_K: torch.Tensor | None, out_MK: torch.Tensor, scale_M1: torch.Tensor
) -> None:
    """Do what `quantize_rows` says, one program a row."""
    num_rows, num_cols = x_MK.shape
    block = next_power_of_2(num_cols)
    kernel = _fp8_quantize_kernel
    if block > _LONGEST_ROW:
        kernel, block = _fp8_quantize_long_kernel, _LONGEST_ROW // 8
    kernel[(num_rows,)](
        x_MK,
        x_MK if factor_K is None else factor_K,
        out_MK,
        scale_M1,
        num_cols,
        x_MK.stride(0),
        out_MK.stride(0),
        LARGEST=E4M3_MAX,
        HAS_FACTOR=factor_K is not None,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )


@jit
def _fp8_scale_kernel(x_ptr, out_ptr, scale_ptr, num_cols, x_row, out_row, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=mask, other=0.0).to(tl.float32) / tl.load(scale_ptr)
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    tl.store(out_ptr + row * out_row + cols, x.to(out_ptr.dtype.element_ty), mask=mask)


def quantize_by_triton(x_MK: torch.Tensor, out_MK: torch.Tensor, scale_11: torch.Tensor) -> None:
    """Do what `quantize_by` says, one program for a piece of a row."""
    num_rows, num_cols = x_MK.shape
    block = min(_SCALE_BLOCK, next_power_of_2(num_cols))
    _fp8_scale_kernel[(num_rows, -(-num_cols // block))](
        x_MK,
        out_MK,
        scale_11,
        num_cols,
        x_MK.stride(0),
        out_MK.stride(0),
        LARGEST=E4M3_MAX,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )


@jit
def _fp8_dequantize_kernel(x_ptr, scale_ptr, out_ptr, num_cols, out_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    x = tl.load(x_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32) * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * out_row + cols, x.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_rows_triton(rounded: Rounded, out_MK: torch.Tensor) -> None:
    """Do what `dequantize_rows` says, one program for a piece of a row."""
    num_rows, num_cols = out_MK.shape
    block = min(_SCALE_BLOCK, next_power_of_2(num_cols))
    _fp8_dequantize_kernel[(num_rows, -(-num_cols // block))](
        rounded.data_MK,
        rounded.scale_M1,
        out_MK,
        num_cols,
        out_MK.stride(0),
        BLOCK=block,
        num_warps=num_warps_for(block),
    )


@jit
def _fp8_transpose_kernel(x_ptr, out_ptr, num_rows, num_cols, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    cols = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    x = tl.load(x_ptr + rows[:, None] * num_cols + cols[None, :], mask=mask, other=0)
    tl.store(out_ptr + cols[:, None] * num_rows + rows[None, :], tl.trans(x), mask=tl.trans(mask))


def transpose_bytes_triton(x_NK: torch.Tensor, out_KN: torch.Tensor) -> None:
    """Do what `transpose_bytes` says, one program a tile."""
    num_rows, num_cols = x_NK.shape
    _fp8_transpose_kernel[(-(-num_rows // _TILE), -(-num_cols // _TILE))](
        x_NK.view(torch.uint8), out_KN.view(torch.uint8), num_rows, num_cols, TILE=_TILE, num_warps=4
    )
