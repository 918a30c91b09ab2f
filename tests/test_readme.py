"""The READMEs and the pages of docs/ say only what is true: their commands parse, their YAML loads, their links lead
somewhere, their Python runs, and the error messages they show are the ones that are printed."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
BASE_RECIPE = ROOT / "examples/llm_finetune/llama3_2/llama3_2_1b_squad.yaml"
"""A fragment of YAML in the docs is put into this recipe."""
SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model the docs name; Python blocks run with a tiny local one in its place."""

NOT_INSTALLED_BY_UV = [
    "torch",
    "torchvision",
    "triton",
    "nvidia-cublas-cu12",
    "nvidia-cuda-cupti-cu12",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cufft-cu12",
    "nvidia-cufile-cu12",
    "nvidia-curand-cu12",
    "nvidia-cusolver-cu12",
    "nvidia-cusparse-cu12",
    "nvidia-cusparselt-cu12",
    "nvidia-nccl-cu12",
    "transformer-engine",
    "nvidia-modelopt",
    "nvidia-modelopt-core",
    "flash-attn",
    "transformer-engine-cu12",
    "transformer-engine-torch",
]
"""What the playbook's `uv sync` line leaves to the container."""

RECIPE_VERBS = ("finetune", "pretrain", "kd", "benchmark")
OTHER_PROGRAMS = ("cd", "export", "git", "hf", "ls", "tail", "tensorboard")


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page's bash blocks, split into words."""
    found = []
    for block in blocks(page, "bash"):
        lines = block.replace("\\\n", " ").splitlines()
        found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


def subcommands() -> list[str]:
    """Return the names of the subcommands: the files of `cli` that describe arguments."""
    files = sorted((ROOT / "nemo_automodel/cli").glob("*.py"))
    return [f.stem.replace("_", "-") for f in files if "\ndef add_arguments(" in f.read_text(encoding="utf-8")]


# ---------------------------------------------------------------------------------------------------- commands


def load(argv: list[str], default: str = "") -> None:
    """Load a recipe with its overrides and check every key."""
    from nemo_automodel.components.config import targets
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
    from nemo_automodel.recipes.settings import load_settings

    opened = targets._Fence.prefixes
    try:
        load_settings(parse_args_and_load_config(default, argv))
    finally:
        targets._Fence.prefixes = opened  # pages show `--allow-target`, which lasts as long as the process


def check_automodel(args: list[str]) -> None:
    if args[0].endswith((".yaml", ".yml")):
        load(["-c", *args])
    elif args[0] in RECIPE_VERBS:
        assert args[1] == "llm", args
        load(args[2:])
    elif args != ["--help"] and args != ["--version"]:
        assert args[0] in subcommands(), f"`automodel {args[0]}` is no subcommand; there are {subcommands()}"
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module("nemo_automodel.cli." + args[0].replace("-", "_")).add_arguments(parser)
        if args[0] in ("inspect", "plan"):  # its other words are those of a run
            load(["-c", *parser.parse_known_args(args[1:])[1]])
        else:
            parser.parse_args(args[1:])


def check_python(args: list[str], copied: dict[str, str]) -> None:
    if args[0] == "-c":
        compile(args[1], "the page", "exec")
    elif args[0] == "-m":
        assert importlib.util.find_spec(args[1]), args
    else:
        script = ROOT / copied.get(args[0], args[0])
        assert script.is_file(), f"{args[0]} does not exist"
        if len(args) > 1:
            load(args[1:])


def check_install(args: list[str]) -> None:
    extras = pyproject_extras()
    for word in args:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= extras, f"{word}: extras are {sorted(extras)}"


def check_uv(args: list[str], copied: dict[str, str]) -> None:
    if args[0] == "run":
        rest = [word for word in args[1:] if word not in ("--frozen", "--no-sync")]
        check_python(rest[1:] if rest[0] == "python" else rest, copied)
    elif args[0] == "sync":
        left_out = [args[i + 1] for i, word in enumerate(args) if word == "--no-install-package"]
        assert left_out[: len(NOT_INSTALLED_BY_UV)] == NOT_INSTALLED_BY_UV
        assert args[1:4] == ["--inexact", "--frozen", "--all-extras"]
    elif args[0] == "pip":
        check_install(args)
    else:
        assert args[0] in ("venv", "lock"), args


def pyproject_extras() -> set[str]:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, flags=re.MULTILINE))


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist_and_parse(page: Path):
    copied: dict[str, str] = {}
    for words in commands(page):
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        program, args = Path(words[0]).name, words[1:]
        if program == "make":
            assert set(args) <= make_targets(), f"{words}: the Makefile has {sorted(make_targets())}"
        elif program in ("automodel", "am"):
            check_automodel(args)
        elif program in ("python", "python3"):
            if args[:2] != ["-m", "venv"]:
                check_python(args, copied)
        elif program == "uv":
            check_uv(args, copied)
        elif program == "pip":
            check_install(args)
        elif program == "cp":
            assert (ROOT / args[0]).exists(), f"{words}: {args[0]} does not exist"
            copied[args[1]] = args[0]
        else:
            assert program in OTHER_PROGRAMS, f"{words}: nothing checks this program"


def test_the_readme_has_the_playbooks_commands():
    scripts = [w for w in commands(READMES[0]) if "examples/llm_finetune/finetune.py" in w]
    configs = [w[w.index("-c") + 1].rpartition("/")[2] for w in scripts]
    assert configs == ["llama3_2_1b_squad_peft.yaml", "llama3_1_8b_squad_qlora.yaml", "qwen3_8b_squad_spark.yaml"]
    assert all("--step_scheduler.max_steps" in w and "--packed_sequence.packed_sequence_size" in w for w in scripts)


def test_both_readmes_list_the_same_commands():
    english, korean = (commands(page) for page in READMES)
    assert english == korean


def test_both_readmes_have_the_same_sections():
    english, korean = (re.findall(r"^(#+) ", page.read_text(encoding="utf-8"), flags=re.M) for page in READMES)
    assert english == korean


@pytest.mark.parametrize("page", [*READMES, ROOT / "docs/cli.md"], ids=page_id)
def test_every_subcommand_is_listed(page: Path):
    text = page.read_text(encoding="utf-8")
    listed = set(re.findall(r"`automodel ([a-z-]+)", text)) - set(RECIPE_VERBS)
    assert listed == set(subcommands())


# ------------------------------------------------------------------------------------------- links and snippets


def anchors(page: Path) -> set[str]:
    """Return the anchors a page's headings get."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_resolve(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page_id(page)}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{page_id(page)}: {link}: no such heading"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=page_id)
def test_files_named_in_the_docs_exist(page: Path):
    for name in re.findall(r"`((?:nemo_automodel|examples|recipes|tests|benchmarks|docs)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page_id(page)}: `{name}` does not exist"


def yaml_blocks() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, block in enumerate(blocks(page, "yaml")):
            yield f"{page_id(page)}-{number}", block


@pytest.mark.parametrize(("name", "block"), list(yaml_blocks()), ids=[name for name, _ in yaml_blocks()])
def test_yaml_of_the_docs_loads(name: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for variable in re.findall(r"\$\{(?:oc\.env:)?(\w+)", block):
        monkeypatch.setenv(variable, "a-value")
    sections = yaml.safe_load(block)
    if "qat" in sections:
        pytest.importorskip("torchao")
    recipe = yaml.safe_load(BASE_RECIPE.read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **sections}))
    load(["-c", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_json_of_the_docs_parses(page: Path):
    for block in blocks(page, "json"):
        for line in block.splitlines():
            assert isinstance(json.loads(line), dict), line


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_id)
def test_python_of_the_docs_runs(page: Path, model_dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from support.tiny import CHAT_TEMPLATE

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block.replace(SMALL_MODEL, str(model_dirs("llama", CHAT_TEMPLATE))), page_id(page), "exec"), names)


def shown_errors() -> list[tuple[str, str]]:
    """Return (command, what it prints) of the console blocks of docs/errors.md."""
    page = ROOT / "docs/errors.md"
    found = []
    for block in blocks(page, "console") if page.exists() else []:
        command, _, output = block.replace("\\\n", " ").partition("\n")
        found.append((command.removeprefix("$ "), output.strip()))
    return found


@pytest.mark.parametrize(("command", "output"), shown_errors(), ids=[command for command, _ in shown_errors()])
def test_shown_errors_are_the_printed_ones(
    command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from nemo_automodel.cli.app import main

    (tmp_path / "recipe.yaml").write_text(BASE_RECIPE.read_text())
    monkeypatch.chdir(tmp_path)
    program, *args = shlex.split(command)
    assert program == "automodel"
    assert main(args) == 2
    assert capsys.readouterr().err.split() == output.split(), "wrapping aside, the docs show another message"
