"""Gradients summed over processes, their norm, and clipping to it, without waiting for the device.

Sums are made once a step, after the last micro-batch, however many there were. Gradients of a group of parameters are
copied into one buffer in fp32, added up there and copied back, so 16-bit gradients are rounded once more, not oftener.
The sum is the same in every process, bit for bit, hence so are norm and update, and weights never drift apart. The
price: the sums are not made while the last backward pass still runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from nemo_automodel.components.distributed.ranks import Ranks

_BUCKET_MB = 64


def sum_over_ranks(
    parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor, ranks: Ranks, bucket_mb: int | None = None
) -> torch.Tensor:
    """Replace all gradients by their sums over processes, and return the sum of ``loss``, a float32 device scalar.

    A parameter that has a gradient in one process has one in all afterwards, and one that has none anywhere keeps none,
    so the optimizer leaves it alone as it does in one process. ``bucket_mb`` is the size of a buffer.
    """
    if not ranks.are_several:
        return loss
    missing = [number for number, p in enumerate(parameters) if p.grad is None]
    for number in missing:
        parameters[number].grad = torch.zeros_like(parameters[number])
    present = torch.ones(len(parameters), dtype=torch.float32, device=loss.device)
    if missing:
        present[missing] = 0
    head = torch.cat([loss.detach().reshape(1).float(), present])
    ranks.sum_in_place(head)
    for pieces in _buckets(parameters, (bucket_mb or _BUCKET_MB) * 2**20 // 4):
        flat = torch.cat([piece.reshape(-1).float() for piece in pieces])
        ranks.sum_in_place(flat)
        sums = torch.split(flat, [piece.numel() for piece in pieces])
        torch._foreach_copy_(pieces, [total.view_as(piece) for total, piece in zip(sums, pieces, strict=True)])
    if missing:
        is_missing_everywhere = (head[1:] == 0).tolist()
        for number in missing:
            if is_missing_everywhere[number]:
                parameters[number].grad = None
    return head[0]


def copy_from_first(parameters: Sequence[torch.Tensor], ranks: Ranks) -> None:
    """Give every process the first one's values."""
    for parameter in parameters if ranks.are_several else ():
        ranks.copy_from(parameter, 0)


def _buckets(parameters: Sequence[torch.nn.Parameter], most: int) -> Iterator[list[torch.Tensor]]:
    """Yield the gradients in groups of at most ``most`` numbers, large ones cut: a buffer must not be the largest."""
    group: list[torch.Tensor] = []
    num_numbers = 0
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        for piece in torch.split(grad.view(-1), most) if grad.is_contiguous() else (grad,):
            if group and num_numbers + piece.numel() > most:
                yield group
                group, num_numbers = [], 0
            group.append(piece)
            num_numbers += piece.numel()
    if group:
        yield group


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
