"""Environment variables inside configuration text.

Five spellings are understood: ``${VAR}``, ``${VAR,default}``, ``${oc.env:VAR}``, ``${oc.env:VAR,default}`` and
``$VAR``. Names may hold dots. ``$$VAR`` and ``$${`` stand for a dollar that starts no placeholder. The text with its
placeholders is what is printed and saved; only the program sees the value, so a token never reaches a disk through a
config.
"""

from __future__ import annotations

import os
import re

from nemo_automodel.shared.errors import ConfigError

_NAME = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*"
_PLACEHOLDER = re.compile(
    rf"\$\$(?=[A-Za-z_{{])"
    rf"|\$\{{\s*(?:oc\.env:)?(?P<braced>{_NAME})\s*(?:,(?P<default>[^}}]*))?\}}"
    rf"|(?P<strange>\$\{{[^}}]*\}}?)"
    rf"|\$(?P<bare>{_NAME})"
)


def has_placeholder(text: str) -> bool:
    """Tell whether ``text`` holds a placeholder (or an escaped one)."""
    return _PLACEHOLDER.search(text) is not None


def is_one_placeholder(text: str) -> bool:
    """Tell whether ``text`` is one placeholder without a default, and nothing else."""
    match = _PLACEHOLDER.fullmatch(text.strip())
    return match is not None and match["default"] is None


def interpolate(text: str, place: str) -> str:
    """Replace every placeholder of ``text`` by its value.

    Args:
        text: what the user wrote.
        place: the dotted key that holds it, for the message.

    Raises:
        ConfigError: a variable without default is not set, or the spelling is none of the five.
    """
    return _PLACEHOLDER.sub(lambda match: _value(match, text, place), text)


def _value(match: re.Match[str], text: str, place: str) -> str:
    if match[0] == "$$":
        return "$"
    if match["strange"]:
        raise ConfigError(
            f"`{place}` holds `{match['strange']}`, which is not a placeholder. Write ${{VAR}}, ${{VAR,default}}, "
            "${oc.env:VAR} or ${oc.env:VAR,default}, or $${ for a plain dollar sign."
        )
    name, rest = match["braced"], ""
    if name is None:
        name, rest = _longest_set_prefix(match["bare"])
    if name in os.environ:
        return os.environ[name] + rest
    if match["default"] is not None:
        return match["default"].strip()
    raise ConfigError(
        f"`{place}` needs the environment variable {name}, which is not set. Set {name}, or give a default: "
        f"${{{name},default}}."
    )


def _longest_set_prefix(name: str) -> tuple[str, str]:
    """Split ``DIR.jsonl`` into a variable that is set and the text after it: the dot may be part of either."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        candidate = ".".join(parts[:count])
        if candidate in os.environ:
            return candidate, name[len(candidate) :]
    return name, ""
