"""From a data set to a stream of batches that can stop anywhere and go on exactly there.

The order of an epoch follows from seed and epoch alone, so the place in it is one number: the rows handed out so far.
It does not depend on workers, and a run may go on with another batch size. Data sets that are streams keep their own
place, worker by worker.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from nemo_automodel.components.datasets.config import DataloaderConfig
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.streaming import IndexedStream
from nemo_automodel.shared.errors import NotSupportedYetError, UserError

logger = logging.getLogger(__name__)

# rows sorted together by group_by_length, in batches: long enough to find equals, short enough to stay shuffled
_BATCHES_SORTED_TOGETHER = 50
_LENGTHS_AT_ONCE = 1000


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
    replica no row is lost: the last batch may be smaller. On several, each gets the same number of rows and the few
    that remain are left out of the epoch.

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
        # without a generator of its own, every start of an iteration would draw from the one that dropout uses
        "generator": torch.Generator().manual_seed(seed),
    }
    batch_size = local_batch_size if cfg.batch_size == "local" else cfg.batch_size
    assert batch_size is None or isinstance(batch_size, int)
    if isinstance(dataset, IterableDataset):
        _configure_stream(dataset, cfg, seed, is_training, num_replicas, replica)
        stream_collate = None if batch_size is None else collate_fn
        options |= {"batch_size": batch_size, "collate_fn": stream_collate}
        if batch_size is not None:
            options["drop_last"] = cfg.drop_last
        return ResumableDataLoader(dataset, None, options)
    lengths = _lengths(dataset) if cfg.group_by_length else None
    sampler = EpochBatchSampler(
        len(dataset),
        batch_size or 1,
        shuffle_seed=seed if shuffles(cfg, is_training) else None,
        drop_last=cfg.drop_last,
        num_replicas=num_replicas,
        replica=replica,
        lengths=lengths,
    )
    options |= {"batch_sampler": sampler, "collate_fn": _only_item if batch_size is None else collate_fn}
    return ResumableDataLoader(dataset, sampler, options)


def _configure_stream(
    dataset: IterableDataset[Any], cfg: DataloaderConfig, seed: int, is_training: bool, num_replicas: int, replica: int
) -> None:
    if cfg.group_by_length:
        raise UserError("`dataloader.group_by_length: true` needs a data set with a length, but this one is a stream.")
    if isinstance(dataset, IndexedStream):
        dataset.configure(seed if shuffles(cfg, is_training) else None, num_replicas, replica)
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
    if not isinstance(dataset, TokenizedRows):
        return [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    found: list[int] = []
    for start in range(0, len(dataset), _LENGTHS_AT_ONCE):
        found += dataset.lengths(range(start, min(start + _LENGTHS_AT_ONCE, len(dataset))))
    return found


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of row numbers of one replica, in an order that follows from seed and epoch.

    All replicas cut the same order into pieces of ``batch_size * num_replicas`` rows and take every
    ``num_replicas``-th of a piece, so that the rows of a global batch do not depend on how it is spread.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        shuffle_seed: int | None,
        drop_last: bool = False,
        num_replicas: int = 1,
        replica: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.num_rows, self.piece = num_rows, batch_size * num_replicas
        self.epoch, self.start = 0, 0
        self._shuffle_seed, self._num_replicas, self._replica = shuffle_seed, num_replicas, replica
        self._lengths = None if lengths is None else np.array(lengths)
        self.num_used = num_rows - num_rows % (self.piece if drop_last else num_replicas)
        if self.num_used == 0:
            raise UserError(
                f"The data set has {num_rows} rows, but one batch takes {self.piece} (local batch size × replicas). "
                "Use a smaller batch, or set `dataloader.drop_last: false`."
            )

    def __len__(self) -> int:
        return math.ceil(self.num_used / self.piece)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(self.start, self.num_used, self.piece):
            end = min(start + self.piece, self.num_used)
            yield order[start + self._replica : end : self._num_replicas].tolist()

    def _order(self) -> np.ndarray:
        rng = None if self._shuffle_seed is None else np.random.default_rng([self._shuffle_seed, self.epoch])
        order = np.arange(self.num_rows) if rng is None else rng.permutation(self.num_rows)
        if self._lengths is None:
            return order
        stretch = self.piece * _BATCHES_SORTED_TOGETHER
        for start in range(0, self.num_rows, stretch):
            rows = order[start : start + stretch]
            order[start : start + stretch] = rows[np.argsort(-self._lengths[rows], kind="stable")]
        if rng is None:
            return order
        num_whole = self.num_rows // self.piece  # a batch that is not full stays the last one
        whole = order[: num_whole * self.piece].reshape(num_whole, self.piece)
        return np.concatenate([rng.permutation(whole).reshape(-1), order[num_whole * self.piece :]])


class ResumableDataLoader(StatefulDataLoader):  # type: ignore[misc]
    """A loader whose state is a place in an epoch.

    Each iteration begins at the start of the epoch set by ``set_epoch``; only the first one after ``load_state_dict``
    goes on where the state was taken, which may be the end of that epoch: then it yields nothing.
    """

    def __init__(self, dataset: Any, sampler: EpochBatchSampler | None, options: dict[str, Any]) -> None:
        self._rows, self.epoch = sampler, 0
        self._start, self._num_batches, self._is_finished = 0, 0, False
        self._has_begun, self._resumes = False, False
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            super().__init__(dataset, **options)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a place loaded for another epoch is forgotten."""
        if epoch != self.epoch:
            self._start, self._num_batches, self._is_finished = 0, 0, False
            self._has_begun, self._resumes = False, False
            self.next_iter_state = None
        self.epoch = epoch
        if self._rows is not None:
            self._rows.epoch = epoch
        elif isinstance(self.dataset, IndexedStream):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of micro-batches of a whole epoch; a TypeError where a stream does not end."""
        if self._rows is not None:
            return len(self._rows)
        if not isinstance(self.dataset, IndexedStream):
            return int(super().__len__())
        if self.dataset.repeats:
            raise TypeError("A stream that repeats for ever has no length.")
        size, num_workers = self.batch_size or 1, max(self.num_workers, 1)
        shares = [self.dataset.num_items_of(worker, num_workers) for worker in range(num_workers)]
        return sum(share // size if self.drop_last else math.ceil(share / size) for share in shares)

    def __iter__(self) -> Iterator[Any]:
        if not self._resumes:
            self._start, self._num_batches, self._is_finished = 0, 0, False
        self._has_begun, self._resumes = True, False
        if self._is_finished:
            return
        if self._rows is not None:
            self._rows.start = self._start
        for batch in super().__iter__():
            self._num_batches += 1
            yield batch
        self._is_finished = True

    def state_dict(self) -> dict[str, Any]:
        """Return the place: epoch, rows handed out over all replicas (or the stream's own state)."""
        state: dict[str, Any] = {"epoch": self.epoch, "is_finished": self._is_finished}
        if self._rows is None:
            return {**state, "stream": super().state_dict() if self._has_begun else self.next_iter_state or {}}
        done = min(self._start + self._num_batches * self._rows.piece, self._rows.num_used)
        return {**state, "num_rows_done": done, "num_rows": self._rows.num_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place at the next iteration.

        Raises:
            UserError: the data set has another number of rows than when the state was taken.
        """
        self.set_epoch(state["epoch"])
        self._is_finished, self._has_begun, self._resumes = state["is_finished"], False, True
        if self._rows is None:
            self.next_iter_state = None
            super().load_state_dict(state["stream"])
            return
        if state["num_rows"] != self._rows.num_rows:
            raise UserError(
                f"The data set has {self._rows.num_rows:,} rows, but it had {state['num_rows']:,} when the checkpoint "
                "was written, so its place in the data means nothing. Restore the data, or start a new run."
            )
        self._start, self._num_batches = state["num_rows_done"], 0
