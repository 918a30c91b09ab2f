"""The kernels of `swiglu_lora`.

A program owns some rows and a piece of the columns, so a row's products of low rank come as one partial sum for each
piece, fp32, added up afterwards in a fixed order: results do not depend on timing.

What they wait for is memory: with 8192 rows of 14336 columns on an H100 0.24 ms forward and 0.47 ms on the way back, at
3 TB/s, for 6 and 12 bytes an element. So tiles are asked for while the one before is worked on
(``num_stages``), which the products need anyway, and what stays the same over a program's columns, the narrow factors
of its rows, is read once. Places within a tile are counted in 32 bits from its first row: 64 bits for each of them
took as many registers as the numbers themselves, and half as many programs ran side by side.

A tile has 64 rows where WGMMA can be trusted, see `assembler`, and 32 elsewhere: with the ptxas that Triton brings, a
trial with 64 rows and 32 ranks ended on an H100 in an illegal memory access.
"""

from __future__ import annotations

import torch

from nemo_automodel.kernels.assembler import tile_rows
from nemo_automodel.kernels.dropout import Dropout, keeps_tile
from nemo_automodel.kernels.jit import jit, tl
from nemo_automodel.kernels.lora import MAX_BLOCK_R, Update, block_r, low_tile, update_tile

NUM_WARPS, PIECES = 4, 8
"""Warps of a program, pieces of a row at least."""
_SUM_BLOCK_T = 64
_NUM_PROGRAMS = 1024
"""About eight a multiprocessor of an H100: over few rows, these are cut into more pieces."""


@jit
def _swiglu_lora_forward_kernel(
    gate_up_ptr,
    out_ptr,
    low_ptr,
    b_ptr,
    a_ptr,
    partial_ptr,
    seed_ptr,
    mask_row,
    num_rows,
    num_cols,
    piece_cols,
    in_row,
    out_row,
    low_row,
    b_rank,
    b_col,
    a_row,
    HAS_UPDATE: tl.constexpr,
    GATE_FROM: tl.constexpr,
    UP_FROM: tl.constexpr,
    UP_TO: tl.constexpr,
    BLOCK_R: tl.constexpr,
    A_RANK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DROPS_UPDATE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    DROPS_A: tl.constexpr,
    SALT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_T
    piece = tl.program_id(1)
    rows = tl.arange(0, BLOCK_T)
    inside_T = rows < num_rows - first_row
    ranks = tl.arange(0, A_BLOCK)
    dtype = out_ptr.dtype.element_ty
    gate_up_ptr += first_row.to(tl.int64) * in_row
    out_ptr += first_row.to(tl.int64) * out_row
    up_b_ptr = b_ptr + num_cols * b_col
    product = tl.zeros([BLOCK_T, A_BLOCK], dtype=tl.float32)
    if HAS_UPDATE:
        low_ptr += first_row.to(tl.int64) * low_row
        gate_low = low_tile(low_ptr, rows, inside_T, low_row, GATE_FROM, UP_FROM, BLOCK_R)
        up_low = low_tile(low_ptr, rows, inside_T, low_row, UP_FROM, UP_TO, BLOCK_R)
    for start in tl.range(0, piece_cols, BLOCK_N, num_stages=STAGES):
        first_col = piece * piece_cols + start
        cols = first_col + tl.arange(0, BLOCK_N)
        inside_N = cols < num_cols
        mask = inside_T[:, None] & inside_N[None, :]
        at = gate_up_ptr + (rows[:, None] * in_row + cols[None, :])
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + num_cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_UPDATE:
            gate_update = update_tile(
                gate_low, low_ptr, b_ptr, rows, cols, inside_T, inside_N, low_row, b_rank, b_col, GATE_FROM, UP_FROM
            )
            up_update = update_tile(
                up_low, low_ptr, up_b_ptr, rows, cols, inside_T, inside_N, low_row, b_rank, b_col, UP_FROM, UP_TO
            )
            if DROPS_UPDATE:
                mask_rows = mask_row + first_row + rows
                gate_keeps = keeps_tile(seed_ptr, mask_rows, first_col, 2 * num_cols, SALT, THRESHOLD, BLOCK_N, True)
                up_keeps = keeps_tile(
                    seed_ptr, mask_rows, num_cols + first_col, 2 * num_cols, SALT, THRESHOLD, BLOCK_N, IS_EVEN
                )
                gate_sum = (gate + tl.where(gate_keeps, gate_update * SCALE, 0.0)).to(dtype)
                up_sum = (up + tl.where(up_keeps, up_update * SCALE, 0.0)).to(dtype)
                tl.store(at, gate_sum, mask=mask)
                tl.store(at + num_cols, up_sum, mask=mask)
                gate, up = gate_sum.to(tl.float32), up_sum.to(tl.float32)
            else:
                gate += gate_update
                up += up_update
        h = (gate / (1.0 + tl.exp(-gate)) * up).to(dtype)
        tl.store(out_ptr + (rows[:, None] * out_row + cols[None, :]), h, mask=mask)
        if A_RANK > 0:
            a = tl.load(
                a_ptr + (ranks[None, :] * a_row + cols[:, None]),
                mask=(ranks < A_RANK)[None, :] & inside_N[:, None],
                other=0.0,
            )
            if DROPS_A:
                h_keeps = keeps_tile(
                    seed_ptr, mask_row + first_row + rows, first_col, num_cols, SALT, THRESHOLD, BLOCK_N, True
                )
                h = tl.where(h_keeps, h, 0.0).to(dtype)
            product = tl.dot(h, a, product, input_precision="ieee")
    if A_RANK > 0:
        if DROPS_A:
            product = product * SCALE
        to = partial_ptr + (
            (piece.to(tl.int64) * num_rows + first_row) * A_RANK + rows[:, None] * A_RANK + ranks[None, :]
        )
        tl.store(to, product, mask=inside_T[:, None] & (ranks < A_RANK)[None, :])


@jit
def _swiglu_lora_backward_kernel(
    dh_ptr,
    gate_up_ptr,
    low_ptr,
    dlow_ptr,
    b_ptr,
    a_ptr,
    partial_ptr,
    seed_ptr,
    mask_row,
    num_rows,
    num_cols,
    piece_cols,
    dh_row,
    in_row,
    low_row,
    dlow_row,
    b_rank,
    b_col,
    a_rank,
    a_col,
    HAS_UPDATE: tl.constexpr,
    MULTIPLIES: tl.constexpr,
    GATE_FROM: tl.constexpr,
    UP_FROM: tl.constexpr,
    UP_TO: tl.constexpr,
    BLOCK_R: tl.constexpr,
    A_RANK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DROPS_A: tl.constexpr,
    SALT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_T
    piece = tl.program_id(1)
    rows = tl.arange(0, BLOCK_T)
    inside_T = rows < num_rows - first_row
    ranks = tl.arange(0, BLOCK_R)
    dtype = gate_up_ptr.dtype.element_ty
    gate_up_ptr += first_row.to(tl.int64) * in_row
    dh_ptr += first_row.to(tl.int64) * dh_row
    up_b_ptr = b_ptr + num_cols * b_col
    gate_product = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    up_product = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    if A_RANK > 0:
        dlow_ptr += first_row.to(tl.int64) * dlow_row
        dlow = low_tile(dlow_ptr, rows, inside_T, dlow_row, 0, A_RANK, A_BLOCK)
    if HAS_UPDATE:
        low_ptr += first_row.to(tl.int64) * low_row
        gate_low = low_tile(low_ptr, rows, inside_T, low_row, GATE_FROM, UP_FROM, BLOCK_R)
        up_low = low_tile(low_ptr, rows, inside_T, low_row, UP_FROM, UP_TO, BLOCK_R)
    for start in tl.range(0, piece_cols, BLOCK_N, num_stages=STAGES):
        first_col = piece * piece_cols + start
        cols = first_col + tl.arange(0, BLOCK_N)
        inside_N = cols < num_cols
        mask = inside_T[:, None] & inside_N[None, :]
        at = gate_up_ptr + (rows[:, None] * in_row + cols[None, :])
        dh_at = dh_ptr + (rows[:, None] * dh_row + cols[None, :])
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + num_cols, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_at, mask=mask, other=0.0).to(tl.float32)
        if A_RANK > 0:
            dh_update = update_tile(
                dlow, dlow_ptr, a_ptr, rows, cols, inside_T, inside_N, dlow_row, a_rank, a_col, 0, A_RANK
            )
            if DROPS_A:
                h_keeps = keeps_tile(
                    seed_ptr, mask_row + first_row + rows, first_col, num_cols, SALT, THRESHOLD, BLOCK_N, True
                )
                dh_update = tl.where(h_keeps, dh_update * SCALE, 0.0)
            dh += dh_update
        if HAS_UPDATE:
            gate_update = update_tile(
                gate_low, low_ptr, b_ptr, rows, cols, inside_T, inside_N, low_row, b_rank, b_col, GATE_FROM, UP_FROM
            )
            up_update = update_tile(
                up_low, low_ptr, up_b_ptr, rows, cols, inside_T, inside_N, low_row, b_rank, b_col, UP_FROM, UP_TO
            )
            gate += gate_update
            up += up_update
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        dgate = (dh * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype)
        dup = (dh * silu).to(dtype)
        tl.store(at, dgate, mask=mask)
        tl.store(at + num_cols, dup, mask=mask)
        tl.store(dh_at, (silu * up).to(dtype), mask=mask)
        if MULTIPLIES:
            b_at = cols[:, None] * b_col + ranks[None, :] * b_rank
            b_gate = tl.load(
                b_ptr + (b_at + GATE_FROM * b_rank),
                mask=inside_N[:, None] & (ranks < UP_FROM - GATE_FROM)[None, :],
                other=0.0,
            )
            b_up = tl.load(
                up_b_ptr + (b_at + UP_FROM * b_rank),
                mask=inside_N[:, None] & (ranks < UP_TO - UP_FROM)[None, :],
                other=0.0,
            )
            gate_product = tl.dot(dgate, b_gate, gate_product, input_precision="ieee")
            up_product = tl.dot(dup, b_up, up_product, input_precision="ieee")
    if MULTIPLIES:
        to = partial_ptr + (
            (piece.to(tl.int64) * num_rows + first_row) * UP_TO + rows[:, None] * UP_TO + ranks[None, :]
        )
        tl.store(to + GATE_FROM, gate_product, mask=inside_T[:, None] & (ranks < UP_FROM - GATE_FROM)[None, :])
        tl.store(to + UP_FROM, up_product, mask=inside_T[:, None] & (ranks < UP_TO - UP_FROM)[None, :])


@jit
def _sum_pieces_kernel(
    partial_ptr, out_ptr, num_rows, num_pieces, RANK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, WIDTH)
    mask = (rows < num_rows)[:, None] & (ranks < RANK)[None, :]
    total = tl.zeros([BLOCK_T, WIDTH], dtype=tl.float32)
    for piece in range(0, num_pieces):
        at = partial_ptr + (piece * num_rows + rows)[:, None] * RANK + ranks[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(
        out_ptr + rows[:, None] * WIDTH + ranks[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(rows < num_rows)[:, None] & (ranks < WIDTH)[None, :],
    )


def swiglu_lora_triton(
    gate_up_TG: torch.Tensor,
    out_TF: torch.Tensor,
    update: Update | None,
    a_RF: torch.Tensor | None,
    a_rank: int,
    a_dropout: Dropout | None = None,
) -> torch.Tensor | None:
    """Do what `swiglu_lora.swiglu_lora` says."""
    num_rows, num_cols = out_TF.shape
    low_TR, factor_RN = (gate_up_TG, gate_up_TG) if update is None else (update.low_TR, update.factor_RN)
    (update_dropout,) = update.dropouts if update is not None and update.dropouts else (None,)
    assert a_dropout is None or update_dropout is None, "masks lie before the adapters or behind them"
    dropout = update_dropout if a_dropout is None else a_dropout
    parts = () if update is None else update.parts
    shape = shape_of(False, max(a_rank, _widest(parts)), dropout is not None, tile_rows(out_TF.device))
    (grid_rows, num_pieces), piece_cols = _grid(num_rows, num_cols, shape)
    partial_PTR = gate_up_TG.new_empty((num_pieces, num_rows, a_rank), dtype=torch.float32)
    _swiglu_lora_forward_kernel[(grid_rows, num_pieces)](
        gate_up_TG,
        out_TF,
        low_TR,
        factor_RN,
        gate_up_TG if a_RF is None else a_RF,
        partial_PTR,
        gate_up_TG if dropout is None else dropout.seed,
        0 if dropout is None else dropout.first_row,
        num_rows,
        num_cols,
        piece_cols,
        gate_up_TG.stride(0),
        out_TF.stride(0),
        low_TR.stride(0),
        *factor_RN.stride(),
        0 if a_RF is None else a_RF.stride(0),
        HAS_UPDATE=update is not None,
        DROPS_UPDATE=update_dropout is not None,
        IS_EVEN=num_cols % 2 == 0,
        DROPS_A=a_dropout is not None,
        **_rank_constants(parts, a_rank),
        **shape,
        **_drop_constants(dropout),
        num_warps=NUM_WARPS,
    )
    return None if a_RF is None else _sum_pieces(partial_PTR, a_RF.shape[0], out_TF.dtype)


def swiglu_lora_backward_triton(
    dh_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    update: Update | None,
    dh_update: Update | None,
    b_GR: torch.Tensor | None,
    parts: tuple[tuple[int, int], ...],
) -> torch.Tensor | None:
    """Do what `swiglu_lora.swiglu_lora_backward` says."""
    num_rows, num_cols = dh_TF.shape
    rank = parts[-1][1] if parts else 0
    low_TR = gate_up_TG if update is None else update.low_TR
    factor_RN = gate_up_TG if update is None else update.factor_RN
    b_RG = factor_RN if b_GR is None else b_GR.t()
    dlow_TR, a_RF = (dh_TF, dh_TF) if dh_update is None else (dh_update.low_TR, dh_update.factor_RN)
    (dropout,) = dh_update.dropouts if dh_update is not None and dh_update.dropouts else (None,)
    a_rank = 0 if dh_update is None else dh_update.rank
    shape = shape_of(True, max(a_rank, _widest(parts)), dropout is not None, tile_rows(dh_TF.device))
    (grid_rows, num_pieces), piece_cols = _grid(num_rows, num_cols, shape)
    partial_PTR = gate_up_TG.new_empty((num_pieces, num_rows, rank), dtype=torch.float32)
    _swiglu_lora_backward_kernel[(grid_rows, num_pieces)](
        dh_TF,
        gate_up_TG,
        low_TR,
        dlow_TR,
        b_RG,
        a_RF,
        partial_PTR,
        gate_up_TG if dropout is None else dropout.seed,
        0 if dropout is None else dropout.first_row,
        num_rows,
        num_cols,
        piece_cols,
        dh_TF.stride(0),
        gate_up_TG.stride(0),
        low_TR.stride(0),
        dlow_TR.stride(0),
        *b_RG.stride(),
        *a_RF.stride(),
        HAS_UPDATE=update is not None,
        MULTIPLIES=b_GR is not None,
        DROPS_A=dropout is not None,
        **_rank_constants(parts, a_rank),
        **shape,
        **_drop_constants(dropout),
        num_warps=NUM_WARPS,
    )
    return None if b_GR is None else _sum_pieces(partial_PTR, b_GR.shape[1], dh_TF.dtype)


def _grid(num_rows: int, num_cols: int, shape: dict[str, int]) -> tuple[tuple[int, int], int]:
    """Return the grid and the columns of a piece, a whole number of tiles."""
    tiles, blocks = -(-num_cols // shape["BLOCK_N"]), -(-num_rows // shape["BLOCK_T"])
    piece_tiles = -(-tiles // max(PIECES, _NUM_PROGRAMS // blocks))
    return (blocks, -(-tiles // piece_tiles)), piece_tiles * shape["BLOCK_N"]


def shape_of(is_backward: bool, widest_rank: int, makes_mask: bool, height: int) -> dict[str, int]:
    """Return rows and columns of a tile and how many are in flight, as measured on an H100.

    ``height`` is `tile_rows`. Masks and wide factors take the registers, and more tiles of ranks, which a rank above
    `MAX_BLOCK_R` takes, want the shared memory, of which small GPUs have 99 KB.
    """
    if widest_rank > MAX_BLOCK_R:
        return {"BLOCK_T": 32, "BLOCK_N": 64, "STAGES": 1}
    is_crowded = is_backward and (widest_rank > 32 or (makes_mask and height == 32))
    return {"BLOCK_T": height, "BLOCK_N": 64, "STAGES": 2 if is_crowded else 3}


def _widest(parts: tuple[tuple[int, int], ...]) -> int:
    return max((to - first for first, to in parts), default=0)


def _rank_constants(parts: tuple[tuple[int, int], ...], a_rank: int) -> dict[str, int]:
    """Return the ranks of gate, of up and of the down projection as constants of a kernel."""
    (gate_from, gate_to), (up_from, up_to) = parts if parts else ((0, 0), (0, 0))
    assert gate_to == up_from, "adapters of a pack lie side by side"
    return {
        "GATE_FROM": gate_from,
        "UP_FROM": up_from,
        "UP_TO": up_to,
        "BLOCK_R": block_r(_widest(parts)),
        "A_RANK": a_rank,
        "A_BLOCK": block_r(a_rank),
    }


def _drop_constants(dropout: Dropout | None) -> dict[str, float]:
    """Return what the kernels need to know of a mask."""
    return {
        "SALT": 0 if dropout is None else dropout.salt,
        "THRESHOLD": 0 if dropout is None else dropout.threshold,
        "SCALE": 1.0 if dropout is None else dropout.scale,
    }


def _sum_pieces(partial_PTR: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Add up the pieces into ``[T, width]``, zero behind the ranks; ``width`` is a power of two."""
    num_pieces, num_rows, rank = partial_PTR.shape
    out_TR = torch.empty((num_rows, width), dtype=dtype, device=partial_PTR.device)
    _sum_pieces_kernel[(-(-num_rows // _SUM_BLOCK_T),)](
        partial_PTR, out_TR, num_rows, num_pieces, RANK=rank, WIDTH=width, BLOCK_T=_SUM_BLOCK_T
    )
    return out_TR
