"""Output head and cross-entropy over chunks of rows.

A chunk of logits is made by one matrix product in the dtype of the model, turned **in place** into the gradient of the
logits, multiplied by the head again to give the gradient of the hidden states, and overwritten by the next chunk. So a
micro-batch costs two products with the head, the memory of one chunk and of the hidden states' gradient. A chunk is
long enough (2048 rows) that reading the head for each of them hides behind the arithmetic. The price: the gradient is
computed in the forward pass, also when nobody asks for it later.

A head that learns needs the gradient of the logits once more, for its own. Whichever is smaller waits for the backward
pass: the gradient of all logits, ``[N, V]``, where rows are at most D, and then the head's is summed straight into its
``grad``; else the head's, ``[V, D]``, summed over the chunks. Never are there two matrices of logits, or one in fp32.

Shapes: N labelled rows, M rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_automodel.kernels.jit import jit, runs_triton, tl
from nemo_automodel.kernels.weight_grad import add_product_grad, tell_complete

CHUNK_ROWS = 2048
_BLOCK = 4096


def cross_entropy_(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, scale: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Return the token losses, fp32 ``[M]`` (float64 for float64), and turn the logits into their gradient.

    ``scale``, a scalar tensor, multiplies the gradient and not the losses. Rows with ``ignore_index`` get 0 in both.
    """
    run = cross_entropy_triton if runs_triton(logits_MV) else cross_entropy_reference
    return run(logits_MV, labels_M, scale, ignore_index)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        scale: torch.Tensor,
        ignore_index: int,
        chunk_rows: int,
    ) -> torch.Tensor:
        num_rows, num_dims = hidden_ND.shape
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        keeps_logits = wants_weight and num_rows <= num_dims
        kept_NV = hidden_ND.new_empty((num_rows, weight_VD.shape[0])) if keeps_logits else None
        grad_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if wants_hidden else None
        grad_VD = None
        losses = []
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            out_MV = None if kept_NV is None else kept_NV[rows]
            logits_MV = torch.mm(hidden_ND[rows], weight_VD.t(), out=out_MV)
            losses.append(cross_entropy_(logits_MV, labels_N[rows], scale, ignore_index).sum())
            if grad_ND is not None:
                torch.mm(logits_MV, weight_VD, out=grad_ND[rows])
            if wants_weight and not keeps_logits:
                if grad_VD is None:
                    grad_VD = torch.mm(logits_MV.t(), hidden_ND[rows])
                else:
                    grad_VD.addmm_(logits_MV.t(), hidden_ND[rows])
            del logits_MV, out_MV
        ctx.save_for_backward(hidden_ND if keeps_logits else None)
        ctx.grads, ctx.weight = (grad_ND, grad_VD, kept_NV), weight_VD
        return torch.stack(losses).sum() * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.grads is not None, "gradients are scaled in place, so the backward pass runs once"
        (grad_ND, grad_VD, kept_NV), ctx.grads = ctx.grads, None
        weight, incoming = ctx.weight, grad_outputs[0]
        if kept_NV is not None:
            (hidden_ND,) = ctx.saved_tensors
            add_product_grad([weight], kept_NV, hidden_ND * incoming.to(hidden_ND.dtype))
        elif grad_VD is not None:
            grad_VD.mul_(incoming.to(grad_VD.dtype))
            weight.grad = grad_VD if weight.grad is None else weight.grad.add_(grad_VD)
        if grad_ND is not None:
            grad_ND.mul_(incoming.to(grad_ND.dtype))
        if ctx.needs_input_grad[1]:
            tell_complete([weight])
        return grad_ND, None, None, None, None, None


def frozen_head_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """Return ``scale`` times the sum of the token losses, a fp32 scalar (float64 for float64).

    ``scale`` is a scalar tensor on the device. The weight gets no gradient.
    """
    return trained_head_loss(hidden_ND, weight_VD.detach(), labels_N, scale, ignore_index, chunk_rows)


def trained_head_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """Return what `frozen_head_loss` returns; the backward pass, which runs once, adds to ``weight_VD.grad`` itself.

    ``weight_VD`` is a leaf, a parameter.
    """
    loss: torch.Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, labels_N, scale, ignore_index, chunk_rows
    )
    return loss


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def cross_entropy_reference(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, scale: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Do what `cross_entropy_` says in plain operations."""
    math = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    is_label_M = labels_M != ignore_index
    targets_M1 = labels_M.where(is_label_M, 0).unsqueeze(1)
    lse_M = torch.logsumexp(math, dim=-1)
    losses_M = (lse_M - math.gather(1, targets_M1).squeeze(1)).where(is_label_M, 0)
    grad_MV = (math - lse_M.unsqueeze(1)).exp()
    grad_MV.scatter_add_(1, targets_M1, grad_MV.new_full(targets_M1.shape, -1.0))
    logits_MV.copy_((grad_MV * scale).masked_fill_(~is_label_M.unsqueeze(1), 0))
    return losses_M


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    scale_ptr,
    losses_ptr,
    num_cols,
    row_stride,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    base = logits_ptr + row * row_stride
    dtype = logits_ptr.dtype.element_ty
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        for start in range(0, num_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(base + cols, tl.zeros([BLOCK], dtype=dtype), mask=cols < num_cols)
    else:
        # every lane keeps a running maximum and sum of its own, so that the loop has no reduction
        tops = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, num_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(base + cols, mask=cols < num_cols, other=float("-inf")).to(tl.float32)
            new_tops = tl.maximum(tops, x)
            # a lane that has seen nothing but -inf would compute inf - inf
            safe = tl.where(new_tops == float("-inf"), 0.0, new_tops)
            sums = sums * tl.exp(tops - safe) + tl.exp(x - safe)
            tops = new_tops
        top = tl.max(tops, axis=0)
        lse = top + tl.log(tl.sum(sums * tl.exp(tops - top), axis=0))
        tl.store(losses_ptr + row, lse - tl.load(base + label).to(tl.float32))
        scale = tl.load(scale_ptr).to(tl.float32)
        for start in range(0, num_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < num_cols
            x = tl.load(base + cols, mask=mask, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - lse) - tl.where(cols == label, 1.0, 0.0)
            tl.store(base + cols, (grad * scale).to(dtype), mask=mask)


def cross_entropy_triton(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, scale: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Do what `cross_entropy_` says, one program a row: it reads the row twice, the second time from the cache."""
    num_rows, num_cols = logits_MV.shape
    losses_M = torch.empty(num_rows, dtype=torch.float32, device=logits_MV.device)
    _cross_entropy_kernel[(num_rows,)](
        logits_MV,
        labels_M,
        scale,
        losses_M,
        num_cols,
        logits_MV.stride(0),
        ignore_index,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return losses_M
