"""Gradients of the weights of norms: sums over all tokens, in two stages and a fixed order.

The weight of an RMSNorm ``y = n·w`` with ``n = x·rstd`` has the gradient ``Σ dy·n``. A program sums some rows of some
columns in fp32, and a second, small sum adds the pieces, so results do not depend on timing. The price is that dy and x
are read once more than the norm's backward pass does: 25 µs a norm on an H100 at 4096 tokens of an 8B model.

Shapes: T tokens, D hidden size, P pieces; H query heads, K key heads, C = H + K, E head dim, B rows, S positions.
"""

from __future__ import annotations

import torch

from nemo_automodel.kernels.jit import jit, next_power_of_2, num_warps_for, runs_triton, tl
from nemo_automodel.kernels.rope import QKVLayout, load_halves, turn

_MAX_PIECES = 32
_BLOCK_T, _BLOCK_N = 16, 128
_HEADS_PER_BLOCK = 16


def norm_weight_grad(dy_TD: torch.Tensor, x_TD: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """Return the gradient of an RMSNorm's weight, ``[D]`` in the dtype of ``rstd_T``; rows may lie in wider buffers."""
    run = norm_weight_grad_triton if runs_triton(dy_TD) else norm_weight_grad_reference
    return run(dy_TD, x_TD, rstd_T)


def head_norm_grads(
    dq_BHSE: torch.Tensor,
    dk_BKSE: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: QKVLayout,
    raw_TW: torch.Tensor,
    rstd_TC: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the weights of the query and the key norm, ``[E]`` each, in the dtype of ``rstd_TC``.

    Arguments are those of `rope.rotate_qkv_backward`; nothing is overwritten.
    """
    cos, sin = cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])
    run = head_norm_grads_triton if runs_triton(raw_TW) else head_norm_grads_reference
    grad_CE = run(dq_BHSE, dk_BKSE, cos, sin, layout, raw_TW, rstd_TC)
    return grad_CE[: layout.num_heads].sum(0), grad_CE[layout.num_heads :].sum(0)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def norm_weight_grad_reference(dy_TD: torch.Tensor, x_TD: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """Do what `norm_weight_grad` says in plain operations."""
    return (dy_TD.to(rstd_T.dtype) * x_TD.to(rstd_T.dtype) * rstd_T.unsqueeze(1)).sum(0)


def head_norm_grads_reference(
    dq_BHSE: torch.Tensor,
    dk_BKSE: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: QKVLayout,
    raw_TW: torch.Tensor,
    rstd_TC: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of every head's norm, ``[C, E]``, in plain operations."""
    math_dtype = rstd_TC.dtype
    turned_TCE = torch.cat([dq_BHSE, dk_BKSE], dim=1).transpose(1, 2).flatten(0, 1).to(math_dtype)
    raw = raw_TW[:, : layout.rotated_width].to(math_dtype)
    if layout.bias_W is not None:
        raw = raw + layout.bias_W[: layout.rotated_width]
    normed_TCE = raw.reshape(turned_TCE.shape) * rstd_TC.unsqueeze(-1)
    return (turn(turned_TCE, cos, -sin) * normed_TCE).sum(0)


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def _norm_weight_grad_kernel(
    dy_ptr,
    x_ptr,
    rstd_ptr,
    partial_ptr,
    num_rows,
    num_cols,
    piece_rows,
    dy_row,
    x_row,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for start in range(0, piece_rows, BLOCK_T):
        rows = piece * piece_rows + start + tl.arange(0, BLOCK_T)
        inside = rows < num_rows
        mask = inside[:, None] & (cols < num_cols)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total += dy * x * tl.load(rstd_ptr + rows, mask=inside, other=0.0)[:, None]
    tl.store(partial_ptr + piece * num_cols + cols, tl.sum(total, axis=0), mask=cols < num_cols)


@jit
def _head_norm_grad_kernel(
    dq_ptr,
    dk_ptr,
    cos_ptr,
    sin_ptr,
    bias_ptr,
    raw_ptr,
    rstd_ptr,
    partial_ptr,
    num_tokens,
    piece_tokens,
    seq_len,
    dq_b,
    dq_h,
    dq_s,
    dk_b,
    dk_h,
    dk_s,
    raw_row,
    table_rows,
    table_row,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    HALF: tl.constexpr = HEAD // 2
    piece = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    is_q = (head < NUM_Q) & (e < HALF)
    is_k = (head >= NUM_Q) & (head < NUM_Q + NUM_KV) & (e < HALF)
    mask = is_q | is_k
    at = head * HEAD + e
    first = tl.zeros([BLOCK_H, BLOCK_E], dtype=tl.float32)
    second = tl.zeros([BLOCK_H, BLOCK_E], dtype=tl.float32)
    for index in range(0, piece_tokens):
        token = piece * piece_tokens + index
        lives = token < num_tokens
        batch, place = token // seq_len, token % seq_len
        at_q = dq_ptr + batch * dq_b + place * dq_s + head * dq_h + e
        at_k = dk_ptr + batch * dk_b + place * dk_s + (head - NUM_Q) * dk_h + e
        c = tl.load(at_q, mask=is_q & lives, other=0.0).to(tl.float32)
        c += tl.load(at_k, mask=is_k & lives, other=0.0).to(tl.float32)
        d = tl.load(at_q + HALF, mask=is_q & lives, other=0.0).to(tl.float32)
        d += tl.load(at_k + HALF, mask=is_k & lives, other=0.0).to(tl.float32)
        row = (token % table_rows) * table_row + e
        cos = tl.load(cos_ptr + row, mask=(e < HALF) & lives, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + row, mask=(e < HALF) & lives, other=0.0).to(tl.float32)
        x, y = load_halves(raw_ptr, bias_ptr, token * raw_row + at, at, mask & lives, mask, HALF, HAS_BIAS)
        rstd_at = rstd_ptr + token * (NUM_Q + NUM_KV) + head
        rstd = tl.load(rstd_at, mask=(head < NUM_Q + NUM_KV) & lives, other=0.0)
        first += (c * cos + d * sin) * x * rstd
        second += (d * cos - c * sin) * y * rstd
    to = partial_ptr + piece * (NUM_Q + NUM_KV) * HEAD + at
    tl.store(to, first, mask=mask)
    tl.store(to + HALF, second, mask=mask)


def norm_weight_grad_triton(dy_TD: torch.Tensor, x_TD: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """Do what `norm_weight_grad` says, one program for some rows of some columns."""
    num_rows, num_cols = dy_TD.shape
    tiles = -(-num_rows // _BLOCK_T)
    piece_tiles = -(-tiles // _MAX_PIECES)
    num_pieces = -(-tiles // piece_tiles)
    partial_PD = torch.empty((num_pieces, num_cols), dtype=torch.float32, device=dy_TD.device)
    _norm_weight_grad_kernel[(num_pieces, -(-num_cols // _BLOCK_N))](
        dy_TD,
        x_TD,
        rstd_T,
        partial_PD,
        num_rows,
        num_cols,
        piece_tiles * _BLOCK_T,
        dy_TD.stride(0),
        x_TD.stride(0),
        BLOCK_T=_BLOCK_T,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
    )
    return partial_PD.sum(0)


def head_norm_grads_triton(
    dq_BHSE: torch.Tensor,
    dk_BKSE: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: QKVLayout,
    raw_TW: torch.Tensor,
    rstd_TC: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of every head's norm, ``[C, E]``, one program for some heads of some tokens."""
    dq_BHSE, dk_BKSE = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq_BHSE, dk_BKSE))
    num_tokens, num_heads = raw_TW.shape[0], layout.num_heads + layout.num_kv_heads
    block_h, block_e = min(_HEADS_PER_BLOCK, next_power_of_2(num_heads)), next_power_of_2(layout.head_dim // 2)
    piece_tokens = -(-num_tokens // (4 * _MAX_PIECES))
    num_pieces = -(-num_tokens // piece_tokens)
    partial_PCE = torch.empty((num_pieces, num_heads, layout.head_dim), dtype=torch.float32, device=raw_TW.device)
    _head_norm_grad_kernel[(num_pieces, -(-num_heads // block_h))](
        dq_BHSE,
        dk_BKSE,
        cos,
        sin,
        raw_TW if layout.bias_W is None else layout.bias_W,
        raw_TW,
        rstd_TC,
        partial_PCE,
        num_tokens,
        piece_tokens,
        dq_BHSE.shape[2],
        *dq_BHSE.stride()[:3],
        *dk_BKSE.stride()[:3],
        raw_TW.stride(0),
        cos.shape[0],
        cos.stride(0),
        NUM_Q=layout.num_heads,
        NUM_KV=layout.num_kv_heads,
        HEAD=layout.head_dim,
        HAS_BIAS=layout.bias_W is not None,
        BLOCK_H=block_h,
        BLOCK_E=block_e,
        num_warps=num_warps_for(2 * block_h * block_e),
    )
    return partial_PCE.sum(0)
