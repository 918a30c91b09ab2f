"""Installed packages against what this project requires, and against the versions it was tested with.

The requirements come from the project's own metadata, the tested versions from ``constraints.txt`` of a checkout.
Another version than the tested one is no fault; it is the first thing to know when something else is.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import nemo_automodel
from nemo_automodel.components.doctor.findings import NOTE, OK, PROBLEM, WARNING, Check, Finding, pip_command

PROJECT = "nemo-automodel"
ROOT = Path(nemo_automodel.__file__).resolve().parents[1]
_NOT_FOR_ALL = ("dev", "hopper")
"""Extras for developers, and for one kind of GPU: `gpu.assembler` speaks of it there."""
_ENABLES = {
    "qlora": "bases in 4 or 8 bits (QLoRA)",
    "kernels": "the fast layers, where PyTorch did not bring Triton",
    "demo": "the quickstart's model",
    "tensorboard": "the tracker TensorBoard",
    "wandb": "the tracker Weights & Biases",
    "mlflow": "the tracker MLflow",
}


def normal(name: str) -> str:
    """Return a package's name in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Return normal name → version of every installed package; the first on the path is the one that is imported."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(normal(name), distribution.version)
    return found


def read_pins(path: Path) -> dict[str, str]:
    """Read ``name==version`` lines; a marker behind the version has to fit this Python."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            pins[normal(requirement.name)] = next(iter(requirement.specifier)).version
    return pins


def applies(requirement: Requirement, extra: str = "") -> bool:
    """Tell whether a requirement belongs to an extra (``""``: to the project itself) on this Python."""
    if requirement.marker is None:
        return not extra
    fits = requirement.marker.evaluate({"extra": extra})
    return fits and not (extra and requirement.marker.evaluate({"extra": ""}))


def judge_requirements(requirements: Iterable[Requirement], installed: Mapping[str, str], pip: str) -> Finding:
    """Look at what the project cannot do without."""
    wrong = []
    for requirement in requirements:
        version = installed.get(normal(requirement.name))
        if version is None:
            wrong.append((requirement, f"{requirement.name} is missing"))
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append((requirement, f"{requirement.name} {version} is not {requirement.specifier}"))
    if not wrong:
        return Finding("packages.required", OK, "all required packages are there", facts={"wrong": []})
    lines = [line for _, line in wrong]
    names = " ".join(f"'{requirement.name}{requirement.specifier}'" for requirement, _ in wrong)
    return Finding(
        "packages.required",
        PROBLEM,
        "; ".join(lines),
        "Training needs them in these versions.",
        (f"{pip} {names}",),
        {"wrong": lines},
    )


def judge_tested(installed: Mapping[str, str], pins: Mapping[str, str], direct: set[str], pip: str) -> Finding:
    """Look at the versions that are others than the tested ones; ``direct`` are the packages we import ourselves.

    A local build of the same version (``2.13.0+cpu``) is the tested one.
    """
    others = {
        name: (version, pins[name])
        for name, version in sorted(installed.items())
        if name in pins and Version(version).public != Version(pins[name]).public
    }
    facts = {"others": {name: list(versions) for name, versions in others.items()}, "num_pins": len(pins)}
    if not others:
        return Finding("packages.tested", OK, "all versions are the tested ones", facts=facts)
    shown = [f"{name} {version} (tested: {pin})" for name, (version, pin) in others.items() if name in direct]
    num_more = len(others) - len(shown)
    if num_more:
        shown.append(f"{num_more} packages that others need" if shown else f"{num_more} indirect packages")
    is_far = any(
        Version(version).major != Version(pin).major for name, (version, pin) in others.items() if name in direct
    )
    return Finding(
        "packages.tested",
        WARNING if is_far else NOTE,
        f"other than the tested versions: {', '.join(shown)}",
        "Within the required ranges they should work. If something fails without a reason, take the tested ones."
        if not is_far
        else "Another major version may have renamed or removed what is used here. Take the tested ones.",
        (f"{pip} -c constraints.txt -e .",),
        facts,
    )


def judge_extras(extras: Mapping[str, Iterable[Requirement]], installed: Mapping[str, str], pip: str) -> Finding:
    """Look at the optional packages, and say what the missing ones would enable."""
    missing = {}
    for extra, requirements in extras.items():
        names = [r.name for r in requirements if normal(r.name) not in installed]
        if names:
            missing[extra] = names
    facts = {"missing": missing}
    if not missing:
        return Finding("packages.extras", OK, "all extras are there", facts=facts)
    told = [
        f"{extra} ({', '.join(names)}) for {_ENABLES.get(extra, 'what its name says')}"
        for extra, names in missing.items()
    ]
    return Finding(
        "packages.extras",
        NOTE,
        f"not installed: {'; '.join(told)}",
        "A recipe that asks for one of them says so before anything is loaded.",
        (f"{pip} {project_with(missing)}",),
        facts,
    )


def project_with(extras: Iterable[str]) -> str:
    """Return what pip installs to get this project with extras: the checkout, where this is one."""
    names = f"[{','.join(extras)}]"
    return f"-e '.{names}'" if (ROOT / "pyproject.toml").is_file() else f"'{PROJECT}{names}'"


def judge_project(module: str, version: str, installed: str | None, examples: bool) -> Finding:
    """Look at this package itself: the version that is installed must be the one that is imported."""
    facts = {"version": version, "installed": installed, "directory": module, "examples": examples}
    if installed is None:
        return Finding(
            "packages.nemo_automodel",
            NOTE,
            f"nemo_automodel {version} is imported from {module}, but not installed",
            "It works from here only, and the command `automodel` is missing elsewhere.",
            ("python3 -m venv .venv && .venv/bin/pip install -e .",),
            facts,
        )
    if installed != version:
        return Finding(
            "packages.nemo_automodel",
            WARNING,
            f"nemo_automodel {version} is imported from {module}, but {installed} is installed",
            "Two copies, or another project of the same name: which one runs depends on the directory you are in.",
            ("python3 -m pip uninstall nemo-automodel", "python3 -m pip install -e ."),
            facts,
        )
    where = " with examples" if examples else ""
    return Finding("packages.nemo_automodel", OK, f"nemo_automodel {version}{where}", facts=facts)


def _own_requirements() -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires(PROJECT) or []]


def _extras() -> dict[str, list[Requirement]]:
    names = metadata.metadata(PROJECT).get_all("Provides-Extra") or []
    own = _own_requirements()
    return {name: [r for r in own if applies(r, name)] for name in names if name not in _NOT_FOR_ALL}


def has_pip() -> bool:
    """Tell whether this Python has pip."""
    return importlib.util.find_spec("pip") is not None


def _check_tested(installed: Mapping[str, str], pip: str) -> Finding:
    pins_file = ROOT / "constraints.txt"
    if not pins_file.is_file():
        return Finding(
            "packages.tested",
            NOTE,
            "the list of tested versions is not installed",
            "It is constraints.txt of the repository.",
        )
    direct = {normal(requirement.name) for requirement in _own_requirements()}
    return judge_tested(installed, read_pins(pins_file), direct, pip)


def package_checks() -> dict[str, Check]:
    """Return the checks of installed packages by name."""
    installed = installed_versions()
    pip = pip_command("", has_pip=has_pip())

    checks: dict[str, Check] = {
        "packages.nemo_automodel": lambda: judge_project(
            str(ROOT), nemo_automodel.__version__, installed.get(PROJECT), (ROOT / "examples").is_dir()
        )
    }
    if PROJECT not in installed:
        return checks  # nothing says what it requires
    return {
        **checks,
        "packages.required": lambda: judge_requirements([r for r in _own_requirements() if applies(r)], installed, pip),
        "packages.tested": lambda: _check_tested(installed, pip),
        "packages.extras": lambda: judge_extras(_extras(), installed, pip),
    }
