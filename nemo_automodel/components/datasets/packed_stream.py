"""A stream of packed rows, made from a stream of documents as it comes.

Documents are read in chunks and each chunk is packed on its own, together with what was left of the one before: the
documents of its last pack, which may have room. So the whole state is the stream's own state where the chunk began,
those few documents, what was counted until then, and the number of packs handed out of the chunk; whoever resumes reads
one chunk again, and counts it once. A stream that has no state of its own is read again from its start.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.components.datasets.llm.tokenized_rows import nothing_left
from nemo_automodel.components.datasets.packed_row import packed_row
from nemo_automodel.components.datasets.packing import Arrange, Document, PackingReport, check_length, strategy_of
from nemo_automodel.components.datasets.row_tokens import tokens_of_sample
from nemo_automodel.components.datasets.streaming import Stream
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

_DOCUMENTS_IN_ORDER = 256
"""Documents of a chunk where the strategy keeps their order: the first pack should not wait for many."""


class PackedStream(Stream[Sample]):
    """Yield the packed rows of a stream of samples."""

    def __init__(
        self,
        source: IterableDataset[Any],
        cfg: PackedSequenceConfig,
        pad_token_id: int,
        arrange: Arrange | None = None,
        bears_unlearned: bool = False,
    ) -> None:
        """Take a stream.

        Raises:
            UserError: ``max_packs``, which counts the packs of a whole set.
        """
        super().__init__()
        if cfg.max_packs is not None:
            raise UserError(
                f"`packed_sequence.max_packs: {cfg.max_packs}` needs a data set with a length, but this one is a "
                "stream. Remove it and set `step_scheduler.max_steps`."
            )
        self.source = source
        self.report = PackingReport(cfg.packed_sequence_size, cuts_long=cfg.long_policy == "truncate")
        """Of the epoch so far, the part before a restart included."""
        self._strategy, self._policy, self._pad_token_id = strategy_of(cfg), cfg.long_policy, pad_token_id
        self._chunk_size = _DOCUMENTS_IN_ORDER if cfg.packing_strategy == "thd" else cfg.look_ahead
        self._arrange, self._bears_unlearned = arrange, bears_unlearned
        self._begin()
        self._has_reported = False

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        """Tell whether the stream has no end."""
        return isinstance(self.source, Stream) and self.source.repeats

    def configure(self, shuffle_seed: int | None, num_replicas: int, replica: int, buffer_size: int = 1) -> None:
        """Set order and share of the documents."""
        if isinstance(self.source, Stream):
            self.source.configure(shuffle_seed, num_replicas, replica, buffer_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the documents."""
        super().set_epoch(epoch)
        if isinstance(self.source, Stream):
            self.source.set_epoch(epoch)

    def _begin(self) -> None:
        self._source_state: Any = None
        """Where the chunk begins: the source's state, or how many documents were read; None: at its start."""
        self._carried: list[Document] = []
        self._num_handed, self._num_read = 0, 0
        self._set_report(PackingReport(self.report.size))

    def _set_report(self, counts: PackingReport) -> None:
        """Go on counting from where the chunk begins."""
        self.report = replace(counts, size=self.report.size, cuts_long=self.report.cuts_long)
        self._counts_before = replace(self.report)

    def __iter__(self) -> Iterator[Sample]:
        resumes = self._goes_on()
        if resumes:
            self.report = replace(self._counts_before)
        else:
            self._begin()
        documents = self._open()
        while True:
            chunk = list(itertools.islice(documents, self._chunk_size))
            is_last = len(chunk) < self._chunk_size
            self._num_read += len(chunk)
            pieces = self._carried + self._arranged([document for document in chunk if document is not None])
            packs = [[pieces[number] for number in pack] for pack in self._packs(pieces)]
            rest = [] if is_last or not packs else packs.pop()
            for pack in packs[: self._num_handed]:
                self.report.add_row(pack)
            for pack in packs[self._num_handed :]:
                self._num_handed += 1
                self.report.add_row(pack)
                yield packed_row(pack, self.report.size, self._pad_token_id)
            self._report("The stream, with what was read before" if resumes else "The beginning of the stream")
            if is_last:
                return
            self._carried, self._num_handed, self._counts_before = rest, 0, replace(self.report)
            self._source_state = self.source.state_dict() if isinstance(self.source, Stream) else self._num_read

    def _open(self) -> Iterator[Document | None]:
        """Begin to read the documents where the chunk begins; None stands for one that is left out."""
        if self._source_state is not None and isinstance(self.source, Stream):
            self.source.load_state_dict(self._source_state)
        samples = iter(self.source)
        if self._source_state is not None and not isinstance(self.source, Stream):
            self._num_read = self._source_state
            next(itertools.islice(samples, self._num_read, self._num_read), None)
        for number, sample in enumerate(samples, start=self._num_read + 1):
            yield self._document(sample, f"Document {number:,} of the stream")

    def _document(self, sample: Sample, where: str) -> Document | None:
        tokens = tokens_of_sample(sample, where)
        length = check_length(len(tokens.ids), self.report, self._policy, where)
        labels = tokens.labels[:length]
        if length and (labels == IGNORE_INDEX).all():
            if tokens.num_learned and not self._bears_unlearned:
                key = "packed_sequence.packed_sequence_size"
                raise nothing_left(where, len(tokens.ids), key, self.report.size, tokens.num_learned)
            self.report.num_unlearned += 1
            return None
        return Document(tokens.ids[:length], labels) if length else None

    def _arranged(self, documents: list[Document]) -> list[Document]:
        return documents if self._arrange is None else self._arrange(documents)

    def _packs(self, pieces: list[Document]) -> Iterator[list[int]]:
        return self._strategy(((number, len(piece.ids)) for number, piece in enumerate(pieces)), self.report.size)

    def _report(self, what: str) -> None:
        worker = get_worker_info()
        if self._has_reported or self.report.num_rows == 0 or (worker is not None and worker.id > 0):
            return
        self._has_reported = True
        logger.info("%s: %s", what, self.report)

    def state_dict(self) -> dict[str, Any]:
        """Return the place: where the chunk began, with which counts, what was left for it, how much is handed out."""
        carried = [[None if part is None else part.tolist() for part in document] for document in self._carried]
        counts = asdict(self._counts_before)
        return {"source": self._source_state, "carried": carried, "num_handed": self._num_handed, "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place at the next iteration."""
        self._begin()
        self._source_state, self._num_handed = state["source"], state["num_handed"]
        self._carried = [
            Document(*(np.array(part, dtype=np.int32) for part in document if part is not None))
            for document in state["carried"]
        ]
        if "counts" in state:  # checkpoints of before did not keep them
            self._set_report(PackingReport(**state["counts"]))
        self._note_place()
