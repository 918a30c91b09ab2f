"""Rows of a table in the host's memory, read by the GPU itself.

Page-locked memory of the host has an address that a GPU can read. A lookup reads only the rows it needs, so it moves
the bytes of its result over the bus: 67 MB for 8,192 tokens of an 8B model, one or two milliseconds. Nobody waits for
token ids to arrive on the host.

Shapes: T tokens, V rows of the table, D columns.
"""

from __future__ import annotations

import torch

from nemo_automodel.kernels.jit import jit, runs_triton, tl

_BLOCK = 1024


def gather_rows(ids_T: torch.Tensor, table_VD: torch.Tensor) -> torch.Tensor:
    """Return ``table[ids]``, ``[T, D]``, on the device of the ids. For a GPU the table is page-locked and dense."""
    out_TD = torch.empty((ids_T.numel(), table_VD.shape[1]), dtype=table_VD.dtype, device=ids_T.device)
    run = gather_rows_triton if runs_triton(ids_T) else gather_rows_reference
    run(ids_T, table_VD, out_TD)
    return out_TD


def gather_rows_reference(ids_T: torch.Tensor, table_VD: torch.Tensor, out_TD: torch.Tensor) -> None:
    """Do what `gather_rows` says in plain operations; on a GPU the host waits for the ids."""
    out_TD.copy_(table_VD[ids_T.to(table_VD.device)])


@jit
def _host_rows_kernel(ids_ptr, table_ptr, out_ptr, num_cols, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    row = tl.load(ids_ptr + token).to(tl.int64)
    tl.store(out_ptr + token * num_cols + cols, tl.load(table_ptr + row * num_cols + cols, mask=mask), mask=mask)


def gather_rows_triton(ids_T: torch.Tensor, table_VD: torch.Tensor, out_TD: torch.Tensor) -> None:
    """Do what `gather_rows` says, a piece of a row a program."""
    num_tokens, num_cols = out_TD.shape
    _host_rows_kernel[(num_tokens, -(-num_cols // _BLOCK))](
        ids_T.contiguous(), table_VD, out_TD, num_cols, BLOCK=_BLOCK, num_warps=4
    )
