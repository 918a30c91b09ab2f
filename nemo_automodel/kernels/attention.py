"""Attention over packed rows: which positions may see which, and the kernels that compute with it.

A packed row holds documents one after the other and padding at its end. A position may attend to positions of its own
document that are not after it; the padding counts as one more document, so that every position may attend to at least
one and softmax never sees an empty row. A document may be a prefix followed by branches: a branch sees the prefix and
itself, never another branch, and its positions go on where the prefix ends. Windows and chunks therefore count
positions, not places in the row.

One rule (`attention_rule`) is read in two ways: as a dense mask, S × S entries a row, and by FlexAttention, which skips
the blocks that `block_mask` leaves out. The variable-length kernel needs the borders of the documents alone, knows no
windows and no branches, and computes in bf16 or fp16.

Shapes: B rows, S positions of a row, C documents of a row (filled up with negative lengths), H query heads, K key and
value heads, E head dimension, T = B·S.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

Rule = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes indices of row, head, query and key that broadcast together; returns where attention is allowed."""

BLOCK = 128
"""Positions of a block of FlexAttention, for queries and for keys."""
_SEGMENTS_AT_ONCE = 32
_MAX_RECOMPILES = 64
"""Shapes × kinds of layers × (training, evaluation) that FlexAttention is compiled for; PyTorch gives up at 8."""


@dataclass(frozen=True)
class PackedLayout:
    """What every position of a batch of packed rows is. Integers ``[B, S]``, on one device."""

    documents_BS: torch.Tensor
    """Number of the document, counted in the row; the padding has a number of its own."""
    positions_BS: torch.Tensor
    """Position in the document, as the model is told."""
    branches_BS: torch.Tensor | None = None
    """0 in a prefix and in documents without branches, n in the n-th branch; ``None``: there are none."""

    def to(self, device: torch.device) -> PackedLayout:
        """Return the layout on ``device``, copied without waiting."""
        branches = self.branches_BS
        return PackedLayout(
            self.documents_BS.to(device, non_blocking=True),
            self.positions_BS.to(device, non_blocking=True),
            None if branches is None else branches.to(device, non_blocking=True),
        )


def document_numbers(seq_lens_BC: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Return the document number of every position, int64 ``[B, S]``; it never falls along a row.

    ``seq_lens_BC`` int64 holds the lengths of the documents; negative entries are filling.
    """
    ends_BC = seq_lens_BC.clamp(min=0).cumsum(dim=1)
    places_BS = torch.arange(seq_len, device=ends_BC.device).expand(ends_BC.shape[0], -1).contiguous()
    return torch.searchsorted(ends_BC, places_BS, right=True)


def attention_rule(layout: PackedLayout, *, window: int | None = None, chunk: int | None = None) -> Rule:
    """Return the rule of the rows of ``layout``; it serves as a ``mask_mod`` of FlexAttention.

    ``window``: only the last ``window`` positions, the query's own included (sliding attention). ``chunk``: only
    positions of the same block of ``chunk`` positions, counted from the document's start (chunked attention).
    """
    documents_BS, positions_BS, branches_BS = layout.documents_BS, layout.positions_BS, layout.branches_BS

    def allows(row: torch.Tensor, head: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        allowed = (query >= key) & (documents_BS[row, query] == documents_BS[row, key])
        if branches_BS is not None:
            branch = branches_BS[row, key]
            allowed = allowed & ((branch == 0) | (branch == branches_BS[row, query]))
        if window is not None:
            allowed = allowed & (positions_BS[row, query] - positions_BS[row, key] < window)
        if chunk is not None:
            allowed = allowed & (positions_BS[row, query] // chunk == positions_BS[row, key] // chunk)
        return allowed

    return allows


def packed_mask(layout: PackedLayout, *, window: int | None = None, chunk: int | None = None) -> torch.Tensor:
    """Return the bool mask ``[B, 1, S, S]`` (query, key), True where `attention_rule` allows attention."""
    num_rows, seq_len = layout.documents_BS.shape
    device = layout.documents_BS.device
    row = torch.arange(num_rows, device=device).view(-1, 1, 1)
    place = torch.arange(seq_len, device=device)
    allows = attention_rule(layout, window=window, chunk=chunk)
    return allows(row, None, place.view(1, -1, 1), place.view(1, 1, -1)).unsqueeze(1)


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a bool mask into numbers to add to attention scores: 0 where True, the lowest number of ``dtype`` else."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


# --- FlexAttention ---------------------------------------------------------------------------------------------------


def block_mask(layout: PackedLayout, *, window: int | None = None, chunk: int | None = None) -> BlockMask:
    """Return what FlexAttention computes for the rows of ``layout``, without a wait for the device.

    A block of keys is left out where no pair of it can be allowed, and taken without asking the rule where all are.
    Both follow from the documents at the ends of the blocks, because document numbers never fall along a row; so
    nothing of the size S × S is made.
    """
    seq_len = layout.documents_BS.shape[1]
    documents_BN = _blocks(layout.documents_BS)
    first_BN, last_BN = documents_BN[..., 0], documents_BN[..., -1]
    index_N = torch.arange(first_BN.shape[1], device=first_BN.device)
    behind_NN = index_N.unsqueeze(1) - index_N.unsqueeze(0)  # blocks between a query block and a key block before it
    touched_BNN = (behind_NN >= 0) & (last_BN.unsqueeze(1) >= first_BN.unsqueeze(2))
    full_BNN = (behind_NN > 0) & (first_BN.unsqueeze(1) == last_BN.unsqueeze(2))
    if layout.branches_BS is not None:
        is_prefix_BN = (_blocks(layout.branches_BS) == 0).all(dim=-1)
        full_BNN = full_BNN & is_prefix_BN.unsqueeze(1)
    if window is not None:
        # positions lie at most as far apart as places, and in a document without branches exactly as far
        full_BNN = full_BNN & ((behind_NN + 1) * BLOCK <= window)
        if layout.branches_BS is None:
            touched_BNN = touched_BNN & ((behind_NN - 1) * BLOCK + 1 < window)
    if chunk is not None:
        full_BNN = torch.zeros_like(full_BNN)
    return BlockMask.from_kv_blocks(
        *_listed(touched_BNN & ~full_BNN),
        *_listed(full_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=attention_rule(layout, window=window, chunk=chunk),
        seq_lengths=(seq_len, seq_len),
    )


def _blocks(values_BS: torch.Tensor) -> torch.Tensor:
    """Return ``[B, N, BLOCK]``; what is missing in the last block is filled with the last value."""
    missing = -values_BS.shape[1] % BLOCK
    if missing:
        values_BS = torch.cat([values_BS, values_BS[:, -1:].expand(-1, missing)], dim=1)
    return values_BS.reshape(values_BS.shape[0], -1, BLOCK)


def _listed(chosen_BNN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of chosen key blocks of every query block and their indices, chosen ones first."""
    order = chosen_BNN.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen_BNN.sum(dim=-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(torch_flex_attention, dynamic=False)


def flex_attention(
    q_BHSE: torch.Tensor, k_BKSE: torch.Tensor, v_BKSE: torch.Tensor, mask: BlockMask, scale: float | None = None
) -> torch.Tensor:
    """Return attention ``[B, H, S, E]`` by FlexAttention, compiled on a GPU for every new shape."""
    has_groups = q_BHSE.shape[1] != k_BKSE.shape[1]
    kwargs: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": has_groups}
    if q_BHSE.device.type == "cpu" or torch.compiler.is_compiling():
        return torch_flex_attention(q_BHSE, k_BKSE, v_BKSE, **kwargs)  # type: ignore[no-any-return]
    with torch._dynamo.config.patch(recompile_limit=_MAX_RECOMPILES):
        return _compiled_flex_attention()(q_BHSE, k_BKSE, v_BKSE, **kwargs)  # type: ignore[no-any-return]


# --- variable-length attention ---------------------------------------------------------------------------------------


def document_borders(seq_lens_BC: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, int]:
    """Return the borders of all documents of a batch in its T positions, and a bound on the longest document.

    The borders are int32 ``[N + 1]``, from 0 to T, each padding a document of its own. Both are rounded up (empty
    documents at the end, a power of two), so that few shapes occur. ``seq_lens_BC`` lies on the CPU.
    """
    lengths_BC = seq_lens_BC.clamp(min=0)
    padding_B1 = seq_len - lengths_BC.sum(dim=1, keepdim=True)
    lengths_N = torch.cat([lengths_BC, padding_B1], dim=1).flatten()
    lengths_N = lengths_N[lengths_N > 0]
    longest = max(BLOCK, 1 << (int(lengths_N.max()) - 1).bit_length())
    empty = -len(lengths_N) % _SEGMENTS_AT_ONCE
    return torch.nn.functional.pad(lengths_N, (1, empty)).cumsum(dim=0, dtype=torch.int32), min(longest, seq_len)


@cache
def _varlen_arguments() -> frozenset[str]:
    """Return the arguments of PyTorch's variable-length attention; empty where it has none (before torch 2.10)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def has_varlen_attention() -> bool:
    """Tell whether this PyTorch has a variable-length attention that takes a scale (torch 2.11 and later)."""
    return {"scale", "window_size"} <= _varlen_arguments()


def varlen_attention(
    q_BHSE: torch.Tensor,
    k_BKSE: torch.Tensor,
    v_BKSE: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Return causal attention inside each document ``[B, S, H, E]``; ``document_borders`` makes the last two."""
    from torch.nn.attention.varlen import varlen_attn

    num_rows, num_heads, seq_len, _ = q_BHSE.shape
    kwargs: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if num_heads != k_BKSE.shape[1] and "enable_gqa" in _varlen_arguments():
        kwargs["enable_gqa"] = True  # before there was this argument, the kernel shared keys and values unasked
    q_THE, k_TKE, v_TKE = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHSE, k_BKSE, v_BKSE))
    out_THE: Any = varlen_attn(q_THE, k_TKE, v_TKE, borders, borders, longest, longest, **kwargs)
    return out_THE.reshape(num_rows, seq_len, num_heads, -1)  # type: ignore[no-any-return]


# --- either ----------------------------------------------------------------------------------------------------------


def is_packed_mask(mask: object) -> bool:
    """Tell whether a mask is one that `packed_attention` reads: a block mask, or borders in the form of a mask."""
    return isinstance(mask, BlockMask) or (isinstance(mask, torch.Tensor) and mask.dtype == torch.int32)


def borders_as_mask(borders: torch.Tensor, longest: int) -> torch.Tensor:
    """Return ``[1, 1, longest, N + 1]``, of no more memory than ``borders``: it travels wherever a mask does."""
    return borders.expand(1, 1, longest, -1)


def borders_of_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return the borders of `borders_as_mask`."""
    return mask[0, 0, 0]


def packed_attention(
    q_BHSE: torch.Tensor,
    k_BKSE: torch.Tensor,
    v_BKSE: torch.Tensor,
    mask: torch.Tensor | BlockMask,
    scale: float | None = None,
) -> torch.Tensor:
    """Return attention ``[B, S, H, E]`` under a mask that `is_packed_mask` knows, in the dtype of the values."""
    # rotary embeddings in float32 leave queries and keys wider than values
    q_BHSE, k_BKSE = q_BHSE.to(v_BKSE.dtype), k_BKSE.to(v_BKSE.dtype)
    if isinstance(mask, BlockMask):
        return flex_attention(q_BHSE, k_BKSE, v_BKSE, mask, scale).transpose(1, 2).contiguous()
    return varlen_attention(q_BHSE, k_BKSE, v_BKSE, borders_of_mask(mask), mask.shape[2], scale)
