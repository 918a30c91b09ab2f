"""Mixtures with a stream in them.

Where every set has numbered rows, the mixture has them too, and it is a ``MixedRows``, streamed or not. Only a set that
comes over the network makes a real merging of streams necessary: the next row is taken from the set whose next place
comes first, with places drawn as in ``mix``: the j-th row of a set with share p lies in [j/p, (j+1)/p). So shares hold
in every stretch here, too. The state is that of every set, the places and the random numbers' own state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.components.datasets.llm.sample_stream import SampleStream
from nemo_automodel.components.datasets.mix import MixedRows, MixedSet, check_mixture
from nemo_automodel.components.datasets.streaming import IndexedStream, Stream
from nemo_automodel.shared.errors import UserError


def mix(sets: Sequence[MixedSet], stopping: str = "first_exhausted", seed: int = 42) -> Any:
    """Mix sets of any kind.

    Returns:
        ``MixedRows`` where all are map-style sets; a stream over them where one is a stream of numbered rows;
        ``MixedStream`` where one has no numbers. A stream that repeats is never exhausted.

    Raises:
        UserError: a weight that is not positive, an unknown stopping rule, or a stream that cannot be mixed.
    """
    check_mixture(sets, stopping)
    if not any(isinstance(part.dataset, IterableDataset) for part in sets):
        return MixedRows(sets, stopping, seed)
    for part in sets:
        if isinstance(part.dataset, IterableDataset) and not isinstance(part.dataset, Stream):
            raise UserError(
                f"{part.name} is a stream of the kind {type(part.dataset).__name__}, which does not keep a place that "
                "a mixture could go back to. Use a data set of `nemo_automodel.components.datasets.llm`."
            )
    behind = [_rows_behind(part.dataset) for part in sets]
    repeats = [isinstance(part.dataset, Stream) and part.dataset.repeats for part in sets]
    if all(rows is not None for rows in behind) and (all(repeats) or not any(repeats)):
        numbered = [part._replace(dataset=rows) for part, rows in zip(sets, behind, strict=True)]
        return SampleStream(MixedRows(numbered, stopping, seed), repeats=all(repeats))
    streams = [part._replace(dataset=_as_stream(part.dataset)) for part in sets]
    return MixedStream(streams, stopping, seed)


def _rows_behind(dataset: Any) -> Any | None:
    if isinstance(dataset, IndexedStream):
        return dataset.rows_behind()
    return None if isinstance(dataset, IterableDataset) else dataset


def _as_stream(dataset: Any) -> Stream[Sample]:
    return dataset if isinstance(dataset, Stream) else SampleStream(dataset)


class MixedStream(Stream[Sample]):
    """Samples of several streams in the proportions of their weights."""

    def __init__(self, sets: Sequence[MixedSet], stopping: str, seed: int) -> None:
        super().__init__()
        self.sets, self.stopping, self.seed = list(sets), stopping, seed
        self.repeats = all(part.dataset.repeats for part in sets)
        """As one that repeats is never exhausted, the others decide where the mixture ends."""
        total = sum(part.weight for part in sets)
        self._shares = [part.weight / total for part in sets]
        self._begin()

    def rewind(self) -> None:
        """Go to the beginning of the epoch, with every set."""
        self._begin()
        self._note_place()

    def _begin(self) -> None:
        worker = get_worker_info()
        lane = [self._replica, 0 if worker is None else worker.id]
        self._rng = np.random.default_rng([self.seed, int(self._epoch), *lane])
        self._num_drawn = [0] * len(self.sets)
        self._num_passes = [0] * len(self.sets)
        self._places = [self._draw_place(number) for number in range(len(self.sets))]
        for part in self.sets:
            part.dataset.first_round = 0
            part.dataset.rewind()

    def _draw_place(self, number: int) -> float:
        return float(self._num_drawn[number] + self._rng.random()) / self._shares[number]

    def configure(self, shuffle_seed: int | None, num_replicas: int, replica: int, buffer_size: int = 1) -> None:
        """Set the order within each set, and this rank's share of each."""
        super().configure(shuffle_seed, num_replicas, replica, buffer_size)
        for part in self.sets:
            part.dataset.configure(shuffle_seed, num_replicas, replica, buffer_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        super().set_epoch(epoch)
        for part in self.sets:
            part.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        if not self._goes_on():
            self._begin()
        iterators = [iter(part.dataset) for part in self.sets]
        while True:
            number = min(range(len(self.sets)), key=self._places.__getitem__)
            sample = next(iterators[number], None)
            if sample is None:
                self._num_passes[number] += 1
                if self.stopping == "first_exhausted" or all(self._num_passes):
                    return
                self.sets[number].dataset.first_round = self._num_passes[number]
                iterators[number] = iter(self.sets[number].dataset)
                sample = next(iterators[number], None)
            if sample is None:  # this worker's share of the set is empty
                self._places[number] = float("inf")
                continue
            self._num_drawn[number] += 1
            self._places[number] = self._draw_place(number)
            yield sample

    def state_dict(self) -> dict[str, Any]:
        """Return the place of every set, and what decides which comes next."""
        return {
            "sets": [part.dataset.state_dict() for part in self.sets],
            "num_drawn": list(self._num_drawn),
            "num_passes": list(self._num_passes),
            "places": list(self._places),
            "rng": copy.deepcopy(self._rng.bit_generator.state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place at the next iteration."""
        for part, inner in zip(self.sets, state["sets"], strict=True):
            part.dataset.load_state_dict(inner)
        self._num_drawn, self._num_passes = list(state["num_drawn"]), list(state["num_passes"])
        self._places = list(state["places"])
        self._rng = np.random.default_rng()
        self._rng.bit_generator.state = copy.deepcopy(state["rng"])
        self._note_place()
