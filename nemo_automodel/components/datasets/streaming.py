"""Iterable sets whose items have numbers: a stream over an order of numbers, shared out to ranks and workers.

Because an item depends on its number only, the whole state of a stream is its place in the order, so that a run resumes
exactly and skips nothing by reading it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

T = TypeVar("T")


class IndexedStream(IterableDataset[T], Generic[T]):
    """Yield ``item(i)`` for all numbers below ``num_items``, once or for ever."""

    def __init__(self, num_items: int, repeats: bool = False) -> None:
        self._num_items, self.repeats = num_items, repeats
        self._shuffle_seed: int | None = None
        self._num_replicas, self._replica = 1, 0
        # in shared memory, so that workers which outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._round, self._position, self._resumes = 0, 0, False

    def item(self, index: int) -> T:
        """Return item ``index``."""
        raise NotImplementedError

    def configure(self, shuffle_seed: int | None, num_replicas: int, replica: int) -> None:
        """Set the order (None: as numbered) and this rank's share; every rank gets the same number of items."""
        self._shuffle_seed, self._num_replicas, self._replica = shuffle_seed, num_replicas, replica

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self._epoch.fill_(epoch)

    def num_items_of(self, worker: int, num_workers: int) -> int:
        """Return how many items one worker of this rank yields in a round."""
        return len(range(worker, self._num_items // self._num_replicas, num_workers))

    def _order(self) -> Sequence[int]:
        num_used = self._num_items - self._num_items % self._num_replicas
        if self._shuffle_seed is None:
            return range(self._replica, num_used, self._num_replicas)
        rng = np.random.default_rng([self._shuffle_seed, int(self._epoch), self._round])
        order: list[int] = rng.permutation(self._num_items)[self._replica : num_used : self._num_replicas].tolist()
        return order

    def __iter__(self) -> Iterator[T]:
        if not self._resumes:
            self._round, self._position = 0, 0
        self._resumes = False
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            for index in self._order()[first::stride][self._position :]:
                self._position += 1
                yield self.item(index)
            if not self.repeats or self.num_items_of(first, stride) == 0:
                return
            self._round, self._position = self._round + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the place of this stream."""
        return {"round": self._round, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place at the next iteration."""
        self._round, self._position, self._resumes = state["round"], state["position"], True
