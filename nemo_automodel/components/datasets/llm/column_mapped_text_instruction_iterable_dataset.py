"""The iterable form of the column-mapped set: rows come in a stream that can be repeated for ever."""

from __future__ import annotations

from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
    ColumnMappedTextInstructionDataset,
)


class ColumnMappedTextInstructionIterableDataset(ColumnMappedTextInstructionDataset):
    """Takes the same arguments and returns a stream, which repeats unless ``repeat_on_exhaustion`` is false."""

    always_streams = True
