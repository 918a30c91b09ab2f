"""The house rules that a machine can check: who may import whom, what an import costs, what a file may not contain.

Sizes are printed for people to judge; only the arrows and the forbidden words fail.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nemo_automodel"
ROOMS = ["cli", "recipes", "_transformers", "components", "kernels", "shared"]
"""A room imports itself and the rooms to its right."""

RE_EXPORTS = {
    "nemo_automodel/__init__.py": "the lazy public names",
    "nemo_automodel/components/models/common/__init__.py": "YAML files name `components.models.common.BackendConfig`",
}
"""Package files that may hold code, and why."""


def modules() -> dict[str, Path]:
    """Return dotted name → file of every module of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of everything a module imports, at the top, lazily, relatively or by a string."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, base] if base else start)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def room_of(dotted: str) -> tuple[str, str] | None:
    """Return (room, component) of one of our dotted names; the component is empty outside `components`."""
    parts = dotted.split(".")
    if parts[0] != PACKAGE or len(parts) < 2 or parts[1] not in ROOMS:
        return None
    return parts[1], parts[2] if parts[1] == "components" and len(parts) > 2 else ""


def forbidden(source: str, target: str) -> str | None:
    """Say why module `source` may not import the name `target`; None when it may."""
    here, there = room_of(source), room_of(target)
    if here is None or there is None:
        return None
    if ROOMS.index(there[0]) < ROOMS.index(here[0]):
        return f"{here[0]} may not import {there[0]}: the arrow is {' → '.join(ROOMS)}"
    if here[0] == "components" and there[0] == "components" and here[1] != there[1]:
        return f"components never import each other: {here[1]} imports {there[1]}"
    if there == ("components", "config") and here[0] not in ("cli", "recipes") and here[1] != "config":
        return "only cli and recipes import components/config"
    return None


def test_arrows_point_right():
    broken = []
    for module, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for target, line in imported(tree, module, path.name == "__init__.py"):
            if reason := forbidden(module, target):
                broken.append(f"{path.relative_to(ROOT)}:{line}: imports {target}; {reason}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("nemo_automodel.shared.x", "import nemo_automodel.kernels.attention", "shared may not import kernels"),
        ("nemo_automodel.kernels.x", "def f():\n    from nemo_automodel.recipes import llm", "kernels may not import"),
        ("nemo_automodel.components.loss.x", "from ..datasets import utils", "loss imports datasets"),
        ("nemo_automodel.components.loss.x", "from nemo_automodel.components import datasets", "loss imports datasets"),
        ("nemo_automodel._transformers.x", "import nemo_automodel.components.config.loader", "only cli and recipes"),
        ("nemo_automodel.recipes.x", "importlib.import_module('nemo_automodel.cli.app')", "recipes may not import cli"),
        ("nemo_automodel.recipes.x", "from nemo_automodel.components.config import loader", None),
        ("nemo_automodel.components.loss.x", "from nemo_automodel.components.loss import masked_ce", None),
        ("nemo_automodel.cli.x", "import nemo_automodel.shared.errors", None),
    ],
)
def test_the_arrow_test_sees_every_kind_of_import(module: str, source: str, reason: str | None):
    reasons = [forbidden(module, target) for target, _ in imported(ast.parse(source), module)]
    if reason is None:
        assert reasons == [None]
    else:
        assert any(found and reason in found for found in reasons), reasons


def test_every_module_lives_in_a_room():
    homeless = [name for name in modules() if name != PACKAGE and room_of(name) is None]
    assert not homeless, homeless


def test_package_files_are_empty():
    full = []
    for path in sorted((ROOT / PACKAGE).rglob("__init__.py")):
        name = path.relative_to(ROOT).as_posix()
        if name not in RE_EXPORTS and path.read_text(encoding="utf-8").strip():
            full.append(name)
    assert not full, f"package files hold code: {full}"


def test_every_folder_of_the_package_is_a_package():
    missing = [p.parent for p in (ROOT / PACKAGE).rglob("*.py") if not (p.parent / "__init__.py").exists()]
    assert not missing, f"folders without __init__.py are left out of an installation: {sorted(set(missing))}"


@pytest.mark.parametrize("module", ["nemo_automodel", "nemo_automodel.cli.app", "nemo_automodel.recipes.settings"])
def test_imports_without_torch(module: str):
    heavy = ("torch", "transformers", "datasets", "numpy", "bitsandbytes", "peft")
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"`import {module}` loads {done.stdout.strip()}"


def test_loading_settings_needs_no_torch():
    code = (
        "import sys\n"
        "from nemo_automodel.components.config.loader import load_yaml_config\n"
        "from nemo_automodel.recipes.settings import load_settings\n"
        "load_settings(load_yaml_config('examples/llm_finetune/llama3_1/llama3_1_8b_squad_qlora.yaml'))\n"
        "assert 'torch' not in sys.modules, 'load_settings imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------- forbidden words

# put together here, so that this file does not hold what it forbids
_INDEX_HOSTS = ["py" + "pi.org", "py" + "thonhosted", "npm" + "js", "download." + "pytorch", "py" + "pi.nvidia"]
_MACHINE_PATH = re.compile(r"(?<![\w.$~}>-])/(?:root|home|work|Users|mnt|opt)/[\w.-]")


def tracked_files() -> list[Path]:
    """Return what git would commit: tracked files and new ones that are not ignored."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_index_host_and_no_path_of_one_machine():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # binary
        for number, line in enumerate(text.splitlines(), 1):
            if any(host in line for host in _INDEX_HOSTS) or _MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "host names of package indexes, or paths of one machine:\n" + "\n".join(found)


def test_no_lock_file_is_tracked():
    assert "uv.lock" not in {path.name for path in tracked_files()}, "a lock file spells out package-index hosts"


# ------------------------------------------------------------------------------------------------------ sizes


def test_print_sizes(capsys: pytest.CaptureFixture[str]):
    files, functions = [], []
    for path in modules().values():
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT / PACKAGE).as_posix()
        files.append((text.count("\n"), name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(((node.end_lineno or node.lineno) - node.lineno + 1, f"{name}:{node.name}"))
    files.sort(reverse=True)
    functions.sort(reverse=True)
    total = sum(lines for lines, _ in files)
    with capsys.disabled():
        print(f"\nsizes: {total} lines, {len(files)} files, {len(functions)} functions (guides: file 400, function 60)")
        print("  longest files:     " + ", ".join(f"{name} {lines}" for lines, name in files[:5]))
        print("  longest functions: " + ", ".join(f"{name} {lines}" for lines, name in functions[:5]))
    assert total > 0
