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


class Stream(IterableDataset[T], Generic[T]):
    """What a loader asks of a stream: an order to configure, an epoch, a share for each worker, and a state."""

    repeats = False
    """It begins again after its last item, for ever."""

    def __init__(self) -> None:
        self._shuffle_seed: int | None = None
        self._num_replicas, self._replica = 1, 0
        self._buffer_size = 1
        # in shared memory, so that workers which outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self.first_round = 0
        """The number of the first pass over the items in an iteration; every pass has an order of its own."""
        self._place_epoch: int | None = None
        """The epoch of a place that was loaded and not gone to yet."""

    def configure(self, shuffle_seed: int | None, num_replicas: int, replica: int, buffer_size: int = 1) -> None:
        """Set the order (None: as they come) and this rank's share.

        ``buffer_size`` is how many items are shuffled together where they have no numbers.
        """
        self._shuffle_seed, self._num_replicas, self._replica = shuffle_seed, num_replicas, replica
        self._buffer_size = buffer_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self._epoch.fill_(epoch)

    def _note_place(self) -> None:
        """Let the next iteration of this epoch go on where the stream stands now."""
        self._place_epoch = int(self._epoch)

    def _goes_on(self) -> bool:
        """Tell whether the iteration that begins goes on at a place; ask once, at its start.

        A place of another epoch is forgotten: a loader that was stopped at the very end of an epoch takes the place and
        never asks for an item.
        """
        place_epoch, self._place_epoch = self._place_epoch, None
        return place_epoch == int(self._epoch)

    def num_items_of(self, worker: int, num_workers: int) -> int | None:
        """Return how many items one worker of this rank yields in a pass; None where only reading them tells."""
        return None

    def rewind(self) -> None:
        """Go to the beginning of the epoch."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the place of this stream."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place at the next iteration."""
        raise NotImplementedError


class IndexedStream(Stream[T], Generic[T]):
    """Yield ``item(i)`` for all numbers below ``num_items``, once or for ever; every rank gets equally many."""

    items_at_once = 1
    """Items that are made together."""

    def __init__(self, num_items: int, repeats: bool = False) -> None:
        super().__init__()
        self._num_items, self.repeats = num_items, repeats
        self._round, self._position = 0, 0

    def item(self, index: int) -> T:
        """Return item ``index``."""
        raise NotImplementedError

    def items(self, indices: Sequence[int]) -> Sequence[T]:
        """Return several items."""
        return [self.item(index) for index in indices]

    def permutation(self, rng: np.random.Generator) -> np.ndarray:
        """Return all numbers in a random order."""
        return rng.permutation(self._num_items)

    def rows_behind(self) -> Any | None:
        """Return the map-style set whose rows the items are, number by number; None where there is none."""
        return None

    def first_items(self, num_batches: int, batch_size: int, num_workers: int) -> list[list[int]]:
        """Return the numbers of the first batches of the epoch, as so many workers make them, without moving."""
        stride, order = max(num_workers, 1), self._order()
        shares = [order[first::stride] for first in range(stride)]
        batches = []
        for number in range(num_batches):
            start = number // stride * batch_size
            batches.append(list(shares[number % stride][start : start + batch_size]))
        return [batch for batch in batches if batch]

    def num_items_of(self, worker: int, num_workers: int) -> int:
        """Return how many items one worker of this rank yields in a round."""
        return len(range(worker, self._num_items // self._num_replicas, num_workers))

    def _order(self) -> Sequence[int]:
        num_used = self._num_items - self._num_items % self._num_replicas
        if self._shuffle_seed is None:
            return range(self._replica, num_used, self._num_replicas)
        rng = np.random.default_rng([self._shuffle_seed, int(self._epoch), self._round])
        order: list[int] = self.permutation(rng)[self._replica : num_used : self._num_replicas].tolist()
        return order

    def __iter__(self) -> Iterator[T]:
        if not self._goes_on():
            self._round, self._position = self.first_round, 0
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            order = self._order()[first::stride]
            for start in range(self._position, len(order), self.items_at_once):
                for item in self.items(order[start : start + self.items_at_once]):
                    self._position += 1
                    yield item
            if not self.repeats or self.num_items_of(first, stride) == 0:
                return
            self._round, self._position = self._round + 1, 0

    def rewind(self) -> None:
        """Go to the beginning of the epoch."""
        self._round, self._position = self.first_round, 0
        self._note_place()

    def state_dict(self) -> dict[str, Any]:
        """Return the place of this stream."""
        return {"round": self._round, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place at the next iteration."""
        self._round, self._position = state["round"], state["position"]
        self._note_place()
