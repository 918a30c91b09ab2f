"""Tool calls: the forms they come in, and whether a chat template writes them at all.

A template that was made for plain chat passes over ``tool_calls`` without a word. The assistant's turn is then empty
but for its end, and training on it would look well and teach the model to say nothing. So the template is asked first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.chat_formatting import Conversation
from nemo_automodel.components.datasets.rows import Row, describe
from nemo_automodel.shared.errors import UserError

_PROBE_NAME, _PROBE_VALUE = "probe_function", "probe argument value"
_JSON_TYPES = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "list": "array",
    "array": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
    "object": "object",
}


class ToolReader:
    """Row → conversation, refusing a template that would leave the row's tool calls out.

    ``to_item`` reads the row. The template is asked once, when the first row with a call comes up.
    """

    def __init__(
        self, to_item: Callable[[Row, str], Conversation], tokenizer: PreTrainedTokenizerBase, template: str
    ) -> None:
        self._to_item, self._tokenizer, self._template = to_item, tokenizer, template

    def __call__(self, row: Row, where: str) -> Conversation:
        """Read the row.

        Raises:
            UserError: it cannot be read, or the template does not write its calls.
        """
        item = self._to_item(row, where)
        if any("tool_calls" in message for message in item.messages) and not self._writes_calls:
            raise UserError(
                f"{where} has tool calls, but the chat template does not write them: the model would learn to end its "
                "turn without a word. Set `dataset.chat_template` to one that handles `tool_calls`, or use the "
                "tokenizer of a model made for tools."
            )
        return item

    @cached_property
    def _writes_calls(self) -> bool:
        call = {"type": "function", "function": {"name": _PROBE_NAME, "arguments": {"x": _PROBE_VALUE}}}
        messages: Any = [
            {"role": "user", "content": "probe"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        tools: Any = [as_tool({"name": _PROBE_NAME, "description": "probe", "parameters": {"x": "str"}}, "probe")]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self._template, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            return True  # it wants something else of a conversation; the rows themselves will tell
        return _PROBE_VALUE in str(text)


def parse_json_list(value: Any, column: str, where: str) -> list[Any]:
    """Return a column that holds a list, or the JSON text of one.

    Raises:
        UserError: it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: the text in `{column}` is not valid JSON: {error.msg} at column {error.colno}. Write a list."
            ) from None
    if not isinstance(value, list):
        raise UserError(f"{where}: `{column}` is {describe(value)}, but it must be a list, or the JSON text of one.")
    return value


def as_tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return ``{"name", "arguments"}`` as chat templates take it.

    Raises:
        UserError: no name, or arguments that are not an object.
    """
    inner = call.get("function", call) if isinstance(call, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or not isinstance(name, str) or not name:
        raise UserError(
            f'{where}: a call must look like {{"name": "…", "arguments": {{…}}}}, but one is not like that.'
        )
    arguments = inner.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: the arguments of the call of `{name}` are not valid JSON: {error.msg}."
            ) from None
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: the arguments of the call of `{name}` are {describe(arguments)}, not an object.")
    about = {} if inner is call else call  # an id, which some templates write
    return {**about, "type": "function", "function": {"name": name, "arguments": arguments}}


def as_tool(tool: Any, where: str) -> dict[str, Any]:
    """Return a function's description in OpenAI's form, with the parameters as a JSON schema.

    Descriptions in xLAM's form, where ``parameters`` maps each name to a Python type (``List[int], optional``), are
    rewritten; a parameter with a default or an optional type is not required.

    Raises:
        UserError: no name, or parameters that are not an object.
    """
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise UserError(f'{where}: a tool must look like {{"name": "…", "parameters": {{…}}}}, but one has no name.')
    parameters = inner.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{where}: the parameters of the tool `{inner['name']}` are {describe(parameters)}.")
    if not _is_schema(parameters):
        parameters = _schema_of(parameters)
    return {"type": "function", "function": {**inner, "parameters": parameters}}


def _is_schema(parameters: dict[str, Any]) -> bool:
    return parameters.get("type") == "object" and isinstance(parameters.get("properties", {}), dict)


def _schema_of(parameters: dict[str, Any]) -> dict[str, Any]:
    properties, required = {}, []
    for name, given in parameters.items():
        about = dict(given) if isinstance(given, dict) else {"type": str(given)}
        written = str(about.get("type", "str"))
        properties[name] = {**about, **_json_type(written)}
        if "default" not in about and "optional" not in written.lower():
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def _json_type(written: str) -> dict[str, Any]:
    """Turn a Python type as written into the type of a JSON schema; an unknown one is text."""
    head, _, inner = re.sub(r",\s*optional$", "", written.strip(), flags=re.IGNORECASE).partition("[")
    head, inner = head.strip().lower(), inner.removesuffix("]")
    if head in ("optional", "union"):
        return _json_type(_first_of(inner))
    found: dict[str, Any] = {"type": _JSON_TYPES.get(head, "string")}
    if found["type"] == "array" and inner:
        found["items"] = _json_type(_first_of(inner))
    return found


def _first_of(inner: str) -> str:
    """Return the first of several types: of ``Dict[str, int], None`` the whole dictionary."""
    depth = 0
    for place, letter in enumerate(inner):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            return inner[:place]
    return inner
