"""The loss that many YAML files name after Transformer Engine. Nothing of Transformer Engine is needed here.

On one device it is the same number as `MaskedCrossEntropy`. The reference's version gives NaN for a batch without a
label; this one gives 0.
"""

from __future__ import annotations

import torch

from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.shared.errors import NotSupportedYetError
from nemo_automodel.shared.types import IGNORE_INDEX


class TEParallelCrossEntropy:
    """Cross-entropy over a vocabulary that may be split over a tensor-parallel group.

    Raises:
        NotSupportedYetError: ``tp_group`` is given; splitting the vocabulary comes with tensor parallelism.
    """

    needs_hidden_states = False

    def __init__(self, ignore_index: int = IGNORE_INDEX, reduction: str = "sum", tp_group: object = None) -> None:
        if tp_group is not None:
            raise NotSupportedYetError(
                "`loss_fn.tp_group` splits the vocabulary over devices, which this version does not do yet. "
                "Leave it out and run on one device."
            )
        self._loss = MaskedCrossEntropy(ignore_index=ignore_index, reduction=reduction)

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        num_label_tokens: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss; shapes, dtypes and errors as in `MaskedCrossEntropy`."""
        return self._loss(logits, labels, mask=mask, num_label_tokens=num_label_tokens)
