"""Packing: several short documents share a row, so that no time goes into padding.

A document is never cut in two. ``thd`` keeps the order: a document that does not fit any more begins the next row.
``neat`` looks at all lengths and always takes the longest document that still fits; the rows then stand in the order of
their first document. In a row ``position_ids`` restart at 0 with every document and run on into the padding at the end,
and ``seq_lens`` says where the documents lie: whoever computes attention keeps them apart by it.

All documents are tokenised before the first step; they are kept as int32, 8 bytes a token with its label.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

_DOCUMENTS_AT_ONCE = 1000


@dataclass
class PackingReport:
    """What packing did to a data set."""

    size: int
    """Tokens of a row."""
    num_rows: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    """Tokens of the documents."""
    num_too_long: int = 0
    num_unlearned: int = 0
    """Documents without a learned token, left out."""

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
            line += f", {self.num_too_long:,} documents dropped because they are longer than a row"
        if self.num_unlearned:
            line += f", {self.num_unlearned:,} dropped because nothing of them is learned"
        return line + "."


class PackedRows(Dataset[Sample]):
    """Packed rows, put together when asked for.

    A row holds ``input_ids``, ``labels``, ``position_ids`` (lists of ``size``), ``seq_lens`` (lengths of its documents)
    and ``seq_lens_padded`` (the same, the last one with the padding).
    """

    def __init__(
        self,
        documents: Sequence[tuple[np.ndarray, np.ndarray]],
        packs: Sequence[Sequence[int]],
        report: PackingReport,
        pad_token_id: int,
    ) -> None:
        self._documents, self._packs, self._pad_token_id = documents, packs, pad_token_id
        self.report = report

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> Sample:
        size = self.report.size
        input_ids, labels = np.full(size, self._pad_token_id), np.full(size, IGNORE_INDEX)
        position_ids, lengths, end = np.zeros(size, dtype=np.int64), [], 0
        for number in self._packs[index]:
            ids, document_labels = self._documents[number]
            start, end = end, end + len(ids)
            input_ids[start:end], labels[start:end] = ids, document_labels
            position_ids[start:] = np.arange(size - start)  # the last document's run on into the padding
            lengths.append(len(ids))
        return {
            "input_ids": input_ids.tolist(),
            "labels": labels.tolist(),
            "position_ids": position_ids.tolist(),
            "seq_lens": lengths,
            "seq_lens_padded": [*lengths[:-1], lengths[-1] + size - end],
        }


def pack_dataset(
    dataset: Any,
    cfg: PackedSequenceConfig,
    *,
    pad_token_id: int,
    seed: int,
    shuffle: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Pack a map-style data set of samples into rows of ``cfg.packed_sequence_size`` tokens.

    ``shuffle`` shuffles the documents with ``seed`` first; ``progress`` is called with the number of documents done and
    the number of all.

    Returns:
        ``PackedRows``; with ``cfg.prepacked`` the data set itself, once its first row is seen to be packed.

    Raises:
        UserError: an iterable data set, nothing fits, or a document is too long and ``drop_long_samples`` is false.
    """
    if cfg.prepacked:
        _check_prepacked(dataset[0], cfg.packed_sequence_size)
        return dataset
    if isinstance(dataset, IterableDataset):
        raise UserError(
            "`packed_sequence.packed_sequence_size` needs a data set with a length, but this one is a stream. Set it "
            "to 0, or use the map-style form of the data set."
        )
    if cfg.num_proc > 1:
        logger.warning("`packed_sequence.num_proc: %d` has no effect: the tokenizer uses all cores.", cfg.num_proc)
    order = np.random.default_rng(seed).permutation(len(dataset)) if shuffle else np.arange(len(dataset))
    report = PackingReport(size=cfg.packed_sequence_size)
    documents: list[tuple[np.ndarray, np.ndarray]] = []
    stream = _fitting_documents(dataset, order.tolist(), cfg, report, progress)
    pack = _next_fit if cfg.packing_strategy == "thd" else _longest_first
    packs = pack(stream, documents, report.size, cfg.max_packs)
    if not packs:
        raise UserError(
            f"None of the {len(dataset):,} documents can be packed: {report.num_too_long:,} are longer than "
            f"`packed_sequence.packed_sequence_size: {report.size}`, {report.num_unlearned:,} have nothing to learn."
        )
    report.num_rows, report.num_documents = len(packs), sum(len(pack) for pack in packs)
    report.num_tokens = sum(len(documents[number][0]) for pack in packs for number in pack)
    logger.info("%s", report)
    return PackedRows(documents, packs, report, pad_token_id)


def _check_prepacked(row: Sample, size: int) -> None:
    missing = [key for key in ("input_ids", "labels", "position_ids", "seq_lens", "seq_lens_padded") if key not in row]
    if missing or len(row["input_ids"]) != size:
        what = f"has no `{missing[0]}`" if missing else f"has {len(row['input_ids'])} tokens"
        raise UserError(
            f"`packed_sequence.prepacked: true` expects packed rows of {size} tokens, but the first row {what}. "
            "Set it to false to have the rows packed."
        )


def _fitting_documents(
    dataset: Any,
    order: list[int],
    cfg: PackedSequenceConfig,
    report: PackingReport,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and labels of every document that can be packed; count the others in ``report``."""
    for start in range(0, len(order), _DOCUMENTS_AT_ONCE):
        indices = order[start : start + _DOCUMENTS_AT_ONCE]
        samples = dataset.__getitems__(indices) if isinstance(dataset, TokenizedRows) else [dataset[i] for i in indices]
        for index, sample in zip(indices, samples, strict=True):
            ids, labels = _document(sample)
            if len(ids) > report.size:
                if not cfg.drop_long_samples:
                    where = dataset.rows.where(index) if isinstance(dataset, TokenizedRows) else f"Row {index + 1}"
                    raise UserError(
                        f"{where} has {len(ids):,} tokens, but `packed_sequence.packed_sequence_size` is "
                        f"{report.size:,}. Raise it, set `packed_sequence.drop_long_samples: true`, or truncate with "
                        "`dataset.seq_length`."
                    )
                report.num_too_long += 1
            elif (labels == IGNORE_INDEX).all():
                report.num_unlearned += 1
            else:
                yield ids, labels
        if progress is not None:
            progress(start + len(indices), len(order))


def _document(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and labels without padding, with a ``loss_mask`` folded into the labels."""
    length = sum(sample["attention_mask"]) if "attention_mask" in sample else len(sample["input_ids"])
    ids = np.array(sample["input_ids"][:length], dtype=np.int32)
    labels = np.array(sample["labels"][:length], dtype=np.int32)
    if "loss_mask" in sample:
        labels[np.array(sample["loss_mask"][:length]) == 0] = IGNORE_INDEX
    return ids, labels


def _next_fit(
    stream: Iterator[tuple[np.ndarray, np.ndarray]],
    documents: list[tuple[np.ndarray, np.ndarray]],
    size: int,
    max_packs: int | None,
) -> list[list[int]]:
    packs: list[list[int]] = []
    free = 0
    for document in stream:
        length = len(document[0])
        if not packs or length > free:
            if max_packs is not None and len(packs) == max_packs:
                break  # nothing more is tokenised
            packs.append([])
            free = size
        packs[-1].append(len(documents))
        documents.append(document)
        free -= length
    return packs


def _longest_first(
    stream: Iterator[tuple[np.ndarray, np.ndarray]],
    documents: list[tuple[np.ndarray, np.ndarray]],
    size: int,
    max_packs: int | None,
) -> list[list[int]]:
    documents.extend(stream)
    by_length: dict[int, list[int]] = {}
    for number in reversed(range(len(documents))):
        by_length.setdefault(len(documents[number][0]), []).append(number)
    lengths = sorted(by_length)
    packs = []
    while lengths:
        pack, free = [], size
        while (at := bisect_right(lengths, free) - 1) >= 0:
            length = lengths[at]
            pack.append(by_length[length].pop())
            free -= length
            if not by_length[length]:
                del lengths[at]
        packs.append(sorted(pack))
    return sorted(packs)[:max_packs]
