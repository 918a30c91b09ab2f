"""Hundreds of small matrices scaled, converted and copied at once, each to a place in some larger buffer.

An adapter is copied into the packed weights after every optimizer step. There are two matrices a linear layer, and
PyTorch's operations over lists of tensors take a launch for each where a target lies in a wider buffer, 420 in a model
of 30 layers, for a few megabytes. `CopyMany` keeps a table of the addresses on the device and takes one. The price is
that the table must be made again when a matrix moves, which the caller sees and tells by giving other `Copy` objects.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from nemo_automodel.kernels.jit import jit, runs_triton, tl

BLOCK = 2048
"""Elements that a program copies."""

Copy = tuple[torch.Tensor, torch.Tensor, float]
"""(target, source, scale): both ``[N, M]`` with dense rows, the target's rows may lie in a wider buffer."""


class CopyMany:
    """Copies lists of matrices; knows the last list again by its objects."""

    def __init__(self) -> None:
        self._last: list[Copy] = []
        self._table: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, copies: Sequence[Copy]) -> None:
        """Write ``scale · source`` to every target, rounded once."""
        if len(copies) != len(self._last) or not all(map(operator.is_, copies, self._last)):
            self._last = list(copies)
            self._table = copy_table(copies) if _is_one_kind(copies) else None
        if self._table is None:
            copy_many_reference(copies)
        else:
            copy_many_triton(copies, self._table)


def _is_one_kind(copies: Sequence[Copy]) -> bool:
    """Tell whether one launch of the kernel can do it."""
    first, source, _ = copies[0]
    kinds = {(t.dtype, s.dtype, t.device, s.device) for t, s, _ in copies}
    has_dense_rows = all(t.stride(1) == s.stride(1) == 1 or t.shape[1] == 1 for t, s, _ in copies)
    return len(kinds) == 1 and has_dense_rows and runs_triton(first) and first.device == source.device


def copy_many_reference(copies: Sequence[Copy]) -> None:
    """Do what `CopyMany` says with operations over lists of tensors."""
    targets, sources, scales = (list(column) for column in zip(*copies, strict=True))
    torch._foreach_copy_(targets, torch._foreach_mul(sources, scales))


def copy_table(copies: Sequence[Copy]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, on the device of the matrices, what the kernel reads.

    int64 ``[C, 6]``: addresses of source and target, rows, columns, row strides of source and target; int32
    ``[P, 2]``: for each program its matrix and first element; fp32 ``[C]``: scales.
    """
    entries, tiles = [], []
    for number, (target, source, _) in enumerate(copies):
        rows, cols = source.shape
        entries.append([source.data_ptr(), target.data_ptr(), rows, cols, source.stride(0), target.stride(0)])
        tiles.append(torch.tensor([[number, start] for start in range(0, rows * cols, BLOCK)], dtype=torch.int32))
    device = copies[0][0].device
    table = torch.tensor(entries, dtype=torch.int64).to(device)
    scales = torch.tensor([scale for _, _, scale in copies], dtype=torch.float32).to(device)
    return table, torch.cat(tiles).to(device), scales


@jit
def _copy_many_kernel(table_ptr, tiles_ptr, scales_ptr, like_source_ptr, like_target_ptr, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    matrix = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    elements = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK)
    entry = table_ptr + matrix * 6
    source = tl.load(entry).to(like_source_ptr.dtype)
    target = tl.load(entry + 1).to(like_target_ptr.dtype)
    num_rows = tl.load(entry + 2)
    num_cols = tl.load(entry + 3)
    row = elements // num_cols
    col = elements - row * num_cols
    mask = row < num_rows
    value = tl.load(source + row * tl.load(entry + 4) + col, mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(scales_ptr + matrix)
    tl.store(target + row * tl.load(entry + 5) + col, value.to(like_target_ptr.dtype.element_ty), mask=mask)


def copy_many_triton(copies: Sequence[Copy], table: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Do what `CopyMany` says; ``table`` is `copy_table` of the same copies, which keep the memory in use."""
    addresses, tiles, scales = table
    _copy_many_kernel[(tiles.shape[0],)](addresses, tiles, scales, copies[0][1], copies[0][0], BLOCK=BLOCK, num_warps=4)
