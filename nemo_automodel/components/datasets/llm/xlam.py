"""Function calling in xLAM's schema: ``query``, ``tools`` and ``answers``, the last two often as JSON text.

The query is the user's turn, the calls are the assistant's, and the tools are offered to the template. Which text that
becomes is the chat template's business, so there is no plain-text form: a model that is served with another format than
it was trained with does not call anything.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.chat_dataset import ConversationRows
from nemo_automodel.components.datasets.llm.chat_formatting import ChatEncoder, Conversation, Message, use_chat_template
from nemo_automodel.components.datasets.llm.formatting import Layout, Sample
from nemo_automodel.components.datasets.llm.sample_stream import as_stream
from nemo_automodel.components.datasets.llm.tool_calls import (
    ToolReader,
    as_tool,
    as_tool_call,
    parse_json_list,
)
from nemo_automodel.components.datasets.rows import Row
from nemo_automodel.components.datasets.sources import load_rows
from nemo_automodel.components.datasets.streaming import Stream
from nemo_automodel.shared.errors import UserError


def make_xlam_dataset(
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int | None = None,
    limit_dataset_samples: int | None = None,
    fp8: bool = False,
    split: str = "train",
    dataset_name: str = "Salesforce/xlam-function-calling-60k",
    padding: bool | str = False,
    truncation: bool | str = False,
    chat_template: str | None = None,
    skip_invalid_samples: bool = False,
    streaming: bool = False,
) -> ConversationRows | Stream[Sample]:
    """Build samples from rows of a query, the tools on offer and the calls to make.

    ``dataset_name`` is a Hub name, a file, a directory or a glob, see ``sources.load_rows``; ``limit_dataset_samples``
    keeps the first rows only. ``fp8`` pads every sample to a multiple of 16 tokens. ``skip_invalid_samples`` lets a row
    teach nothing that cannot be used: some templates refuse several calls in one turn. ``streaming`` gives a stream,
    see ``sample_stream``.

    Raises:
        UserError: unreadable data, a missing column, or no chat template.
    """
    rows = load_rows(
        dataset_name, split, limit=limit_dataset_samples, skip_invalid=skip_invalid_samples, streaming=streaming
    )
    rows.require_columns("query", "tools", "answers")
    template = use_chat_template(tokenizer, chat_template)
    if template is None:
        raise UserError(
            "make_xlam_dataset needs a chat template that writes tools and calls, but the tokenizer has none. Set "
            "`dataset.chat_template` to a text or a .jinja file, or use an instruction-tuned model's tokenizer."
        )
    layout = Layout.of(tokenizer, seq_length, padding, truncation, fp8=fp8)
    reader = ToolReader(_conversation, tokenizer, template)
    dataset = ConversationRows(rows, reader, ChatEncoder(tokenizer, template), layout, skip_invalid_samples)
    return as_stream(dataset) if streaming else dataset


def _conversation(row: Row, where: str) -> Conversation:
    query = row.get("query")
    if not isinstance(query, str) or not query.strip():
        raise UserError(f"{where}: `query` must be text, and not empty.")
    calls = [as_tool_call(call, where) for call in parse_json_list(row.get("answers"), "answers", where)]
    if not calls:
        raise UserError(f"{where}: `answers` holds no call, so there is nothing to learn. Remove the row.")
    tools = [as_tool(tool, where) for tool in parse_json_list(row.get("tools"), "tools", where)]
    messages: list[Message] = [
        {"role": "user", "content": query},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    return Conversation(messages, tools or None)
