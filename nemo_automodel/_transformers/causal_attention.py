"""Causal attention without a mask, for rows whose padding stands at the end.

On a GPU, PyTorch's fused kernels share key and value heads among query heads in half precision only; asked to do so in
fp32, SDPA silently computes the whole matrix of scores. So there the heads are repeated first, at the cost of their
memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

MASKLESS_SDPA = "maskless_sdpa"
"""SDPA under a name for which Transformers makes no mask: attention is causal and nothing else."""


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention ``[B, S, H, E]`` in the form that Transformers' models ask for.

    ``query`` ``[B, H, S, E]``, ``key`` and ``value`` ``[B, K, S, E]`` with H a multiple of K. There is no mask to give.
    """
    assert attention_mask is None, "rows that need a mask take another road"
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1 and query.is_cuda and query.dtype == torch.float32:
        key, value = (t.repeat_interleave(num_groups, dim=1) for t in (key, value))
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(MASKLESS_SDPA, causal_attention)
