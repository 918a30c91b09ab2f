"""Cross-entropy of single tokens, computed over a few rows at a time.

The textbook form turns the whole logits matrix into fp32, keeps its log-softmax for the backward pass and makes a third
matrix for the gradient: at a vocabulary of 128k and 8k tokens every one of them is 4 GiB. Here the forward pass keeps
one number per row, the log-sum-exp; the backward pass makes the softmax again from it, a few rows at a time, straight
into the gradient. Arithmetic is fp32 in both passes, memory beyond the logits is their gradient and one chunk.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_automodel.shared.errors import UserError

CHUNK_ELEMENTS = 2**24
"""Logits that are held in fp32 at once when no chunk length is asked for: 64 MiB."""


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor, ignore_index: int, chunk_rows: int, upcast: bool
    ) -> torch.Tensor:
        math_dtype = torch.promote_types(torch.float32, logits_NV.dtype) if upcast else logits_NV.dtype
        is_label_N = labels_N != ignore_index
        targets_N = labels_N.where(is_label_N, 0)
        lse_N = logits_NV.new_empty(labels_N.shape, dtype=math_dtype)
        for rows in row_chunks(labels_N.numel(), chunk_rows):
            lse_N[rows] = torch.logsumexp(logits_NV[rows].to(math_dtype), dim=-1)
        target_logits_N = logits_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1).to(math_dtype)
        ctx.save_for_backward(logits_NV, targets_N, is_label_N, lse_N)
        ctx.chunk_rows, ctx.math_dtype = chunk_rows, math_dtype
        # where(), not a product: an ignored row may hold inf or NaN
        return (lse_N - target_logits_N).where(is_label_N, 0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_NV, targets_N, is_label_N, lse_N = ctx.saved_tensors
        scale_N = grad_outputs[0].to(ctx.math_dtype).where(is_label_N, 0)
        grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        for rows in row_chunks(targets_N.numel(), ctx.chunk_rows):
            grad_MV = softmax_gradient(logits_NV[rows].to(ctx.math_dtype), lse_N[rows], targets_N[rows])
            grad_MV.mul_(scale_N[rows].unsqueeze(1))
            grad_NV[rows] = grad_MV.masked_fill_(~is_label_N[rows].unsqueeze(1), 0)
        return grad_NV, None, None, None, None


def softmax_gradient(logits_MV: torch.Tensor, lse_M: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
    """Return d(lse - logit of the target)/d(logits): softmax minus one-hot."""
    grad_MV = (logits_MV - lse_M.unsqueeze(1)).exp_()
    minus_one = grad_MV.new_full((targets_M.numel(), 1), -1.0)
    return grad_MV.scatter_add_(1, targets_M.unsqueeze(1), minus_one)


def row_chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    """Return slices that cover ``num_rows`` rows, ``chunk_rows`` at a time."""
    return [slice(start, start + chunk_rows) for start in range(0, num_rows, chunk_rows)]


def default_chunk_rows(vocab_size: int) -> int:
    """Return how many rows of ``vocab_size`` logits make one chunk."""
    return max(1, CHUNK_ELEMENTS // vocab_size)


def token_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int,
    chunk_rows: int | None = None,
    fp32_upcast: bool = True,
) -> torch.Tensor:
    """Return the cross-entropy of every position, 0 where the label is ``ignore_index``.

    ``logits`` ``[..., V]`` of any float dtype, ``labels`` ``[...]`` int64; the result is ``[...]``, fp32 (the dtype of
    the logits without ``fp32_upcast``). Neither input is modified; the gradient has the dtype of the logits.

    Raises:
        UserError: the shapes do not belong together.
    """
    if logits.shape[:-1] != labels.shape:
        raise UserError(
            f"The loss got logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}, but they "
            "must agree in all dimensions before the vocabulary. Pass the logits and labels of the same positions."
        )
    vocab_size = logits.shape[-1]
    rows = chunk_rows or default_chunk_rows(vocab_size)
    losses: torch.Tensor = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, vocab_size), labels.reshape(-1), ignore_index, rows, fp32_upcast
    )
    return losses.view(labels.shape)


def masked_labels(labels: torch.Tensor, mask: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """Return the labels with ``ignore_index`` where ``mask`` is 0; the caller's tensor stays as it is."""
    return labels if mask is None else labels.masked_fill(mask == 0, ignore_index)


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that no loss here knows.

    Raises:
        UserError: it is not ``sum``, ``mean`` or ``none``.
    """
    if reduction not in ("sum", "mean", "none"):
        raise UserError(f"`loss_fn.reduction: {reduction}` is not known. Use sum, mean or none.")


def reduce_losses(
    losses: torch.Tensor, num_labels: torch.Tensor, reduction: str, num_label_tokens: int | torch.Tensor | None
) -> torch.Tensor:
    """Reduce token losses; ``num_labels`` counts the learned positions among them (only ``mean`` reads it).

    With ``num_label_tokens``, the learned positions of the whole optimizer step, the sum is divided by it, so that
    micro-batches and ranks add up to the mean over the step. A batch without a label contributes 0, never NaN.

    Raises:
        UserError: ``num_label_tokens`` comes with another reduction than ``sum``.
    """
    if num_label_tokens is not None:
        if reduction != "sum":
            raise UserError(
                f"`loss_fn.reduction: {reduction}` cannot be combined with a number of label tokens, because the loss "
                "is already a mean over the whole step. Use `reduction: sum`."
            )
        return losses.sum() / at_least_one(num_label_tokens)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / at_least_one(num_labels)


def at_least_one(count: int | torch.Tensor) -> int | torch.Tensor:
    """Return ``count``, or 1 when it is 0: the divisor of a sum that is then 0 as well."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
