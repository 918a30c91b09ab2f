"""Prompt and answer from columns the user names: ``context`` and ``question`` prompt, ``answer`` is learned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.chat_formatting import ChatEncoder, Conversation, use_chat_template
from nemo_automodel.components.datasets.llm.formatting import Layout, PromptAnswer, PromptAnswerEncoder
from nemo_automodel.components.datasets.llm.sample_stream import Streamable
from nemo_automodel.components.datasets.llm.tokenized_rows import Encoder, TokenizedRows
from nemo_automodel.components.datasets.rows import Row, describe
from nemo_automodel.components.datasets.sources import load_rows
from nemo_automodel.shared.errors import UserError, did_you_mean

_KEYS = ("context", "question", "answer")


class ColumnMappedTextInstructionDataset(Streamable, TokenizedRows[Any]):
    """Samples from the columns named in ``column_mapping``.

    The prompt is context and question, where they are there and not empty, with a space after each. Numbers become
    text; null counts as empty.
    """

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
        streaming: bool = False,
        repeat_on_exhaustion: bool | None = None,
    ) -> None:
        """Load the rows; nothing is tokenised yet.

        * ``path_or_dataset_id``: Hub name, file, directory or glob, see ``sources.load_rows``.
        * ``column_mapping``: ``answer`` and at least one of ``context`` and ``question`` → column of the data.
        * ``answer_only_loss_mask``: false learns the prompt too.
        * ``use_hf_chat_template``: render with the tokenizer's chat template, the prompt as the user's turn.
        * ``streaming``: a stream, see ``sample_stream``.
        * ``repeat_on_exhaustion``: the stream begins again after its last row, so that ``max_steps`` decides; by
          default the iterable form does, and ``streaming: true`` does not.

        Raises:
            UserError: unreadable data, a bad mapping, a missing column, or no chat template where one is asked for.
        """
        mapping = _checked_mapping(column_mapping)
        if repeat_on_exhaustion and not streaming:
            raise UserError("`dataset.repeat_on_exhaustion: true` is for streams. Set `dataset.streaming: true`.")
        self.repeats = self.always_streams if repeat_on_exhaustion is None else repeat_on_exhaustion
        rows = load_rows(path_or_dataset_id, split, name, limit_dataset_samples, streaming=streaming)
        rows.require_columns(*mapping.values())
        layout = Layout.of(tokenizer, seq_length, padding, truncation)
        encoder: Encoder[Any]
        if use_hf_chat_template:
            template = use_chat_template(tokenizer, None)
            if template is None:
                raise UserError(
                    "`dataset.use_hf_chat_template: true` needs a chat template, but the tokenizer has none. "
                    "Set it to false, or use an instruction-tuned model's tokenizer."
                )
            encoder = ChatEncoder(tokenizer, template, answer_only=answer_only_loss_mask)
            super().__init__(rows, partial(_conversation, mapping=mapping), encoder, layout)
        else:
            encoder = PromptAnswerEncoder(tokenizer, answer_only=answer_only_loss_mask)
            super().__init__(rows, partial(_prompt_answer, mapping=mapping), encoder, layout)


def _checked_mapping(mapping: Mapping[str, str]) -> dict[str, str]:
    for key in mapping:
        if key not in _KEYS:
            raise UserError(
                f"`dataset.column_mapping.{key}` is not known.{did_you_mean(key, _KEYS)} Known: {', '.join(_KEYS)}."
            )
    chosen = {key: mapping[key] for key in _KEYS if mapping.get(key) is not None}
    if "answer" not in chosen or len(chosen) < 2:
        raise UserError(
            f"`dataset.column_mapping` names {', '.join(chosen) or 'nothing'}, but it needs `answer` and at least "
            "one of `context` and `question`."
        )
    return chosen


def _prompt_answer(row: Row, where: str, mapping: dict[str, str]) -> PromptAnswer:
    texts = {key: _text(row.get(column), column, where) for key, column in mapping.items()}
    answer = texts.pop("answer")
    parts = [text for text in texts.values() if text]
    if not parts:
        raise UserError(f"{where}: {' and '.join(mapping[key] for key in texts)} hold no text, so there is no prompt.")
    return PromptAnswer(" ".join(parts) + " ", answer)


def _conversation(row: Row, where: str, mapping: dict[str, str]) -> Conversation:
    prompt, answer = _prompt_answer(row, where, mapping)
    return Conversation([{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": answer}])


def _text(value: object, column: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: the column `{column}` holds {describe(value)}, but it must hold text.")
    return str(value)
