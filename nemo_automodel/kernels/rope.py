"""Bias, query/key norm and rotary embedding on packed queries, keys and values, and the way back.

The fused projection writes one matrix, a row a token: H query heads, then K key heads, then K value heads, E wide each.
`rotate_qkv` finishes it where it lies; with query/key norm (Qwen3) the raw projection must survive for the gradient, so
the finished queries and keys go to a matrix of their own. `rotate_qkv_backward` reads the gradients of attention in
whatever layout they come and writes one packed matrix: no concatenation, no copy to make them contiguous.

Rotation (Su et al. 2021, in the half-split layout of Hugging Face): ``(a, b) → (a·cos − b·sin, b·cos + a·sin)`` for the
two halves of a head; the gradient is the rotation by the opposite angle. The norm is an RMSNorm over each head, its
weight shared by all heads. Arithmetic is fp32, every result is rounded once.

Shapes: B rows, S positions, T = B·S tokens, H query heads, K key heads, E head dim, W = (H + 2K)·E, C = H + K heads
that rotate. cos and sin are ``[B or 1, S, E]``, their halves equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nemo_automodel.kernels.jit import jit, next_power_of_2, num_warps_for, runs_triton, tl

_HEADS_PER_BLOCK = 16


@dataclass(frozen=True)
class QKVLayout:
    """How a packed row is divided, and the constants of the query/key norm (None without one)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm_E: torch.Tensor | None = None
    k_norm_E: torch.Tensor | None = None
    norm_eps: float = 0.0
    bias_W: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Elements of a packed row."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def rotated_width(self) -> int:
        """Elements of the queries and keys of a packed row."""
        return (self.num_heads + self.num_kv_heads) * self.head_dim


def rotate_qkv(
    qkv_TW: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: QKVLayout
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the finished queries and keys ``[T, C·E]`` and 1/rms of each head ``[T, C]`` (None without a norm).

    Without a norm ``qkv_TW`` is finished in place and the first result is a view of it. With a norm only its values get
    their bias; queries and keys stay raw.
    """
    cos, sin = cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])
    has_norm = layout.q_norm_E is not None
    out_TX = qkv_TW[:, : layout.rotated_width]
    rstd_TC = None
    if has_norm:
        math_dtype = torch.promote_types(qkv_TW.dtype, torch.float32)
        out_TX = torch.empty(out_TX.shape, dtype=qkv_TW.dtype, device=qkv_TW.device)
        num_rotated = layout.num_heads + layout.num_kv_heads
        rstd_TC = torch.empty((qkv_TW.shape[0], num_rotated), dtype=math_dtype, device=qkv_TW.device)
    run = rotate_qkv_triton if runs_triton(qkv_TW) else rotate_qkv_reference
    run(qkv_TW, cos, sin, layout, out_TX, rstd_TC)
    return out_TX, rstd_TC


def rotate_qkv_backward(
    dq_BHSE: torch.Tensor,
    dk_BKSE: torch.Tensor,
    dv_BKSE: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: QKVLayout,
    dqkv_TW: torch.Tensor,
    *,
    raw_TW: torch.Tensor | None = None,
    rstd_TC: torch.Tensor | None = None,
) -> None:
    """Write the gradient of the packed projection to ``dqkv_TW``.

    Gradients of attention may have any strides but a dense last dimension. ``raw_TW`` (the projection as `rotate_qkv`
    left it) and ``rstd_TC`` belong to the query/key norm.
    """
    cos, sin = cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])
    run = rotate_qkv_backward_triton if runs_triton(dqkv_TW) else rotate_qkv_backward_reference
    run(dq_BHSE, dk_BKSE, dv_BKSE, cos, sin, layout, dqkv_TW, raw_TW, rstd_TC)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def turn(x_TCE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate every head of every token; cos and sin ``[S, E]`` are repeated for every row of the batch."""
    half = x_TCE.shape[-1] // 2
    repeat = x_TCE.shape[0] // cos.shape[0]
    cos, sin = (table[:, None, :half].to(x_TCE.dtype).repeat(repeat, 1, 1) for table in (cos, sin))
    a, b = x_TCE[..., :half], x_TCE[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _head_norms(layout: QKVLayout, dtype: torch.dtype) -> torch.Tensor:
    """Return the norm's weight of every rotating head, ``[C, E]``."""
    assert layout.q_norm_E is not None
    assert layout.k_norm_E is not None
    weights = [layout.q_norm_E.expand(layout.num_heads, -1), layout.k_norm_E.expand(layout.num_kv_heads, -1)]
    return torch.cat(weights).to(dtype)


def rotate_qkv_reference(
    qkv_TW: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: QKVLayout,
    out_TX: torch.Tensor,
    rstd_TC: torch.Tensor | None,
) -> None:
    """Do what `rotate_qkv` says in plain operations."""
    math_dtype = torch.promote_types(qkv_TW.dtype, torch.float32)
    x_TX = qkv_TW[:, : layout.rotated_width].to(math_dtype)
    if layout.bias_W is not None:
        x_TX = x_TX + layout.bias_W[: layout.rotated_width]
        qkv_TW[:, layout.rotated_width : layout.width] += layout.bias_W[layout.rotated_width :]
    x_TCE = x_TX.reshape(x_TX.shape[0], -1, layout.head_dim)
    if rstd_TC is not None:
        rstd_TC.copy_(torch.rsqrt(x_TCE.square().mean(dim=-1) + layout.norm_eps))
        x_TCE = x_TCE * rstd_TC.unsqueeze(-1) * _head_norms(layout, math_dtype)
    out_TX.copy_(turn(x_TCE, cos, sin).flatten(1))


def rotate_qkv_backward_reference(
    dq_BHSE: torch.Tensor,
    dk_BKSE: torch.Tensor,
    dv_BKSE: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: QKVLayout,
    dqkv_TW: torch.Tensor,
    raw_TW: torch.Tensor | None,
    rstd_TC: torch.Tensor | None,
) -> None:
    """Do what `rotate_qkv_backward` says in plain operations."""
    math_dtype = torch.promote_types(dqkv_TW.dtype, torch.float32)
    turned = torch.cat([dq_BHSE, dk_BKSE], dim=1).transpose(1, 2).flatten(0, 1).to(math_dtype)
    grad_TCE = turn(turned, cos, -sin)
    if rstd_TC is not None:
        assert raw_TW is not None
        raw = raw_TW[:, : layout.rotated_width].to(math_dtype)
        if layout.bias_W is not None:
            raw = raw + layout.bias_W[: layout.rotated_width]
        normed = raw.reshape(raw.shape[0], -1, layout.head_dim) * rstd_TC.unsqueeze(-1)
        scaled = grad_TCE * _head_norms(layout, math_dtype)
        grad_TCE = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd_TC.unsqueeze(-1)
    dqkv_TW[:, : layout.rotated_width] = grad_TCE.flatten(1)
    dqkv_TW[:, layout.rotated_width : layout.width] = dv_BKSE.transpose(1, 2).flatten(0, 1).flatten(1)


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def load_halves(x_ptr, bias_ptr, at, bias_at, mask, bias_mask, HALF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Load the first and the second half of heads as a projection left them, with its bias."""
    first = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        first += tl.load(bias_ptr + bias_at, mask=bias_mask, other=0.0).to(tl.float32)
        second += tl.load(bias_ptr + bias_at + HALF, mask=bias_mask, other=0.0).to(tl.float32)
    return first, second


@jit
def _rope_forward_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    out_ptr,
    rstd_ptr,
    qkv_row,
    out_row,
    table_rows,
    table_row,
    eps,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    HALF: tl.constexpr = HEAD // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = e < HALF
    rotates = head < NUM_Q + NUM_KV
    mask = rotates & inside
    if HAS_BIAS:
        mask = (head < NUM_Q + 2 * NUM_KV) & inside
    at = head * HEAD + e
    a, b = load_halves(qkv_ptr, bias_ptr, token * qkv_row + at, at, mask, mask, HALF, HAS_BIAS)
    if HAS_BIAS:
        is_value = mask & (head >= NUM_Q + NUM_KV)
        tl.store(qkv_ptr + token * qkv_row + at, a.to(qkv_ptr.dtype.element_ty), mask=is_value)
        tl.store(qkv_ptr + token * qkv_row + at + HALF, b.to(qkv_ptr.dtype.element_ty), mask=is_value)
    if HAS_NORM:
        mean = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / HEAD
        rstd = (1.0 / tl.sqrt(mean + eps))[:, None]
        tl.store(rstd_ptr + token * (NUM_Q + NUM_KV) + head, rstd, mask=rotates)
        is_query = head < NUM_Q
        first = tl.where(is_query, tl.load(q_norm_ptr + e, mask=inside), tl.load(k_norm_ptr + e, mask=inside))
        second = tl.where(
            is_query, tl.load(q_norm_ptr + HALF + e, mask=inside), tl.load(k_norm_ptr + HALF + e, mask=inside)
        )
        a = a * rstd * first.to(tl.float32)
        b = b * rstd * second.to(tl.float32)
    place = (token % table_rows) * table_row + e
    cos = tl.load(cos_ptr + place, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + place, mask=inside, other=0.0).to(tl.float32)
    to = out_ptr + token * out_row + at
    tl.store(to, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=rotates & inside)
    tl.store(to + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=rotates & inside)


@jit
def _load_grads(dq_ptr, dk_ptr, dv_ptr, at_q, at_k, at_v, is_q, is_k, is_v):
    """Load one element of each head from the gradient that it belongs to."""
    value = tl.load(dq_ptr + at_q, mask=is_q, other=0.0).to(tl.float32)
    value += tl.load(dk_ptr + at_k, mask=is_k, other=0.0).to(tl.float32)
    value += tl.load(dv_ptr + at_v, mask=is_v, other=0.0).to(tl.float32)
    return value


@jit
def _rope_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cos_ptr,
    sin_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    raw_ptr,
    rstd_ptr,
    out_ptr,
    seq_len,
    dq_b,
    dq_h,
    dq_s,
    dk_b,
    dk_h,
    dk_s,
    dv_b,
    dv_h,
    dv_s,
    raw_row,
    out_row,
    table_rows,
    table_row,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    HALF: tl.constexpr = HEAD // 2
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // seq_len, token % seq_len
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = e < HALF
    rotates = head < NUM_Q + NUM_KV
    is_q = (head < NUM_Q) & inside
    is_k = (head >= NUM_Q) & rotates & inside
    is_v = (head >= NUM_Q + NUM_KV) & (head < NUM_Q + 2 * NUM_KV) & inside
    at_q = batch * dq_b + place * dq_s + head * dq_h + e
    at_k = batch * dk_b + place * dk_s + (head - NUM_Q) * dk_h + e
    at_v = batch * dv_b + place * dv_s + (head - NUM_Q - NUM_KV) * dv_h + e
    c = _load_grads(dq_ptr, dk_ptr, dv_ptr, at_q, at_k, at_v, is_q, is_k, is_v)
    d = _load_grads(dq_ptr, dk_ptr, dv_ptr, at_q + HALF, at_k + HALF, at_v + HALF, is_q, is_k, is_v)
    row = (token % table_rows) * table_row + e
    cos = tl.load(cos_ptr + row, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row, mask=inside, other=0.0).to(tl.float32)
    a = tl.where(rotates, c * cos + d * sin, c)
    b = tl.where(rotates, d * cos - c * sin, d)
    at = head * HEAD + e
    if HAS_NORM:
        mask = rotates & inside
        x, y = load_halves(raw_ptr, bias_ptr, token * raw_row + at, at, mask, mask, HALF, HAS_BIAS)
        rstd = tl.load(rstd_ptr + token * (NUM_Q + NUM_KV) + head, mask=rotates, other=0.0)
        x, y = x * rstd, y * rstd
        is_query = head < NUM_Q
        first = tl.where(is_query, tl.load(q_norm_ptr + e, mask=inside), tl.load(k_norm_ptr + e, mask=inside))
        second = tl.where(
            is_query, tl.load(q_norm_ptr + HALF + e, mask=inside), tl.load(k_norm_ptr + HALF + e, mask=inside)
        )
        scaled_a = tl.where(mask, a * first.to(tl.float32), 0.0)
        scaled_b = tl.where(mask, b * second.to(tl.float32), 0.0)
        mean = ((tl.sum(scaled_a * x, axis=1) + tl.sum(scaled_b * y, axis=1)) / HEAD)[:, None]
        a = tl.where(rotates, (scaled_a - x * mean) * rstd, a)
        b = tl.where(rotates, (scaled_b - y * mean) * rstd, b)
    to = out_ptr + token * out_row + at
    writes = (head < NUM_Q + 2 * NUM_KV) & inside
    tl.store(to, a.to(out_ptr.dtype.element_ty), mask=writes)
    tl.store(to + HALF, b.to(out_ptr.dtype.element_ty), mask=writes)


def _blocks(layout: QKVLayout, num_heads: int) -> tuple[int, dict[str, Any]]:
    """Return how many blocks of heads there are, and the constants both kernels share."""
    block_h = min(_HEADS_PER_BLOCK, next_power_of_2(num_heads))
    block_e = next_power_of_2(layout.head_dim // 2)
    constants = {
        "NUM_Q": layout.num_heads,
        "NUM_KV": layout.num_kv_heads,
        "HEAD": layout.head_dim,
        "HAS_BIAS": layout.bias_W is not None,
        "HAS_NORM": layout.q_norm_E is not None,
        "BLOCK_H": block_h,
        "BLOCK_E": block_e,
        "num_warps": num_warps_for(2 * block_h * block_e),
    }
    return -(-num_heads // block_h), constants


def rotate_qkv_triton(
    qkv_TW: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: QKVLayout,
    out_TX: torch.Tensor,
    rstd_TC: torch.Tensor | None,
) -> None:
    """Do what `rotate_qkv` says, one program for some heads of a token."""
    num_heads = layout.num_heads + layout.num_kv_heads * (1 if layout.bias_W is None else 2)
    num_blocks, constants = _blocks(layout, num_heads)
    _rope_forward_kernel[(qkv_TW.shape[0], num_blocks)](
        qkv_TW,
        cos,
        sin,
        qkv_TW if layout.bias_W is None else layout.bias_W,
        qkv_TW if layout.q_norm_E is None else layout.q_norm_E,
        qkv_TW if layout.k_norm_E is None else layout.k_norm_E,
        out_TX,
        cos if rstd_TC is None else rstd_TC,
        qkv_TW.stride(0),
        out_TX.stride(0),
        cos.shape[0],
        cos.stride(0),
        layout.norm_eps,
        **constants,
    )


def rotate_qkv_backward_triton(
    dq_BHSE: torch.Tensor,
    dk_BKSE: torch.Tensor,
    dv_BKSE: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: QKVLayout,
    dqkv_TW: torch.Tensor,
    raw_TW: torch.Tensor | None,
    rstd_TC: torch.Tensor | None,
) -> None:
    """Do what `rotate_qkv_backward` says, one program for some heads of a token."""
    # a layout without a dense last dimension is not known from any attention kernel; it would only cost a copy
    dq_BHSE, dk_BKSE, dv_BKSE = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq_BHSE, dk_BKSE, dv_BKSE))
    num_blocks, constants = _blocks(layout, layout.num_heads + 2 * layout.num_kv_heads)
    _rope_backward_kernel[(dqkv_TW.shape[0], num_blocks)](
        dq_BHSE,
        dk_BKSE,
        dv_BKSE,
        cos,
        sin,
        dq_BHSE if layout.bias_W is None else layout.bias_W,
        dq_BHSE if layout.q_norm_E is None else layout.q_norm_E,
        dq_BHSE if layout.k_norm_E is None else layout.k_norm_E,
        dq_BHSE if raw_TW is None else raw_TW,
        cos if rstd_TC is None else rstd_TC,
        dqkv_TW,
        dq_BHSE.shape[2],
        *dq_BHSE.stride()[:3],
        *dk_BKSE.stride()[:3],
        *dv_BKSE.stride()[:3],
        0 if raw_TW is None else raw_TW.stride(0),
        dqkv_TW.stride(0),
        cos.shape[0],
        cos.stride(0),
        **constants,
    )
