"""Micro-batches of a number of tokens instead of a number of rows.

What a micro-batch costs, in time and in memory, is its rows times its longest row, padding included. With a fixed
number of rows one long row sets the price of all its neighbours; with a budget of tokens the rows of a step are sorted
by length and cut wherever the next row would not fit, so neighbours are alike, little is padding, and memory has one
known limit. Taking the longest rows first, as many as fit, makes the fewest micro-batches there can be; it also meets
the largest one first, so a run that does not fit in memory says so in its first seconds.

The rows of a step stay the rows of that step: only their split changes, and since the loss is a sum over all label
tokens of the step, the update stays the same. The price: a loader's item is the list of a whole step's micro-batches,
so a worker tokenises a step at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.shared.types import Batch

logger = logging.getLogger(__name__)

_REPORTED_COUNTS = (1, 10, 100, 1000, 10_000, 100_000)


class TokenBudgetCollater:
    """Turn the samples of one step into micro-batches of at most ``max_tokens`` positions, the longest rows first.

    A row longer than that makes a micro-batch of its own; such rows are counted in ``num_rows_over`` and told in a
    warning at 1, 10, 100, … of them.
    """

    def __init__(self, collate_fn: Callable[[list[Sample]], Batch], max_tokens: int) -> None:
        self.collate_fn, self.max_tokens = collate_fn, max_tokens
        self.num_rows_over = 0

    def __call__(self, samples: Sequence[Sample]) -> list[Batch]:
        """Split and collate; every sample is in one micro-batch, whose ``input_ids`` are ``[B, S]``."""
        rows = sorted(samples, key=lambda sample: len(sample["input_ids"]), reverse=True)
        batches, start = [], 0
        while start < len(rows):
            count = self._num_fitting(len(rows[start]["input_ids"]))
            batch = self.collate_fn(rows[start : start + count])
            fitting = self._num_fitting(batch["input_ids"].shape[1])
            if fitting < len(batch["input_ids"]):  # the collate function rounds lengths up
                batch = self.collate_fn(rows[start : start + fitting])
            if batch["input_ids"].shape[1] > self.max_tokens:
                self._report(batch["input_ids"].shape[1])
            start += len(batch["input_ids"])
            batches.append(batch)
        return batches

    def _num_fitting(self, length: int) -> int:
        return max(self.max_tokens // max(length, 1), 1)

    def _report(self, length: int) -> None:
        self.num_rows_over += 1
        if self.num_rows_over in _REPORTED_COUNTS:
            logger.warning(
                "A row of %d tokens is longer than `step_scheduler.local_batch_tokens: %d`, so it is a micro-batch of "
                "its own (%d such rows so far). Raise the budget, or truncate with `dataset.seq_length`.",
                length, self.max_tokens, self.num_rows_over,
            )  # fmt: skip


class MicroBatches(Iterable[Batch]):
    """A loader whose items are lists of micro-batches, read one micro-batch at a time."""

    def __init__(self, loader: Iterable[list[Batch]]) -> None:
        self.loader: Any = loader

    def __iter__(self) -> Iterator[Batch]:
        for batches in self.loader:
            yield from batches
