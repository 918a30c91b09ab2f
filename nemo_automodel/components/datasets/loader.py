"""From a data set to a stream of batches that can stop anywhere and go on exactly there.

The order of an epoch (`epoch_order`) follows from seed and epoch alone, so the place in it is one number: the rows
handed out so far. It does not depend on workers, and a run may go on with another batch size. Data sets that are
streams keep their own place, worker by worker.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from nemo_automodel.components.datasets.config import DataloaderConfig
from nemo_automodel.components.datasets.epoch_order import EpochBatchSampler, FixedRows
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.mix import MixedRows, samples_at
from nemo_automodel.components.datasets.packed_rows import PackedRows
from nemo_automodel.components.datasets.packed_stream import PackedStream
from nemo_automodel.components.datasets.streaming import IndexedStream, Stream
from nemo_automodel.components.datasets.worker_faults import WorkerWatch, leave_signals_to_parent
from nemo_automodel.shared.errors import NotSupportedYetError, UserError

_LENGTHS_AT_ONCE = 1000
# what a worker makes of an error: its whole traceback, with the message at the end
_OF_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\n.*\n[\w.]+Error: (.*)", re.DOTALL)
_END = object()
"""Stands for an item where there is none left."""


def shuffles(cfg: DataloaderConfig, is_training: bool) -> bool:
    """Tell whether a loader shuffles: as the key says, else training rows yes and validation rows no."""
    return is_training if cfg.shuffle is None else cfg.shuffle


def build_dataloader(
    dataset: Any,
    cfg: DataloaderConfig,
    *,
    local_batch_size: int,
    collate_fn: Callable[[list[Any]], Any],
    seed: int,
    is_training: bool,
    num_replicas: int = 1,
    replica: int = 0,
) -> ResumableDataLoader:
    """Build the loader of one rank.

    With ``cfg.batch_size`` None an item of the data set is a batch already and ``collate_fn`` is not called. On one
    replica no row is lost: the last batch may be smaller. On several, each gets the same number of training rows and
    the few that remain are left out of the epoch; of validation rows none is.

    Raises:
        UserError: keys that do not go together with this kind of data set.
    """
    if cfg.num_workers > 0:
        # a forked worker must not use the tokenizer's threads, which were not forked with it
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options: dict[str, Any] = {
        "num_workers": cfg.num_workers,
        "pin_memory": cfg.pin_memory and torch.cuda.is_available(),
        "persistent_workers": cfg.persistent_workers,
        "prefetch_factor": cfg.prefetch_factor,
        "worker_init_fn": leave_signals_to_parent if cfg.num_workers > 0 else None,
        # without a generator of its own, every start of an iteration would draw from the one that dropout uses
        "generator": torch.Generator().manual_seed(seed),
    }
    batch_size = local_batch_size if cfg.batch_size == "local" else cfg.batch_size
    assert batch_size is None or isinstance(batch_size, int)
    section = "dataloader" if is_training else "validation_dataloader"
    if isinstance(dataset, IterableDataset):
        _configure_stream(dataset, cfg, seed, is_training, num_replicas, replica)
        stream_collate = None if batch_size is None else collate_fn
        options |= {"batch_size": batch_size, "collate_fn": stream_collate}
        if batch_size is not None:
            options["drop_last"] = cfg.drop_last
        return ResumableDataLoader(dataset, None, options, section, cfg.timeout)
    if cfg.num_workers > 0 and isinstance(dataset, PackedRows):
        dataset.finish_before_fork()
    # packed rows all have one length
    lengths = _lengths(dataset) if cfg.group_by_length and not isinstance(dataset, PackedRows) else None
    sampler = EpochBatchSampler(
        dataset if isinstance(dataset, PackedRows) else FixedRows(len(dataset)),
        batch_size or 1,
        shuffle_seed=seed if shuffles(cfg, is_training) else None,
        drop_last=cfg.drop_last,
        num_replicas=num_replicas,
        replica=replica,
        lengths=lengths,
        mixture=dataset if isinstance(dataset, MixedRows) else None,
        shares_all=not is_training,
    )
    options |= {"batch_sampler": sampler, "collate_fn": _only_item if batch_size is None else collate_fn}
    return ResumableDataLoader(dataset, sampler, options, section, cfg.timeout)


def _configure_stream(
    dataset: IterableDataset[Any], cfg: DataloaderConfig, seed: int, is_training: bool, num_replicas: int, replica: int
) -> None:
    if cfg.group_by_length:
        raise UserError("`dataloader.group_by_length: true` needs a data set with a length, but this one is a stream.")
    if isinstance(dataset, PackedStream) and not isinstance(dataset.source, Stream):
        _configure_stream(dataset.source, cfg, seed, is_training, num_replicas, replica)
    elif isinstance(dataset, Stream):
        shuffle_seed = seed if shuffles(cfg, is_training) else None
        dataset.configure(shuffle_seed, num_replicas, replica, cfg.shuffle_buffer_size)
    elif num_replicas > 1:
        raise NotSupportedYetError(
            f"A stream of the kind {type(dataset).__name__} on {num_replicas} ranks is not supported yet. Use a "
            "map-style data set, or one process."
        )
    elif cfg.shuffle:
        raise UserError(
            f"`dataloader.shuffle: true` cannot shuffle a stream of the kind {type(dataset).__name__}. Set it to false "
            "and shuffle the data set itself."
        )


def _only_item(items: list[Any]) -> Any:
    (item,) = items
    return item


def _lengths(dataset: Any) -> list[int]:
    if not isinstance(dataset, TokenizedRows | MixedRows):
        return [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    found: list[int] = []
    for start in range(0, len(dataset), _LENGTHS_AT_ONCE):
        found += dataset.lengths(range(start, min(start + _LENGTHS_AT_ONCE, len(dataset))))
    return found


def _place_of(dataset: Any, row: int) -> str:
    """Name a row by its file and line, where the data set can tell without making it."""
    if isinstance(dataset, TokenizedRows):
        return dataset.rows.where(row)
    if isinstance(dataset, MixedRows):
        return dataset.where(row)
    return f"row {row + 1:,}"


class ResumableDataLoader(StatefulDataLoader):  # type: ignore[misc]
    """A loader whose state is a place in an epoch.

    Each iteration begins at the start of the epoch set by ``set_epoch``; only the first one after ``load_state_dict``
    goes on where the state was taken, which may be the end of that epoch: then it yields nothing.

    ``look_ahead`` shows the item that comes next. It is drawn then and kept for the iteration; the state stays that of
    the place before it until it is handed out.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: EpochBatchSampler | None,
        options: dict[str, Any],
        section: str = "dataloader",
        timeout_s: float = 0.0,
    ) -> None:
        self.section = section
        """Of the settings, for messages."""
        self._timeout_s = timeout_s
        self.watch = WorkerWatch([], timeout_s)
        """Over the processes of the iteration under way."""
        self._rows, self.epoch = sampler, 0
        self._start, self._num_batches, self._is_finished = 0, 0, False
        self._has_begun, self._resumes = False, False
        self._live: Iterator[Any] | None = None
        """What is being iterated over."""
        self._is_waiting = False
        """``look_ahead`` began the iteration, and nobody has asked for it yet."""
        self._ahead: list[Any] = []
        """The one item that was drawn and not handed out."""
        self._state_before: dict[str, Any] | None = None
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            super().__init__(dataset, **options)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a place loaded for another epoch is forgotten."""
        if epoch != self.epoch:
            self._start, self._num_batches, self._is_finished = 0, 0, False
            self._has_begun, self._resumes = False, False
            self._forget_ahead()
            self.next_iter_state = None
        self.epoch = epoch
        if self._rows is not None:
            self._rows.epoch = epoch
        elif isinstance(self.dataset, Stream):
            self.dataset.set_epoch(epoch)

    @property
    def has_numbers(self) -> bool:
        """Tell whether its rows have numbers; those of a stream have none here."""
        return self._rows is not None

    @property
    def grows(self) -> bool:
        """Tell whether rows are still coming, so that ``len`` would wait for them."""
        return self._rows is not None and not self._rows.rows.is_complete

    def at_least(self, num_batches: int) -> bool:
        """Tell whether a whole epoch has so many micro-batches; of rows that are still coming, wait for no more."""
        return num_batches <= len(self) if self._rows is None else self._rows.at_least(num_batches)

    def __len__(self) -> int:
        """Return the number of micro-batches of a whole epoch; a TypeError where a stream does not end."""
        if self._rows is not None:
            return len(self._rows)
        if not isinstance(self.dataset, Stream):
            return int(super().__len__())
        if self.dataset.repeats:
            raise TypeError("A stream that repeats for ever has no length.")
        size, num_workers = self.batch_size or 1, max(self.num_workers, 1)
        known = [self.dataset.num_items_of(worker, num_workers) for worker in range(num_workers)]
        shares = [share for share in known if share is not None]
        if len(shares) < num_workers:
            raise TypeError("Only reading this stream to its end tells how long it is.")
        return sum(share // size if self.drop_last else math.ceil(share / size) for share in shares)

    def __iter__(self) -> Iterator[Any]:
        if not self._is_waiting:
            self._live = self._begin()
        self._is_waiting = False
        live, watch = self._live, self.watch
        assert live is not None
        try:
            while (item := self._ahead.pop() if self._ahead else self._draw(live)) is not _END:
                self._state_before = None
                self._num_batches += 1
                yield item
        finally:
            watch.end()
        self._forget_ahead()  # workers end with the iteration
        self._is_finished = True

    def _begin(self) -> Iterator[Any]:
        """Return the items from the place where the loader stands."""
        self._forget_ahead()
        if not self._resumes:
            self._start, self._num_batches, self._is_finished = 0, 0, False
        self._has_begun, self._resumes = True, False
        if self._is_finished:
            return iter(())
        if self._rows is not None:
            self._rows.start = self._start
        others = set(multiprocessing.active_children())
        try:
            items: Iterator[Any] = super().__iter__()
        finally:  # also what an error on the way leaves behind
            workers = [process for process in multiprocessing.active_children() if process not in others]
            if self.persistent_workers and not workers:
                workers = self.watch.workers
            self.watch = WorkerWatch(sorted(workers, key=lambda process: process.pid or 0), self._timeout_s)
        return items

    def _draw(self, items: Iterator[Any]) -> Any:
        """Return the next item, ``_END`` after the last one."""
        try:
            with self.watch.waiting():
                return next(items, _END)
        except UserError as error:
            found = _OF_WORKER.fullmatch(str(error))
            if found is None:
                raise
            raise UserError(found[1].strip()) from error

    def next_worker(self) -> int | None:
        """Return the number of the worker whose turn it is, None of streams, where one may have ended before."""
        if self._rows is None or not self.watch.workers:
            return None
        return (self._num_batches + len(self._ahead)) % len(self.watch.workers)

    def next_rows(self) -> str:
        """Name the rows of the batch that comes next; nothing where they have no numbers."""
        if self._rows is None:
            return ""
        numbers = self._rows.batch_at(self.epoch, self._num_done + len(self._ahead) * self._rows.piece)
        if not numbers:
            return ""
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        return f"{_place_of(self.dataset, numbers[0])}{more}"

    def _forget_ahead(self) -> None:
        self._live, self._is_waiting, self._ahead, self._state_before = None, False, [], None
        self.watch.end()

    def look_ahead(self, may_draw: bool = True) -> tuple[Any, list[int] | None] | None:
        """Return the item that comes next and the numbers of its rows (None: they have none), without moving.

        At the end of an epoch it is the first one of the next epoch; of a stream, whose next epoch can only be known by
        reading it, there is none then. With ``may_draw`` false workers are not waited for: rows with numbers are made
        here, and of a stream there is none.
        """
        numbers = None
        if self._rows is not None:
            numbers = self._rows.batch_at(self.epoch, self._num_done)
            if not numbers or not (may_draw or self._ahead):
                numbers = numbers or self._rows.batch_at(self.epoch + 1, 0)
                return self.collate_fn(samples_at(self.dataset, numbers)), numbers
        if not self._ahead:
            if not may_draw:
                return None
            before = self.state_dict()
            if self._live is None:
                self._live, self._is_waiting = self._begin(), True
            self._ahead, self._state_before = [self._draw(self._live)], before
        return None if self._ahead[0] is _END else (self._ahead[0], numbers)

    def num_items_done(self) -> int | None:
        """Return how many items of the epoch were handed out; None of streams, and after another batch size."""
        if self._rows is None or self._num_done % self._rows.piece:
            return None
        return self._num_done // self._rows.piece

    def num_items_left(self) -> int | None:
        """Return how many items of the epoch will come, waiting for rows that are being made; None of streams."""
        if self._rows is None:
            return None
        return -(-max(self._rows.num_used - self._num_done, 0) // self._rows.piece)

    @property
    def _num_done(self) -> int:
        """Rows handed out in this epoch over all replicas."""
        assert self._rows is not None
        return self._start + self._num_batches * self._rows.piece

    def peek(self, num_batches: int) -> list[list[int]] | None:
        """Return the row numbers of the epoch's first micro-batches, without moving.

        None for streams whose items have no numbers.
        """
        if self._rows is not None:
            return list(itertools.islice(self._rows, num_batches))
        if isinstance(self.dataset, IndexedStream):
            return self.dataset.first_items(num_batches, self.batch_size or 1, self.num_workers)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the place: epoch, rows handed out over all replicas (or the stream's own state)."""
        if self._state_before is not None:
            return self._state_before
        state: dict[str, Any] = {"epoch": self.epoch, "is_finished": self._is_finished}
        if self._rows is None:
            stream = super().state_dict() if self._has_begun else self.next_iter_state or {}
            return {**state, "num_workers": self.num_workers, "stream": stream}
        done = self._num_done
        if not self._rows.rows.is_complete:
            return {**state, "num_rows_done": done, "num_rows": None}
        return {**state, "num_rows_done": min(done, self._rows.num_used), "num_rows": len(self._rows.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place at the next iteration.

        Raises:
            UserError: the data set has another number of rows than when the state was taken, or the stream another
                number of workers.
        """
        if self._rows is None and state.get("num_workers", self.num_workers) != self.num_workers:
            raise UserError(
                f"`{self.section}.num_workers` is {self.num_workers}, but each of {state['num_workers']} workers kept "
                f"its own place in the stream. Go on with --{self.section}.num_workers {state['num_workers']}"
            )
        self.set_epoch(state["epoch"])
        self._forget_ahead()
        self._is_finished, self._has_begun, self._resumes = state["is_finished"], False, True
        if self._rows is None:
            self.next_iter_state = None
            super().load_state_dict(state["stream"])
            return
        rows, num_rows = self._rows.rows, state["num_rows"]
        if num_rows is not None and (not rows.at_least(num_rows) or rows.at_least(num_rows + 1)):
            raise UserError(
                f"The data set has {len(rows):,} rows, but it had {num_rows:,} when the checkpoint was written, so its "
                "place in the data means nothing. Restore the data, or start a new run."
            )
        self._start, self._num_batches = state["num_rows_done"], 0
