"""The input embedding, whose gradient is added where it lies.

Automatic differentiation makes a gradient of the whole vocabulary for every micro-batch, 1 GB for 128k tokens of an 8B
model, almost all of it zero, and adds it to ``grad``. Here the gradients of equal tokens are summed in a matrix as long
as the batch, by torch's own kernel, and its rows are added to ``grad``: a token has one row, so nothing depends on
timing, and the device is not waited for. A head that shares the weight has added to the same ``grad`` before.

Shapes: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nemo_automodel.kernels.weight_grad import tell_complete


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: torch.Tensor, ids: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight_VD, padding_idx
        return nn.functional.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        weight = ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        rows_T, sums_TD = sums_by_token(ids.flatten(), grad_outputs[0].flatten(0, -2), weight.shape[0])
        if ctx.padding_idx is not None:
            sums_TD.masked_fill_((rows_T == ctx.padding_idx).unsqueeze(1), 0)
        weight.grad.index_add_(0, rows_T, sums_TD)
        tell_complete([weight])
        return None, None, None


def sums_by_token(ids_T: torch.Tensor, grad_TD: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and the sums of their rows; behind the last token come rows of zeros for any others."""
    sorted_T, order_T = ids_T.sort(stable=True)
    is_new_T = torch.ones_like(sorted_T)
    is_new_T[1:] = sorted_T[1:] != sorted_T[:-1]
    place_T = is_new_T.cumsum(0) - 1
    # zeros for many tokens and not for one, whose row would be waited for
    others_T = torch.arange(ids_T.numel(), device=ids_T.device, dtype=ids_T.dtype).remainder_(num_tokens)
    tokens_T = others_T.scatter_(0, place_T, sorted_T)
    place_of_row_T = torch.empty_like(place_T).scatter_(0, order_T, place_T)
    num_rows = ids_T.numel()
    sums_TD = torch.ops.aten.embedding_dense_backward(grad_TD.contiguous(), place_of_row_T, num_rows, -1, False)
    return tokens_T, sums_TD


class FastEmbedding(nn.Embedding):
    """A Hugging Face embedding that adds to ``grad`` itself. Made by `speed_up_embedding`, never built."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``[..., D]`` for token ids."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        out: torch.Tensor = _Embed.apply(self.weight, input, self.padding_idx)  # type: ignore[no-untyped-call]
        return out


def speed_up_embedding(embedding: nn.Module) -> None:
    """Exchange the class of an embedding, in place, unless it does more than look rows up."""
    if type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq:
        embedding.__class__ = FastEmbedding
