"""Random tokens in ready-made batches, for measuring speed."""

from __future__ import annotations

import torch

from nemo_automodel.components.datasets.streaming import IndexedStream
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX, Batch


class MockIterableDataset(IndexedStream[Batch]):
    """Yield whole batches of random tokens; goes with ``dataloader.batch_size: null``.

    A batch holds int64 ``input_ids``, ``labels`` (shifted, the last one -100) and ``position_ids``, each
    ``[batch_size, seq_len]``. The tokens depend on the batch's number only, so a run can be repeated and resumed.
    """

    def __init__(
        self, vocab_size: int = 1024, seq_len: int = 1024, num_samples: int = 1000000, batch_size: int = 1
    ) -> None:
        """Set the shape; ``num_samples`` counts rows, of which the last batch may bring a few more."""
        for key, value in (("vocab_size", vocab_size), ("num_samples", num_samples), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"`dataset.{key}` is {value}, but it must be at least 1.")
        if seq_len < 2:
            raise UserError(f"`dataset.seq_len` is {seq_len}, but it must be at least 2.")
        super().__init__(-(-num_samples // batch_size))
        self._vocab_size, self._shape = vocab_size, (batch_size, seq_len)

    def item(self, index: int) -> Batch:
        """Return batch ``index``."""
        generator = torch.Generator().manual_seed(index)
        input_ids = torch.randint(self._vocab_size, self._shape, generator=generator)
        labels = torch.roll(input_ids, -1, dims=1)
        labels[:, -1] = IGNORE_INDEX
        position_ids = torch.arange(self._shape[1]).repeat(self._shape[0], 1)
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
