"""Cross-entropy a fixed number of rows at a time: the least memory beyond the logits and their gradient."""

from __future__ import annotations

import torch

from nemo_automodel.components.loss.token_loss import check_reduction, masked_labels, reduce_losses, token_losses
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX


class ChunkedCrossEntropy:
    """`MaskedCrossEntropy` with the chunk length in the user's hand.

    Args:
        chunk_len: rows of logits that are held in fp32 at once.
        compile: accepted and unused: a chunk is a handful of operations with a hand-written backward pass, and
            compiling them would start a compiler for nothing.
        ignore_index: the label of positions that are not learned.
        reduction: ``sum``, ``mean`` over the learned positions, or ``none``.

    Raises:
        UserError: unknown reduction, or a chunk of no rows.
    """

    needs_hidden_states = False

    def __init__(
        self, chunk_len: int = 32, compile: bool = True, ignore_index: int = IGNORE_INDEX, reduction: str = "sum"
    ) -> None:
        check_reduction(reduction)
        if chunk_len < 1:
            raise UserError(f"`loss_fn.chunk_len` is {chunk_len}, but a chunk has at least one row. Use 32 or more.")
        self.chunk_len = chunk_len
        self.ignore_index = ignore_index
        self.reduction = reduction

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        num_label_tokens: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss; shapes, dtypes and errors as in `MaskedCrossEntropy`."""
        labels = masked_labels(labels, mask, self.ignore_index)
        losses = token_losses(logits, labels, ignore_index=self.ignore_index, chunk_rows=self.chunk_len)
        return reduce_losses(losses, (labels != self.ignore_index).sum(), self.reduction, num_label_tokens)
