"""Several data sets as one, in the proportions of their weights.

A mixture of map-style sets is a map-style set: a list of (set, row) that follows from sizes, weights and seed alone, so
packing, grouping by length, shuffling and resuming work on it as on any other, and a place in it is one number.

The order is stratified. The j-th row of a set with share p stands at a random place of the interval [j/p, (j+1)/p); all
rows are then read from left to right. So every stretch of the mixture, not only the whole, holds each set's share to
within one row, and yet no pattern repeats. Which rows of a set come, and in what order, is a shuffle of that set.

The price: 10 bytes a row in memory, and one order for the whole run. ``shuffled`` is the other order of an epoch: rows
change places within their set only, so that the shares of every stretch stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from nemo_automodel.components.datasets.config import MixConfig
from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

_MAX_ROWS = 200_000_000


class MixedSet(NamedTuple):
    """One set of a mixture."""

    dataset: Any
    weight: float
    """Its share of the rows, relative to the other weights."""
    name: str
    """For messages."""


class MixedRows(Dataset[Sample]):
    """Rows of several map-style sets, ``sets[i].dataset[j]`` for every (i, j) of the plan."""

    def __init__(self, sets: Sequence[MixedSet], stopping: str = "first_exhausted", seed: int = 42) -> None:
        """Plan the mixture; no row is read.

        ``first_exhausted`` stops where one set has no row left, so no row comes twice; ``all_exhausted`` goes on until
        every set has been read as a whole, the others again and again, each time in a new order.

        Raises:
            UserError: no set, a weight that is not positive, an unknown stopping rule, or a mixture without end.
        """
        check_mixture(sets, stopping)
        self.sets, self.stopping, self.seed = list(sets), stopping, seed
        sizes = [len(part.dataset) for part in sets]
        self.set_numbers, self.row_numbers = _plan(sizes, [part.weight for part in sets], stopping, seed)
        self.num_drawn = np.bincount(self.set_numbers, minlength=len(sets)).tolist()
        logger.info("%s", self._report(sizes))

    def __len__(self) -> int:
        return len(self.set_numbers)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return several samples; those of one set are asked for together."""
        found: list[Sample] = [{}] * len(indices)
        for dataset, places, rows in self._by_set(indices):
            for place, sample in zip(places, samples_at(dataset, rows), strict=True):
                found[place] = sample
        return found

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Return the number of positions of each sample."""
        found = [0] * len(indices)
        for dataset, places, rows in self._by_set(indices):
            has_lengths = isinstance(dataset, TokenizedRows | MixedRows)
            lengths = dataset.lengths(rows) if has_lengths else [len(dataset[row]["input_ids"]) for row in rows]
            for place, length in zip(places, lengths, strict=True):
                found[place] = length
        return found

    def locate(self, index: int) -> tuple[Any, int]:
        """Return the innermost set that row ``index`` comes from, and its number there."""
        dataset, row = self.sets[self.set_numbers[index]].dataset, int(self.row_numbers[index])
        return dataset.locate(row) if isinstance(dataset, MixedRows) else (dataset, row)

    def where(self, index: int) -> str:
        """Name the place of row ``index`` as its set names it: file and line, or data set and row."""
        dataset, row = self.locate(index)
        if isinstance(dataset, TokenizedRows):
            return dataset.rows.where(row)
        return f"{self.sets[self.set_numbers[index]].name} row {row + 1}"

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Return all row numbers in another order that holds every set's share as evenly as the order itself."""
        order = np.empty(len(self), dtype=np.int64)
        for number in range(len(self.sets)):
            (places,) = np.nonzero(self.set_numbers == number)
            order[places] = rng.permutation(places)
        return order

    def _by_set(self, indices: Sequence[int]) -> list[tuple[Any, list[int], list[int]]]:
        """Return (set, places in ``indices``, its rows) for each set that is asked for."""
        chosen = np.asarray(indices, dtype=np.int64)
        numbers = self.set_numbers[chosen]
        found = []
        for number in np.unique(numbers):
            (places,) = np.nonzero(numbers == number)
            rows = self.row_numbers[chosen[places]]
            found.append((self.sets[number].dataset, places.tolist(), rows.tolist()))
        return found

    def _report(self, sizes: Sequence[int]) -> str:
        parts = []
        for part, size, drawn in zip(self.sets, sizes, self.num_drawn, strict=True):
            times = f", {drawn / size:.1f} times its {size:,}" if drawn > size else f" of {size:,}"
            parts.append(f"{part.name} {100 * drawn / len(self):.1f} % ({drawn:,} rows{times})")
        return f"Mixed {len(self.sets)} sets into {len(self):,} rows: {'; '.join(parts)}."


def check_mixture(sets: Sequence[MixedSet], stopping: str) -> None:
    """Refuse a mixture that cannot be made.

    Raises:
        UserError: no set, a weight that is not positive, or an unknown stopping rule.
    """
    if not sets:
        raise UserError("A mixture needs at least one set. Add one to `mix`.")
    for part in sets:
        if not 0 < part.weight < float("inf"):
            raise UserError(f"The weight of {part.name} is {part.weight:g}, but it must be positive. Use 1.0.")
    MixConfig(stopping=stopping)  # refuses an unknown rule


def samples_at(dataset: Any, rows: list[int]) -> list[Sample]:
    """Return the samples of several rows of any map-style set; sets of our own make them together."""
    if isinstance(dataset, TokenizedRows | MixedRows):
        return dataset.__getitems__(rows)
    return [dataset[row] for row in rows]


def _plan(sizes: Sequence[int], weights: Sequence[float], stopping: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the set (int16) and the row in it (int64) of every row of the mixture."""
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    ends = np.array(sizes) / shares  # where each set has been read once
    last = int(np.argmin(ends) if stopping == "first_exhausted" else np.argmax(ends))
    if ends[last] > _MAX_ROWS:
        raise UserError(
            f"The mixture would have {ends[last]:,.0f} rows, because the others are read again until the last set is "
            "exhausted. Use `stopping: first_exhausted`, or raise the weight of the largest set."
        )
    places, sets, rows = [], [], []
    for number, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        rng = np.random.default_rng([seed, number])
        most = size if number == last else int(np.ceil(ends[last] * share))
        at = (np.arange(most) + rng.random(most)) / share
        if number != last:
            at = at[at < ends[last]]
        num_passes = -(-len(at) // size)
        order = np.concatenate([rng.permutation(size) for _ in range(num_passes)]) if num_passes else np.empty(0, int)
        places.append(at)
        sets.append(np.full(len(at), number, dtype=np.int16))
        rows.append(order[: len(at)].astype(np.int64))
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(sets)[order], np.concatenate(rows)[order]
