"""The configuration tree.

A run is described by one live tree of plain values: the YAML file with the command line's overrides in it. What ran is
what is saved, because both come from this tree. Nothing here imports a target: a mapping with ``_target_`` is a call
written down, made when ``instantiate`` is asked for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_automodel.components.config import targets
from nemo_automodel.components.config.redact import is_secret_key, redact, redact_text
from nemo_automodel.components.config.values import FromEnvironment, Written, from_text, translate_value
from nemo_automodel.components.config.yaml_file import read_yaml
from nemo_automodel.shared.errors import ConfigError

__all__ = [
    "CALL_KEYS",
    "ConfigNode",
    "check_loaded",
    "is_unread",
    "load_yaml_config",
    "to_callable",
    "to_plain",
    "translate_value",
]

_MAX_DEPTH = 60
_MAX_VALUES = 50_000
# keys that steer a call and are never passed to it
CALL_KEYS = frozenset(("_target_", "_recursive_", "_convert_"))
_MISSING = object()


def is_unread(section: str) -> bool:
    """Tell whether a top-level section is passed over: metadata and parked sections."""
    return section == "ci" or section.startswith("_")


class ConfigNode:
    """A mapping of the configuration, read by attribute, by key or by dotted path.

    Args:
        values: a plain mapping; strings are read by ``translate_value`` and may hold environment placeholders.
        place: the dotted key of this mapping, for messages.
    """

    _values: dict[str, Any]
    _place: str
    _raw: dict[Any, Any]

    def __init__(self, values: Mapping[Any, Any] | None = None, place: str = "") -> None:
        values = values or {}
        object.__setattr__(self, "_place", place)
        budget = _Budget()
        object.__setattr__(self, "_values", {})
        for key, value in values.items():
            self._values[_checked_key(key, place)] = _wrap(value, _join(place, key), budget, 1)
        object.__setattr__(self, "_raw", copy.deepcopy(dict(values)) if place == "" else {})

    # --- reading -----------------------------------------------------------------------------------------------

    @property
    def raw_config(self) -> dict[Any, Any]:
        """The mapping as it was read, before overrides."""
        return copy.deepcopy(self._raw)

    @property
    def place(self) -> str:
        """The dotted key of this mapping; empty at the root."""
        return self._place

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value at a dotted key (``a.b.0``), or ``default`` where there is none."""
        found = self._find(key)
        return default if found is _MISSING else _unwrap(found)

    def get_as_string(self, key: str, default: str | None = None) -> str | None:
        """Return the text the user wrote: ``1.10`` stays ``1.10``. Environment placeholders are replaced."""
        found = self._find(key)
        if found is _MISSING:
            return default
        return found.text if isinstance(found, Written) else str(_unwrap(found))

    def keys(self) -> list[str]:
        """The keys of this mapping, in the order of the file."""
        return list(self._values)

    def items(self) -> list[tuple[str, Any]]:
        """Keys and values of this mapping."""
        return [(key, _unwrap(value)) for key, value in self._values.items()]

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not _MISSING

    def __getitem__(self, key: str) -> Any:
        found = self._find(key)
        if found is _MISSING:
            raise KeyError(key)
        return _unwrap(found)

    def __getattr__(self, key: str) -> Any:
        values = self.__dict__.get("_values", {})
        if key not in values:
            raise AttributeError(f"`{self.__dict__.get('_place') or 'the configuration'}` has no key `{key}`")
        return _unwrap(values[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigNode) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ConfigNode({self.to_yaml_dict()!r})"

    def _find(self, key: str) -> Any:
        if key in self._values:
            return self._values[key]
        current: Any = self
        for segment in str(key).split("."):
            current = _child(_unwrap(current), segment)
            if current is _MISSING:
                return _MISSING
        return current

    # --- writing -----------------------------------------------------------------------------------------------

    def set_by_dotted(self, key: str, value: Any) -> None:
        """Set the value at a dotted key, making the mappings on the way.

        A list on the way is edited at one element (``lst.0.x``); any other value on the way gives way to a mapping.

        Raises:
            ConfigError: an empty part, or a list element that is not there.
        """
        segments = key.split(".")
        if not all(segments):
            raise ConfigError(f"`{key}` is not a dotted key: a part between the dots is empty. Write section.key.")
        current: Any = self
        for depth, segment in enumerate(segments[:-1]):
            current = _descend(current, segment, ".".join(segments[: depth + 1]))
        place = _join(self._place, key)
        wrapped = _wrap(value, place, _Budget(), len(segments))
        if isinstance(current, list):
            current[_index(current, segments[-1], ".".join(segments[:-1]))] = wrapped
        else:
            current._values[segments[-1]] = wrapped

    def remove(self, key: str) -> None:
        """Remove a key of this mapping; nothing happens where there is none."""
        self._values.pop(key, None)

    def __setattr__(self, key: str, value: Any) -> None:
        self.__setitem__(key, value)

    def __setitem__(self, key: str, value: Any) -> None:
        """Set a key of this mapping; dots in it are part of the name."""
        self._values[key] = _wrap(value, _join(self._place, key), _Budget(), 1)

    def copy(self) -> ConfigNode:
        """Return an independent copy."""
        return copy.deepcopy(self)

    # --- plain forms ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return plain mappings and values, environment included: for the program, not for a disk."""
        return {key: to_plain(value) for key, value in self._values.items()}

    def to_yaml_dict(
        self, resolve_env: bool = False, redact_sensitive: bool = True, use_orig_values: bool = False
    ) -> dict[str, Any]:
        """Return what may be printed or saved, and reads back as this configuration.

        Args:
            resolve_env: replace environment placeholders by their values.
            redact_sensitive: mask passwords, tokens and keys.
            use_orig_values: keep every text as it was written (``'1e-8'`` instead of the number).
        """
        return {
            key: _printable(key, value, resolve_env, redact_sensitive, use_orig_values)
            for key, value in self._values.items()
        }

    def resolve_environment(self) -> None:
        """Read every environment variable that a section in use names.

        Raises:
            ConfigError: a variable without default is not set.
        """
        for key, value in self._values.items():
            is_disabled = isinstance(value, ConfigNode) and value.get("enable") is False
            if not (is_unread(key) and self._place == "") and not is_disabled:
                to_plain(value)

    # --- calls ---------------------------------------------------------------------------------------------------

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call this mapping describes; ``kwargs`` beat the mapping's own.

        Nested mappings with ``_target_`` are called first, other nested mappings are passed as plain dicts, and texts
        under keys ending in ``_fn`` as the callable they name.

        Raises:
            ConfigError: no ``_target_``, a target that is not allowed or not there, or arguments it does not take.
        """
        target, own = self._call()
        merged, place = {**own, **kwargs}, self._place or "configuration"
        targets.check_call(target, merged, place, num_positional=len(args))
        return targets.call(target, args, merged, place)

    def as_callable(self, **kwargs: Any) -> Callable[..., Any]:
        """Return the target with this mapping's arguments filled in, to be called later (a collate function)."""
        target, own = self._call()
        merged = {**own, **kwargs}
        targets.check_call(target, merged, self._place, may_lack=True)
        return functools.partial(target, **merged) if merged else target

    def instantiate_path(self, key: str, default: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Instantiate the mapping at a dotted key, or return ``default`` where there is none."""
        node = self.get(key)
        return default if node is None else node.instantiate(*args, **kwargs)

    def _call(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        if "_target_" not in self._values:
            place = self._place or "configuration"
            raise ConfigError(f"`{place}` has no `_target_`. Name the class or function to call.")
        target = targets.resolve(self.get("_target_"), _join(self._place, "_target_"))
        return target, {
            key: _argument(key, value, _join(self._place, key)) for key, value in self.items() if key not in CALL_KEYS
        }


def load_yaml_config(path: str | Path) -> ConfigNode:
    """Read a YAML file into a tree, with its environment placeholders and its targets checked.

    Raises:
        ConfigError: the file is not a readable YAML mapping, a variable is not set, or a target is not allowed.
    """
    config = ConfigNode(read_yaml(path))
    check_loaded(config)
    return config


def check_loaded(config: ConfigNode) -> None:
    """Check what can be checked of any tree: environment variables, and every target wherever it stands."""
    config.resolve_environment()
    for place, path in _targets_in(config):
        targets.check_path(path, place)


def to_callable(value: Any, place: str) -> Callable[..., Any]:
    """Turn a dotted name, a mapping with ``_target_`` or a callable into a callable.

    Raises:
        ConfigError: the value is none of them, or its target is not allowed or not there.
    """
    if isinstance(value, ConfigNode):
        return value.as_callable()
    return targets.resolve(value, place)


# --- the tree's small parts ----------------------------------------------------------------------------------------


class _Budget:
    """Counts values, so that a file whose aliases multiply ends in a message instead of in the memory."""

    def __init__(self) -> None:
        self.left = _MAX_VALUES

    def spend(self, place: str, depth: int) -> None:
        self.left -= 1
        if self.left < 0 or depth > _MAX_DEPTH:
            raise ConfigError(
                f"`{place[:80]}` is too large or nested too deeply (an alias inside itself?). Spell it out."
            )


def _join(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def _checked_key(key: Any, place: str) -> str:
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise ConfigError(f"`{_join(place, key)}`: the key {key!r} is not text. Put it in quotes.")
    return key  # type: ignore[return-value]  # numbers stay numbers: they are keys of tables such as id2label


def _wrap(value: Any, place: str, budget: _Budget, depth: int) -> Any:
    budget.spend(place, depth)
    if isinstance(value, str):
        value = from_text(value, place)
        if isinstance(value, str | Written | FromEnvironment):
            return value
    if isinstance(value, ConfigNode):
        value = value._values
    if isinstance(value, Mapping):
        node = ConfigNode(place=place)
        for key, item in value.items():
            node._values[_checked_key(key, place)] = _wrap(item, _join(place, key), budget, depth + 1)
        return node
    if isinstance(value, list | tuple):
        return [_wrap(item, _join(place, i), budget, depth + 1) for i, item in enumerate(value)]
    return value


def _unwrap(value: Any) -> Any:
    if isinstance(value, Written):
        return value.value
    if isinstance(value, FromEnvironment):
        return _wrap_resolved(value)
    if isinstance(value, list):
        return [_unwrap(item) for item in value]
    return value


def _wrap_resolved(value: FromEnvironment) -> Any:
    resolved = value.value
    return ConfigNode(resolved, value.place) if isinstance(resolved, dict) else resolved


def to_plain(value: Any) -> Any:
    """Return a value of the tree with plain mappings and lists, environment included."""
    value = _unwrap(value)
    if isinstance(value, ConfigNode):
        return value.to_dict()
    return [to_plain(item) for item in value] if isinstance(value, list) else value


def _printable(key: str, value: Any, resolve_env: bool, hide: bool, original: bool) -> Any:
    if isinstance(value, ConfigNode):
        return {
            # everything below a secret key is secret
            name: _printable(key if is_secret_key(str(key)) else name, item, resolve_env, hide, original)
            for name, item in value._values.items()
        }
    if isinstance(value, list):
        return [_printable(key, item, resolve_env, hide, original) for item in value]
    if isinstance(value, FromEnvironment) and not resolve_env:
        return redact_text(str(key), value.text) if hide else value.text
    if isinstance(value, Written):
        is_text = isinstance(value.value, str)
        value = value.text if original or is_text else value.value
    value = to_plain(value)
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return redact(str(key), value) if hide else value


def _child(current: Any, segment: str) -> Any:
    if isinstance(current, ConfigNode):
        if segment in current._values:
            return current._values[segment]
        return current._values.get(int(segment), _MISSING) if segment.isdigit() else _MISSING  # type: ignore[call-overload]
    if isinstance(current, list) and segment.isdigit() and int(segment) < len(current):
        return current[int(segment)]
    return _MISSING


def _descend(current: Any, segment: str, place: str) -> Any:
    """Step into ``segment`` for writing."""
    if isinstance(current, list):
        index = _index(current, segment, place.rpartition(".")[0])
        if not isinstance(current[index], ConfigNode | list):
            current[index] = ConfigNode(place=place)
        return current[index]
    child = current._values.get(segment)
    if isinstance(child, FromEnvironment) and isinstance(child.value, dict | list):
        raise ConfigError(f"`{place}` comes from the environment and cannot be edited in parts. Set it as a whole.")
    if not isinstance(child, ConfigNode | list):
        child = current._values[segment] = ConfigNode(place=place)
    return child


def _index(values: list[Any], segment: str, place: str) -> int:
    if not segment.isdigit() or int(segment) >= len(values):
        raise ConfigError(
            f"`{place}.{segment}`: `{place}` is a list of {len(values)}, so an element is named by a number from 0 to "
            f"{len(values) - 1}. Write --{place}.0, or set the whole list."
        )
    return int(segment)


def _argument(key: str, value: Any, place: str) -> Any:
    if isinstance(value, ConfigNode):
        if "_target_" in value:
            return value.as_callable() if key.endswith("_fn") else value.instantiate()
        return {name: _argument(name, item, _join(place, name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_argument("", item, _join(place, i)) for i, item in enumerate(value)]
    if key.endswith("_fn") and isinstance(value, str) and ("." in value or ":" in value):
        return targets.resolve(value, place)
    return value


def _targets_in(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every ``_target_``, and every text under a key ending in ``_fn`` that is a path."""
    value = _readable(value)
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _targets_in(item, _join(place, i))
    if not isinstance(value, ConfigNode):
        return
    for key, raw in value._values.items():
        item, where = _readable(raw), _join(place, key)
        if item is None and isinstance(raw, FromEnvironment):
            continue
        is_path = isinstance(item, str) and str(key).endswith("_fn") and ("." in item or ":" in item)
        if key == "_target_" or is_path:
            yield where, item
        else:
            yield from _targets_in(item, where)


def _readable(value: Any) -> Any:
    """Unwrap, but leave a text alone whose variable is not set: only sections nobody reads still hold one."""
    try:
        return _unwrap(value)
    except ConfigError:
        return None
