"""Packing: several short documents share a row, so that no time goes into padding.

A document is never cut in two. A *strategy* turns documents, given by number and length, into packs, lists of numbers:

* ``thd`` keeps the order: a document that does not fit any more begins the next pack (next fit).
* ``best_fit`` looks at the next ``look_ahead`` documents. The oldest of them begins a pack, so none waits long; then,
  as long as one fits, the one that leaves the least room goes in, the oldest of equals.
* ``neat`` looks at all documents and always takes the longest one that still fits; packs then stand in the order of
  their first document.

All are deterministic. The first two hand out packs while documents still arrive, so a run begins before its data is
tokenised; ``neat`` has to wait for the last one.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.shared.errors import UserError


class Document(NamedTuple):
    """What is packed as one piece: a tokenised row, or several rows that share their beginning."""

    ids: np.ndarray
    """int32 ``[T]``"""
    labels: np.ndarray
    """int32 ``[T]``, already shifted; -100 where nothing is learned."""
    branches: np.ndarray | None = None
    """int32 ``[K]``, lengths of the shared beginning and of each branch, adding up to T; None: one plain sequence."""

    @property
    def num_rows(self) -> int:
        """Number of tokenised rows that it holds."""
        return 1 if self.branches is None else len(self.branches) - 1

    @property
    def num_saved_tokens(self) -> int:
        """Tokens that the rows would have more if each had its own beginning."""
        return 0 if self.branches is None else int(self.branches[0]) * (self.num_rows - 1)


Arrange = Callable[[list[Document]], list[Document]]
"""A step between documents and packs: consecutive documents (a window, in packing order) in, what is packed out.

Every token that is learned must come out exactly once, and no document may come out longer than a row. It must depend
on its argument alone, because packs are made again after a restart.
"""

ARRANGE_WINDOW = 256
"""Documents that an ``Arrange`` step sees together. Where there is one, a shuffle moves whole windows of rows."""

Piece = tuple[int, int]
"""The number of a document and its length."""

Strategy = Callable[[Iterable[Piece], int], Iterator[list[int]]]
"""Turns documents that are no longer than a row of so many tokens into packs, in the order in which rows are read."""


@dataclass
class PackingReport:
    """What packing did to a data set, so far."""

    size: int
    """Tokens of a row."""
    num_rows: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    """Tokens of the documents."""
    num_too_long: int = 0
    """Documents longer than a row, left out or cut."""
    num_unlearned: int = 0
    """Documents without a learned token, left out."""
    cuts_long: bool = False
    """Documents longer than a row are cut, not left out."""
    num_saved_tokens: int = 0
    """Tokens that shared prefixes saved."""

    def add_row(self, documents: Iterable[Document]) -> None:
        """Count a row and what it holds."""
        self.num_rows += 1
        for document in documents:
            self.num_documents += document.num_rows
            self.num_tokens += len(document.ids)
            self.num_saved_tokens += document.num_saved_tokens

    @property
    def padding_share(self) -> float:
        """Share of the rows' tokens that is padding."""
        return 1 - self.num_tokens / (self.num_rows * self.size)

    def __str__(self) -> str:
        line = (
            f"Packed {self.num_documents:,} documents with {self.num_tokens:,} tokens into {self.num_rows:,} rows of "
            f"{self.size:,}: {100 * self.padding_share:.1f} % padding"
        )
        if self.num_too_long:
            what = "cut" if self.cuts_long else "dropped"
            line += f", {self.num_too_long:,} documents {what} because they are longer than a row"
        if self.num_unlearned:
            line += f", {self.num_unlearned:,} dropped because nothing of them is learned"
        if self.num_saved_tokens:
            share = self.num_saved_tokens / (self.num_tokens + self.num_saved_tokens)
            line += f"; prefix sharing saved {self.num_saved_tokens:,} tokens, {100 * share:.1f} %"
        return line + "."


def check_length(length: int, report: PackingReport, policy: str, where: str) -> int:
    """Return how many tokens of a document are packed: 0 leaves it out; count it.

    Raises:
        UserError: it is longer than a row and the policy is ``error``.
    """
    if length <= report.size:
        return length
    if policy == "error":
        raise UserError(
            f"{where} has {length:,} tokens, but `packed_sequence.packed_sequence_size` is {report.size:,}. Raise "
            "it, set `packed_sequence.on_long` to drop or truncate, or truncate with `dataset.seq_length`."
        )
    report.num_too_long += 1
    return report.size if policy == "truncate" else 0


def strategy_of(cfg: PackedSequenceConfig) -> Strategy:
    """Return the strategy that the settings name."""
    if cfg.packing_strategy == "best_fit":
        return partial(best_fit, look_ahead=cfg.look_ahead)
    return next_fit if cfg.packing_strategy == "thd" else longest_first


def next_fit(pieces: Iterable[Piece], size: int) -> Iterator[list[int]]:
    """Fill one pack after the other, in order."""
    pack: list[int] = []
    free = size
    for number, length in pieces:
        if length > free:
            yield pack
            pack, free = [], size
        pack.append(number)
        free -= length
    if pack:
        yield pack


def best_fit(pieces: Iterable[Piece], size: int, look_ahead: int) -> Iterator[list[int]]:
    """Fill each pack with its oldest document and then with whatever leaves the least room."""
    pool, source = _Pool(), iter(pieces)

    def look() -> None:
        while len(pool) < look_ahead and (piece := next(source, None)) is not None:
            pool.add(*piece)

    look()
    while len(pool):
        number, length = pool.take_oldest()
        pack, free = [number], size - length
        look()
        while (found := pool.take_longest(free)) is not None:
            pack.append(found[0])
            free -= found[1]
            look()
        yield pack


def longest_first(pieces: Iterable[Piece], size: int) -> Iterator[list[int]]:
    """Fill each pack with the longest documents of all that still fit."""
    pool, packs, place = _Pool(), [], {}
    for at, (number, length) in enumerate(pieces):
        place[number] = at
        pool.add(number, length)
    while len(pool):
        pack, free = [], size
        while (found := pool.take_longest(free)) is not None:
            pack.append(found[0])
            free -= found[1]
        packs.append(sorted(pack, key=place.__getitem__))
    yield from sorted(packs, key=lambda pack: place[pack[0]])


class _Pool:
    """Documents by age and by length."""

    def __init__(self) -> None:
        self._by_age: deque[Piece] = deque()
        self._by_length: dict[int, deque[int]] = {}
        self._lengths: list[int] = []
        self._taken: set[int] = set()
        """Documents that are gone from ``_by_length`` but not yet from ``_by_age``."""
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, number: int, length: int) -> None:
        self._num += 1
        self._by_age.append((number, length))
        if length not in self._by_length:
            self._by_length[length] = deque()
            insort(self._lengths, length)
        self._by_length[length].append(number)

    def take_oldest(self) -> Piece:
        while self._by_age[0][0] in self._taken:
            self._taken.remove(self._by_age.popleft()[0])
        number, length = self._by_age.popleft()
        self._take(length)  # it is the oldest of its length too
        return number, length

    def take_longest(self, free: int) -> Piece | None:
        """Take the longest document of at most ``free`` tokens, the oldest of equals; None where there is none."""
        at = bisect_right(self._lengths, free) - 1
        if at < 0:
            return None
        length = self._lengths[at]
        number = self._take(length)
        self._taken.add(number)
        return number, length

    def _take(self, length: int) -> int:
        numbers = self._by_length[length]
        number = numbers.popleft()
        self._num -= 1
        if not numbers:
            del self._by_length[length]
            del self._lengths[bisect_right(self._lengths, length) - 1]
        return number
