"""The types that cross the borders between rooms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

IGNORE_INDEX = -100
"""The label of a position that is not learned."""

SEQ_LENS_PADDING = -1000
"""Fills the rows of ``seq_lens`` of a batch up to the longest list."""

Batch = dict[str, torch.Tensor]
"""What a collate function makes and the engine takes, all on the CPU.

* ``input_ids`` int64 ``[B, S]``
* ``labels`` int64 ``[B, S]``, already shifted: ``labels[b, s]`` is the token to predict at position ``s``, or -100
* ``attention_mask`` int64 ``[B, S]``, unpacked rows only: 1 on real tokens, 0 on padding
* ``position_ids`` int64 ``[B, S]``, packed rows only: restart at 0 in every document, and after the prefix in every
  branch of it
* ``branch_ids`` int64 ``[B, S]``, packed rows that share prefixes only: n in the n-th branch of a document, which sees
  the document's prefix and itself; 0 in prefixes, in documents without branches and in padding
* ``seq_lens`` int64 ``[B, D]``, packed rows only: lengths of the D documents of each row without padding, filled with
  -1000; the documents stand one after the other from position 0, whatever is left of the row is padding
"""


class Stateful(Protocol):
    """Anything whose state goes into a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if nothing had happened."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step reports. All plain Python numbers: the step's one device sync has happened."""

    loss: float
    """Sum of the token losses over the step's label tokens, divided by their number."""
    grad_norm: float
    """Norm of all gradients before clipping."""
    lr: float
    """Learning rate after the scheduler's step."""
    num_label_tokens: int
    """Learned positions of the step over all micro-batches and ranks."""
    num_tokens: int
    """Tokens of the step without tail padding."""
    mem_gib: float
    """Peak allocated device memory since the last step, 0 on the CPU."""
    tps: float
    """``num_tokens`` per second since the previous step's end: data, validation and saving included."""
    mfu: float | None = None
    """Share of the device's peak that the model's own operations reach, in per cent; None where no peak is known."""
