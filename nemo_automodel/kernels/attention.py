"""Masks that keep the documents of a packed row apart.

A packed row holds documents one after the other and padding at its end. A position may attend to positions of its own
document that are not after it; the padding counts as one more document, so that every row of the mask has at least one
allowed position and softmax never sees an empty row.

Shapes: B rows, S positions of a row, C documents of a row (filled up with negative lengths).
"""

from __future__ import annotations

import torch


def document_layout(seq_lens_BC: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the document number and the place in its document of every position, both int64 ``[B, S]``.

    ``seq_lens_BC`` int64 holds the lengths of the documents; negative entries are filling. The padding at the end of a
    row has a number of its own.
    """
    ends_BC = seq_lens_BC.clamp(min=0).cumsum(dim=1)
    positions_BS = torch.arange(seq_len, device=ends_BC.device).expand(ends_BC.shape[0], -1).contiguous()
    documents_BS = torch.searchsorted(ends_BC, positions_BS, right=True)
    starts_BD = torch.nn.functional.pad(ends_BC, (1, 0))
    return documents_BS, positions_BS - starts_BD.gather(1, documents_BS)


def packed_mask(
    documents_BS: torch.Tensor, places_BS: torch.Tensor, *, window: int | None = None, chunk: int | None = None
) -> torch.Tensor:
    """Return the bool mask ``[B, 1, S, S]`` (query, key), True where attention is allowed.

    ``window``: only the last ``window`` positions, the query's own included (sliding attention). ``chunk``: only
    positions of the same block of ``chunk`` positions, counted from the document's start (chunked attention).
    """
    position_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    distance_SS = position_S.unsqueeze(1) - position_S.unsqueeze(0)
    allowed_SS = distance_SS >= 0
    if window is not None:
        allowed_SS &= distance_SS < window
    mask_BSS = (documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)) & allowed_SS
    if chunk is not None:
        blocks_BS = places_BS // chunk
        mask_BSS &= blocks_BS.unsqueeze(2) == blocks_BS.unsqueeze(1)
    return mask_BSS.unsqueeze(1)


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a bool mask into numbers to add to attention scores: 0 where True, the lowest number of ``dtype`` else."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
