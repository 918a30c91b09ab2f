"""Products of a matrix under dropout with the narrow matrices of adapters: the mask is made on the tile that is read.

`dropped_low` multiplies from the right, ``(x ∘ D) @ factor``, and `dropped_grad` from the left, ``(x ∘ D)ᵀ @ low``; D
is zero where an element is dropped and 1/(1 − p) elsewhere. Several adapters may read one matrix, each under its own
mask: a tile is read once and multiplied once for each of them, into columns that are theirs alone. Without this, every
mask costs a copy of the matrix.

A program of `dropped_low` owns some rows and a piece of the columns, one of `dropped_grad` some columns and a chunk of
the rows; they leave partial sums in fp32, added up in a fixed order: results do not depend on timing.

Shapes: T rows, N columns, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_automodel.kernels.assembler import tile_rows
from nemo_automodel.kernels.dropout import Dropout, Share, keeps_tile, shares_of
from nemo_automodel.kernels.jit import jit, runs_triton, tl
from nemo_automodel.kernels.lora import MAX_BLOCK_R, block_r

LOW_COLS, GRAD_ROWS = {32: 128, 64: 64}, {32: 64, 64: 64}
"""The other side of a tile whose results have as many rows as `tile_rows` says."""
_NUM_PROGRAMS = 1024
"""About eight a multiprocessor of an H100; as many partial sums as that takes."""

Parts = Sequence[tuple[int, int]]


def dropped_low(x_TN: torch.Tensor, factor_NR: torch.Tensor, parts: Parts, dropouts: Sequence[Dropout]) -> torch.Tensor:
    """Return ``(x ∘ D) @ factor``, ``[T, R]``, in the dtype of x; zero at ranks of no part.

    ``parts`` are the ranks of each adapter, ``dropouts`` its mask, or one mask for all. Rows may lie in wider buffers.
    """
    shares = shares_of(parts, dropouts)
    run = dropped_low_triton if runs_triton(x_TN) else dropped_low_reference
    return run(x_TN, factor_NR, shares)


def dropped_grad(x_TN: torch.Tensor, low_TR: torch.Tensor, parts: Parts, dropouts: Sequence[Dropout]) -> torch.Tensor:
    """Return ``(x ∘ D)ᵀ @ low``, ``[N, R]``, in the dtype of x; see `dropped_low`."""
    shares = shares_of(parts, dropouts)
    run = dropped_grad_triton if runs_triton(x_TN) else dropped_grad_reference
    return run(x_TN, low_TR, shares)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def dropped_low_reference(x_TN: torch.Tensor, factor_NR: torch.Tensor, shares: list[Share]) -> torch.Tensor:
    """Do what `dropped_low` says in plain operations."""
    out_TR = x_TN.new_zeros((x_TN.shape[0], factor_NR.shape[1]))
    for first, to, dropout in shares:
        out_TR[:, first:to] = dropout.apply(x_TN) @ factor_NR[:, first:to]
    return out_TR


def dropped_grad_reference(x_TN: torch.Tensor, low_TR: torch.Tensor, shares: list[Share]) -> torch.Tensor:
    """Do what `dropped_grad` says in plain operations."""
    out_NR = x_TN.new_zeros((x_TN.shape[1], low_TR.shape[1]))
    for first, to, dropout in shares:
        out_NR[:, first:to] = dropout.apply(x_TN).t() @ low_TR[:, first:to]
    return out_NR


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def _dropped_low_kernel(
    x_ptr,
    factor_ptr,
    partial_ptr,
    seed_ptr,
    mask_row,
    num_rows,
    num_cols,
    piece_cols,
    x_row,
    factor_row,
    factor_col,
    rank_from,
    num_ranks,
    SHARES: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    inside_T = rows < num_rows - first_row
    mask_rows = mask_row + first_row + rows
    piece = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    x_ptr += first_row.to(tl.int64) * x_row
    total = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for start in range(0, piece_cols, BLOCK_N):
        first_col = piece * piece_cols + start
        cols = first_col + tl.arange(0, BLOCK_N)
        inside_N = cols < num_cols
        x = tl.load(
            x_ptr + (rows[:, None] * x_row + cols[None, :]), mask=inside_T[:, None] & inside_N[None, :], other=0.0
        )
        factor_at = factor_ptr + (cols[:, None] * factor_row + (rank_from + ranks)[None, :] * factor_col)
        for i in tl.static_range(len(SHARES)):
            here = (ranks >= SHARES[i][0]) & (ranks < SHARES[i][1])
            factor = tl.load(factor_at, mask=inside_N[:, None] & here[None, :], other=0.0)
            keeps = keeps_tile(seed_ptr, mask_rows, first_col, num_cols, SHARES[i][2], THRESHOLD, BLOCK_N, True)
            total = tl.dot(tl.where(keeps, x, 0.0).to(x.dtype), factor, total, input_precision="ieee")
    to = partial_ptr + (piece.to(tl.int64) * num_rows + first_row + rows)[:, None] * num_ranks + ranks[None, :]
    tl.store(to, total * SCALE, mask=inside_T[:, None] & (ranks < num_ranks)[None, :])


@jit
def _dropped_grad_kernel(
    x_ptr,
    low_ptr,
    partial_ptr,
    seed_ptr,
    mask_row,
    num_rows,
    num_cols,
    chunk_rows,
    x_row,
    low_row,
    low_col,
    rank_from,
    num_ranks,
    SHARES: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_col = tl.program_id(0) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    inside_N = cols < num_cols
    chunk = tl.program_id(1)
    rows = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for start in range(0, chunk_rows, BLOCK_T):
        first_row = chunk * chunk_rows + start
        inside_T = rows < num_rows - first_row
        mask_rows = mask_row + first_row + rows
        x_at = x_ptr + first_row.to(tl.int64) * x_row + (rows[:, None] * x_row + cols[None, :])
        x = tl.load(x_at, mask=inside_T[:, None] & inside_N[None, :], other=0.0)
        low_at = low_ptr + first_row.to(tl.int64) * low_row
        low_at += rows[:, None] * low_row + (rank_from + ranks)[None, :] * low_col
        for i in tl.static_range(len(SHARES)):
            here = (ranks >= SHARES[i][0]) & (ranks < SHARES[i][1])
            low = tl.load(low_at, mask=inside_T[:, None] & here[None, :], other=0.0)
            keeps = keeps_tile(seed_ptr, mask_rows, first_col, num_cols, SHARES[i][2], THRESHOLD, BLOCK_N, True)
            dropped = tl.where(keeps, x, 0.0).to(x.dtype)
            total = tl.dot(tl.trans(dropped), low, total, input_precision="ieee")
    to = partial_ptr + (chunk * num_cols + cols)[:, None] * num_ranks + ranks[None, :]
    tl.store(to, total * SCALE, mask=inside_N[:, None] & (ranks < num_ranks)[None, :])


def _launches(shares: list[Share]) -> list[list[Share]]:
    """Divide the ranks so that each launch has at most a tile of them."""
    if shares[-1][1] - shares[0][0] <= MAX_BLOCK_R:
        return [shares]
    return [
        [(start, min(start + MAX_BLOCK_R, to), dropout)]
        for first, to, dropout in shares
        for start in range(first, to, MAX_BLOCK_R)
    ]


def _pieces(length: int, block: int, num_others: int) -> tuple[int, int]:
    """Divide ``length`` so that there are programs enough; return how many pieces and how long, a multiple of block."""
    tiles = -(-length // block)
    wanted = max(1, min(tiles, _NUM_PROGRAMS // num_others))
    piece_tiles = -(-tiles // wanted)
    return -(-tiles // piece_tiles), piece_tiles * block


def _constants(shares: list[Share], tile: tuple[int, int]) -> dict[str, object]:
    rank_from, dropout = shares[0][0], shares[0][2]
    return {
        "SHARES": tuple((first - rank_from, to - rank_from, mask.salt) for first, to, mask in shares),
        "THRESHOLD": dropout.threshold,
        "SCALE": dropout.scale,
        "BLOCK_T": tile[0],
        "BLOCK_N": tile[1],
        "BLOCK_R": block_r(shares[-1][1] - rank_from),
        "num_warps": 4,
    }


def dropped_low_triton(x_TN: torch.Tensor, factor_NR: torch.Tensor, shares: list[Share]) -> torch.Tensor:
    """Do what `dropped_low` says."""
    num_rows, num_cols = x_TN.shape
    out_TR = x_TN.new_zeros((num_rows, factor_NR.shape[1]))
    height = tile_rows(x_TN.device)
    tile = height, LOW_COLS[height]
    blocks = -(-num_rows // tile[0])
    num_pieces, piece_cols = _pieces(num_cols, tile[1], blocks)
    for launch in _launches(shares):
        first, to = launch[0][0], launch[-1][1]
        partial_PTR = x_TN.new_empty((num_pieces, num_rows, to - first), dtype=torch.float32)
        _dropped_low_kernel[(blocks, num_pieces)](
            x_TN,
            factor_NR,
            partial_PTR,
            launch[0][2].seed,
            launch[0][2].first_row,
            num_rows,
            num_cols,
            piece_cols,
            x_TN.stride(0),
            *factor_NR.stride(),
            first,
            to - first,
            **_constants(launch, tile),
        )
        out_TR[:, first:to] = partial_PTR.sum(dim=0)
    return out_TR


def dropped_grad_triton(x_TN: torch.Tensor, low_TR: torch.Tensor, shares: list[Share]) -> torch.Tensor:
    """Do what `dropped_grad` says."""
    num_rows, num_cols = x_TN.shape
    out_NR = x_TN.new_zeros((num_cols, low_TR.shape[1]))
    height = tile_rows(x_TN.device)
    tile = GRAD_ROWS[height], height
    blocks = -(-num_cols // tile[1])
    num_chunks, chunk_rows = _pieces(num_rows, tile[0], blocks)
    for launch in _launches(shares):
        first, to = launch[0][0], launch[-1][1]
        partial_CNR = x_TN.new_empty((num_chunks, num_cols, to - first), dtype=torch.float32)
        _dropped_grad_kernel[(blocks, num_chunks)](
            x_TN,
            low_TR,
            partial_CNR,
            launch[0][2].seed,
            launch[0][2].first_row,
            num_rows,
            num_cols,
            chunk_rows,
            x_TN.stride(0),
            *low_TR.stride(),
            first,
            to - first,
            **_constants(launch, tile),
        )
        out_NR[:, first:to] = partial_CNR.sum(dim=0)
    return out_NR
