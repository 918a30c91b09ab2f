"""Cross-entropy over the positions that carry a label: the default loss."""

from __future__ import annotations

import torch

from nemo_automodel.components.loss.token_loss import check_reduction, masked_labels, reduce_losses, token_losses
from nemo_automodel.shared.types import IGNORE_INDEX


class MaskedCrossEntropy:
    """Cross-entropy of logits against already shifted labels.

    Args:
        fp32_upcast: compute in fp32 whatever the dtype of the logits, a few rows at a time.
        ignore_index: the label of positions that are not learned.
        reduction: ``sum``, ``mean`` over the learned positions, or ``none``.

    Raises:
        UserError: unknown reduction.
    """

    needs_hidden_states = False
    chunk_rows: int | None = None
    """Rows of logits that are held in fp32 at once; None leaves it to the vocabulary's size."""

    def __init__(self, fp32_upcast: bool = True, ignore_index: int = IGNORE_INDEX, reduction: str = "sum") -> None:
        check_reduction(reduction)
        self.fp32_upcast = fp32_upcast
        self.ignore_index = ignore_index
        self.reduction = reduction

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        num_label_tokens: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of ``logits`` ``[..., V]`` and ``labels`` ``[...]``.

        Positions where ``mask`` ``[...]`` is 0 are ignored too. ``num_label_tokens`` divides the sum. No input is
        modified; without a single label the loss is 0.

        Raises:
            UserError: shapes differ, or ``num_label_tokens`` with a reduction other than ``sum``.
        """
        labels = masked_labels(labels, mask, self.ignore_index)
        losses = token_losses(
            logits,
            labels,
            ignore_index=self.ignore_index,
            chunk_rows=self.chunk_rows,
            fp32_upcast=self.fp32_upcast,
        )
        return reduce_losses(losses, (labels != self.ignore_index).sum(), self.reduction, num_label_tokens)
