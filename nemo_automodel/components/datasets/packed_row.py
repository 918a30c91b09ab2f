"""One packed row: documents one after the other, and what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_automodel.components.datasets.branches import branch_places
from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.components.datasets.packing import Document
from nemo_automodel.shared.types import IGNORE_INDEX


def packed_row(documents: Sequence[Document], size: int, pad_token_id: int) -> Sample:
    """Put documents into a row.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` (lists of ``size``), ``seq_lens`` (lengths of the documents) and
        ``seq_lens_padded`` (the same, the last one with the padding); ``branch_ids`` where a document has branches.
    """
    input_ids, labels = np.full(size, pad_token_id), np.full(size, IGNORE_INDEX)
    position_ids, branch_ids = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    lengths, end = [], 0
    for document in documents:
        start, end = end, end + len(document.ids)
        input_ids[start:end], labels[start:end] = document.ids, document.labels
        position_ids[start:] = np.arange(size - start)  # the last document's run on into the padding
        if document.branches is not None:
            position_ids[start:end], branch_ids[start:end] = branch_places(document.branches)
        lengths.append(len(document.ids))
    row = {
        "input_ids": input_ids.tolist(),
        "labels": labels.tolist(),
        "position_ids": position_ids.tolist(),
        "seq_lens": lengths,
        "seq_lens_padded": [*lengths[:-1], lengths[-1] + size - end],
    }
    if any(document.branches is not None for document in documents):
        row["branch_ids"] = branch_ids.tolist()
    return row
