"""Output head and cross-entropy in one step: the logits never exist as a whole.

For every chunk of rows the forward pass makes the logits in fp32, the loss, the gradient of the logits, and from it at
once the gradients of the hidden states and of the head's weight. Only those two are kept for the backward pass, which
multiplies them by the incoming gradient. Memory beyond the inputs: the gradients, and one chunk of logits; the price is
that the gradients are computed in the forward pass, also when nobody asks for them later.

Shapes: N tokens, M rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_automodel.components.loss.token_loss import at_least_one, default_chunk_rows, row_chunks, softmax_gradient
from nemo_automodel.shared.errors import NotSupportedYetError, UserError
from nemo_automodel.shared.types import IGNORE_INDEX


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the token losses times ``scale``. Inputs in one dtype; sums and softmax are fp32 or better."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        ignore_index: int,
        scale: float | torch.Tensor,
        softcap: float,
        wants_grad: tuple[bool, bool],
    ) -> torch.Tensor:
        math_dtype = torch.promote_types(torch.float32, hidden_ND.dtype)
        wants_hidden, wants_weight = wants_grad
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=math_dtype) if wants_weight else None
        total = hidden_ND.new_zeros((), dtype=math_dtype)
        is_label_N = labels_N != ignore_index
        targets_N = labels_N.where(is_label_N, 0)
        for rows in row_chunks(labels_N.numel(), default_chunk_rows(weight_VD.shape[0])):
            hidden_MD, targets_M, is_label_M = hidden_ND[rows], targets_N[rows], is_label_N[rows]
            logits_MV = torch.nn.functional.linear(hidden_MD, weight_VD).to(math_dtype)
            if softcap:
                logits_MV = torch.tanh_(logits_MV / softcap).mul_(softcap)
            lse_M = torch.logsumexp(logits_MV, dim=-1)
            total += (lse_M - logits_MV.gather(1, targets_M.unsqueeze(1)).squeeze(1)).where(is_label_M, 0).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad_MV = softmax_gradient(logits_MV, lse_M, targets_M).mul_(scale)
            if softcap:
                grad_MV.mul_(1 - (logits_MV / softcap).square_())
            grad_MV = grad_MV.masked_fill_(~is_label_M.unsqueeze(1), 0).to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = grad_MV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_MV.t() @ hidden_MD
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND * grad_outputs[0].to(grad_hidden_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_outputs[0]).to(ctx.weight_dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None, None, None


class FusedLinearCrossEntropy:
    """Cross-entropy straight from hidden states and the weight of the output head.

    Args:
        ignore_index: the label of positions that are not learned.
        logit_softcapping: c > 0 turns every logit x into c·tanh(x/c), as Gemma 2 does; 0 leaves them.
        reduction: ``sum``.

    Raises:
        UserError: another reduction, or a negative softcap.
    """

    needs_hidden_states = True

    def __init__(self, ignore_index: int = IGNORE_INDEX, logit_softcapping: float = 0, reduction: str = "sum") -> None:
        if reduction != "sum":
            raise UserError(f"`loss_fn.reduction: {reduction}` is not known to FusedLinearCrossEntropy. Use sum.")
        if logit_softcapping < 0:
            raise UserError(
                f"`loss_fn.logit_softcapping` is {logit_softcapping}, but a cap is positive. Use 0 to turn it off."
            )
        self.ignore_index = ignore_index
        self.logit_softcapping = float(logit_softcapping)
        self.reduction = reduction

    def __call__(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        lm_weight: torch.Tensor,
        num_label_tokens: int | torch.Tensor | None = None,
        grad_reduce_group: object = None,
    ) -> torch.Tensor:
        """Return the loss of ``hidden_states`` ``[..., D]``, ``labels`` ``[...]`` and ``lm_weight`` ``[V, D]``.

        The loss is fp32 and divided by ``num_label_tokens``. A frozen ``lm_weight`` gets no gradient and costs none.

        Raises:
            UserError: shapes differ.
            NotSupportedYetError: ``grad_reduce_group``, which belongs to a head split over devices.
        """
        if grad_reduce_group is not None:
            raise NotSupportedYetError("A head split over devices is not supported yet. Leave `grad_reduce_group` out.")
        if hidden_states.shape[:-1] != labels.shape or hidden_states.shape[-1] != lm_weight.shape[-1]:
            raise UserError(
                f"The loss got hidden states of shape {tuple(hidden_states.shape)}, labels of shape "
                f"{tuple(labels.shape)} and a head of shape {tuple(lm_weight.shape)}, which do not belong together."
            )
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        scale = 1.0 if num_label_tokens is None else 1.0 / at_least_one(num_label_tokens)
        can_learn = torch.is_grad_enabled()
        with torch.autocast(device, enabled=False):
            loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype),
                lm_weight.to(dtype),
                labels.reshape(-1),
                self.ignore_index,
                scale,
                self.logit_softcapping,
                (can_learn and hidden_states.requires_grad, can_learn and lm_weight.requires_grad),
            )
        return loss
