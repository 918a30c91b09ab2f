"""The label gate of a run: which rows are looked at, and when.

Before the model is loaded, the rows of step 0 and a seeded sample are read past the loader, so that its place stays
where it is; what random numbers that takes is put back. A stream whose items have no numbers cannot be read without
moving it, so there the first step's own batches are looked at, before they are trained on.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from nemo_automodel._transformers.model_source import read_json, resolve_source
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.datasets.config import DataCheckConfig
from nemo_automodel.components.datasets.document_view import DocumentView, documents_of, rows_of
from nemo_automodel.components.datasets.label_check import NO_LIMITS, LabelStatistics, ModelLimits, check_labels
from nemo_automodel.components.datasets.loader import ResumableDataLoader
from nemo_automodel.components.datasets.packed_rows import PackedRows
from nemo_automodel.components.datasets.packed_stream import PackedStream
from nemo_automodel.components.datasets.packing import PackingReport
from nemo_automodel.components.datasets.streaming import IndexedStream
from nemo_automodel.components.datasets.token_budget import TokenBudgetCollater
from nemo_automodel.components.datasets.utils import default_collater, packed_sequence_thd_collater
from nemo_automodel.components.training.rng import ScopedRNG
from nemo_automodel.shared.types import IGNORE_INDEX, Batch

logger = logging.getLogger(__name__)


class DataCheck:
    """Looks at a run's training rows once.

    ``source`` is the training set of ``loader`` before packing; ``limits`` is what the model can take.
    """

    def __init__(
        self,
        config: DataCheckConfig,
        loader: ResumableDataLoader,
        source: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
        limits: ModelLimits = NO_LIMITS,
    ) -> None:
        self.config, self.loader, self.source, self.tokenizer = config, loader, source, tokenizer
        self._seed, self._limits = seed, limits
        self.statistics: LabelStatistics | None = None
        """What was found first; None until rows were looked at."""
        self._has_seen_first = False

    def before_model(self, num_batches: int) -> None:
        """Look at the first ``num_batches`` micro-batches and a sample, and log what was counted.

        Raises:
            UserError: the rows cannot teach what they should.
        """
        self.look(num_batches)
        if self.statistics is not None:
            logger.info("%s", self.statistics)

    def look(self, num_batches: int) -> None:
        """Do what ``before_model`` does without a word."""
        batches = self.loader.peek(num_batches)
        self._has_seen_first = batches is not None
        first = [index for batch in batches or () for index in batch]
        with ScopedRNG(self._seed, ranked=True):
            if self._is_packed:
                sample, packed = self._sample(), list(itertools.chain(*rows_of(self.loader.dataset, first)))
            else:
                sample, packed = self._sample(also=first), []
            collated = self._collated(batches[0]) if batches else []
        self._check(sample, packed)
        if collated:
            # a collate function of the user's may mask again; only what is left of whole rows is judged
            lenient = replace(self.config, max_unlearned_share=1.0)
            check_labels(collated, self.tokenizer, lenient, limits=self._limits)

    def first_step(self, batches: Sequence[Batch]) -> None:
        """Look at the batches of a step, unless its rows were looked at before.

        Raises:
            UserError: the rows cannot teach what they should.
        """
        if self._has_seen_first:
            return
        self._has_seen_first = True
        documents = [
            document
            for number, batch in enumerate(batches, start=1)
            for document in documents_of(batch, f"Micro-batch {number} of the first step")
        ]
        is_first_look = self.statistics is None
        self._check([], documents)
        if is_first_look:
            logger.info("%s", self.statistics)

    @property
    def _is_packed(self) -> bool:
        return self.source is not self.loader.dataset

    def _collated(self, batch: list[int]) -> list[DocumentView]:
        """Return the documents of the first micro-batch as a collate function of the user's makes it."""
        loader = self.loader
        collate_fn = loader.collate_fn
        if isinstance(collate_fn, TokenBudgetCollater):
            collate_fn = collate_fn.collate_fn
        if collate_fn in (default_collater, packed_sequence_thd_collater) or isinstance(
            loader.dataset, IterableDataset
        ):
            return []
        made = collate_fn([loader.dataset[index] for index in batch])
        return documents_of(made, "The first micro-batch")

    def _sample(self, also: Sequence[int] = ()) -> list[DocumentView]:
        """Return documents of the set before packing, in its order: rows chosen by the seed, and the rows ``also``."""
        rows = self.source.rows_behind() if isinstance(self.source, IndexedStream) else self.source
        num_rows = _num_rows(rows)
        chosen: set[int] = set()
        if num_rows is not None:
            rng = np.random.default_rng([self._seed, num_rows])
            chosen = set(rng.choice(num_rows, size=min(self.config.sample_rows, num_rows), replace=False).tolist())
        indices = sorted(chosen.union(also))
        return list(itertools.chain(*rows_of(self.source if rows is None else rows, indices)))

    def _check(self, sample: list[DocumentView], packed: list[DocumentView]) -> None:
        num_dropped = num_kept = 0
        report = self._packing_report()
        if report is not None:
            sample, num_dropped = _as_packed(sample, report)
            num_kept = len(sample)
            # a document that is both in the sample and in the first packs is one document
            known = {document.content for document in sample}
            packed = [document for document in packed if document.content not in known]
        documents = sample + packed
        if not documents:
            return
        found = check_labels(
            documents,
            self.tokenizer,
            self.config,
            num_rows=_num_rows(self.source) if sample else None,
            num_dropped=num_dropped,
            num_kept=num_kept,
            limits=self._limits,
        )
        self.statistics = self.statistics or found

    def _packing_report(self) -> PackingReport | None:
        packed = self.loader.dataset
        return packed.report if isinstance(packed, PackedRows | PackedStream) else None


def _as_packed(documents: list[DocumentView], report: PackingReport) -> tuple[list[DocumentView], int]:
    """Return what packing leaves of documents that are longer than a row, and how many it leaves out."""
    fitting = [document for document in documents if len(document.input_ids) <= report.size]
    if len(fitting) == len(documents) or not report.cuts_long:
        return fitting, len(documents) - len(fitting)
    return [_cut(document, report.size) for document in documents], 0


def _cut(document: DocumentView, size: int) -> DocumentView:
    if len(document.input_ids) <= size:
        return document
    labels = document.labels[:size]
    num_lost = document.num_learned - sum(label != IGNORE_INDEX for label in labels)
    kept = replace(document, input_ids=document.input_ids[:size], labels=labels)
    return replace(
        kept,
        cut_ids=[*document.ids[len(kept.ids) :], *document.cut_ids],
        num_learned_cut=document.num_learned_cut + num_lost,
        cut_by="packed_sequence.packed_sequence_size",
    )


def _num_rows(rows: Any) -> int | None:
    try:
        return len(rows)
    except TypeError:  # what `len` raises for a stream
        return None


def limits_of(model: ConfigNode, model_path: str | None) -> ModelLimits:
    """Return what the model can take, as its section or its local config.json says."""
    values: dict[str, Any] = {}
    if model_path is not None:
        file = Path(resolve_source(model_path)) / "config.json"
        values = read_json(file) if file.is_file() else {}
        values = {**values, **(values.get("text_config") or {})}
    found = [model.get(key, values.get(key)) for key in ("vocab_size", "max_position_embeddings")]
    return ModelLimits(*(value if isinstance(value, int) else None for value in found))
