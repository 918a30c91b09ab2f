"""The machine without its GPU: Python, memory, disks, limits, locale and switches of the environment.

Each ``judge_…`` takes numbers and returns a finding, so it can be asked about any machine; ``host_checks`` reads the
numbers of this one. Inside a container the limits of its control group count, not the machine's memory.
"""

from __future__ import annotations

import locale
import os
import platform
import resource
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_automodel.components.doctor.findings import (
    GIB,
    NOTE,
    OK,
    PROBLEM,
    WARNING,
    Check,
    Finding,
    gib,
    in_container,
    python_command,
)
from nemo_automodel.shared.cache import cache_directory
from nemo_automodel.shared.memory import FLUSH, Memory, read_memory

OLDEST_PYTHON = (3, 10)
ARCHITECTURES = ("x86_64", "aarch64")
PLAYBOOK_MEMORY = 32 * 10**9
"""What the playbook asks for, in bytes; firmware and kernel keep a part of it for themselves."""
LEAST_AVAILABLE = 2 * GIB
LEAST_SHM = GIB
LEAST_OPEN_FILES = 1024

_HARMFUL = {
    "TRITON_INTERPRET": "Triton kernels are interpreted: thousands of times slower, and products in bf16 are wrong.",
    "CUDA_LAUNCH_BLOCKING": "Every kernel is waited for. It helps to find a fault and makes training slow.",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "Every tensor asks the driver for memory, which makes training slow.",
}
"""Switches for finding faults, and what they cost when they stay on."""


def judge_python(version: tuple[int, int, int], is_64_bit: bool) -> Finding:
    """Look at the running Python."""
    text = ".".join(map(str, version))
    facts = {"version": text, "executable": sys.executable}
    if version[:2] < OLDEST_PYTHON or not is_64_bit:
        return Finding(
            "machine.python",
            PROBLEM,
            f"Python {text}{'' if is_64_bit else ', 32 bits'}",
            "Python 3.10 or newer with 64 bits is needed; PyTorch has no build for others.",
            ("sudo apt install python3 python3-venv", "python3 -m venv .venv && .venv/bin/pip install -e ."),
            facts,
        )
    return Finding("machine.python", OK, f"Python {text}", facts=facts)


def judge_architecture(machine: str) -> Finding:
    """Look at the processor's architecture."""
    facts = {"machine": machine}
    if machine in ARCHITECTURES:
        return Finding("machine.architecture", OK, machine, facts=facts)
    return Finding(
        "machine.architecture",
        WARNING,
        f"this processor is `{machine}`",
        f"Packages are tested on {' and '.join(ARCHITECTURES)}. Where no wheel fits, pip builds from source.",
        ("sudo apt install build-essential cmake python3-dev",),
        facts,
    )


def judge_bytecode(is_set: bool, has_compiled: bool) -> Finding:
    """Look at PYTHONDONTWRITEBYTECODE and at whether PyTorch's files are compiled all the same."""
    facts = {"PYTHONDONTWRITEBYTECODE": is_set, "compiled": has_compiled}
    if has_compiled or not is_set:
        what = "compiled packages" if has_compiled else "packages are compiled at their first import"
        return Finding("machine.bytecode", OK, what, facts=facts)
    return Finding(
        "machine.bytecode",
        WARNING,
        "PYTHONDONTWRITEBYTECODE is set and the packages are not compiled",
        "Every start compiles them again, which doubles the time to the first step.",
        (
            "unset PYTHONDONTWRITEBYTECODE",
            f"{python_command()} -m compileall -q {sysconfig.get_paths()['purelib']}",
        ),
        facts,
    )


def judge_encoding(preferred: str, output: str) -> Finding:
    """Look at the encodings of files and of standard output."""
    facts = {"preferred": preferred, "output": output}

    def is_utf8(name: str) -> bool:
        return name.lower().replace("-", "").replace("_", "") in ("utf8", "utf8sig")

    if is_utf8(preferred) and is_utf8(output):
        return Finding("machine.encoding", OK, "UTF-8", facts=facts)
    return Finding(
        "machine.encoding",
        WARNING,
        f"texts are read as {preferred} and printed as {output}",
        "Libraries that name no encoding break at the first letter that is not ASCII, in data or in a path.",
        ("export LC_ALL=C.UTF-8 PYTHONUTF8=1",),
        facts,
    )


def judge_switches(env: Mapping[str, str]) -> Finding:
    """Look for switches that help to find a fault and cost speed or correctness afterwards."""
    found = [name for name in _HARMFUL if env.get(name, "0") not in ("", "0")]
    if not found:
        return Finding("machine.switches", OK, "no debugging switch is on", facts={"on": []})
    return Finding(
        "machine.switches",
        WARNING,
        f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} on",
        " ".join(_HARMFUL[name] for name in found),
        (f"unset {' '.join(found)}",),
        {"on": found},
    )


# ------------------------------------------------------------------------------------------------------------ memory


def judge_memory(memory: Memory) -> Finding:
    """Look at the host's memory."""
    where = " (the container's limit)" if memory.is_limited else ""
    what = f"{gib(memory.available)} of {gib(memory.total)} memory free{where}"
    facts = {"total": memory.total, "available": memory.available, "is_limited": memory.is_limited}
    if memory.available < LEAST_AVAILABLE:
        return Finding(
            "machine.memory",
            WARNING,
            what,
            "Loading a model would swap or be killed. End what holds the memory: the largest processes are listed by",
            ("ps -eo pid,user,rss,comm --sort=-rss | head",),
            facts,
        )
    if memory.total < 0.9 * PLAYBOOK_MEMORY:
        return Finding(
            "machine.memory",
            NOTE,
            what,
            "The playbook asks for 32 GB. Less is enough for small models: the weights pass through it once.",
            facts=facts,
        )
    return Finding("machine.memory", OK, what, facts=facts)


def judge_unified_memory(memory: Memory) -> Finding:
    """Look at the memory of a machine whose GPU has none of its own (GB10, DGX Spark, Jetson).

    There the driver reports as free what the kernel has not lent out; the cache of files counts as used although it
    would be given back. So an allocation can fail on a machine that looks half empty.
    """
    what = f"GPU and host share {gib(memory.total)}; {gib(memory.free)} are free, {gib(memory.cached)} cache files"
    facts = {"total": memory.total, "free": memory.free, "cached": memory.cached}
    why = (
        "Cached files count as used when the GPU asks for memory, so it may run out below its capacity. "
        "Flush them before a large model is loaded."
    )
    if memory.free < memory.total // 2 and memory.cached > memory.total // 4:
        return Finding("machine.unified_memory", WARNING, what, why, (FLUSH,), facts)
    return Finding("machine.unified_memory", NOTE, what, why, (FLUSH,), facts)


# ------------------------------------------------------------------------------------------------------------- disks


@dataclass(frozen=True)
class Place:
    """A directory that has to hold something, and how much of it."""

    check: str
    title: str
    problem_below: int
    warning_below: int
    needs: str
    """What the space is for."""
    elsewhere: str
    """The command that takes another directory."""


CHECKPOINTS = Place(
    "machine.disk_checkpoints",
    "checkpoints",
    GIB,
    20 * GIB,
    "A full checkpoint of an 8B model takes 16 GB and its optimizer 32 GB more; an adapter well below 1 GB.",
    "automodel recipe.yaml --checkpoint.checkpoint_dir /path/on/another/disk",
)
MODELS = Place(
    "machine.disk_models",
    "Hugging Face cache",
    2 * GIB,
    20 * GIB,
    "An 8B model takes 16 GB, a 70B model 140 GB; a download that finds no room stops half-way.",
    "export HF_HOME=/path/on/another/disk",
)
CACHE = Place(
    "machine.disk_cache",
    "cache of tokenised data",
    GIB // 2,
    2 * GIB,
    "Tokenised rows are kept here so that the next start does not wait for them.",
    "export NEMO_AUTOMODEL_CACHE=/path/on/another/disk",
)


def judge_disk(place: Place, directory: Path, total: int, free: int, is_writable: bool) -> Finding:
    """Look at the disk under ``directory``, which may not exist yet."""
    facts = {"directory": str(directory), "total": total, "free": free, "is_writable": is_writable}
    if not is_writable:
        return Finding(
            place.check,
            PROBLEM,
            f"{place.title}: {directory} cannot be written",
            f"{place.needs} Change the owner, or take another place.",
            (f'sudo install -d -o "$(id -un)" -g "$(id -gn)" {shlex.quote(str(directory))}', place.elsewhere),
            facts,
        )
    if free < place.warning_below:
        status = PROBLEM if free < place.problem_below else WARNING
        largest = f"du -xh --max-depth=2 {shlex.quote(str(existing_parent(directory)))} | sort -h | tail"
        what = f"{place.title}: only {gib(free)} of {gib(total)} free at {directory}"
        return Finding(place.check, status, what, place.needs, (largest, place.elsewhere), facts)
    return Finding(place.check, OK, f"{gib(free)} free for the {place.title}", facts=facts)


def existing_parent(path: Path) -> Path:
    """Return ``path`` or the nearest directory above it that exists."""
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_disk(place: Place, directory: Path) -> Finding:
    """Measure the disk that ``directory`` lies on or would lie on."""
    there = existing_parent(directory)
    usage = shutil.disk_usage(there)
    is_writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return judge_disk(place, directory, usage.total, usage.free, is_writable)


def hub_home(env: Mapping[str, str]) -> Path:
    """Return where the Hugging Face libraries keep things, by their own rule."""
    base = env.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expandvars(env.get("HF_HOME") or f"{base}/huggingface")).expanduser()


def hub_cache(env: Mapping[str, str]) -> Path:
    """Return where downloaded models lie."""
    name = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(name)).expanduser() if name else hub_home(env) / "hub"


# ------------------------------------------------------------------------------------------------------------ limits


def judge_shm(total: int, is_container: bool) -> Finding:
    """Look at /dev/shm, through which the workers of a data loader pass their batches."""
    facts = {"total": total}
    what = f"/dev/shm holds {gib(total) if total >= GIB else f'{total / 2**20:.0f} MiB'}"
    if total >= LEAST_SHM:
        return Finding("machine.shm", OK, what, facts=facts)
    if is_container:
        fix: tuple[str, ...] = ("docker run --shm-size=8g --ulimit memlock=-1 --gpus all -it IMAGE",)
    else:
        fix = ("sudo mount -o remount,size=8G /dev/shm",)
    return Finding(
        "machine.shm",
        WARNING,
        what,
        "Workers of the data loader pass batches through it and die with `Bus error` when it is full; NCCL needs it "
        "too. Without workers (`dataloader.num_workers: 0`, the default) one GPU does not need it.",
        (*fix, "automodel recipe.yaml --dataloader.num_workers 0"),
        facts,
    )


def judge_limits(open_files: int, address_space: int, locked_memory: int, has_gpu: bool) -> Finding:
    """Look at this shell's limits; -1 is no limit, memory in bytes."""
    facts = {"open_files": open_files, "address_space": address_space, "locked_memory": locked_memory}
    if address_space != -1:
        return Finding(
            "machine.limits",
            PROBLEM if has_gpu else WARNING,
            f"the address space is limited to {gib(address_space)} (ulimit -v)",
            "CUDA reserves far more addresses than it uses memory, and weights are mapped into them.",
            ("ulimit -v unlimited",),
            facts,
        )
    if 0 <= open_files < LEAST_OPEN_FILES:
        return Finding(
            "machine.limits",
            WARNING,
            f"only {open_files} files may be open at once (ulimit -n)",
            "Shards of weights and workers of the data loader each hold some; the run would end with "
            "`Too many open files`.",
            (f"ulimit -n {4 * LEAST_OPEN_FILES}",),
            facts,
        )
    what = f"{'any number of' if open_files == -1 else open_files} open files"
    if has_gpu and 0 <= locked_memory < 64 * 2**20:
        return Finding(
            "machine.limits",
            NOTE,
            f"{what}, {locked_memory // 1024} KiB of locked memory (ulimit -l)",
            "Several nodes over InfiniBand need more; one machine does not. In Docker: --ulimit memlock=-1.",
            ("ulimit -l unlimited",),
            facts,
        )
    return Finding("machine.limits", OK, what, facts=facts)


def soft_limit(kind: int) -> int:
    """Return the soft limit of this process, -1 for none."""
    soft = resource.getrlimit(kind)[0]
    return -1 if soft == resource.RLIM_INFINITY else soft


def check_shm() -> Finding:
    """Measure /dev/shm."""
    shm = Path("/dev/shm")
    return judge_shm(shutil.disk_usage(shm).total if shm.is_dir() else 0, in_container())


def check_bytecode(env: Mapping[str, str]) -> Finding:
    """Look for compiled files beside PyTorch's sources."""
    library = Path(sysconfig.get_paths()["purelib"])
    has_compiled = any((library / "torch/__pycache__").glob("__init__.*.pyc"))
    return judge_bytecode(bool(env.get("PYTHONDONTWRITEBYTECODE")), has_compiled)


def host_checks(env: Mapping[str, str], has_gpu: bool, encoding: str) -> dict[str, Check]:
    """Return the checks of this machine by name; ``encoding`` is standard output's."""
    version = sys.version_info

    return {
        "machine.python": lambda: judge_python((version.major, version.minor, version.micro), sys.maxsize > 2**32),
        "machine.architecture": lambda: judge_architecture(platform.machine()),
        "machine.memory": lambda: judge_memory(read_memory()),
        CHECKPOINTS.check: lambda: check_disk(CHECKPOINTS, Path("checkpoints")),
        MODELS.check: lambda: check_disk(MODELS, hub_cache(env)),
        CACHE.check: lambda: check_disk(CACHE, cache_directory("")),
        "machine.shm": check_shm,
        "machine.limits": lambda: judge_limits(
            soft_limit(resource.RLIMIT_NOFILE),
            soft_limit(resource.RLIMIT_AS),
            soft_limit(resource.RLIMIT_MEMLOCK),
            has_gpu,
        ),
        "machine.encoding": lambda: judge_encoding(locale.getpreferredencoding(False), encoding),
        "machine.bytecode": lambda: check_bytecode(env),
        "machine.switches": lambda: judge_switches(env),
    }
