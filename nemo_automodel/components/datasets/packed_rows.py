"""A set of packed rows that grows while it is read.

The list of packs is made once, in an order that follows from the data, the seed and the packing settings alone: however
fast the rows are tokenised, by however many processes, from the cache or not, pack ``i`` is pack ``i``. So the place in
the set is one number, and a run can begin with the first pack while the last rows are still text. Whoever asks for a
pack that is not there yet waits for it, and for no more than it.

A row is put together when it is asked for. ``position_ids`` restart at 0 with every document and run on into the
padding at the end, and ``seq_lens`` says where the documents lie: whoever computes attention keeps them apart by it.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.components.datasets.llm.tokenized_rows import nothing_left
from nemo_automodel.components.datasets.mix import MixedRows
from nemo_automodel.components.datasets.packed_row import packed_row
from nemo_automodel.components.datasets.packed_stream import PackedStream
from nemo_automodel.components.datasets.packing import (
    ARRANGE_WINDOW,
    Arrange,
    Document,
    PackingReport,
    Piece,
    check_length,
    strategy_of,
)
from nemo_automodel.components.datasets.prefix_sharing import PrefixSharing
from nemo_automodel.components.datasets.row_tokens import RowTokens, row_tokens
from nemo_automodel.components.datasets.token_cache import TokenizedRow
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """A bar that shows how far a wait has come."""

    def move_to(self, done: float, detail: str = "") -> None:
        """Set what is done."""

    def close(self) -> None:
        """Take the bar away."""


class _NoProgress:
    def move_to(self, done: float, detail: str = "") -> None:
        pass

    def close(self) -> None:
        pass


class Documents:
    """The documents of a map-style set in packing order; what cannot be packed is counted and left out."""

    def __init__(
        self,
        tokens: RowTokens,
        order: np.ndarray,
        cfg: PackedSequenceConfig,
        arrange: Arrange | None = None,
        bears_unlearned: bool = False,
    ) -> None:
        self.tokens, self.num_rows, self.num_seen = tokens, len(order), 0
        self.report = PackingReport(cfg.packed_sequence_size, cuts_long=cfg.long_policy == "truncate")
        self._order, self._policy, self._arrange = order, cfg.long_policy, arrange
        self._bears_unlearned = bears_unlearned
        self._arranged: list[Document] = []

    def __iter__(self) -> Iterator[Piece]:
        if self._arrange is None:
            yield from self._fitting()
            return
        fitting = self._fitting()
        while window := list(itertools.islice(fitting, ARRANGE_WINDOW)):
            for document in self._arrange([self._document(row) for row, _ in window]):
                self._arranged.append(document)
                yield len(self._arranged) - 1, len(document.ids)

    def __getitem__(self, number: int) -> Document:
        return self._document(number) if self._arrange is None else self._arranged[number]

    def where(self, numbers: list[int]) -> list[str] | None:
        """Name the places of documents; None where they were arranged anew."""
        return None if self._arrange is not None else [self.tokens.where(row) for row in numbers]

    def _document(self, row: int) -> Document:
        tokens = self.tokens[row]
        return Document(tokens.ids[: self.report.size], tokens.labels[: self.report.size])

    def _fitting(self) -> Iterator[Piece]:
        for row in self._order.tolist():
            tokens = self.tokens[row]
            self.num_seen += 1
            self.tokens.count_cut(row, tokens)
            length = len(tokens.ids)
            if length > self.report.size:
                length = check_length(length, self.report, self._policy, self.tokens.where(row))
                if length == 0:
                    continue
            num_learned = tokens.num_learned
            if length < len(tokens.ids):
                num_learned = int((tokens.labels[:length] != IGNORE_INDEX).sum())
                if num_learned < tokens.num_learned:
                    self._check_cut(row, tokens, num_learned)
            if num_learned == 0:
                self.report.num_unlearned += 1
                continue
            yield row, length

    def _check_cut(self, row: int, tokens: TokenizedRow, num_learned: int) -> None:
        if num_learned == 0 and not self._bears_unlearned:
            where, key = self.tokens.where(row), "packed_sequence.packed_sequence_size"
            raise nothing_left(where, tokens.num_tokens, key, self.report.size, tokens.num_learned)


class PackedRows(Dataset[Sample]):
    """Packed rows, made as they are asked for; what a row holds is told in ``packed_row``."""

    def __init__(
        self,
        documents: Documents,
        packs: Iterator[list[int]],
        pad_token_id: int,
        bar: Callable[[], Progress] = _NoProgress,
    ) -> None:
        self._documents, self._coming, self._pad_token_id = documents, packs, pad_token_id
        self._packs: list[np.ndarray] = []
        self._is_complete = False
        self._bar, self._owner = bar, os.getpid()

    @property
    def report(self) -> PackingReport:
        """What packing has done so far; of the whole set after ``len``."""
        return self._documents.report

    @property
    def is_complete(self) -> bool:
        """Tell whether all packs are there."""
        return self._is_complete

    def at_least(self, num_rows: int) -> bool:
        """Tell whether there are so many rows, waiting until they are there or it is known that they never will be.

        Raises:
            UserError: a row of the data set cannot be used, or none can be packed.
        """
        while len(self._packs) < num_rows and not self._is_complete:
            self._grow()
        return len(self._packs) >= num_rows

    def __len__(self) -> int:
        """Return the number of rows of the whole set, waiting for the last one."""
        if not self._is_complete:
            with closing(self._bar()) as bar:
                while not self._is_complete:
                    self._grow()
                    done = self._documents.num_seen
                    bar.move_to(done, f"of {self._documents.num_rows:,} documents")
        return len(self._packs)

    def __getitem__(self, index: int) -> Sample:
        if not self.at_least(index + 1):
            raise IndexError(f"row {index} of {len(self._packs)}")
        documents = [self._documents[number] for number in self._packs[index].tolist()]
        return packed_row(documents, self.report.size, self._pad_token_id)

    def where(self, index: int) -> list[str] | None:
        """Name the place of each document of row ``index``; None where documents were joined before."""
        if not self.at_least(index + 1):
            raise IndexError(f"row {index} of {len(self._packs)}")
        return self._documents.where(self._packs[index].tolist())

    def finish_before_fork(self) -> None:
        """Make all packs now if processes that are forked later could not make them on their own."""
        if not self._documents.tokens.is_in_files:
            len(self)

    def _grow(self) -> None:
        report = self.report
        try:
            pack = next(self._coming, None)
        except UserError:
            self._documents.tokens.close()
            raise
        if pack is not None:
            self._packs.append(np.array(pack, dtype=np.int64))
            report.add_row(self._documents[number] for number in pack)
            return
        self._is_complete = True
        self._documents.tokens.close()
        if not self._packs:
            raise UserError(
                f"None of the {self._documents.num_rows:,} documents can be packed: {report.num_too_long:,} are longer "
                f"than `packed_sequence.packed_sequence_size: {report.size}`, {report.num_unlearned:,} have nothing to "
                "learn."
            )
        if os.getpid() == self._owner:
            logger.info("%s", report)


def pack_dataset(
    dataset: Any,
    cfg: PackedSequenceConfig,
    *,
    pad_token_id: int,
    seed: int,
    shuffle: bool,
    bar: Callable[[], Progress] = _NoProgress,
    bears_unlearned: bool = False,
) -> Any:
    """Pack a data set of samples into rows of ``cfg.packed_sequence_size`` tokens.

    ``shuffle`` shuffles the documents with ``seed`` first; ``bar`` makes a progress bar when the whole set is waited
    for. The first row is made at once, except by ``neat``, so that data that cannot be packed is refused here.
    ``bears_unlearned`` leaves documents out that a cut to a row's length leaves nothing to learn of; otherwise they
    end the run.

    Returns:
        ``PackedRows``, or ``PackedStream`` of an iterable data set; with ``cfg.prepacked`` the data set itself, once
        its first row is seen to be packed.

    Raises:
        UserError: nothing fits, or a document is too long and is to be refused, or loses all that is learned.
    """
    if cfg.prepacked:
        _check_prepacked(dataset[0], cfg.packed_sequence_size)
        return dataset
    arrange = PrefixSharing(cfg.packed_sequence_size, shuffle) if cfg.share_prefix else None
    if isinstance(dataset, IterableDataset):
        return PackedStream(dataset, cfg, pad_token_id, arrange, bears_unlearned)
    order = _order(dataset, seed if shuffle else None, 1 if arrange is None else ARRANGE_WINDOW)
    documents = Documents(row_tokens(dataset, order, cfg), order, cfg, arrange, bears_unlearned)
    packs = itertools.islice(strategy_of(cfg)(documents, cfg.packed_sequence_size), cfg.max_packs)
    packed = PackedRows(documents, packs, pad_token_id, bar)
    if cfg.packing_strategy != "neat":
        packed.at_least(1)
    return packed


def _order(dataset: Any, seed: int | None, block: int) -> np.ndarray:
    """Return the order of the documents; a shuffle moves blocks of so many neighbours."""
    if seed is None:
        return np.arange(len(dataset))
    rng = np.random.default_rng(seed)
    if isinstance(dataset, MixedRows):
        return dataset.shuffled(rng)
    if block == 1:
        return rng.permutation(len(dataset))
    starts = rng.permutation(-(-len(dataset) // block)) * block
    order = (starts[:, None] + np.arange(block)).reshape(-1)
    return order[order < len(dataset)]


def _check_prepacked(row: Sample, size: int) -> None:
    missing = [key for key in ("input_ids", "labels", "position_ids", "seq_lens", "seq_lens_padded") if key not in row]
    if missing or len(row["input_ids"]) != size:
        what = f"has no `{missing[0]}`" if missing else f"has {len(row['input_ids'])} tokens"
        raise UserError(
            f"`packed_sequence.prepacked: true` expects packed rows of {size} tokens, but the first row {what}. "
            "Set it to false to have the rows packed."
        )
