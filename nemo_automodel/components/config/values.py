"""What a piece of configuration text means.

YAML strings and command-line overrides go through the same reading, so ``eps: 1e-8`` in a file and ``--optimizer.eps
1e-8`` give the same number. The written text is kept beside the value: a name such as ``1.10`` can be had back as text,
and a saved configuration reads back as what it was.
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass
from typing import Any

from nemo_automodel.components.config.env import has_placeholder, interpolate

_WORDS: dict[str, Any] = {
    "none": None,
    "None": None,
    "true": True,
    "True": True,
    "false": False,
    "False": False,
}
_MAX_LITERAL_CHARS = 1000
_PLAIN = (bool, int, float, str, type(None))


def translate_value(text: str) -> Any:
    """Return ``None``, a boolean, a Python literal, or ``text`` itself.

    Only literals that YAML can hold count: numbers, strings, lists, tuples and mappings of them. ``null``, ``TRUE`` and
    ``[a,b]`` stay text.
    """
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _MAX_LITERAL_CHARS:
        return text
    try:
        with warnings.catch_warnings():  # Python warns about odd escapes such as '\d'
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value if _is_plain(value) else text


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) in (str, int) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


@dataclass
class Written:
    """A scalar whose value is not its text."""

    text: str
    value: Any


@dataclass
class FromEnvironment:
    """A text with placeholders. The environment is read once, when the value is first asked for."""

    text: str
    place: str
    _value: Any = None
    _is_read: bool = False

    @property
    def value(self) -> Any:
        """The value, read like any other text.

        Raises:
            ConfigError: a variable without default is not set.
        """
        if not self._is_read:
            self._value = translate_value(interpolate(self.text, self.place))
            self._is_read = True
        return self._value


def from_text(text: str, place: str) -> Any:
    """Read what the user wrote at ``place``: a plain value, a ``Written`` or a ``FromEnvironment``.

    Lists and mappings come back as plain containers whose strings are wrapped where needed.
    """
    value = translate_value(text)
    if isinstance(value, list | tuple | dict):
        return _wrap_literal(value, place)
    if has_placeholder(text):
        return FromEnvironment(text, place)
    return text if isinstance(value, str) and value == text else Written(text, value)


def _wrap_literal(value: Any, place: str) -> Any:
    """Keep the strings of a Python literal as they are: ``{'a': '1'}`` holds the text 1, not the number."""
    if isinstance(value, dict):
        return {key: _wrap_literal(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_wrap_literal(item, f"{place}.{i}") for i, item in enumerate(value))
    if not isinstance(value, str):
        return value
    if has_placeholder(value):
        return FromEnvironment(value, place)
    return value if translate_value(value) == value else Written(repr(value), value)
