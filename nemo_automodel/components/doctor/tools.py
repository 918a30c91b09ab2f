"""The programs around a training: uv, git, Docker and a C compiler."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from nemo_automodel.components.doctor.findings import (
    NOTE,
    OK,
    WARNING,
    Check,
    Finding,
    in_container,
    pip_command,
)
from nemo_automodel.components.doctor.programs import Ran, run_program

TO_PATH = 'export PATH="$HOME/.local/bin:$PATH"'


def judge_uv(ran: Ran, off_path: Path | None, in_environment: bool, is_managed: bool, has_pip: bool) -> Finding:
    """Look at ``uv --version``.

    ``off_path`` is a uv that PATH lacks; ``in_environment``: this Python is a virtual environment's, where pip needs no
    permission; ``is_managed``: the system's package manager owns this Python and pip refuses to install into it.
    """
    if ran.is_good:
        return Finding("tools.uv", OK, ran.output.strip(), facts={"uv": ran.output.strip()})
    why = "The playbook's commands start with `uv run`. pip and the `automodel` command do without it."
    if off_path is not None:
        return Finding(
            "tools.uv", NOTE, f"uv is in {off_path.parent}, which PATH lacks", why, (TO_PATH,), {"uv": str(off_path)}
        )
    if in_environment:
        fix: tuple[str, ...] = (pip_command("uv", has_pip=has_pip),) if has_pip else ("pip3 install --user uv",)
    elif is_managed:
        fix = ("python3 -m venv .venv && .venv/bin/pip install uv",)
        why += " The system owns this Python, so pip refuses to install into it: use an environment."
    else:
        fix = ("pip3 install --user uv", TO_PATH)
        why += " Without permission for the system's packages (`pip install uv` denied), install it for yourself."
    what = "uv is not installed" if ran.is_missing else f"uv does not work: {ran.reason()}"
    return Finding("tools.uv", NOTE, what, why, fix, {"uv": None})


def judge_git(ran: Ran) -> Finding:
    """Look at ``git --version``."""
    if ran.is_good:
        return Finding("tools.git", OK, ran.output.strip(), facts={"git": ran.output.strip()})
    return Finding(
        "tools.git",
        NOTE,
        "git is not installed" if ran.is_missing else f"git does not work: {ran.reason()}",
        "It clones this repository and installs packages from a commit.",
        ("sudo apt install git",),
        {"git": None},
    )


def judge_docker(ran: Ran, remote: str | None, user: str, groups: set[str], registered: set[str]) -> Finding:
    """Look at ``docker ps``.

    ``remote`` is a daemon on another machine, which is not asked. ``groups`` are this session's, ``registered`` those
    the user gets at the next login.
    """
    check = "tools.docker"
    if remote is not None:
        return Finding(
            check, NOTE, f"docker talks to {remote}, which was not asked", "The doctor asks nobody over a network."
        )
    if ran.is_missing:
        return Finding(check, NOTE, "docker is not installed", "Only the playbook's container needs it.")
    if ran.is_good:
        return Finding(check, OK, "docker works without sudo", facts={"works": True})
    text = f"{ran.output} {ran.errors}".lower()
    facts = {"works": False, "in_group": "docker" in groups, "registered": "docker" in registered}
    if "permission denied" in text:
        if "docker" in registered and "docker" not in groups:
            return Finding(
                check,
                WARNING,
                "docker: permission denied, because this shell is older than your membership in the group `docker`",
                "Without the group every docker command needs sudo. A new login has it, or this line.",
                ("newgrp docker",),
                facts,
            )
        return Finding(
            check,
            WARNING,
            f"docker: permission denied; {user} is not in the group `docker`"
            if "docker" not in groups
            else "docker: permission denied although you are in the group `docker`",
            "Without the group every docker command needs sudo. Members of the group are as powerful as root."
            if "docker" not in groups
            else "The socket belongs to another group.",
            ("sudo usermod -aG docker $USER", "newgrp docker")
            if "docker" not in groups
            else ("ls -l /var/run/docker.sock", "sudo systemctl restart docker.socket docker"),
            facts,
        )
    if "cannot connect" in text or "is the docker daemon running" in text or ran.timed_out:
        return Finding(
            check,
            NOTE,
            "the docker daemon does not answer" if ran.timed_out else "the docker daemon is not running",
            "Only the playbook's container needs it.",
            ("sudo systemctl restart docker",),
            facts,
        )
    return Finding(
        check,
        NOTE,
        f"docker does not work: {ran.reason()}",
        "Only the playbook's container needs it.",
        ("docker ps",),
        facts,
    )


def judge_compiler(compiler: str | None, has_headers: bool, has_gpu: bool) -> Finding:
    """Look at the C compiler and at Python's headers, which Triton uses at every first run of a kernel."""
    facts = {"compiler": compiler, "headers": has_headers}
    if compiler is not None and has_headers:
        return Finding("tools.compiler", OK, f"{Path(compiler).name} and Python.h", facts=facts)
    missing = " and ".join(
        name for name, there in (("a C compiler", compiler is not None), ("Python.h", has_headers)) if not there
    )
    return Finding(
        "tools.compiler",
        WARNING if has_gpu else NOTE,
        f"{missing} {'are' if ' and ' in missing else 'is'} missing",
        "Triton compiles a small C file for each kernel, so LoRA's and the loss's kernels cannot start; neither can "
        "torch.compile.",
        (f"sudo apt install build-essential python{sys.version_info.major}.{sys.version_info.minor}-dev",),
        facts,
    )


def remote_docker(env: Mapping[str, str]) -> str | None:
    """Return the name of a Docker daemon on another machine that ``docker`` would talk to; None for this machine's."""
    host = env.get("DOCKER_HOST", "")
    if host:
        return None if urlsplit(host).scheme == "unix" else "DOCKER_HOST"
    context = env.get("DOCKER_CONTEXT", "")
    settings = Path(env.get("DOCKER_CONFIG") or "~/.docker").expanduser() / "config.json"
    if not context and settings.is_file():
        context = json.loads(settings.read_text(encoding="utf-8")).get("currentContext", "")
    return None if context in ("", "default", "rootless", "desktop-linux") else f"the context `{context}`"


def check_docker(env: Mapping[str, str]) -> Finding:
    """Ask docker, unless its daemon is on another machine."""
    if in_container() and shutil.which("docker") is None:
        return Finding("tools.docker", OK, "this is a container", facts={"works": None})
    remote = remote_docker(env)
    ran = Ran(None) if remote else run_program(["docker", "ps"])
    user = env.get("USER") or getpass.getuser()
    denied = not ran.is_good and not ran.is_missing
    groups = set(run_program(["id", "-nG"]).output.split()) if denied else set()
    registered = set(run_program(["id", "-nG", user]).output.split()) if denied else set()
    return judge_docker(ran, remote, user, groups, registered)


def check_uv(has_pip: bool) -> Finding:
    """Ask uv, and look for one that PATH lacks."""
    usual = (Path(sys.executable).with_name("uv"), Path("~/.local/bin/uv").expanduser())
    off_path = next((path for path in usual if os.access(path, os.X_OK)), None)
    is_managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    return judge_uv(run_program(["uv", "--version"]), off_path, sys.prefix != sys.base_prefix, is_managed, has_pip)


def check_compiler(env: Mapping[str, str], has_gpu: bool) -> Finding:
    """Look for what Triton looks for: CC, then the usual names."""
    names = [name for name in (env.get("CC"), "gcc", "clang", "cc") if name]
    compiler = next((path for path in map(shutil.which, names) if path), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return judge_compiler(compiler, headers.is_file(), has_gpu)


def tool_checks(env: Mapping[str, str], has_gpu: bool, has_pip: bool) -> dict[str, Check]:
    """Return the checks of programs by name."""
    return {
        "tools.uv": lambda: check_uv(has_pip),
        "tools.git": lambda: judge_git(run_program(["git", "--version"])),
        "tools.docker": lambda: check_docker(env),
        "tools.compiler": lambda: check_compiler(env, has_gpu),
    }
