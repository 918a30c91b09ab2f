"""Values against their declared types.

Two kinds of sections exist: those mapped to a settings dataclass, and those that describe a call. Both are checked with
the same rule: the annotation of a field or of a parameter says what a value may be, and an unknown key is an error that
names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from nemo_automodel.components.config.later import refuse_later_target
from nemo_automodel.components.config.loader import CALL_KEYS, ConfigNode, to_plain
from nemo_automodel.components.config.signature import Parameter, Signature, TargetMissingError, signature_of
from nemo_automodel.components.config.targets import check_path
from nemo_automodel.shared.errors import ConfigError, did_you_mean

T = TypeVar("T")

_NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "null",
}
_NO_DEFAULT = object()


def build(cls: type[T], node: ConfigNode | None, section: str, open_field: str | None = None) -> T:
    """Map a section to its settings dataclass.

    Args:
        cls: the dataclass.
        node: the section, or ``None`` where the file has none: every default then.
        section: its dotted name, for messages.
        open_field: field that takes every key the dataclass does not know, as a mapping.

    Raises:
        ConfigError: not a mapping, an unknown key, a wrong type, or what the dataclass itself refuses.
    """
    if node is None:
        return cls()
    require_mapping(node, section)
    hints = _hints_of(cls)
    defaults = {f.name: _default_of(f) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known = [name for name in hints if name != open_field]
    values: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key in node:
        if key in known:
            values[key] = conform(node, key, hints[key], section, defaults[key])
        elif open_field is not None and near_miss(key, known) is None:
            extra[key] = to_plain(node[key])
        else:
            raise ConfigError(unknown_key(section, key, known))
    if open_field is not None:
        values[open_field] = extra
    return cls(**values)


def check_keys(node: Any, section: str, known: Iterable[str]) -> None:
    """Refuse a section that is not a mapping of known keys.

    Raises:
        ConfigError: not a mapping, or an unknown key.
    """
    require_mapping(node, section)
    known = list(known)
    for key in node:
        if key not in known:
            raise ConfigError(unknown_key(section, key, known))


def require_mapping(node: Any, section: str) -> None:
    """Refuse a section that is not a mapping.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(node, ConfigNode):
        raise ConfigError(
            f"`{section}` is {show(node)}, but it must be a mapping of keys. Write `{section}:` and keys."
        )


def unknown_key(section: str, key: str, known: Collection[str]) -> str:
    """Return the message for a key nobody knows."""
    near = did_you_mean(str(key), known) or f" Known: {', '.join(known)}."
    return f"`{section}.{key}`: unknown key `{key}`.{near} Correct or remove it."


def check_target(
    node: ConfigNode,
    *,
    runtime: Collection[str] = (),
    own_keywords: Collection[str] = (),
    may_lack: bool = False,
    place: str | None = None,
) -> Signature | None:
    """Check a section that describes a call, without importing its target.

    Nested mappings with ``_target_`` are checked too. Texts the target declares as text, but which read as numbers, are
    put back to text in ``node``.

    Args:
        node: the section, with ``_target_``.
        runtime: keywords the program itself adds to the call.
        own_keywords: keywords an open target is known to take; a key close to one of them, but not equal, is an error.
        may_lack: required arguments may come later, as a collate function's batch does.
        place: dotted name for messages; the node's own by default.

    Returns:
        The signature, or ``None`` where the source does not tell it.

    Raises:
        ConfigError: the target is missing or not allowed, a keyword is unknown, lacking or of the wrong type.
    """
    place = node.place if place is None else place
    path = node.get("_target_")
    if path is None:
        raise ConfigError(f"`{place}` has no `_target_`. Name the class or function, such as package.module.Name.")
    _check_nested(node, place)
    check_path(path, f"{place}._target_")
    if callable(path) or ":" in path or "." not in path:
        return None
    try:
        signature = signature_of(path)
    except TargetMissingError as error:
        refuse_later_target(path, f"{place}._target_")
        raise ConfigError(f"`{place}._target_: {path}`: {error} Correct the path.") from None
    if signature is not None:
        known = [name for name in signature.parameters if name not in runtime]
        _check_keywords(node, signature, place, known, own_keywords)
        for name in known:
            if signature.parameters[name].is_required and not may_lack and name not in node:
                raise ConfigError(f"`{place}` lacks `{name}`, which {path} needs. Add {place}.{name}.")
    return signature


def near_miss(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that ``word`` is a slip of: one edit away, or two for longer words."""
    for candidate in known:
        allowed = 2 if len(candidate) >= 8 else 1
        if len(candidate) >= 5 and word != candidate and _edit_distance(word, candidate) <= allowed:
            return candidate
    return None


def conform(node: ConfigNode, key: str, hint: Any, section: str, default: Any = _NO_DEFAULT) -> Any:
    """Return the value of ``key`` as ``hint`` wants it.

    Whole numbers pass for numbers, booleans never for whole numbers, and numbers pass for text as they were written.

    Raises:
        ConfigError: the value is of another type.
    """
    value = node[key]
    found = _match(value, hint)
    if found is not _NO_MATCH:
        return found
    kinds = _alternatives(hint)
    if str in kinds and isinstance(value, int | float) and not isinstance(value, bool):
        return node.get_as_string(key)
    place = f"{section}.{key}" if section else key
    raise ConfigError(f"`{place}` is {show(value)}, but it must be {_describe(hint)}.{_remedy(value, kinds, default)}")


def show(value: Any) -> str:
    """Return a value as the user would write it, short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, ConfigNode):
        return "a mapping"
    text = f"`{value}`" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- types -----------------------------------------------------------------------------------------------------------

_NO_MATCH = object()


def _hints_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default is not dataclasses.MISSING else _NO_DEFAULT


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _match(value: Any, hint: Any) -> Any:
    for kind in _alternatives(hint):
        found = _match_one(value, kind)
        if found is not _NO_MATCH:
            return found
    return _NO_MATCH


def _match_one(value: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind) or kind
    if kind is Any:
        return value
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) else _NO_MATCH
    if origin is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number else _NO_MATCH
    if origin is list:
        return _match_list(value, (*typing.get_args(kind), Any)[0])
    if origin is dict:
        return value.to_dict() if isinstance(value, ConfigNode) else _NO_MATCH
    if origin is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO_MATCH
    return value if isinstance(value, origin) else _NO_MATCH


def _match_list(value: Any, item_hint: Any) -> Any:
    if not isinstance(value, list):
        return _NO_MATCH
    items = [_match(item, item_hint) for item in value]
    return _NO_MATCH if any(item is _NO_MATCH for item in items) else items


def _describe(hint: Any) -> str:
    words = []
    for kind in _alternatives(hint):
        origin = typing.get_origin(kind) or kind
        arguments = typing.get_args(kind)
        if origin is typing.Literal:
            words += [show(argument) for argument in arguments]
        elif origin is list and arguments and arguments[0] is str:
            words.append("a list of texts")
        else:
            words.append(_NOUNS.get(origin, "a value"))
    return " or ".join(words)


def _remedy(value: Any, kinds: tuple[Any, ...], default: Any) -> str:
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return f" Write {int(value)}."
    if isinstance(value, str) and bool in kinds:
        return " Write true or false without quotes."
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):  # what YAML reads so, the command line does not
        return """ On the command line put texts inside in quotes: "['a', 'b']" or "{'a': 1}"."""
    if value == "null" and types.NoneType in kinds:
        return " On the command line null is written none."
    if default is _NO_DEFAULT:
        return " Change it."
    return f" Change it, or leave it out for {show(default)}."


def _edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours between two words (optimal string alignment)."""
    before: list[int] = []
    above = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, above = above, row
    return above[-1]


# --- calls -----------------------------------------------------------------------------------------------------------


def _check_nested(value: Any, place: str) -> None:
    children: list[tuple[Any, Any]] = []
    if isinstance(value, ConfigNode):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    for key, child in children:
        where = f"{place}.{key}"
        if isinstance(child, ConfigNode) and "_target_" in child:
            # a collate function gets its batch later; anything else gets all its arguments here
            check_target(child, may_lack=str(key).endswith("_fn"), place=where)
        else:
            _check_nested(child, where)


def _check_keywords(
    node: ConfigNode, signature: Signature, place: str, known: list[str], own_keywords: Collection[str]
) -> None:
    for key in node:
        parameter = signature.parameters.get(key)
        if parameter is not None:
            _check_argument(node, key, parameter, place)
        elif key in CALL_KEYS or (signature.is_open and key in own_keywords):
            continue
        elif not signature.is_open:
            raise ConfigError(
                f"`{place}.{key}`: {node.get('_target_')} takes no `{key}`."
                f"{did_you_mean(key, known) or _takes(known)} Correct or remove it."
            )
        else:
            slip = near_miss(key, [*known, *own_keywords])
            if slip is not None:
                raise ConfigError(f"`{place}.{key}`: did you mean `{slip}`? Correct or remove it.")


def _takes(known: list[str]) -> str:
    return f" It takes: {', '.join(known)}." if known else " It takes no keys."


def _check_argument(node: ConfigNode, key: str, parameter: Parameter, place: str) -> None:
    value = node[key]
    kinds = _alternatives(parameter.hint)
    if isinstance(value, str | None) and any((typing.get_origin(kind) or kind) is list for kind in kinds):
        return  # one text, or none, for a list of texts is the target's own business (`target_modules: '*_proj'`)
    if isinstance(value, ConfigNode) and "_target_" in value:
        return  # becomes an object
    found = conform(node, key, parameter.hint, place)
    if isinstance(found, str) and not isinstance(value, str):
        node[key] = repr(found)
