"""What weights that learn need of numbers in 8 bits: a matrix rounded and turned round at once, and their gradient.

The gradient of a weight, ``dyᵀ·x``, sums over tokens, so both operands must lie with the tokens inside, and a scale for
each token cannot be taken out of the sum: columns of ``dy`` and ``x`` get scales instead, or the whole matrix one
(`quantize_transposed`). The same pass turns a weight round for the way back where its bytes are not kept: there its
rows have scales already.

Sums over thousands of tokens are added up outside the matrix units (``fast_accum=False``).

Shapes: R rows and C columns of a matrix that is turned round, P = R rounded up to 16; T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import torch

from nemo_automodel.kernels.fp8 import E4M3_MAX, largest, scale_of, scaled_product
from nemo_automodel.kernels.jit import jit, runs_triton, tl

_MULTIPLE = 16
"""The inner dimension of a product in 8 bits is a multiple of so many numbers."""
_TILE = 64
"""Rows and columns of the tile that a program turns round."""


def quantize_transposed(
    x_RC: torch.Tensor, scale: torch.Tensor, *, emulate: bool = False, out_CP: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``(x / scale)ᵀ`` in E4M3, dense ``[C, P]``, zero behind the last row of ``x``.

    ``scale`` is fp32, ``[R, 1]``, ``[1, C]`` or ``[1, 1]``. What lies outside the range becomes the largest number.
    ``emulate`` as in `fp8.quantize_rows`; ``out_CP`` is memory for the result.
    """
    num_rows, num_cols = x_RC.shape
    if out_CP is None:
        padded = -(-num_rows // _MULTIPLE) * _MULTIPLE
        out_CP = torch.empty((num_cols, padded), dtype=torch.float8_e4m3fn, device=x_RC.device)
    run = quantize_transposed_triton if runs_triton(x_RC) and not emulate else quantize_transposed_reference
    run(x_RC, scale, out_CP)
    return out_CP


def column_scales(x_RC: torch.Tensor) -> torch.Tensor:
    """Return the scales ``[1, C]``, fp32, that put the largest of each column at the end of the range of E4M3."""
    tops = torch.linalg.vector_norm(x_RC, float("inf"), dim=0, keepdim=True).float()
    return torch.where(tops > 0, tops / E4M3_MAX, 1.0)


def weight_grad(dy_TN: torch.Tensor, x_TK: torch.Tensor, by_rows: bool, *, emulate: bool = False) -> torch.Tensor:
    """Return ``dyᵀ·x``, ``[N, K]`` in the dtype of ``dy``, both rounded to E4M3.

    ``by_rows`` gives every output and every input a scale of its own, otherwise each matrix has one. ``emulate`` rounds
    alike and multiplies in fp32.
    """
    is_plain = emulate or not dy_TN.is_cuda
    operands, scales = [], []
    for matrix in (dy_TN, x_TK):
        scale = column_scales(matrix) if by_rows else scale_of(largest(matrix))
        operands.append(quantize_transposed(matrix, scale, emulate=emulate))
        scales.append(scale.t())
    dy_NP, x_KP = operands
    return scaled_product(dy_NP, scales[0], x_KP, scales[1], dy_TN.dtype, is_plain, fast_accum=False)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def quantize_transposed_reference(x_RC: torch.Tensor, scale: torch.Tensor, out_CP: torch.Tensor) -> None:
    """Do what `quantize_transposed` says in plain operations."""
    num_rows = x_RC.shape[0]
    out_CP[:, :num_rows] = (x_RC.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).t()
    out_CP.view(torch.uint8)[:, num_rows:] = 0


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def _fp8_quantize_transposed_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    num_cols,
    x_row,
    out_row,
    LARGEST: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    SCALE_COL: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    cols = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    in_x = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row + cols[None, :], mask=in_x, other=0.0).to(tl.float32)
    x /= tl.load(scale_ptr + rows[:, None] * SCALE_ROW + cols[None, :] * SCALE_COL, mask=in_x, other=1.0)
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(out_ptr.dtype.element_ty)
    in_out = (cols < num_cols)[:, None] & (rows < out_row)[None, :]
    tl.store(out_ptr + cols[:, None] * out_row + rows[None, :], tl.trans(x), mask=in_out)


def quantize_transposed_triton(x_RC: torch.Tensor, scale: torch.Tensor, out_CP: torch.Tensor) -> None:
    """Do what `quantize_transposed` says, one program a tile."""
    num_rows, num_cols = x_RC.shape
    _fp8_quantize_transposed_kernel[(-(-out_CP.shape[1] // _TILE), -(-num_cols // _TILE))](
        x_RC,
        scale.contiguous(),
        out_CP,
        num_rows,
        num_cols,
        x_RC.stride(0),
        out_CP.stride(0),
        LARGEST=E4M3_MAX,
        SCALE_ROW=int(scale.shape[0] > 1),
        SCALE_COL=int(scale.shape[1] > 1),
        TILE=_TILE,
        num_warps=4,
    )
