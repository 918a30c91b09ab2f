"""How a global batch becomes gradients on one device.

The loss of a step is the sum of the token losses of all its micro-batches divided by the label tokens of all its
micro-batches (on all ranks). Every micro-batch is divided by that one number, so neither the loss nor a gradient
depends on how the global batch was split.

Nothing here waits for the device: losses stay device scalars, and batches come from the CPU, where their labels can be
counted, and are copied asynchronously.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from nemo_automodel._transformers.forward import LabelledForward, LossFn
from nemo_automodel.shared.types import IGNORE_INDEX, SEQ_LENS_PADDING, Batch


class EagerEngine:
    """Forward and backward of one model on one device.

    ``autocast_dtype`` computes in that dtype while the weights keep theirs; ``packed_attention`` names the kernel of
    packed rows and ``joins_frozen_head`` the way of the loss, see ``LabelledForward``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss_fn: LossFn,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
        packed_attention: str = "auto",
        joins_frozen_head: bool = True,
    ) -> None:
        self.forward = LabelledForward(model, packed_attention, joins_frozen_head)
        self.loss_fn = loss_fn
        self.device = device
        self.autocast_dtype = autocast_dtype

    def forward_backward(self, batches: Sequence[Batch], num_label_tokens: int) -> torch.Tensor:
        """Add the gradients of a step's micro-batches to the parameters' ``grad``.

        ``num_label_tokens`` counts the whole step on all ranks and is at least 1. Returns the step's loss on this rank,
        a detached float32 scalar on the device.
        """
        assert num_label_tokens > 0, "a step without labels is skipped by the recipe"
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch in batches:
            with self.forward.attention_of(batch):
                loss = self._loss(batch, num_label_tokens)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().float()
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Return the sum of a batch's token losses, a float32 device scalar, and the number of its label tokens."""
        return self._loss(batch, num_label_tokens=1).float(), count_label_tokens([batch])

    def _loss(self, batch: Batch, num_label_tokens: int) -> torch.Tensor:
        with self.autocast():
            return self.forward.loss(batch, self.loss_fn, num_label_tokens)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the model computes."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)


def count_label_tokens(batches: Sequence[Batch]) -> int:
    """Return the number of learned positions of CPU batches."""
    return sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)


def count_tokens(batches: Sequence[Batch]) -> int:
    """Return the number of tokens of CPU batches, without the padding at the end of their rows."""
    total = 0
    for batch in batches:
        if "seq_lens" in batch:
            lengths = batch["seq_lens"]
            total += int(lengths[lengths != SEQ_LENS_PADDING].sum())
        elif "attention_mask" in batch:
            total += int(batch["attention_mask"].sum())
        else:
            total += batch["input_ids"].numel()
    return total
