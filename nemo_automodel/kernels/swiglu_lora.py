"""SwiGLU, ``h = silu(gate) · up`` (Shazeer 2020), with the LoRA products around it.

Gate and up are the halves of one matrix, as the fused projection writes it. The backward pass overwrites them with
their own gradients and ``dh`` with ``h``, which the weight gradients of the next layer need: no new memory, but it runs
once.

Between the projections of an MLP lie four products of low rank that each cost a pass over the widest matrices of the
model when they stand alone: the update of gate and up, ``low·(s·B)ᵀ``; the next projection's ``h·Aᵀ``; on the way back
the update of dh, ``dlow·A``; and ``d(gate, up)·(s·B)``. SwiGLU reads and writes those matrices anyway, so it does all
four on the matrix units, tile by tile, and each can be left out. Arithmetic is fp32, every result is rounded once.

A program owns some rows and a piece of the columns, so a row's products of low rank come as one partial sum for each
piece, fp32, added up afterwards in a fixed order: results do not depend on timing.

Shapes: T tokens, F intermediate size, G = 2F, R ranks.
"""

from __future__ import annotations

import torch

from nemo_automodel.kernels.dropout import Dropout, keeps_tile
from nemo_automodel.kernels.dropped_products import dropped_low
from nemo_automodel.kernels.jit import jit, runs_triton, tl
from nemo_automodel.kernels.lora import MAX_BLOCK_R, Update, block_r, update_tile

BLOCK_N, NUM_WARPS, PIECES = 64, 4, 8
"""Columns of a tile, warps of a program, pieces of a row at least."""
_SUM_BLOCK_T = 64
_NUM_PROGRAMS = 1024
"""About eight a multiprocessor of an H100: over few rows, these are cut into more pieces."""
MASKED_NUM_WARPS = 8
"""Making masks takes registers; with four warps the backward pass spills twice as many."""


def block_t(widest_rank: int) -> int:
    """Return the rows of a tile.

    From 64 rows on Triton multiplies on Hopper by WGMMA, and the ptxas 12.8 and 12.9 it brings get that wrong where
    operands wait in registers (triton-lang/triton#11781): with 32 ranks a trial on an H100 ended in an illegal memory
    access. Up to 16 ranks layers were held against fp32 there; more take tiles for the older instructions.
    """
    return 64 if widest_rank <= 16 else 32


def num_stages(widest_rank: int) -> int:
    """Return how many tiles of a kernel are in flight: as many as fit the shared memory of every GPU, 99 KB at least.

    More tiles of ranks, which a rank above `MAX_BLOCK_R` takes, want room for each of them.
    """
    return 3 if widest_rank <= 32 else 2 if widest_rank <= MAX_BLOCK_R else 1


def swiglu_lora(
    gate_up_TG: torch.Tensor,
    out_TF: torch.Tensor,
    update: Update | None,
    a_RF: torch.Tensor | None,
    a_rank: int,
    a_dropout: Dropout | None = None,
) -> torch.Tensor | None:
    """Write ``silu(gate) · up`` to ``out_TF``, the update added to gate and up first; return ``out·Aᵀ`` ``[T, R]``.

    ``gate_up_TG`` stays as it is. Without ``a_RF`` the result is None. Rows may lie in wider buffers.
    ``a_rank`` is how many rows of ``a_RF`` are in use; the others are zero. ``a_dropout`` drops what A multiplies.
    """
    if not runs_triton(gate_up_TG):
        return swiglu_lora_reference(gate_up_TG, out_TF, update, a_RF, a_rank, a_dropout)
    if a_RF is None or a_rank <= MAX_BLOCK_R:
        return swiglu_lora_triton(gate_up_TG, out_TF, update, a_RF, a_rank, a_dropout)
    swiglu_lora_triton(gate_up_TG, out_TF, update, None, 0)
    # more ranks than a tile holds: a product of its own reads h once more
    return torch.mm(out_TF, a_RF.t()) if a_dropout is None else _product(out_TF, a_RF.t(), a_rank, a_dropout)


def swiglu_lora_backward(
    dh_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    update: Update | None,
    dh_update: Update | None,
    b_GR: torch.Tensor | None,
    parts: tuple[tuple[int, int], ...],
) -> torch.Tensor | None:
    """Overwrite gate and up with their gradients and ``dh_TF`` with ``h``; return ``d(gate, up)·B`` ``[T, R]``.

    ``update`` is the one of `swiglu_lora`, ``dh_update`` is added to dh first. ``b_GR`` holds the blocks of gate and up
    at the ranks ``parts`` and zero elsewhere; without it the result is None.
    """
    if not runs_triton(gate_up_TG):
        return swiglu_lora_backward_reference(dh_TF, gate_up_TG, update, dh_update, b_GR, parts)
    if b_GR is None or max(to - first for first, to in parts) <= MAX_BLOCK_R:
        return swiglu_lora_backward_triton(dh_TF, gate_up_TG, update, dh_update, b_GR, parts)
    swiglu_lora_backward_triton(dh_TF, gate_up_TG, update, dh_update, None, parts)
    return torch.mm(gate_up_TG, b_GR)


def _product(x_TN: torch.Tensor, factor_NR: torch.Tensor, rank: int, dropout: Dropout) -> torch.Tensor:
    return dropped_low(x_TN, factor_NR, ((0, rank),), (dropout,))


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def swiglu_lora_reference(
    gate_up_TG: torch.Tensor,
    out_TF: torch.Tensor,
    update: Update | None,
    a_RF: torch.Tensor | None,
    a_rank: int,
    a_dropout: Dropout | None = None,
) -> torch.Tensor | None:
    """Do what `swiglu_lora` says in plain operations."""
    math_dtype = torch.promote_types(gate_up_TG.dtype, torch.float32)
    if update is not None:
        gate_up_TG = gate_up_TG.to(math_dtype) + update.product(math_dtype)
    gate, up = gate_up_TG.to(math_dtype).chunk(2, dim=-1)
    out_TF.copy_(torch.nn.functional.silu(gate) * up)
    if a_RF is None:
        return None
    return torch.mm(out_TF if a_dropout is None else a_dropout.apply(out_TF), a_RF.t())


def swiglu_lora_backward_reference(
    dh_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    update: Update | None,
    dh_update: Update | None,
    b_GR: torch.Tensor | None,
    parts: tuple[tuple[int, int], ...],
) -> torch.Tensor | None:
    """Do what `swiglu_lora_backward` says in plain operations."""
    math_dtype = torch.promote_types(gate_up_TG.dtype, torch.float32)
    dh, gate_up = dh_TF.to(math_dtype), gate_up_TG.to(math_dtype)
    if update is not None:
        gate_up = gate_up + update.product(math_dtype)
    if dh_update is not None:
        dh = dh + dh_update.product(math_dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate, dup = dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * silu
    dh_TF.copy_(silu * up)  # dh and gate may be views of what is overwritten here
    gate_up_TG.copy_(torch.cat([dgate, dup], dim=-1))
    if b_GR is None:
        return None
    return torch.mm(gate_up_TG, b_GR)


# --- Triton ----------------------------------------------------------------------------------------------------------


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
    DROPS_A: tl.constexpr,
    A_SALT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    piece = tl.program_id(1).to(tl.int64)
    inside_T = rows < num_rows
    ranks = tl.arange(0, A_BLOCK)
    product = tl.zeros([BLOCK_T, A_BLOCK], dtype=tl.float32)
    for start in range(0, piece_cols, BLOCK_N):
        first_col = piece * piece_cols + start
        cols = first_col + tl.arange(0, BLOCK_N)
        mask = inside_T[:, None] & (cols < num_cols)[None, :]
        at = gate_up_ptr + rows[:, None] * in_row + cols[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + num_cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_UPDATE:
            gate_update = update_tile(
                low_ptr, b_ptr, rows, cols, num_rows, num_cols, low_row, b_rank, b_col, GATE_FROM, UP_FROM, BLOCK_R
            )
            up_update = update_tile(
                low_ptr,
                b_ptr + num_cols * b_col,
                rows,
                cols,
                num_rows,
                num_cols,
                low_row,
                b_rank,
                b_col,
                UP_FROM,
                UP_TO,
                BLOCK_R,
            )
            gate += gate_update
            up += up_update
        h = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * out_row + cols[None, :], h, mask=mask)
        if A_RANK > 0:
            a = tl.load(
                a_ptr + ranks[None, :] * a_row + cols[:, None],
                mask=(ranks < A_RANK)[None, :] & (cols < num_cols)[:, None],
                other=0.0,
            )
            if DROPS_A:
                h_keeps = keeps_tile(seed_ptr, mask_row + rows, first_col, num_cols, A_SALT, THRESHOLD, BLOCK_N, True)
                h = tl.where(h_keeps, h, 0.0).to(out_ptr.dtype.element_ty)
            product = tl.dot(h, a, product, input_precision="ieee")
    if A_RANK > 0:
        if DROPS_A:
            product = product * SCALE
        to = partial_ptr + (piece * num_rows + rows)[:, None] * A_RANK + ranks[None, :]
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
    DROPS_A: tl.constexpr,
    A_SALT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    piece = tl.program_id(1).to(tl.int64)
    inside_T = rows < num_rows
    ranks = tl.arange(0, BLOCK_R)
    dtype = gate_up_ptr.dtype.element_ty
    up_b_ptr = b_ptr + num_cols * b_col
    gate_product = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    up_product = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for start in range(0, piece_cols, BLOCK_N):
        first_col = piece * piece_cols + start
        cols = first_col + tl.arange(0, BLOCK_N)
        inside_N = cols < num_cols
        mask = inside_T[:, None] & inside_N[None, :]
        at = gate_up_ptr + rows[:, None] * in_row + cols[None, :]
        dh_at = dh_ptr + rows[:, None] * dh_row + cols[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + num_cols, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_at, mask=mask, other=0.0).to(tl.float32)
        if A_RANK > 0:
            dh_update = update_tile(
                dlow_ptr, a_ptr, rows, cols, num_rows, num_cols, dlow_row, a_rank, a_col, 0, A_RANK, A_BLOCK
            )
            if DROPS_A:
                h_keeps = keeps_tile(seed_ptr, mask_row + rows, first_col, num_cols, A_SALT, THRESHOLD, BLOCK_N, True)
                dh_update = tl.where(h_keeps, dh_update * SCALE, 0.0)
            dh += dh_update
        if HAS_UPDATE:
            gate_update = update_tile(
                low_ptr, b_ptr, rows, cols, num_rows, num_cols, low_row, b_rank, b_col, GATE_FROM, UP_FROM, BLOCK_R
            )
            up_update = update_tile(
                low_ptr, up_b_ptr, rows, cols, num_rows, num_cols, low_row, b_rank, b_col, UP_FROM, UP_TO, BLOCK_R
            )
            gate += gate_update
            up += up_update
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        dgate = (dh * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype)
        dup = (dh * silu).to(dtype)
        tl.store(at, dgate, mask=mask)
        tl.store(at + num_cols, dup, mask=mask)
        tl.store(dh_at, (silu * up).to(dtype), mask=mask)
        if MULTIPLIES:
            b_at = cols[:, None] * b_col + ranks[None, :] * b_rank
            b_gate = tl.load(
                b_ptr + b_at + GATE_FROM * b_rank,
                mask=inside_N[:, None] & (ranks < UP_FROM - GATE_FROM)[None, :],
                other=0.0,
            )
            b_up = tl.load(
                up_b_ptr + b_at + UP_FROM * b_rank,
                mask=inside_N[:, None] & (ranks < UP_TO - UP_FROM)[None, :],
                other=0.0,
            )
            gate_product = tl.dot(dgate, b_gate, gate_product, input_precision="ieee")
            up_product = tl.dot(dup, b_up, up_product, input_precision="ieee")
    if MULTIPLIES:
        to = partial_ptr + (piece * num_rows + rows)[:, None] * UP_TO + ranks[None, :]
        tl.store(to + GATE_FROM, gate_product, mask=inside_T[:, None] & (ranks < UP_FROM - GATE_FROM)[None, :])
        tl.store(to + UP_FROM, up_product, mask=inside_T[:, None] & (ranks < UP_TO - UP_FROM)[None, :])


def _grid(num_rows: int, num_cols: int, block_rows: int) -> tuple[tuple[int, int], int]:
    """Return the grid and the columns of a piece, a whole number of tiles."""
    tiles, blocks = -(-num_cols // BLOCK_N), -(-num_rows // block_rows)
    piece_tiles = -(-tiles // max(PIECES, _NUM_PROGRAMS // blocks))
    return (blocks, -(-tiles // piece_tiles)), piece_tiles * BLOCK_N


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
        "BLOCK_T": block_t(max(a_rank, _widest(parts))),
        "BLOCK_N": BLOCK_N,
    }


def _drop_constants(a: Dropout | None) -> dict[str, float]:
    """Return what the kernels need to know of the mask over h."""
    return {
        "DROPS_A": a is not None,
        "A_SALT": 0 if a is None else a.salt,
        "THRESHOLD": 0 if a is None else a.threshold,
        "SCALE": 1.0 if a is None else a.scale,
    }


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


def _sum_pieces(partial_PTR: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Add up the pieces into ``[T, width]``, zero behind the ranks; ``width`` is a power of two."""
    num_pieces, num_rows, rank = partial_PTR.shape
    out_TR = torch.empty((num_rows, width), dtype=dtype, device=partial_PTR.device)
    _sum_pieces_kernel[(-(-num_rows // _SUM_BLOCK_T),)](
        partial_PTR, out_TR, num_rows, num_pieces, RANK=rank, WIDTH=width, BLOCK_T=_SUM_BLOCK_T
    )
    return out_TR


def swiglu_lora_triton(
    gate_up_TG: torch.Tensor,
    out_TF: torch.Tensor,
    update: Update | None,
    a_RF: torch.Tensor | None,
    a_rank: int,
    a_dropout: Dropout | None = None,
) -> torch.Tensor | None:
    """Do what `swiglu_lora` says."""
    num_rows, num_cols = out_TF.shape
    widest = max(a_rank, _widest(() if update is None else update.parts))
    (grid_rows, num_pieces), piece_cols = _grid(num_rows, num_cols, block_t(widest))
    low_TR, factor_RN = (gate_up_TG, gate_up_TG) if update is None else (update.low_TR, update.factor_RN)
    partial_PTR = gate_up_TG.new_empty((num_pieces, num_rows, a_rank), dtype=torch.float32)
    _swiglu_lora_forward_kernel[(grid_rows, num_pieces)](
        gate_up_TG,
        out_TF,
        low_TR,
        factor_RN,
        gate_up_TG if a_RF is None else a_RF,
        partial_PTR,
        gate_up_TG if a_dropout is None else a_dropout.seed,
        0 if a_dropout is None else a_dropout.first_row,
        num_rows,
        num_cols,
        piece_cols,
        gate_up_TG.stride(0),
        out_TF.stride(0),
        low_TR.stride(0),
        *factor_RN.stride(),
        0 if a_RF is None else a_RF.stride(0),
        HAS_UPDATE=update is not None,
        **_rank_constants(() if update is None else update.parts, a_rank),
        **_drop_constants(a_dropout),
        num_warps=NUM_WARPS if a_dropout is None else MASKED_NUM_WARPS,
        num_stages=num_stages(widest),
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
    """Do what `swiglu_lora_backward` says."""
    num_rows, num_cols = dh_TF.shape
    widest = max(0 if dh_update is None else dh_update.rank, _widest(parts))
    (grid_rows, num_pieces), piece_cols = _grid(num_rows, num_cols, block_t(widest))
    rank = parts[-1][1] if parts else 0
    low_TR = gate_up_TG if update is None else update.low_TR
    factor_RN = gate_up_TG if update is None else update.factor_RN
    b_RG = factor_RN if b_GR is None else b_GR.t()
    dlow_TR, a_RF = (dh_TF, dh_TF) if dh_update is None else (dh_update.low_TR, dh_update.factor_RN)
    partial_PTR = gate_up_TG.new_empty((num_pieces, num_rows, rank), dtype=torch.float32)
    (dh_dropout,) = dh_update.dropouts if dh_update is not None and dh_update.dropouts else (None,)
    _swiglu_lora_backward_kernel[(grid_rows, num_pieces)](
        dh_TF,
        gate_up_TG,
        low_TR,
        dlow_TR,
        b_RG,
        a_RF,
        partial_PTR,
        gate_up_TG if dh_dropout is None else dh_dropout.seed,
        0 if dh_dropout is None else dh_dropout.first_row,
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
        **_rank_constants(parts, 0 if dh_update is None else dh_update.rank),
        **_drop_constants(dh_dropout),
        num_warps=NUM_WARPS if dh_dropout is None else MASKED_NUM_WARPS,
        num_stages=num_stages(widest),
    )
    return None if b_GR is None else _sum_pieces(partial_PTR, b_GR.shape[1], dh_TF.dtype)
