"""When the output head and the loss are computed together: a head that is one matrix, under a plain loss.

`kernels/linear_ce.py` makes logits, losses and the gradients of the hidden states and of a head that learns in one go,
and turns logits into their gradient in place: a frozen head needs a chunk of them at a time, a trained one the logits
once and never in fp32. That is the same number as the losses of `components/loss` give, so the step replaces all four.
Whatever a model does to its logits after the head would be lost, so the head is asked once, on two tokens, whether its
weight explains the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel.components.loss.chunked_ce import ChunkedCrossEntropy
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.loss.te_parallel_ce import TEParallelCrossEntropy
from nemo_automodel.components.loss.token_loss import at_least_one, default_chunk_rows
from nemo_automodel.kernels.jit import HAS_TRITON, runs_triton
from nemo_automodel.kernels.linear_ce import CHUNK_ROWS, frozen_head_loss, trained_head_loss
from nemo_automodel.kernels.weight_grad import may_write_grads

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Token ids of one row → hidden states ``[1, D]`` and logits ``[1, V]`` of its last token."""

_LOGIT_LOSSES = (MaskedCrossEntropy, ChunkedCrossEntropy, TEParallelCrossEntropy)


@dataclass(frozen=True)
class PlainLoss:
    """A loss that is the sum of fp32 cross-entropies and nothing else."""

    ignore_index: int
    chunk_rows: int | None = None
    """Rows of logits that it holds in fp32 at once, where no kernel keeps them in registers; None: any number."""


def as_plain_loss(loss_fn: object) -> PlainLoss | None:
    """Return what there is to know of a loss of `components/loss`, None if it is another or computes something else."""
    if type(loss_fn) is FusedLinearCrossEntropy:
        return None if loss_fn.logit_softcapping else PlainLoss(loss_fn.ignore_index)
    if type(loss_fn) in _LOGIT_LOSSES:
        assert isinstance(loss_fn, MaskedCrossEntropy)
        is_plain = loss_fn.reduction == "sum" and loss_fn.fp32_upcast
        return PlainLoss(loss_fn.ignore_index, loss_fn.chunk_rows) if is_plain else None
    return None


def tied_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the weight that is input embedding and output head in one, if there is one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    return [embedding.weight] if head is not None and head.weight is embedding.weight else []


def is_one_matrix(head: nn.Module) -> bool:
    """Tell whether a head is a weight without bias, adapter or packing."""
    return type(head) is nn.Linear and head.bias is None


def obstacle(model: PreTrainedModel, head: nn.Module) -> str | None:
    """Return why the head and the loss cannot be one step, as far as that shows before anything is computed."""
    if not is_one_matrix(head):
        return "the head has a bias, an adapter or packed weights"
    if head.weight.requires_grad and not may_write_grads():
        return "the head is trained by several processes"
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        return "the model caps its logits"
    if torch.is_autocast_enabled(model.device.type):
        return "the model runs under autocast"
    if model._compiled_call_impl is not None:
        return "the model is compiled"
    if model.device.type == "cuda" and not HAS_TRITON:
        return "the package triton is not installed"
    return None


def weight_explains(
    weight_VD: torch.Tensor, hidden_1D: torch.Tensor, logits_1V: torch.Tensor, softcap: float = 0
) -> bool:
    """Tell whether the weight of the head alone gives the model's logits, up to rounding."""
    with torch.no_grad():
        expected_1V = nn.functional.linear(hidden_1D, weight_VD)
        tolerance = 2e-2 if expected_1V.dtype in (torch.bfloat16, torch.float16) else 1e-4
        expected_1V = expected_1V.float()
        if softcap:
            expected_1V = softcap * torch.tanh(expected_1V / softcap)
        return torch.allclose(logits_1V.float(), expected_1V, rtol=tolerance, atol=tolerance)


def explains_two_tokens(model: PreTrainedModel, head: nn.Module, forward: Forward) -> bool:
    """Run ``forward`` on two tokens and compare."""
    weight: Any = head.weight
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            hidden_1D, logits_1V = forward(torch.arange(2, device=model.device).unsqueeze(0))
    finally:
        model.train(was_training)
    return hidden_1D.dtype == weight.dtype and weight_explains(weight, hidden_1D, logits_1V)


def loss_of_rows(
    head: nn.Module,
    hidden_ND: torch.Tensor,
    labels_N: torch.Tensor,
    num_label_tokens: int | torch.Tensor | None,
    plain: PlainLoss,
) -> torch.Tensor:
    """Return what a plain loss gives for the hidden states of labelled rows."""
    count = 1 if num_label_tokens is None else at_least_one(num_label_tokens)
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    if isinstance(count, torch.Tensor):
        scale = count.to(hidden_ND.device, dtype).reciprocal()
    else:  # filled on the device: a copy would wait for it
        scale = torch.full((), 1.0 / count, dtype=dtype, device=hidden_ND.device)
    weight: Any = head.weight
    rows = CHUNK_ROWS if runs_triton(hidden_ND) else plain.chunk_rows or default_chunk_rows(weight.shape[0])
    run = trained_head_loss if weight.requires_grad else frozen_head_loss
    return run(hidden_ND, weight, labels_N, scale, plain.ignore_index, rows)
