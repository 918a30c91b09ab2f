"""Reading a YAML file strictly.

YAML lets the last of two equal keys win without a word; here it is an error. Dates stay text. Everything that can be
wrong with the file itself is one line with the line number.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from nemo_automodel.shared.errors import ConfigError, did_you_mean


class _StrictLoader(yaml.SafeLoader):
    """``SafeLoader`` without duplicate keys and without dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (the base class declares it this way)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in first_line:
                raise ConfigError(
                    f"line {line}: the key `{key_node.value}` was already given on line {first_line[key_node.value]}. "
                    "Keep one of them."
                )
            first_line[key_node.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: no such file, a directory, no permission, not UTF-8, a YAML mistake (with line and column), a key
            given twice, or not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"`{path}` does not exist.{_nearest_file(path)} Give the path of a YAML file.") from None
    except IsADirectoryError:
        raise ConfigError(f"`{path}` is a directory. Give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"`{path}` is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}. Check the path and its permissions.") from error
    try:
        # a SafeLoader, only stricter
        tree = yaml.load(text, Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"`{path}`, {error}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"`{path}`, {_position(error)}: {error.problem}. Correct the YAML there.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"`{path}` is not YAML: {' '.join(str(error).split())}. Correct it.") from error
    except RecursionError as error:
        raise ConfigError(f"`{path}` is nested too deeply. Make it flatter.") from error
    if tree is None:
        raise ConfigError(f"`{path}` is empty. Give a YAML file with at least the sections model, dataset, optimizer.")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"`{path}` holds a {type(tree).__name__}, but a configuration is a mapping of sections. "
            "Begin it with lines such as `model:`."
        )
    return tree


def _position(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return "somewhere" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" Neither does its directory `{folder}`."
    names = [entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml")]
    return did_you_mean(path.name, names)
