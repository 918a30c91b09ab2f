"""The ``automodel`` command (also ``am``): run a recipe, or one of the tools beside it.

A run is checked from top to bottom before anything heavy is imported, so a mistyped key costs less than a second.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from nemo_automodel import __version__
from nemo_automodel.cli.launch import launch
from nemo_automodel.components.config.run_safely import run_safely
from nemo_automodel.shared.errors import NotSupportedYetError, UserError, did_you_mean
from nemo_automodel.shared.processes import was_started_as_rank

if TYPE_CHECKING:
    from nemo_automodel.recipes.settings import RunSettings

__all__ = ["main", "run_safely"]

# word → file in this folder
TOOLS = {
    "generate": "generate",
    "chat": "chat",
    "merge": "merge",
    "export": "export",
    "push": "push",
    "inspect": "inspect",
    "plan": "plan",
    "report": "report",
    "replay": "replay",
    "doctor": "doctor",
    "fetch-demo": "fetch_demo",
    "quickstart": "quickstart",
}
# tools whose other words are overrides, or a config file and overrides
_TOOLS_OF_A_CONFIG = ("inspect", "plan", "replay")
_TASKS = ("finetune", "pretrain", "kd", "benchmark")
_DOMAINS = ("llm", "vlm")
_BENCHMARK_RECIPE = "BenchmarkingRecipeForNextTokenPrediction"
_USAGE = """\
usage: automodel <config.yaml> [--section.key value ...]
       automodel finetune|pretrain|benchmark llm -c <config.yaml> [--section.key value ...]
       automodel <tool> [options]

Fine-tune a Hugging Face language model as a YAML file says. Every --section.key value replaces one value of the file.

options:
  -c, --config PATH        the config file
  --nproc-per-node N       processes on this machine, one a GPU (default: one)
  --allow-target PREFIX    let the file name callables of one more package; may be repeated
  --debug                  show the traceback of an error
  --version                show the version
  -h, --help               show this

tools (automodel <tool> --help says more):
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a user's mistake, 3 before a swap, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_safely(lambda: _dispatch(words), debug="--debug" in words)


def _dispatch(words: list[str]) -> int:
    asks_for_help = bool({"-h", "--help"} & set(words)) and words[0] not in TOOLS
    if not words or words[0] == "help" or asks_for_help:
        sys.stdout.write(_help())
        return 0 if words else 2
    if words[0] in ("--version", "version"):
        sys.stdout.write(f"automodel {__version__}\n")
        return 0
    first, rest = words[0], words[1:]
    if first in TOOLS:
        return _run_tool(first, rest)
    if first in _TASKS:
        return _run_task(first, rest)
    if first.startswith("-") or "." in first or "/" in first or Path(first).exists():
        return _run_config(words, words)
    raise UserError(
        f"`{first}` is neither a config file nor a command.{did_you_mean(first, (*TOOLS, *_TASKS))} "
        f"Commands: {', '.join((*_TASKS, *TOOLS))}."
    )


def _run_task(task: str, words: list[str]) -> int:
    domain = words[0] if words else None
    if domain not in _DOMAINS:
        raise UserError(
            f"`automodel {task}` needs a kind of model after it, not `{domain or 'nothing'}`. "
            f"Write automodel {task} llm -c <config.yaml>."
        )
    if task == "kd" or domain == "vlm":
        raise NotSupportedYetError(f"`automodel {task} {domain}` is not supported yet. Use automodel finetune llm.")
    # any file of a fine-tuning run can be timed, so the word counts and not the file's own recipe
    return _run_config(words[1:], [task, *words], _BENCHMARK_RECIPE if task == "benchmark" else None)


def _run_config(words: list[str], command: list[str], recipe: str | None = None) -> int:
    """Run ``recipe``, or the one a config file names; only ``automodel <config.yaml>`` insists that it names one.

    ``words`` are the config file and the overrides, ``command`` is the whole command line.
    """
    takes_positional = words == command
    from nemo_automodel.components.config._arg_parser import load_config, parse_command_line
    from nemo_automodel.recipes.registry import DEFAULT_RECIPE, recipe_path, resolve_recipe
    from nemo_automodel.recipes.section_rules import recipe_name
    from nemo_automodel.recipes.settings import load_settings
    from nemo_automodel.recipes.several import check_several, refuse_benchmark
    from nemo_automodel.recipes.weights_ahead import read_weights_ahead

    line = parse_command_line(words, takes_positional)
    config = load_config(line)
    path = recipe_path(recipe or recipe_name(config) or (None if takes_positional else DEFAULT_RECIPE))
    settings = load_settings(config)
    if not was_started_as_rank():
        if line.num_processes is None and not path.endswith(_BENCHMARK_RECIPE):
            _tell_of_other_gpus(settings)
        num_processes = line.num_processes or 1
        check_several(settings, num_processes)
        if path.endswith(_BENCHMARK_RECIPE):
            refuse_benchmark(num_processes)
        read_weights_ahead(settings)
        if num_processes > 1:
            return launch(command, num_processes)
    run = resolve_recipe(path)(config)
    run.setup()
    run.run_train_validation_loop()
    return 0


def _tell_of_other_gpus(settings: RunSettings) -> None:
    """Say that one GPU of several is used, since nobody asked for more."""
    # one by default for now: sums over NCCL have not run on GPUs yet, and not all that one process can do several can
    if "nccl" not in settings.dist_env.backend:
        return
    import torch

    if (num_gpus := torch.cuda.device_count()) > 1:
        print(f"One of {num_gpus} GPUs is used. All of them: --nproc-per-node {num_gpus}")


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` shows the options.")


def _run_tool(name: str, words: list[str]) -> int:
    module = _tool(name)
    parser = _OneLineParser(prog=f"automodel {name}", description=module.__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.add_arguments(parser)
    try:
        if name in _TOOLS_OF_A_CONFIG:
            args, others = parser.parse_known_args(words)
            args.words = others
        else:
            args = parser.parse_args(words)
    except SystemExit:  # argparse printed its help
        return 0
    return int(module.run(args))


def _tool(name: str) -> ModuleType:
    return importlib.import_module(f"nemo_automodel.cli.{TOOLS[name]}")


def _help() -> str:
    """Return the help text; the tools' lines are read from their files, which are not imported."""
    lines = []
    for name, file in TOOLS.items():
        path = Path(__file__).with_name(f"{file}.py")
        if path.is_file():
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            lines.append(f"  {name:<24} {docstring.partition(chr(10))[0]}\n")
    return _USAGE + "".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
