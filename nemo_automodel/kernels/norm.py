"""RMSNorm with the residual addition in front of it, and its gradient with the residual gradient added: one pass each.

Forward: ``s = x + r``, ``y = s / rms(s) · w``. Backward: with ``n = s / rms(s)`` and ``g = dy · w``,
``ds = dres + (g − n · mean(g · n)) / rms(s)`` (Zhang & Sennrich 2019, with the skip connection's gradient ``dres``).
The backward pass can write ``y`` once more, so that nobody has to keep it for the weight gradients of what follows.
Weights are frozen: there is no ``dw``. For a product in 8 bits the forward pass also rounds what it writes, which saves
reading it once more. Arithmetic is fp32 and every result is rounded once; the price against separate
operations is that the sums must be made again in the backward pass, from one saved number a row.

Rows may lie in wider buffers: every tensor has its own row stride. Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch

from nemo_automodel.kernels.fp8 import E4M3_MAX, Rounded, quantize_rows_reference, quantized
from nemo_automodel.kernels.jit import jit, next_power_of_2, num_warps_for, runs_triton, tl


def rms_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    residual_TD: torch.Tensor | None = None,
    out_TD: torch.Tensor | None = None,
    rounded: Rounded | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised rows and 1/rms of each row, fp32 ``[T]`` (float64 for float64).

    With ``residual_TD`` the sum ``x + residual`` is normalised, and ``x_TD`` **is overwritten** with that sum.
    ``out_TD`` receives the result; the last dimension of every tensor must be dense. ``rounded`` receives the result as
    `quantize_rows` rounds it.
    """
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if out_TD is None else out_TD
    if runs_triton(x_TD):
        return out_TD, rms_norm_triton(x_TD, weight_D, eps, residual_TD, out_TD, rounded)
    return out_TD, rms_norm_reference(x_TD, weight_D, eps, residual_TD, out_TD, rounded)


def rms_norm_backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
    *,
    residual_grad_TD: torch.Tensor | None = None,
    out_TD: torch.Tensor | None = None,
    y_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of the normalised sum ``x_TD``, ``residual_grad_TD`` added; ``y_TD`` receives the output.

    ``out_TD`` may be ``dy_TD`` itself.
    """
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if out_TD is None else out_TD
    run = rms_norm_backward_triton if runs_triton(x_TD) else rms_norm_backward_reference
    run(dy_TD, x_TD, weight_D, rstd_T, residual_grad_TD, out_TD, y_TD)
    return out_TD


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def rms_norm_reference(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None,
    out_TD: torch.Tensor,
    rounded: Rounded | None = None,
) -> torch.Tensor:
    """Do what `rms_norm` says in plain operations; write the result to ``out_TD`` and return 1/rms."""
    math_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    if residual_TD is not None:
        x_TD.add_(residual_TD)
    x = x_TD.to(math_dtype)
    rstd_T = torch.rsqrt(x.square().mean(dim=-1) + eps)
    out_TD.copy_(x * rstd_T.unsqueeze(-1) * weight_D.to(math_dtype))
    if rounded is not None:
        quantize_rows_reference(out_TD, None, rounded.data_MK, rounded.scale_M1)
    return rstd_T


def rms_norm_backward_reference(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
    residual_grad_TD: torch.Tensor | None,
    out_TD: torch.Tensor,
    y_TD: torch.Tensor | None,
) -> None:
    """Do what `rms_norm_backward` says in plain operations."""
    math_dtype = rstd_T.dtype
    normed = x_TD.to(math_dtype) * rstd_T.unsqueeze(-1)
    scaled = dy_TD.to(math_dtype) * weight_D.to(math_dtype)
    dx = (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True)) * rstd_T.unsqueeze(-1)
    if residual_grad_TD is not None:
        dx += residual_grad_TD
    out_TD.copy_(dx)
    if y_TD is not None:
        y_TD.copy_(normed * weight_D.to(math_dtype))


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def _norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    rstd_ptr,
    rounded_ptr,
    scale_ptr,
    num_cols,
    x_row,
    residual_row,
    out_row,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROUNDS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    x = tl.load(x_ptr + row * x_row + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_row + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * x_row + cols, x, mask=mask)
    x = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / num_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = (x * rstd * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_row + cols, y, mask=mask)
    tl.store(rstd_ptr + row, rstd)
    if ROUNDS:
        y, scale = quantized(y.to(tl.float32), LARGEST)
        tl.store(scale_ptr + row, scale)
        tl.store(rounded_ptr + row * num_cols + cols, y.to(rounded_ptr.dtype.element_ty), mask=mask)


@jit
def _norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    residual_grad_ptr,
    out_ptr,
    y_ptr,
    num_cols,
    dy_row,
    x_row,
    residual_grad_row,
    out_row,
    y_row,
    HAS_RESIDUAL: tl.constexpr,
    WRITES_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    rstd = tl.load(rstd_ptr + row)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    normed = tl.load(x_ptr + row * x_row + cols, mask=mask, other=0.0).to(tl.float32) * rstd
    scaled = tl.load(dy_ptr + row * dy_row + cols, mask=mask, other=0.0).to(tl.float32) * weight
    dx = (scaled - normed * (tl.sum(scaled * normed, axis=0) / num_cols)) * rstd
    if HAS_RESIDUAL:
        dx += tl.load(residual_grad_ptr + row * residual_grad_row + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + cols, dx.to(out_ptr.dtype.element_ty), mask=mask)
    if WRITES_Y:
        tl.store(y_ptr + row * y_row + cols, (normed * weight).to(y_ptr.dtype.element_ty), mask=mask)


def rms_norm_triton(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None,
    out_TD: torch.Tensor,
    rounded: Rounded | None = None,
) -> torch.Tensor:
    """Do what `rms_norm` says, one program a row; write the result to ``out_TD`` and return 1/rms."""
    num_rows, num_cols = x_TD.shape
    rstd_T = torch.empty(num_rows, dtype=torch.float32, device=x_TD.device)
    block = next_power_of_2(num_cols)
    _norm_forward_kernel[(num_rows,)](
        x_TD,
        x_TD if residual_TD is None else residual_TD,
        weight_D,
        out_TD,
        rstd_T,
        out_TD if rounded is None else rounded.data_MK,
        rstd_T if rounded is None else rounded.scale_M1,
        num_cols,
        x_TD.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        out_TD.stride(0),
        eps,
        HAS_RESIDUAL=residual_TD is not None,
        ROUNDS=rounded is not None,
        LARGEST=E4M3_MAX,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )
    return rstd_T


def rms_norm_backward_triton(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
    residual_grad_TD: torch.Tensor | None,
    out_TD: torch.Tensor,
    y_TD: torch.Tensor | None,
) -> None:
    """Do what `rms_norm_backward` says, one program a row."""
    num_rows, num_cols = x_TD.shape
    block = next_power_of_2(num_cols)
    _norm_backward_kernel[(num_rows,)](
        dy_TD,
        x_TD,
        weight_D,
        rstd_T,
        dy_TD if residual_grad_TD is None else residual_grad_TD,
        out_TD,
        out_TD if y_TD is None else y_TD,
        num_cols,
        dy_TD.stride(0),
        x_TD.stride(0),
        0 if residual_grad_TD is None else residual_grad_TD.stride(0),
        out_TD.stride(0),
        0 if y_TD is None else y_TD.stride(0),
        HAS_RESIDUAL=residual_grad_TD is not None,
        WRITES_Y=y_TD is not None,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )
