"""Samples as a stream: what ``streaming: true`` makes of a builder.

Over local data a stream is its map-style set read by number: rows are shuffled as a whole, shared out exactly, and a
place is one number. What streaming spares there is the look at every row before the first step.

Over Hub data nothing is downloaded ahead and rows have no numbers. They are read in blocks of
``dataloader.shuffle_buffer_size`` rows, each block is shuffled by itself with an order that follows from seed, epoch
and the block's number, and a place is the stream's own state at the start of the block plus the rows done of it. So a
run goes on exactly where it was; the price is that it reads the block it was in once more.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.mix import MixedRows, samples_at
from nemo_automodel.components.datasets.rows import ListSource, Row, Rows
from nemo_automodel.components.datasets.streamed_rows import StreamedRows
from nemo_automodel.components.datasets.streaming import IndexedStream, Stream

_ROWS_AT_ONCE = 64


class SampleStream(IndexedStream[Sample]):
    """The samples of a map-style set, as a stream."""

    items_at_once = _ROWS_AT_ONCE

    def __init__(self, dataset: Any, repeats: bool = False) -> None:
        super().__init__(len(dataset), repeats)
        self.dataset = dataset

    def items(self, indices: Sequence[int]) -> Sequence[Sample]:
        """Return several samples, tokenised together."""
        return samples_at(self.dataset, list(indices))

    def permutation(self, rng: np.random.Generator) -> np.ndarray:
        """Return all row numbers in a random order; that of a mixture keeps its shares in every stretch."""
        return self.dataset.shuffled(rng) if isinstance(self.dataset, MixedRows) else super().permutation(rng)

    def rows_behind(self) -> Any:
        """Return the map-style set."""
        return self.dataset


@dataclass
class _Place:
    """Where a stream is."""

    round: int = 0
    block: int = 0
    position: int = 0
    """Rows done of the block."""
    block_size: int = 0
    """Rows of the block; 0 before it is read."""
    num_rows: int = 0
    """Rows before the block."""
    stream: dict[str, Any] | None = None
    """State of the stream where the block begins; None at its start."""


class HubSampleStream(Stream[Sample]):
    """The samples of rows that come over the network.

    ``dataset`` was built over the stream's first rows and is put over one block of rows after the other. Each rank
    takes every n-th row; workers share the files of the data set, so more workers than files help nothing.
    """

    def __init__(self, dataset: TokenizedRows[Any], rows: StreamedRows, repeats: bool = False) -> None:
        super().__init__()
        self.dataset, self.rows, self.repeats = dataset, rows, repeats
        self._place = _Place()

    def __iter__(self) -> Iterator[Sample]:
        if not self._goes_on():
            self._place = _Place(round=self.first_round)
        while True:
            yield from self._pass()
            if not self.repeats or self._place.num_rows == 0:
                return
            self._place = _Place(round=self._place.round + 1)

    def _pass(self) -> Iterator[Sample]:
        place, table = self._place, self._share()
        if place.stream is not None:
            table.load_state_dict(copy.deepcopy(place.stream))
        source = iter(table)
        while block := list(itertools.islice(source, place.block_size or self._block_size())):
            place.block_size = len(block)
            order = self._block_order(len(block))
            for start in range(place.position, len(block), _ROWS_AT_ONCE):
                for sample in self._samples(block, order[start : start + _ROWS_AT_ONCE]):
                    place.position += 1
                    yield sample
            place.num_rows += len(block)
            place.block, place.position, place.block_size = place.block + 1, 0, 0
            place.stream = table.state_dict()

    def _share(self) -> Any:
        from datasets.distributed import split_dataset_by_node

        table = self.rows.open()
        return table if self._num_replicas == 1 else split_dataset_by_node(table, self._replica, self._num_replicas)

    def _block_size(self) -> int:
        return _ROWS_AT_ONCE if self._shuffle_seed is None else max(self._buffer_size, 1)

    def _block_order(self, num_rows: int) -> list[int]:
        if self._shuffle_seed is None:
            return list(range(num_rows))
        place = self._place
        rng = np.random.default_rng([self._shuffle_seed, int(self._epoch), place.round, place.block])
        return rng.permutation(num_rows).tolist()  # type: ignore[no-any-return]

    def _samples(self, block: list[Row], numbers: list[int]) -> list[Sample]:
        label = f"{self.rows.label} stream, block of rows from {self._place.num_rows + 1},"
        self.dataset.rows = Rows(ListSource(block, label), range(len(block)), self.rows.column_names)
        return self.dataset.__getitems__(numbers)

    def rewind(self) -> None:
        """Go to the beginning of the epoch."""
        self._place = _Place(round=self.first_round)
        self._note_place()

    def state_dict(self) -> dict[str, Any]:
        """Return the place: pass, block, rows done of it, and the state of the stream where the block begins."""
        return asdict(self._place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place at the next iteration."""
        self._place = _Place(**copy.deepcopy(state))
        self._note_place()


def as_stream(dataset: TokenizedRows[Any], repeats: bool = False) -> Stream[Sample]:
    """Return the samples of a builder's set as a stream, over local rows or over the network as its rows are."""
    if isinstance(dataset.rows, StreamedRows):
        return HubSampleStream(dataset, dataset.rows, repeats)
    return SampleStream(dataset, repeats)


def bear_unlearned(dataset: Any) -> None:
    """Let rows of a set of our own, streamed or not, lose their whole answer without ending the run."""
    rows = dataset.dataset if isinstance(dataset, SampleStream | HubSampleStream) else dataset
    if isinstance(rows, TokenizedRows):
        rows.bears_unlearned = True


class Streamable:
    """A base of set classes with a ``streaming`` keyword: with it true, a call of the class returns a stream.

    Loaders treat the two kinds of data sets differently, by their type, so streaming cannot be an attribute of one
    kind. As with ``pathlib.Path``, what is asked for decides the class of what is made.
    """

    always_streams = False
    """The class is the iterable form of another."""
    repeats = False
    """Its stream begins again after the last row."""

    def __new__(cls, *args: Any, streaming: bool = False, **kwargs: Any) -> Any:
        """Make the set, or the stream over it."""
        made: Any = super().__new__(cls)
        if not (streaming or cls.always_streams):
            return made
        made.__init__(*args, streaming=True, **kwargs)
        return as_stream(made, made.repeats)
