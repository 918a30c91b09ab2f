"""The order of an epoch's rows, cut into the batches of one replica.

It follows from seed and epoch alone, so a place in it is the number of rows handed out before. Rows may still be coming
while the first are read: then nobody waits for more than is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from nemo_automodel.components.datasets.mix import MixedRows
from nemo_automodel.components.datasets.packed_rows import PackedRows
from nemo_automodel.shared.errors import UserError

# rows sorted together by group_by_length, in batches: long enough to find equals, short enough to stay shuffled
_BATCHES_SORTED_TOGETHER = 50


class GrowingRows(Protocol):
    """Rows that may still be coming while the first ones are read."""

    @property
    def is_complete(self) -> bool:
        """Tell whether all rows are there."""

    def at_least(self, num_rows: int) -> bool:
        """Tell whether there are so many, waiting no longer than that takes."""

    def __len__(self) -> int:
        """Return how many there are, waiting for the last one."""


class FixedRows:
    """Rows that are all there."""

    is_complete = True

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def at_least(self, num_rows: int) -> bool:
        """Tell whether there are so many."""
        return num_rows <= self._num_rows

    def __len__(self) -> int:
        return self._num_rows


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of row numbers of one replica, in an order that follows from seed and epoch.

    All replicas cut the same order into pieces of ``batch_size * num_replicas`` rows and take every
    ``num_replicas``-th of a piece, so that the rows of a global batch do not depend on how it is spread.

    Packed rows are read as they are made in epoch 0, since their documents were shuffled before, and in a shuffled
    order in later epochs.
    """

    def __init__(
        self,
        rows: GrowingRows,
        batch_size: int,
        *,
        shuffle_seed: int | None,
        drop_last: bool = False,
        num_replicas: int = 1,
        replica: int = 0,
        lengths: Sequence[int] | None = None,
        mixture: MixedRows | None = None,
        shares_all: bool = False,
    ) -> None:
        """``shares_all``: no row is left out, so some replicas may get one more than others."""
        self.rows, self.piece = rows, batch_size * num_replicas
        self.epoch, self.start = 0, 0
        self._shuffle_seed, self._num_replicas, self._replica = shuffle_seed, num_replicas, replica
        self._lengths = None if lengths is None else np.array(lengths)
        self._mixture = mixture
        self._unit = self.piece if drop_last else 1 if shares_all else num_replicas
        if rows.is_complete:
            self._check_not_empty()

    def _check_not_empty(self) -> None:
        if not self._uses(1):
            raise UserError(
                f"The data set has {len(self.rows)} rows, but one batch takes {self.piece} (local batch size × "
                "replicas). Use a smaller batch, or set `dataloader.drop_last: false`."
            )

    @property
    def num_used(self) -> int:
        """Rows of an epoch: what cannot be shared out evenly is left out."""
        return len(self.rows) // self._unit * self._unit

    def _uses(self, num_rows: int) -> bool:
        """Tell whether an epoch has so many rows, without waiting for more."""
        return self.rows.at_least(-(-num_rows // self._unit) * self._unit)

    def at_least(self, num_batches: int) -> bool:
        """Tell whether an epoch has so many batches, without waiting for more."""
        return num_batches <= 0 or self._uses((num_batches - 1) * self.piece + 1)

    def __len__(self) -> int:
        return math.ceil(self.num_used / self.piece)

    def __iter__(self) -> Iterator[list[int]]:
        self._check_not_empty()
        order, start = self._order(), self.start
        while self._uses(start + 1):
            end = start + self.piece if self._uses(start + self.piece) else self.num_used
            mine = range(start + self._replica, end, self._num_replicas)
            start += self.piece
            if not mine:
                return
            yield list(mine) if order is None else order[mine].tolist()

    def batch_at(self, epoch: int, start: int) -> list[int]:
        """Return the rows of the batch that begins after ``start`` rows of an epoch; none where it ends there."""
        kept = self.epoch, self.start
        self.epoch, self.start = epoch, start
        try:
            return next(iter(self), [])
        finally:
            self.epoch, self.start = kept

    def _order(self) -> np.ndarray | None:
        """Return the rows of the epoch in order; None: as they are numbered."""
        if isinstance(self.rows, PackedRows) and self.epoch == 0:
            return None
        num_rows = len(self.rows)
        rng = None if self._shuffle_seed is None else np.random.default_rng([self._shuffle_seed, self.epoch])
        order = np.arange(num_rows) if rng is None else self._shuffled(rng)
        if self._lengths is None:
            return order
        stretch = self.piece * _BATCHES_SORTED_TOGETHER
        for start in range(0, num_rows, stretch):
            rows = order[start : start + stretch]
            order[start : start + stretch] = rows[np.argsort(-self._lengths[rows], kind="stable")]
        if rng is None:
            return order
        num_whole = num_rows // self.piece  # a batch that is not full stays the last one
        whole = order[: num_whole * self.piece].reshape(num_whole, self.piece)
        return np.concatenate([rng.permutation(whole).reshape(-1), order[num_whole * self.piece :]])

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Return another order of all rows; that of a mixture keeps the shares of its sets in every stretch."""
        return rng.permutation(len(self.rows)) if self._mixture is None else self._mixture.shuffled(rng)
