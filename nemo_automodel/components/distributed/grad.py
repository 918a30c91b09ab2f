"""The norm of the gradients, and clipping to it, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most ``max_norm``; ``None`` only measures.

    Returns the norm before clipping: a float32 scalar on the gradients' device, accumulated in float32 whatever the
    gradients' dtype (a sum of squares in bfloat16 has three digits). A non-finite norm makes the gradients useless; the
    caller reads it together with the loss, its one device sync, and must not apply them.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in with_grad if p.grad is not None]
    assert grads, "a backward pass came first"
    norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
    total_norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, total_norm)
    return total_norm
