"""Numbers in 8 bits with one scale a row: quantisation, and the product of two such matrices.

E4M3 (4 bits of exponent, 3 of mantissa, largest value 448): a row is divided by its largest magnitude over 448, so that
rounding costs at most 1/16 of an element and about 2.6 % of a vector in the 2-norm. Hopper's matrix units read both
operands along their inner dimension, so a weight that is used forward and backward is stored twice, once each way, and
the scale of a row is per output channel in one copy and per input channel in the other.

Shapes: M rows, K inner dimension, N outputs.
"""

from __future__ import annotations

import torch

from nemo_automodel.kernels.jit import jit, next_power_of_2, num_warps_for, runs_triton, tl

E4M3_MAX = 448.0
_LONGEST_ROW = 32768
"""Elements that a program holds in its registers; longer rows are read twice."""


def quantize_rows(x_MK: torch.Tensor, factor_K: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x · factor / scale`` in E4M3, dense ``[M, K]``, and the scales of the rows, fp32 ``[M, 1]``.

    ``factor_K`` is fp32. A row of zeros has scale 1.
    """
    out_MK = torch.empty(x_MK.shape, dtype=torch.float8_e4m3fn, device=x_MK.device)
    scale_M1 = torch.empty((x_MK.shape[0], 1), dtype=torch.float32, device=x_MK.device)
    run = quantize_rows_triton if runs_triton(x_MK) else quantize_rows_reference
    run(x_MK, factor_K, out_MK, scale_M1)
    return out_MK, scale_M1


def scaled_product(
    x_MK: torch.Tensor, x_scale_M1: torch.Tensor, w_NK: torch.Tensor, w_scale_N1: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return ``(x · x_scale) @ (w · w_scale)ᵀ`` as ``[M, N]``. Both operands are E4M3 and dense, K a multiple of 16.

    On the CPU the same numbers are multiplied in fp32.
    """
    if x_MK.is_cuda:
        return torch._scaled_mm(
            x_MK, w_NK.t(), scale_a=x_scale_M1, scale_b=w_scale_N1.t(), out_dtype=dtype, use_fast_accum=True
        )
    return ((x_MK.float() * x_scale_M1) @ (w_NK.float() * w_scale_N1).t()).to(dtype)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def quantize_rows_reference(
    x_MK: torch.Tensor, factor_K: torch.Tensor | None, out_MK: torch.Tensor, scale_M1: torch.Tensor
) -> None:
    """Do what `quantize_rows` says in plain operations."""
    x = x_MK.float() if factor_K is None else x_MK.float() * factor_K
    top_M1 = x.abs().amax(dim=1, keepdim=True)
    scale_M1.copy_(torch.where(top_M1 > 0, top_M1 / E4M3_MAX, 1.0))
    out_MK.copy_((x / scale_M1).clamp(-E4M3_MAX, E4M3_MAX))


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
