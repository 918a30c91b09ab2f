"""Conversations in the two forms they are shared in: OpenAI ``messages`` and ShareGPT ``conversations``.

Both become messages as chat templates take them. Three things are mended on the way, because templates trip over them:
tool-call arguments that are JSON text become objects, content given as text parts becomes one text, and the nulls with
which table formats fill absent keys are taken out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.chat_formatting import (
    ChatEncoder,
    Conversation,
    Message,
    use_chat_template,
)
from nemo_automodel.components.datasets.llm.formatting import Encoded, Layout, eos_token_id
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.rows import Row, describe
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


class ChatDataset(TokenizedRows[Conversation]):
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
        rows = load_rows(path_or_dataset_id, split, name, shuffle_seed=shuffle_seed, skip_invalid=skip_invalid_samples)
        if "conversations" not in rows.column_names:
            rows.require_columns("messages")
        self._eos_id = eos_token_id(tokenizer)
        self._skip_invalid = skip_invalid_samples
        self.num_skipped_rows = 0
        encoder = ChatEncoder(tokenizer, template, mask_history=mask_history, mask_reasoning=mask_reasoning_content)
        layout = Layout.of(tokenizer, seq_length, padding, truncation, shifted=not unshifted)
        super().__init__(rows, conversation, encoder, layout)

    def _encode(self, indices: Sequence[int]) -> list[tuple[int, Encoded]]:
        if not self._skip_invalid:
            return super()._encode(indices)
        try:
            return super()._encode(indices)
        except UserError:
            return [self._encode_or_skip(index) for index in indices]

    def _encode_or_skip(self, index: int) -> tuple[int, Encoded]:
        """Return the row, or two end-of-sequence tokens without a label where the row cannot be used."""
        try:
            return super()._encode([index])[0]
        except UserError as error:
            self.num_skipped_rows += 1
            logger.warning("Skipped (%d so far): %s", self.num_skipped_rows, error)
            return index, Encoded([self._eos_id, self._eos_id], [])


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
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, _tools(row.get("tools"), where))


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
    content = message.pop(content_key, None)
    message.pop(role_key, None)
    if role == "function_call":
        call = _parse(content, f"message {number}", where) if isinstance(content, str) else content
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, where, number) for call in message["tool_calls"]]
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


def _tool_call(call: Any, where: str, number: int) -> Any:
    """Turn OpenAI's JSON text of arguments into the object that templates write as JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        arguments = _parse(function["arguments"], f"arguments of message {number}", where)
        return {**call, "function": {**function, "arguments": arguments}}
    return call


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
