"""The command line of a run: a config file and overrides.

``--a.b value`` edits the file's tree before anything reads it. The next word is the value unless it begins with ``--``;
a bare ``--a.b`` is true; ``--a.b=value`` is always one pair. A word that is neither an override nor the config file is
an error, since a forgotten ``--`` would otherwise silently train something else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_automodel.components.config import targets
from nemo_automodel.components.config.loader import ConfigNode, check_loaded
from nemo_automodel.components.config.run_safely import run_safely
from nemo_automodel.components.config.yaml_file import read_yaml
from nemo_automodel.shared import processes
from nemo_automodel.shared.errors import ConfigError

__all__ = ["CommandLine", "load_config", "parse_args_and_load_config", "parse_command_line", "run_safely"]

_USAGE = """\
usage: <script> [-c <config.yaml>] [--section.key value ...]

Every --section.key value replaces one value of the file. Without -c: {default}

  --allow-target PREFIX    let the file name callables of one more package; may be repeated
  --debug                  show the traceback of an error
"""
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


@dataclass
class CommandLine:
    """What the words of a command line mean."""

    config_path: str | None = None
    overrides: list[tuple[str, str | bool]] = field(default_factory=list)
    """Dotted key and text in the order given; a bare key is True."""
    allowed_targets: list[str] = field(default_factory=list)
    num_processes: int | None = None
    is_debug: bool = False


def parse_args_and_load_config(
    default_config_path: str | Path | None = None, argv: Sequence[str] | None = None
) -> ConfigNode:
    """Load the configuration an example script was asked for.

    Args:
        default_config_path: used when the command line names none; relative to the working directory.
        argv: the words after the program's name; those of this process by default.

    Raises:
        ConfigError: a word that is no override, no config file, or whatever is wrong with the file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        sys.stdout.write(_USAGE.format(default=default_config_path))
        raise SystemExit(0)
    line = parse_command_line(words)
    if line.config_path is None and default_config_path is not None:
        line.config_path = str(default_config_path)
    if line.num_processes not in (None, 1) and not processes.was_started_as_rank():
        raise ConfigError(
            f"`--nproc-per-node {line.num_processes}`: a script is one process. Start it with torchrun "
            f"--nproc-per-node {line.num_processes} <script> ..., or use `automodel <config.yaml>`."
        )
    return load_config(line)


def parse_command_line(argv: Sequence[str], takes_positional: bool = False) -> CommandLine:
    """Sort the words of a command line.

    Args:
        argv: the words after the program's name.
        takes_positional: a word of its own is the config file (``automodel run.yaml``), wherever it stands.

    Raises:
        ConfigError: a word that fits nowhere.
    """
    line = CommandLine()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "-c" or not word.startswith("--"):
            path = _path_of(word, words, takes_positional, line)
            if line.config_path is not None:
                raise ConfigError(f"two config files are given, `{line.config_path}` and `{path}`. Keep one of them.")
            line.config_path = path
            continue
        key, has_equals, text = word[2:].partition("=")
        value: str | bool = text if has_equals else True
        if not has_equals and key != "debug" and words and not words[0].startswith("--") and words[0] != "-c":
            value = words.pop(0)
        _take(line, key, value)
    return line


def load_config(line: CommandLine) -> ConfigNode:
    """Say which config file is read, read it, and put the overrides in.

    Raises:
        ConfigError: no file is named, or whatever is wrong with it.
    """
    if line.config_path is None:
        raise ConfigError(f"no config file is given. Name one with -c run.yaml.{_swallowed(line)}")
    if processes.is_first():
        sys.stdout.write(f"cfg-path: {line.config_path}\n")
        sys.stdout.flush()
    targets.allow_prefixes(line.allowed_targets)
    config = ConfigNode(read_yaml(line.config_path))
    for key, value in line.overrides:
        config.set_by_dotted(key, value)
    check_loaded(config)
    return config


def _path_of(word: str, words: list[str], takes_positional: bool, line: CommandLine) -> str:
    if word == "-c":
        return _required("-c", words.pop(0) if words else True)
    if takes_positional and not word.startswith("-"):
        return word
    last = f" (after `--{line.overrides[-1][0]}`)" if line.overrides else ""
    raise ConfigError(
        f"`{word}`{last} is neither an override nor an option. Write overrides as --section.key value, "
        "and values with spaces in quotes."
    )


def _take(line: CommandLine, key: str, value: str | bool) -> None:
    name = key.replace("_", "-")
    if name == "config":
        if line.config_path is not None:
            raise ConfigError(f"two config files are given, `{line.config_path}` and `{value}`. Keep one of them.")
        line.config_path = _required("--config", value)
    elif name == "debug":
        line.is_debug = True
    elif name == "allow-target":
        line.allowed_targets.append(_required("--allow-target", value))
    elif name == "nproc-per-node":
        line.num_processes = _num_processes(_required("--nproc-per-node", value))
    elif _KEY.fullmatch(key):
        line.overrides.append((key, value))
    else:
        raise ConfigError(f"`--{key}` is not an override. Write --section.key value.")


def _required(option: str, value: str | bool) -> str:
    if isinstance(value, bool) or not value:
        raise ConfigError(f"`{option}` needs a value after it. Add it.")
    return value


def _num_processes(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"`--nproc-per-node {text}` is not a number of processes. Write --nproc-per-node 1.")
    return int(text)


def _swallowed(line: CommandLine) -> str:
    """Say where a config file may have gone: it is read as a value when it follows a bare override."""
    for key, value in line.overrides:
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            return f" `{value}` was read as the value of --{key}; write --{key}=true before it."
    return ""
