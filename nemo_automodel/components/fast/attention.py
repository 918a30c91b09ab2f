"""Attention of a fast layer: any differentiable function, called once, with autograd's memory of it in our hands.

`AttentionGraph` keeps the graph of one call. Queries, keys and values, most of what such a graph holds, can be taken
out of it and put back before the way back: whatever autograd has saved from their memory is noted by its place in it
and found again in the matrices that are made anew. The output and the log-sum-exp stay, so attention itself is not
computed twice. What a function copied from them first, such as keys repeated for their queries, stays as well.

Shapes: B rows, S positions, H query heads, K key heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_automodel.shared.determinism import is_deterministic

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(q ``[B, H, S, E]``, k and v ``[B, K, S, E]``, scale) → ``[B, H, S, E]``; differentiable by autograd."""

ChooseAttention = Callable[[nn.Module, torch.Tensor | None], Attention | None]
"""(a layer's attention module, its mask) → what to compute; None where Hugging Face's own modules must."""

# cuDNN is 1.7 times as fast as the next on Hopper (543 against 304 TFLOP/s forward, measured on an H100)
_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend to all earlier positions; keys and values are not repeated for their group of queries."""
    return _sdpa(q, k, v, scale, None)


def causal_attention_by(name: str, only: bool = False) -> Attention:
    """Return `causal_attention` with the SDPA backend ``name`` first, or with no other.

    ``name`` is ``cudnn``, ``flash``, ``efficient`` or ``math``. Where the same bits are wanted every time, cuDNN is
    none of the others.
    """
    excluded = {name, "cudnn"} if is_deterministic() else {name}
    others = () if only else (backend for other, backend in _BACKENDS.items() if other not in excluded)
    return CausalAttention((_BACKENDS[name], *others))


@dataclass(frozen=True)
class CausalAttention:
    """`causal_attention` by given backends, the first that can. What it reads beside its arguments: nothing."""

    key: tuple[SDPBackend, ...]
    tensors: tuple[torch.Tensor, ...] = ()

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Return ``[B, H, S, E]``."""
        return _sdpa(q, k, v, scale, None, self.key)

    def over(self, tensors: tuple[torch.Tensor, ...]) -> CausalAttention:
        """Return this: it reads no tensors of its own; see `graphs.GraphAttention`."""
        return self


def masked_attention(mask: torch.Tensor) -> Attention:
    """Return attention under a mask ``[B, 1, S, S]``, bool or additive."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if q.is_cuda:  # the backends that take a mask want as many keys as queries
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return _sdpa(q, k, v, scale, mask)

    return attend


def attention_by_mask(module: nn.Module, mask: torch.Tensor | None) -> Attention:
    """Return causal attention without a mask, else attention under it."""
    return causal_attention if mask is None else masked_attention(mask)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    backends: Sequence[SDPBackend] = tuple(_BACKENDS.values()),
) -> torch.Tensor:
    with sdpa_kernel(list(backends), set_priority=True):
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


class AttentionGraph:
    """One call of attention. With ``keeps`` `grads` can follow; with ``forgets`` `put_back` must come before it.

    ``matrices`` are the memory that the heads (q, k, v) are views of, each the whole of its storage.
    """

    def __init__(
        self,
        attention: Attention,
        heads: Sequence[torch.Tensor],
        scale: float,
        keeps: bool,
        forgets: Sequence[torch.Tensor] = (),
    ) -> None:
        self.heads = [head.detach().requires_grad_(keeps) for head in heads]
        # not `self`: autograd's memory would hold this object and this object autograd's memory, for ever
        self._places = _Places(forgets) if keeps and forgets else None
        hooks = nullcontext() if self._places is None else saved_tensors_hooks(self._places.note, self._places.find)
        with torch.set_grad_enabled(keeps), hooks:
            self.out_BHSE = attention(self.heads[0], self.heads[1], self.heads[2], scale)
        if self._places is not None:
            for head in self.heads:  # they stay the inputs of the graph, without memory
                head.data = head.new_empty(0)

    @property
    def lacks_heads(self) -> bool:
        """Whether `put_back` must come before `grads`."""
        return self._places is not None and not self._places.matrices

    def put_back(self, matrices: Sequence[torch.Tensor]) -> None:
        """Give back what was forgotten, made anew: the same sizes and numbers in the same order."""
        assert self._places is not None
        self._places.matrices = list(matrices)

    def grads(self, grad_BHSE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients of q, k and v. Once; nothing is kept."""
        heads, out_BHSE = self.heads, self.out_BHSE
        del self.heads, self.out_BHSE
        grads = torch.autograd.grad(out_BHSE, heads, grad_BHSE)
        self._places = None
        return grads


class _Places:
    """Where in some matrices tensors lie."""

    def __init__(self, matrices: Sequence[torch.Tensor]) -> None:
        self.matrices: list[torch.Tensor] = []
        self._addresses = [matrix.untyped_storage().data_ptr() for matrix in matrices]

    def note(self, tensor: torch.Tensor) -> Any:
        """Return the place of a tensor, or the tensor where it lies elsewhere."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self._addresses:
            return tensor.detach()  # an output would hold its graph, which holds what is noted here
        return self._addresses.index(address), tensor.size(), tensor.stride(), tensor.storage_offset()

    def find(self, noted: Any) -> torch.Tensor:
        """Return the tensor at a place."""
        if isinstance(noted, torch.Tensor):
            return noted
        number, size, stride, offset = noted
        found: torch.Tensor = self.matrices[number].as_strided(size, stride, offset)
        return found
