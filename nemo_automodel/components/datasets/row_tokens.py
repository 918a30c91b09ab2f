"""The tokens of every row of a map-style set, whatever the set is, asked for by number.

Sets of our own are tokenised by background processes and kept in the token cache: asking for a row waits until it is
there. Any other set is asked for its samples in this process, in the order in which they are packed, and what it gives
is kept in memory. Both give the same rows for the same data, in any order and at any speed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.content_key import is_ours, key_of_dataset
from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.mix import MixedRows
from nemo_automodel.components.datasets.read_ahead import ReadAhead
from nemo_automodel.components.datasets.rows import describe
from nemo_automodel.components.datasets.token_cache import TokenizedRow, open_store
from nemo_automodel.components.datasets.tokenize_workers import TokenizeWorkers
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

_SAMPLES_AT_ONCE = 1000
_POLL_S = 0.01
_MAX_PROCESSES = 8


class RowTokens(Protocol):
    """The tokens of a set's rows."""

    is_in_files: bool
    """Processes forked from this one see what is added later."""

    def __getitem__(self, row: int) -> TokenizedRow:
        """Return a row, waiting for it; a UserError when it cannot be used."""

    def where(self, row: int) -> str:
        """Name the place of a row as a person would look it up."""

    def count_cut(self, row: int, tokens: TokenizedRow) -> None:
        """Count and tell what truncation took away."""

    def close(self) -> None:
        """Stop making more; rows that are there stay."""


def row_tokens(dataset: Any, order: np.ndarray, cfg: PackedSequenceConfig, num_proc: int | None = None) -> RowTokens:
    """Begin to make the tokens of the rows ``order``, the first ones first."""
    num_proc = num_proc or cfg.num_proc or min(_MAX_PROCESSES, os.cpu_count() or 1)
    if isinstance(dataset, MixedRows):
        return MixedTokens(dataset, order, cfg, num_proc)
    if isinstance(dataset, TokenizedRows) and is_ours(type(dataset)):
        return StoredTokens(dataset, order, cfg, num_proc)
    return OwnTokens(dataset, order)


class StoredTokens:
    """Rows of a set of our own, made by background processes and kept in the token cache."""

    is_in_files = True

    def __init__(
        self, dataset: TokenizedRows[Any], order: np.ndarray, cfg: PackedSequenceConfig, num_proc: int
    ) -> None:
        self._dataset, self._order, self._num_proc = dataset, order, num_proc
        key = key_of_dataset(dataset)
        if key is None and cfg.cache is not False:
            logger.info("The tokens of this data set are not cached: something in it has no name for its content.")
        self._store = open_store(key, len(dataset), cfg.cache, cfg.cache_days)
        self._owner = os.getpid()
        self._workers: TokenizeWorkers | None = None
        self._ahead: ReadAhead | None = None
        self._num_at_start = -1
        self._is_closed = False
        self._work_if_nobody_does()
        if len(self._store.missing(order)):  # after the workers were forked
            self._ahead = ReadAhead(self._store)

    def where(self, row: int) -> str:
        """Return file and line, or data set and row."""
        return self._dataset.rows.where(row)

    def __getitem__(self, row: int) -> TokenizedRow:
        while row not in self._store:
            is_working = self._workers is not None and self._workers.is_working
            self._store.refresh()
            if row in self._store:
                break
            self._wait(row, is_working)
        return self._store[row]

    def _wait(self, row: int, is_working: bool) -> None:
        if os.getpid() != self._owner or self._is_closed:
            raise UserError(
                f"Tokenised rows are gone from {self._store.directory} while the run needs them. Start it again."
            )
        if self._workers is not None:
            self._workers.check(row)
            if not is_working:  # and yet a row is missing: a chunk was damaged on its way
                self._workers = None
        if self._workers is None:
            self._work_if_nobody_does()
        time.sleep(_POLL_S)

    def _work_if_nobody_does(self) -> None:
        """Become the process that writes, where rows are missing and no other process of this host does it."""
        missing = self._store.missing(self._order)
        if len(missing) == 0:
            self._store.unlock()
            return
        if not self._store.try_lock():
            return
        self._store.refresh()  # what the former holder wrote, or left damaged
        missing = self._store.missing(self._order)
        if len(missing) == self._num_at_start:
            raise UserError(
                f"What is written to the token cache {self._store.directory} cannot be read back. Check the disk, or "
                "set `packed_sequence.cache: false`."
            )
        self._num_at_start = len(missing)
        if len(missing):
            self._workers = TokenizeWorkers(self._dataset, self._store, missing, self._num_proc)
        else:
            self._store.unlock()

    def count_cut(self, row: int, tokens: TokenizedRow) -> None:
        """Count and tell what truncation took away, once, in the process that packs."""
        if tokens.num_learned_cut and os.getpid() == self._owner:
            self._dataset.count_cut(row, tokens.num_tokens, tokens.num_learned, tokens.num_learned_cut)

    def close(self) -> None:
        """Stop the background processes and let others write."""
        if os.getpid() == self._owner and not self._is_closed:
            if self._ahead is not None:
                self._ahead.stop()
            self._store.refresh()
            if self._workers is not None:
                self._workers.stop()
            self._store.unlock()
            self._is_closed = True


class MixedTokens:
    """Rows of a mixture: each set has its own tokens, in its own place of the cache."""

    def __init__(self, dataset: MixedRows, order: np.ndarray, cfg: PackedSequenceConfig, num_proc: int) -> None:
        self._dataset, self._parts = dataset, []
        each = max(1, num_proc // len(dataset.sets))
        for number, part in enumerate(dataset.sets):
            rows = dataset.row_numbers[order[dataset.set_numbers[order] == number]]
            _, first = np.unique(rows, return_index=True)  # a row may come several times
            self._parts.append(row_tokens(part.dataset, rows[np.sort(first)], cfg, each))
        self.is_in_files = all(part.is_in_files for part in self._parts)

    def _find(self, row: int) -> tuple[RowTokens, int]:
        return self._parts[self._dataset.set_numbers[row]], int(self._dataset.row_numbers[row])

    def where(self, row: int) -> str:
        """Return the place as the row's set names it."""
        return self._dataset.where(row)

    def __getitem__(self, row: int) -> TokenizedRow:
        part, inner = self._find(row)
        return part[inner]

    def count_cut(self, row: int, tokens: TokenizedRow) -> None:
        """Let the row's set count."""
        part, inner = self._find(row)
        part.count_cut(inner, tokens)

    def close(self) -> None:
        """Stop making more."""
        for part in self._parts:
            part.close()


class OwnTokens:
    """Rows of any map-style set, asked for in order in this process and kept in memory."""

    is_in_files = False

    def __init__(self, dataset: Any, order: np.ndarray) -> None:
        self._dataset, self._order, self._next = dataset, order, 0
        self._rows: dict[int, TokenizedRow] = {}

    def where(self, row: int) -> str:
        """Return the row's number, counted from 1, or what the set itself says."""
        return self._dataset.rows.where(row) if isinstance(self._dataset, TokenizedRows) else f"Row {row + 1:,}"

    def __getitem__(self, row: int) -> TokenizedRow:
        while row not in self._rows:
            numbers = self._order[self._next : self._next + _SAMPLES_AT_ONCE].tolist()
            is_ours = isinstance(self._dataset, TokenizedRows)
            samples = self._dataset.__getitems__(numbers) if is_ours else [self._dataset[i] for i in numbers]
            for number, sample in zip(numbers, samples, strict=True):
                self._rows[number] = tokens_of_sample(sample, self.where(number))
            self._next += len(numbers)
        return self._rows[row]

    def count_cut(self, row: int, tokens: TokenizedRow) -> None:
        """Nothing to do: the set counts when it makes a sample."""

    def close(self) -> None:
        """Nothing to stop."""


def tokens_of_sample(sample: Sample, where: str) -> TokenizedRow:
    """Return a sample's tokens without padding, with a ``loss_mask`` folded into the labels.

    Raises:
        UserError: its ``input_ids`` and ``labels`` are not two flat lists of one length.
    """
    fields = {key: _flat(sample, key, where) for key in ("input_ids", "labels", "attention_mask", "loss_mask")}
    ids, labels, is_real, is_learned = fields.values()
    if ids is None or labels is None or len(ids) != len(labels):
        missing = "input_ids" if ids is None else "labels"
        lack = f"has no `{missing}`" if ids is None or labels is None else "has `labels` of another length"
        raise UserError(f"{where} of the data set {lack}, so it cannot be packed. Return both as lists of one length.")
    length = len(ids) if is_real is None else int(is_real.sum())
    if is_learned is not None:
        labels = np.where(is_learned == 0, IGNORE_INDEX, labels).astype(np.int32)
    labels = labels[:length]
    return TokenizedRow(ids[:length], labels, int((labels != IGNORE_INDEX).sum()), length, 0)


def _flat(sample: Sample, key: str, where: str) -> np.ndarray | None:
    if not isinstance(sample, dict):
        raise UserError(f"{where} of the data set is {describe(sample)}, but it must be a dict with `input_ids`.")
    value: Sequence[int] | torch.Tensor | None = sample.get(key)
    if value is None:
        return None
    array = np.array(value.tolist() if isinstance(value, torch.Tensor) else value, dtype=np.int32)
    if array.ndim != 1:
        raise UserError(
            f"`{key}` of {where} has {array.ndim} dimensions: the data set yields whole batches, which cannot be "
            "packed. Set `packed_sequence.packed_sequence_size` to 0, or yield one row at a time."
        )
    return array
