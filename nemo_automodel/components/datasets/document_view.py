"""What one training sample says, read back: its documents, their tokens, and which of them are learned.

Samples come in several shapes: a dict of lists, a dict of tensors, a whole batch in one item, a packed row of several
documents. Whoever wants to know what the model is taught (the label gate, ``automodel inspect``) asks for documents
instead. Labels are shifted, so the last token of a document may stand in its labels only.

The type that leaves this stage is ``DocumentView``: one document without its padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from nemo_automodel.components.datasets.llm.formatting import PAD_TOKEN_IDS
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.mix import MixedRows
from nemo_automodel.components.datasets.packed_rows import PackedRows
from nemo_automodel.components.datasets.rows import describe
from nemo_automodel.components.datasets.streaming import IndexedStream
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX, SEQ_LENS_PADDING


@dataclass(frozen=True)
class DocumentView:
    """One document as the model gets it."""

    where: str
    """File and line, or data set and row."""
    input_ids: list[int]
    labels: list[int]
    """Shifted: ``labels[s]`` is the token after ``input_ids[s]``, or -100."""
    cut_ids: list[int] = field(default_factory=list)
    """Tokens that were cut off at the end."""
    cut_by: str = "dataset.seq_length"
    """The key that cut them off."""
    num_learned_cut: int = 0
    """How many of them would be learned."""
    num_learned_padding: int = 0
    """Labels on padding."""
    num_shared: int = 0
    """Tokens at the start that the row holds once for several documents, if this is not the first of them."""
    is_skipped: bool = False
    """Left out by the user's own wish (``skip_invalid_samples``)."""
    row_id: str | None = None
    """The row's own ``id``."""

    @property
    def ids(self) -> list[int]:
        """Every token, the one that is only a label included."""
        last = self.labels[-1] if self.labels else IGNORE_INDEX
        return self.input_ids if last == IGNORE_INDEX else [*self.input_ids, last]

    @property
    def learned(self) -> list[bool]:
        """Whether each of ``ids`` is learned; the first never is, since nothing comes before it."""
        return [False, *(label != IGNORE_INDEX for label in self.labels)][: len(self.ids)]

    @cached_property
    def num_learned(self) -> int:
        """Number of learned tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """``input_ids`` and ``labels`` as int64 ``[T]``."""
        return np.array(self.input_ids, dtype=np.int64), np.array(self.labels, dtype=np.int64)

    @property
    def content(self) -> tuple[bytes, bytes]:
        """Tokens and labels as bytes, equal for documents that teach the same."""
        ids, labels = self.arrays
        return ids.tobytes(), labels.tobytes()


def rows_of(dataset: Any, indices: Sequence[int]) -> list[list[DocumentView]]:
    """Return the documents of each of the rows ``indices`` of a map-style set; nothing that is counted changes.

    A row of a set that yields whole batches has the documents of all its rows.

    Raises:
        UserError: a row cannot be built, or is no sample.
    """
    if isinstance(dataset, TokenizedRows):
        return [[document] for document in _of_tokenized_rows(dataset, indices)]
    if isinstance(dataset, MixedRows):
        return [_of_mixed_row(dataset, index) for index in indices]
    if isinstance(dataset, PackedRows):
        return [_of_packed_rows(dataset, index) for index in indices]
    if isinstance(dataset, IndexedStream):
        behind = dataset.rows_behind()
        if behind is not None:
            return rows_of(behind, indices)
        return [documents_of(dataset.item(index), f"Item {index + 1:,} of the stream") for index in indices]
    return [documents_of(dataset[index], f"Row {index + 1:,} of the data set") for index in indices]


def _of_packed_rows(dataset: PackedRows, index: int) -> list[DocumentView]:
    documents = documents_of(dataset[index], f"Packed row {index + 1:,}")
    places = dataset.where(index)
    if places is None:
        return documents
    return [replace(document, where=place) for document, place in zip(documents, places, strict=True)]


def _of_mixed_row(dataset: MixedRows, index: int) -> list[DocumentView]:
    inner, row = dataset.locate(index)
    (documents,) = rows_of(inner, [row])
    if isinstance(inner, TokenizedRows):
        return documents
    return [replace(document, where=dataset.where(index)) for document in documents]


def _of_tokenized_rows(dataset: TokenizedRows[Any], indices: Sequence[int]) -> list[DocumentView]:
    found = []
    for index, encoded in dataset.encode(indices):
        (document,) = documents_of(dataset.layout.sample(encoded), dataset.rows.where(index))
        limit = dataset.layout.max_tokens
        num_kept, num_cut = dataset.layout.num_cut(encoded)
        row_id = dataset.rows[index].get("id")
        found.append(
            replace(
                document,
                # the first of them may be one that would only be a label, and is none
                cut_ids=[] if limit is None or len(encoded.ids) <= limit else encoded.ids[len(document.ids) :],
                num_learned_cut=num_cut,
                is_skipped=dataset.skips_invalid and (not encoded.learned or (num_cut > 0 and num_kept == 0)),
                row_id=None if row_id is None else str(row_id),
            )
        )
    return found


def documents_of(sample: Any, where: str) -> list[DocumentView]:
    """Return the documents of a sample or batch, in order; see ``rows_in``."""
    return [document for row in rows_in(sample, where) for document in row]


def rows_in(sample: Any, where: str) -> list[list[DocumentView]]:
    """Return the documents of each row of a sample or batch.

    Raises:
        UserError: it lacks ``input_ids`` or ``labels``, or they are not of one length.
    """
    if not isinstance(sample, dict):
        raise UserError(
            f"{where} is {describe(sample)}, but it must be a dict with `input_ids` and `labels`. "
            "Return one from the data set."
        )
    for key in ("input_ids", "labels"):
        if key not in sample:
            there = ", ".join(str(name) for name in sample if name != PAD_TOKEN_IDS)
            raise UserError(
                f"{where} has no `{key}`. Its fields: {there or 'none'}. Return `input_ids` and "
                "`labels` (shifted by one, -100 where nothing is learned)."
            )
    fields = {key: _lists(sample[key]) for key in _FIELDS if key in sample}
    num_rows = len(fields["input_ids"])
    return [
        _of_row(
            {key: values[row] for key, values in fields.items()}, where if num_rows == 1 else f"{where}, row {row + 1}"
        )
        for row in range(num_rows)
    ]


_FIELDS = ("input_ids", "labels", "attention_mask", "loss_mask", "seq_lens", "branch_ids")


def _lists(value: Any) -> list[list[int]]:
    """Return one list for each row of a field, whether the sample is one row or a batch of them."""
    values = value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else list(value)
    return values if values and isinstance(values[0], list | tuple) else [values]


def _of_row(row: dict[str, list[int]], where: str) -> list[DocumentView]:
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) != len(labels):
        raise UserError(
            f"{where} has {len(ids)} `input_ids`, but {len(labels)} `labels`. They must be of one length: labels are "
            "shifted by one, and -100 where nothing is learned."
        )
    if "loss_mask" in row:
        labels = [label if keep else IGNORE_INDEX for label, keep in zip(labels, row["loss_mask"], strict=True)]
    if "seq_lens" in row:
        lengths = [length for length in row["seq_lens"] if length != SEQ_LENS_PADDING]
        return _of_packed_row(ids, labels, lengths, row.get("branch_ids"), where)
    if "attention_mask" not in row:
        return [DocumentView(where, ids, labels)]
    real = [position for position, is_real in enumerate(row["attention_mask"]) if is_real]
    first, end = (real[0], real[-1] + 1) if real else (0, 0)
    num_learned_padding = sum(label != IGNORE_INDEX for label in [*labels[: max(first - 1, 0)], *labels[end:]])
    return [DocumentView(where, ids[first:end], labels[first:end], num_learned_padding=num_learned_padding)]


def _of_packed_row(
    ids: list[int], labels: list[int], lengths: list[int], branch_ids: list[int] | None, where: str
) -> list[DocumentView]:
    documents: list[DocumentView] = []
    start = 0
    for number, length in enumerate(lengths, start=1):
        end, place = start + length, f"{where}, document {number}"
        branches = [] if branch_ids is None else branch_ids[start:end]
        if any(branches):
            documents += _of_branches(ids[start:end], labels[start:end], branches, place)
        else:
            documents.append(DocumentView(place, ids[start:end], labels[start:end]))
        start = end
    if documents:
        stray = sum(label != IGNORE_INDEX for label in labels[start:])
        documents[-1] = replace(documents[-1], num_learned_padding=stray)
    return documents


def _of_branches(ids: list[int], labels: list[int], branches: list[int], where: str) -> list[DocumentView]:
    """Return each branch with the beginning that all of them share."""
    prefix = branches.count(0)
    documents, start = [], prefix
    for number in range(1, max(branches) + 1):
        end = start + branches.count(number)
        documents.append(
            DocumentView(
                f"{where}, branch {number}",
                ids[:prefix] + ids[start:end],
                labels[:prefix] + labels[start:end],
                num_shared=0 if number == 1 else prefix,
            )
        )
        start = end
    return documents
