"""The iterable form of the column-mapped set: rows come in a stream that can be repeated for ever."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
    ColumnMappedTextInstructionDataset,
)
from nemo_automodel.components.datasets.llm.formatting import Sample
from nemo_automodel.components.datasets.streaming import IndexedStream


class ColumnMappedTextInstructionIterableDataset(IndexedStream[Sample]):
    """Stream the samples of ``ColumnMappedTextInstructionDataset``; its arguments mean the same here."""

    def __init__(
        self,
        path_or_dataset_id: str,
        column_mapping: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        split: str | None = "train",
        name: str | None = None,
        answer_only_loss_mask: bool = True,
        seq_length: int | None = None,
        padding: bool | str = "do_not_pad",
        truncation: bool | str = "do_not_truncate",
        limit_dataset_samples: int | None = None,
        use_hf_chat_template: bool = False,
        repeat_on_exhaustion: bool = True,
    ) -> None:
        """Load the rows; ``repeat_on_exhaustion`` begins again after the last, so that ``max_steps`` decides."""
        self._samples = ColumnMappedTextInstructionDataset(
            path_or_dataset_id,
            column_mapping,
            tokenizer,
            split,
            name,
            answer_only_loss_mask,
            seq_length,
            padding,
            truncation,
            limit_dataset_samples,
            use_hf_chat_template,
        )
        super().__init__(len(self._samples), repeats=repeat_on_exhaustion)

    def item(self, index: int) -> Sample:
        """Return the sample of row ``index``."""
        return self._samples[index]
