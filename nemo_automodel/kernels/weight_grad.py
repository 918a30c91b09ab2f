"""Gradients of weights, summed where they lie: a matrix product adds to a parameter's ``grad`` in its accumulator.

Automatic differentiation makes the gradient of every weight anew and then adds it to ``grad``: for an 8B model a second
pass over 48 GB and the memory of the largest gradient, in every micro-batch. Here the product writes to ``grad`` itself
(``grad ← grad + dyᵀ·x``, summed in fp32 and rounded once), and layers that share an input share one product: their
gradients are rows of one matrix, as their weights are.

Nothing is remembered beside ``grad``. Gradients that lie one behind the other in memory are one matrix; those that are
gone (``zero_grad``) get memory anew, together; any others are collected into such a matrix first. So memory is free
between a step and the next backward pass, and whatever else reads or scales gradients finds ordinary ones. Only what
hooks into automatic differentiation itself does not see them, as wrappers that average gradients over processes do.

Shapes: T tokens, K inputs, N outputs of all weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from nemo_automodel.shared.determinism import is_deterministic

_sums_afterwards = False


def is_alone() -> bool:
    """Tell whether this is the only process of a run: of several, somebody averages gradients as they are made."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def sum_afterwards() -> None:
    """Promise that whoever trains with several processes adds up their gradients after the backward pass."""
    global _sums_afterwards
    _sums_afterwards = True


def may_write_grads() -> bool:
    """Tell whether nobody waits for gradients as they are made, so that they may be written where they lie."""
    return _sums_afterwards or is_alone()


def add_product_grad(weights: Sequence[torch.Tensor], dy_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
    """Add ``dyᵀ·x`` to the gradients of ``weights``, ``[N_i, K]`` each, whose outputs lie side by side in ``dy_TN``.

    Rows of both may lie in wider buffers. No other gradient may be on its way to these weights.
    """
    grad_NK, is_new = packed_grad(weights)
    if is_new and is_deterministic():
        # the library may compute a sum otherwise that begins with nothing: the first product is added as all others are
        grad_NK.zero_()
        is_new = False
    if is_new:
        torch.mm(dy_TN.t(), x_TK, out=grad_NK)
    else:
        grad_NK.addmm_(dy_TN.t(), x_TK)


def add_grad(weights: Sequence[torch.Tensor], grad_N: torch.Tensor) -> None:
    """Add a gradient, of any float dtype, to those of ``weights``, whose gradients lie one behind the other in it."""
    packed_N, is_new = packed_grad(weights)
    if is_new:
        packed_N.copy_(grad_N)
    else:
        packed_N.add_(grad_N)


def tell_complete(weights: Sequence[torch.Tensor]) -> None:
    """Run the hooks that wait for gradients to be complete, as automatic differentiation does after adding to one."""
    for weight in weights:
        for hook in list((weight._post_accumulate_grad_hooks or {}).values()):
            hook(weight)


def packed_grad(weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """Return the gradients of ``weights`` as rows of one tensor, and whether there were none: then it is not filled."""
    grads = [weight.grad for weight in weights]
    present = [grad for grad in grads if grad is not None]
    first = weights[0]
    shape = (sum(weight.shape[0] for weight in weights), *first.shape[1:])
    if len(present) == len(grads) and _lie_in_order(present):
        return present[0].as_strided(shape, present[0].stride()), False
    packed = torch.empty(shape, dtype=first.dtype, device=first.device)
    row = 0
    for weight, grad in zip(weights, grads, strict=True):
        part = packed[row : row + weight.shape[0]]
        if present:
            part.zero_() if grad is None else part.copy_(grad)
        weight.grad = part
        row += weight.shape[0]
    return packed, not present


def _lie_in_order(grads: Sequence[torch.Tensor]) -> bool:
    storage, offset = grads[0].untyped_storage(), grads[0].storage_offset()
    for grad in grads:
        is_next = grad.untyped_storage().data_ptr() == storage.data_ptr() and grad.storage_offset() == offset
        if not (is_next and grad.is_contiguous()):
            return False
        offset += grad.numel()
    return True
