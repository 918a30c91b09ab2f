"""Extractive question answering in SQuAD's schema: ``context``, ``question``, ``answers.text``."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.chat_formatting import ChatEncoder, Conversation, use_chat_template
from nemo_automodel.components.datasets.llm.formatting import Layout, PromptAnswer, PromptAnswerEncoder, Sample
from nemo_automodel.components.datasets.llm.sample_stream import as_stream
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.rows import Row, from_json_text
from nemo_automodel.components.datasets.sources import load_rows
from nemo_automodel.components.datasets.streaming import Stream
from nemo_automodel.shared.errors import UserError


def make_squad_dataset(
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int | None = None,
    limit_dataset_samples: int | None = None,
    fp8: bool = False,
    split: str = "train",
    dataset_name: str = "squad",
    padding: bool | str = False,
    truncation: bool | str = False,
    chat_template: str | None = None,
    streaming: bool = False,
) -> TokenizedRows[Any] | Stream[Sample]:
    """Build prompt-and-answer samples from SQuAD-shaped rows.

    The prompt is ``Context: … Question: … Answer: ``, the answer is the first of ``answers.text``. Where the tokenizer
    has a chat template, or ``chat_template`` gives one (text, or a ``.jinja`` or ``.json`` file), the prompt is the
    user's turn and the answer the assistant's.

    ``dataset_name`` is a Hub name, a file, a directory or a glob, see ``sources.load_rows``; ``limit_dataset_samples``
    keeps the first rows only. ``fp8`` pads every sample to a multiple of 16 tokens. ``streaming`` gives a stream, see
    ``sample_stream``.

    Raises:
        UserError: unreadable data, a missing column, or keys that do not go together.
    """
    rows = load_rows(dataset_name, split, limit=limit_dataset_samples, streaming=streaming)
    rows.require_columns("context", "question", "answers")
    layout = Layout.of(tokenizer, seq_length, padding, truncation, fp8=fp8)
    template = use_chat_template(tokenizer, chat_template)
    dataset: TokenizedRows[Any]
    if template is None:
        dataset = TokenizedRows(rows, _prompt_answer, PromptAnswerEncoder(tokenizer), layout)
    else:
        dataset = TokenizedRows(rows, _conversation, ChatEncoder(tokenizer, template), layout)
    return as_stream(dataset) if streaming else dataset


def _prompt_answer(row: Row, where: str) -> PromptAnswer:
    answers = from_json_text(row.get("answers"))
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise UserError(f'{where}: `answers` must look like {{"text": ["…"]}} with one text or more.')
    for column in ("context", "question"):
        if not isinstance(row.get(column), str):
            raise UserError(f"{where}: `{column}` must be text.")
    prompt = f"Context: {row['context']} Question: {row['question']} Answer: "
    return PromptAnswer(prompt, texts[0].strip())


def _conversation(row: Row, where: str) -> Conversation:
    prompt, answer = _prompt_answer(row, where)
    return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
