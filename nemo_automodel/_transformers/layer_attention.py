"""What a fast decoder layer computes as attention, asked in every call: Transformers' masks, read by its own functions.

Masks are made by Transformers or by `packing_masks` for the implementation that the configuration names, so the
function registered under that name reads them. Where a mask is a tensor, the attention says so, and its layer can be
recorded (`components/fast/graphs.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from nemo_automodel._transformers.causal_attention import MASKLESS_SDPA
from nemo_automodel._transformers.packing_masks import PACKED_ATTENTION
from nemo_automodel.components.fast.attention import Attention, causal_attention
from nemo_automodel.kernels.attention import borders_as_mask, borders_of_mask, is_packed_mask

_ATTENTIONS = ("sdpa", MASKLESS_SDPA, PACKED_ATTENTION)
"""Implementations under which no mask means causal attention, and whose function computes from queries and a mask."""


def attention_for(
    module: nn.Module, mask: torch.Tensor | None, causal: Attention = causal_attention
) -> Attention | None:
    """Return what a layer with the attention ``module`` computes under ``mask``, None for Transformers' own way.

    ``causal`` computes where there is no mask.
    """
    name: str = module.config._attn_implementation  # type: ignore[union-attr, assignment]
    projection: Any = module.q_proj
    if name not in _ATTENTIONS or torch.is_autocast_enabled(projection.weight.device.type):
        return None
    if mask is None:
        return causal
    function = AttentionInterface()[name]  # type: ignore[no-untyped-call]

    kind = _UnderTensor if isinstance(mask, torch.Tensor) else _UnderMask
    return kind(function, module, mask)


@dataclass(frozen=True)
class _UnderMask:
    """Attention under a mask by a function that is registered with Transformers."""

    function: Callable[..., Any]
    module: nn.Module
    mask: Any

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        out_BSHE: torch.Tensor = self.function(self.module, q, k, v, self.mask, dropout=0.0, scaling=scale)[0]
        return out_BSHE.transpose(1, 2)


@dataclass(frozen=True)
class _UnderTensor(_UnderMask):
    """The same where the mask is a tensor: it can be recorded (`components/fast/graphs.py`)."""

    mask: torch.Tensor

    @property
    def _has_borders(self) -> bool:
        return is_packed_mask(self.mask)

    @property
    def key(self) -> tuple[Any, ...]:
        """What calls must have in common besides tensors."""
        return (self.function, self.mask.shape)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What is read beside queries, keys and values."""
        return (borders_of_mask(self.mask) if self._has_borders else self.mask,)

    def over(self, tensors: tuple[torch.Tensor, ...]) -> _UnderTensor:
        """Return the same attention that reads ``tensors``."""
        (mask,) = tensors
        return replace(self, mask=borders_as_mask(mask, self.mask.shape[2]) if self._has_borders else mask)
