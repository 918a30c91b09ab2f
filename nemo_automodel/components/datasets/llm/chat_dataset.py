"""Conversations in the two forms they are shared in: OpenAI ``messages`` and ShareGPT ``conversations``.

Both become messages as chat templates take them. Three things are mended on the way, because templates trip over them:
tool-call arguments that are JSON text become objects, content given as text parts becomes one text, and the nulls with
which table formats fill absent keys are taken out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.chat_formatting import (
    ChatEncoder,
    Conversation,
    Message,
    use_chat_template,
)
from nemo_automodel.components.datasets.llm.formatting import Encoded, Layout
from nemo_automodel.components.datasets.llm.sample_stream import Streamable
from nemo_automodel.components.datasets.llm.tokenized_rows import Encoder, TokenizedRows
from nemo_automodel.components.datasets.llm.tool_calls import ToolReader, as_tool_call
from nemo_automodel.components.datasets.rows import Row, Rows, describe
from nemo_automodel.components.datasets.sources import load_rows
from nemo_automodel.shared.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "ipython",
    "function_call": "function_call",
}


class ConversationRows(TokenizedRows[Conversation]):
    """Samples from conversations, of which rows that cannot be used may be skipped.

    With ``skips_invalid`` such a row stays in place and teaches nothing, with a warning, instead of ending the run.
    """

    def __init__(
        self,
        rows: Rows,
        to_item: Callable[[Row, str], Conversation],
        encoder: Encoder[Conversation],
        layout: Layout,
        skips_invalid: bool = False,
    ) -> None:
        self.skips_invalid = skips_invalid
        self._skipped: set[str] = set()
        super().__init__(rows, to_item, encoder, layout)

    @property
    def num_skipped_rows(self) -> int:
        """Rows skipped so far."""
        return len(self._skipped)

    def _encode(self, indices: Sequence[int]) -> list[tuple[int, Encoded]]:
        if not self.skips_invalid:
            return super()._encode(indices)
        try:
            return super()._encode(indices)
        except UserError:
            return [self._encode_or_skip(index) for index in indices]

    def _encode_or_skip(self, index: int) -> tuple[int, Encoded]:
        """Return the row, or two padding tokens without a label where the row cannot be used."""
        try:
            return super()._encode([index])[0]
        except UserError as error:
            where = self.rows.where(index)
            if where not in self._skipped:  # a row comes up again in every epoch
                self._skipped.add(where)
                logger.warning("Skipped (%d so far): %s", self.num_skipped_rows, error)
            return index, Encoded([self.layout.pad_id, self.layout.pad_id], [])


class ChatDataset(Streamable, ConversationRows):
    """Samples from conversations; which turns are learned is told in ``chat_formatting``."""

    def __init__(
        self,
        path_or_dataset_id: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: str | None = None,
        name: str | None = None,
        seq_length: int | None = None,
        padding: bool | str = "do_not_pad",
        truncation: bool | str = "do_not_truncate",
        start_of_turn_token: str | None = None,
        chat_template: str | None = None,
        shuffle_seed: int | None = None,
        mask_reasoning_content: bool = False,
        mask_history: bool = False,
        unshifted: bool = False,
        skip_invalid_samples: bool = False,
        streaming: bool = False,
    ) -> None:
        """Load the rows; nothing is rendered yet.

        * ``path_or_dataset_id``: Hub name, file, directory or glob, see ``sources.load_rows``.
        * ``chat_template``: text, or the path of a ``.jinja`` or ``.json`` file; it becomes the tokenizer's own.
        * ``shuffle_seed``: shuffle the whole split before it is sliced.
        * ``mask_reasoning_content``: do not learn the text of the reasoning; its delimiters are still learned.
        * ``mask_history``: learn the last assistant turn only.
        * ``unshifted``: leave each label on its own token, for losses that do not predict the next token.
        * ``skip_invalid_samples``: a row that cannot be used is left out (malformed lines) or teaches nothing (anything
          found later), with a warning, instead of ending the run.
        * ``streaming``: a stream, see ``sample_stream``.

        Raises:
            UserError: unreadable data, no conversation column, or no chat template.
        """
        template = use_chat_template(tokenizer, chat_template)
        if template is None:
            raise UserError(
                "ChatDataset needs a chat template, but the tokenizer has none. Set `dataset.chat_template` to a text "
                "or a .jinja file, or use an instruction-tuned model's tokenizer."
            )
        if start_of_turn_token is not None:
            logger.warning("`dataset.start_of_turn_token` has no effect: the template's own rendering decides.")
        if unshifted:
            logger.warning("`dataset.unshifted: true`: labels are not shifted, which next-token recipes do not expect.")
        rows = load_rows(
            path_or_dataset_id,
            split,
            name,
            shuffle_seed=shuffle_seed,
            skip_invalid=skip_invalid_samples,
            streaming=streaming,
        )
        if "conversations" not in rows.column_names:
            rows.require_columns("messages")
        encoder = ChatEncoder(tokenizer, template, mask_history=mask_history, mask_reasoning=mask_reasoning_content)
        layout = Layout.of(tokenizer, seq_length, padding, truncation, shifted=not unshifted)
        reader = ToolReader(conversation, tokenizer, template)
        super().__init__(rows, reader, encoder, layout, skip_invalid_samples)


def conversation(row: Row, where: str) -> Conversation:
    """Read a row in either form.

    Raises:
        UserError: not a list of messages, an unknown role, content that is not text, or tools that cannot be read.
    """
    given = row.get("messages")
    if given is None:
        given = row.get("conversations")
    if isinstance(given, str):
        given = _parse(given, "messages", where)
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: the conversation is {describe(given)}, but it must be a list of messages.")
    messages = [_message(message, where, number) for number, message in enumerate(given, start=1)]
    _check_answers(messages, where)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, _tools(row.get("tools"), where))


def _check_answers(messages: Sequence[Message], where: str) -> None:
    """Refuse an answer that is empty, and a call whose result the conversation goes on without."""
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant" or message.get("train") is False:
            continue
        calls = message.get("tool_calls")
        if not calls and not message["content"].strip() and not message.get("reasoning_content"):
            raise UserError(
                f"{where}: message {number}, an answer of the assistant, is empty, so only its end would be learned. "
                "Fill it, remove it, or set `train: false` in it."
            )
        following = messages[number]["role"] if number < len(messages) else "tool"
        if calls and following not in ("tool", "ipython"):
            raise UserError(
                f"{where}: message {number} calls a tool, but message {number + 1} is from `{following}` and no result "
                "comes between them. Add a message with the role `tool`, or cut the conversation after the call."
            )


def _message(given: Any, where: str, number: int) -> Message:
    if not isinstance(given, dict):
        raise UserError(f"{where}: message {number} is {describe(given)}, but it must be an object with a role.")
    role_key, content_key = ("from", "value") if "from" in given else ("role", "content")
    role = _ROLES.get(str(given.get(role_key)).lower())
    if role is None:
        raise UserError(
            f"{where}: message {number} has the role `{given.get(role_key)}`, which is not known."
            f"{did_you_mean(str(given.get(role_key)), _ROLES)} Known: {', '.join(_ROLES)}."
        )
    message = {key: _without_nulls(value) for key, value in given.items() if value is not None}
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    content = message.pop(content_key, None)
    message.pop(role_key, None)
    if role == "function_call":
        calls = _parse(content, f"message {number}", where) if isinstance(content, str) else content
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
        role, content = "assistant", None
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}: message {number}")
    return {"role": role, "content": _content(content, where, number, "tool_calls" in message), **message}


def _content(content: Any, where: str, number: int, has_tool_calls: bool) -> str:
    if content is None and has_tool_calls:
        return ""
    if isinstance(content, list):
        kinds = {part.get("type", "text") if isinstance(part, dict) else "text" for part in content}
        if kinds - {"text"}:
            raise UserError(
                f"{where}: message {number} holds {', '.join(sorted(kinds - {'text'}))} content, but this recipe "
                "trains on text only."
            )
        return "".join(part["text"] if isinstance(part, dict) else part for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: the content of message {number} is {describe(content)}, but it must be text.")
    return content


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Turn OpenAI's JSON text of arguments into the objects that templates write as JSON themselves."""
    if not isinstance(calls, list):
        raise UserError(f"{where}: `tool_calls` is {describe(calls)}, but it must be a list of calls, or left out.")
    return [as_tool_call(call, where) for call in calls]


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        tools = _parse(tools, "tools", where)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: `tools` must be a list of function descriptions, or the JSON text of one.")
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    """Take out keys whose value is null, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _parse(text: str, what: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: the {what} are not valid JSON: {error.msg} at column {error.colno}.") from None
