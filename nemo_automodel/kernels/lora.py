"""LoRA arithmetic on packed layers: weight gradients of several adapters in one product each, and the update itself.

A packed layer stacks the ``A`` of its adapters to ``[R, D]`` and puts their scaled ``B`` into the diagonal blocks of
``[N, R]``, zero elsewhere. With ``low = x·Aᵀ`` and ``dlow = dy·(s·B)`` the gradients are ``dA = dlowᵀ·x`` and
``dB = s·dyᵀ·low``: x and dy are read once for all adapters. The price is that ``dyᵀ·low`` also makes the blocks off the
diagonal, at most three times the work of the smallest products in the layer.

The update ``low·(s·B)ᵀ``, or ``dlow·A`` on the way back, is an `Update` while it waits to be added: whoever reads the
outputs next can make it tile by tile on the matrix units and add it to what it has just read (`update_tile`), which
saves the pass over the outputs that adding it in place costs. `add_update_` is that pass, for outputs that go to a
kernel of somebody else, with the residual stream added on the way where there is one.

Shapes: T tokens, D inputs, N outputs, R ranks of all adapters, rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_automodel.kernels.assembler import tile_rows
from nemo_automodel.kernels.dropout import Dropout, keeps_tile, shares_of
from nemo_automodel.kernels.jit import jit, next_power_of_2, runs_triton, tl

_BLOCK_N = 128
"""Columns of a tile of `add_update_`."""
MAX_BLOCK_R = 64
"""Ranks that meet in one tile; more take several."""


@dataclass(frozen=True)
class Update:
    """A product of low rank that is still to be added: ``low @ factor``.

    ``parts`` are the ranks of each layer in the pack, ``(first, last + 1)``. The last dimension of ``low_TR`` is dense.
    With one mask in ``dropouts`` it lies over the sum, with several each lies over the product of its part's ranks.
    """

    low_TR: torch.Tensor
    factor_RN: torch.Tensor
    parts: tuple[tuple[int, int], ...]
    dropouts: tuple[Dropout, ...] = ()

    @property
    def rank(self) -> int:
        """Ranks in use, without the rounding."""
        return self.parts[-1][1]

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the update ``[T, N]`` in ``dtype``, by one plain product."""
        low_TR, factor_RN = self.low_TR.to(dtype), self.factor_RN.to(dtype)
        if not self.dropouts:
            return low_TR @ factor_RN
        total_TN = low_TR.new_zeros((low_TR.shape[0], factor_RN.shape[1]))
        for first, to, dropout in shares_of(self.parts, self.dropouts):
            total_TN += dropout.apply(low_TR[:, first:to] @ factor_RN[first:to])
        return total_TN


def low_rank_grads(
    x_TD: torch.Tensor, dy_TN: torch.Tensor, low_TR: torch.Tensor, dlow_TR: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``dA`` ``[R, D]`` and ``scale · dB / s`` ``[N, R]`` of stacked adapters; rows may lie in wider buffers."""
    db_NR = dy_TN.new_empty((dy_TN.shape[1], low_TR.shape[1]))
    return torch.mm(dlow_TR.t(), x_TD), torch.addmm(db_NR, dy_TN.t(), low_TR, beta=0, alpha=scale, out=db_NR)


def add_update_(y_TN: torch.Tensor, update: Update, residual_TN: torch.Tensor | None = None) -> torch.Tensor:
    """Add the update, and ``residual_TN`` if there is one, to ``y_TN`` in place and return it.

    Rows may lie in wider buffers. The sum is rounded once.
    """
    run = add_update_triton if runs_triton(y_TN) else add_update_reference
    run(y_TN, update, residual_TN)
    return y_TN


def block_r(rank: int) -> int:
    """Return how many ranks a tile holds: matrix units want at least 16."""
    return min(MAX_BLOCK_R, max(16, next_power_of_2(rank)))


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def add_update_reference(y_TN: torch.Tensor, update: Update, residual_TN: torch.Tensor | None) -> None:
    """Do what `add_update_` says in plain operations."""
    math_dtype = torch.promote_types(y_TN.dtype, torch.float32)
    total = y_TN.to(math_dtype) + update.product(math_dtype)
    y_TN.copy_(total if residual_TN is None else total + residual_TN)


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def low_tile(low_ptr, rows, inside_T, low_row, FROM: tl.constexpr, TO: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return ``low[rows, FROM:TO]``, its first ``BLOCK_R`` ranks; pointer and ``rows`` start at the tile's row."""
    ranks = FROM + tl.arange(0, BLOCK_R)
    return tl.load(
        low_ptr + (rows[:, None] * low_row + ranks[None, :]), mask=inside_T[:, None] & (ranks < TO)[None, :], other=0.0
    )


@jit
def update_tile(
    low,
    low_ptr,
    factor_ptr,
    rows,
    cols,
    inside_T,
    inside_N,
    low_row,
    factor_rank,
    factor_col,
    FROM: tl.constexpr,
    TO: tl.constexpr,
):
    """Return ``low[rows, FROM:TO] @ factor[FROM:TO, cols]``, fp32; ``low`` is the `low_tile` of the same ranks."""
    BLOCK_R: tl.constexpr = low.shape[1]
    total = tl.zeros([rows.shape[0], cols.shape[0]], dtype=tl.float32)
    for start in tl.static_range(FROM, TO, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        if start > FROM:
            low = low_tile(low_ptr, rows, inside_T, low_row, start, TO, BLOCK_R)
        factor = tl.load(
            factor_ptr + (cols[None, :] * factor_col + ranks[:, None] * factor_rank),
            mask=inside_N[None, :] & (ranks < TO)[:, None],
            other=0.0,
        )
        total = tl.dot(low, factor, total, input_precision="ieee")
    return total


@jit
def _add_update_kernel(
    y_ptr,
    residual_ptr,
    low_ptr,
    factor_ptr,
    seed_ptr,
    mask_row,
    num_rows,
    num_cols,
    y_row,
    residual_row,
    low_row,
    factor_rank,
    factor_col,
    HAS_RESIDUAL: tl.constexpr,
    SHARES: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    inside_T = rows < num_rows - first_row
    first_col = tl.program_id(1) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    inside_N = cols < num_cols
    mask = inside_T[:, None] & inside_N[None, :]
    y_ptr += first_row.to(tl.int64) * y_row
    low_ptr += first_row.to(tl.int64) * low_row
    at = y_ptr + (rows[:, None] * y_row + cols[None, :])
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptr += first_row.to(tl.int64) * residual_row
        y += tl.load(residual_ptr + (rows[:, None] * residual_row + cols[None, :]), mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(len(SHARES)):
        low = low_tile(low_ptr, rows, inside_T, low_row, SHARES[i][0], SHARES[i][1], BLOCK_R)
        update = update_tile(
            low,
            low_ptr,
            factor_ptr,
            rows,
            cols,
            inside_T,
            inside_N,
            low_row,
            factor_rank,
            factor_col,
            SHARES[i][0],
            SHARES[i][1],
        )
        if THRESHOLD > 0:
            mask_rows = mask_row + first_row + rows
            keeps = keeps_tile(seed_ptr, mask_rows, first_col, num_cols, SHARES[i][2], THRESHOLD, BLOCK_N, True)
            update = tl.where(keeps, update * SCALE, 0.0)
        y += update
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


def add_update_triton(y_TN: torch.Tensor, update: Update, residual_TN: torch.Tensor | None) -> None:
    """Do what `add_update_` says, one program a tile."""
    num_rows, num_cols = y_TN.shape
    shares = [(0, update.rank, None)] if not update.dropouts else shares_of(update.parts, update.dropouts)
    dropout = update.dropouts[0] if update.dropouts else None
    block_rows = tile_rows(y_TN.device)
    _add_update_kernel[(-(-num_rows // block_rows), -(-num_cols // _BLOCK_N))](
        y_TN,
        y_TN if residual_TN is None else residual_TN,
        update.low_TR,
        update.factor_RN,
        y_TN if dropout is None else dropout.seed,
        0 if dropout is None else dropout.first_row,
        num_rows,
        num_cols,
        y_TN.stride(0),
        0 if residual_TN is None else residual_TN.stride(0),
        update.low_TR.stride(0),
        *update.factor_RN.stride(),
        HAS_RESIDUAL=residual_TN is not None,
        SHARES=tuple((first, to, 0 if mask is None else mask.salt) for first, to, mask in shares),
        THRESHOLD=0 if dropout is None else dropout.threshold,
        SCALE=1.0 if dropout is None else dropout.scale,
        BLOCK_R=block_r(max(to - first for first, to, _ in shares)),
        BLOCK_T=block_rows,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
    )
