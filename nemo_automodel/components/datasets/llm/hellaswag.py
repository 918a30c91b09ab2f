"""HellaSwag as a fine-tuning task: the context is given, the right one of four endings is learned."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.formatting import (
    PAD_TOKEN_IDS,
    Layout,
    PromptAnswer,
    PromptAnswerEncoder,
    Sample,
    pad_token_id,
)
from nemo_automodel.components.datasets.llm.sample_stream import Streamable
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.rows import Row, from_json_text
from nemo_automodel.components.datasets.sources import load_rows
from nemo_automodel.components.datasets.streamed_rows import StreamedRows
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX

_ROWS_AT_ONCE = 1000
_LENGTH_MULTIPLE = 8


class HellaSwag(Streamable, TokenizedRows[PromptAnswer]):
    """Samples of context and gold ending, with a ``loss_mask`` beside the labels (1 where a label is learned).

    ``pad_to_max_length`` pads every sample to the longest of the set, rounded up to a multiple of 8, and tokenises
    the set once to know it.
    """

    def __init__(
        self,
        path_or_dataset: str,
        tokenizer: PreTrainedTokenizerBase,
        split: str = "train",
        num_samples_limit: int | None = None,
        pad_to_max_length: bool = True,
        streaming: bool = False,
    ) -> None:
        """Load the rows; ``streaming`` gives a stream, see ``sample_stream``.

        Raises:
            UserError: unreadable data or a missing column.
        """
        rows = load_rows(path_or_dataset, split, limit=num_samples_limit, streaming=streaming)
        if pad_to_max_length and isinstance(rows, StreamedRows):
            raise UserError(
                "`dataset.pad_to_max_length: true` needs the longest row of the set, which a stream from the Hub does "
                "not know. Set it to false: every batch is padded to its own longest row."
            )
        rows.require_columns("ctx", "endings", "label")
        super().__init__(rows, _prompt_answer, PromptAnswerEncoder(tokenizer), Layout(pad_token_id(tokenizer)))
        if pad_to_max_length:
            longest = max(
                max(self.lengths(range(start, min(start + _ROWS_AT_ONCE, len(rows)))))
                for start in range(0, len(rows), _ROWS_AT_ONCE)
            )
            length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
            self.layout = Layout(self.layout.pad_id, length, pads_to_length=True)

    def __getitems__(self, indices: list[int]) -> list[Sample]:  # type: ignore[override]
        """Return samples with their ``loss_mask``."""
        samples = super().__getitems__(indices)
        for sample in samples:
            sample["loss_mask"] = [int(label != IGNORE_INDEX) for label in sample["labels"]]
            sample[PAD_TOKEN_IDS]["loss_mask"] = 0
        return samples


def _prompt_answer(row: Row, where: str) -> PromptAnswer:
    endings, label = from_json_text(row["endings"]), str(row["label"])
    if not isinstance(endings, list) or not label.isdigit() or int(label) >= len(endings):
        raise UserError(f"{where}: `label` is {label!r}, but it must be the number of one of the endings, from 0.")
    return PromptAnswer(f"{row['ctx'].strip()} ", endings[int(label)].strip())
