"""How much memory is left, and whether the GPU takes it from the same place as the programs do.

On most machines the GPU has memory of its own. On others (GB10 in the DGX Spark, Jetson) both share one: weights on the
GPU, tensors on the host and the cache of files then add up, and a run that takes too much does not fail, it makes the
whole machine swap until nobody can log in any more. So such a run has a floor: it is stopped while that much is left.

Free of torch. Inside a container the limits of its control group count, not the machine's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
FLUSH = "sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'"
"""The playbook's line for machines whose GPU shares the host's memory."""

_SHARING_GPUS = ("GB10", "Thor", "Orin")
_MOST_FLOOR = 4 * GIB
_FLOOR_SHARE = 0.05


@dataclass(frozen=True)
class Memory:
    """The memory this process may use, in bytes."""

    total: int
    available: int
    free: int
    """Without what the kernel would give back on demand."""
    cached: int
    """File contents that the kernel keeps."""
    is_limited: bool = False
    """A control group allows less than the machine has."""


@dataclass(frozen=True)
class _CgroupVersion:
    controller: str
    """What its line in /proc/self/cgroup names; empty in version 2."""
    folder: str
    limit: str
    used: str
    inactive: str
    """Key of memory.stat: cached files that nobody has used for a while, given back before anything fails."""


_CGROUP_VERSIONS = (
    _CgroupVersion("", "", "memory.max", "memory.current", "inactive_file"),
    _CgroupVersion("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def read_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Read the machine's memory and the limits of this process's control groups (version 2 or 1)."""
    fields = {}
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    total, available, is_limited = fields["MemTotal"], fields["MemAvailable"], False
    for version in _CGROUP_VERSIONS:
        for folder in _own_groups(proc, cgroup, version):
            limit_text = (folder / version.limit).read_text(encoding="ascii").strip()
            if limit_text == "max" or int(limit_text) >= fields["MemTotal"]:
                continue
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            used = int((folder / version.used).read_text(encoding="ascii")) - int(stat.get(version.inactive, 0))
            total, is_limited = min(total, int(limit_text)), True
            available = min(available, max(0, int(limit_text) - used))
    return Memory(total, available, fields["MemFree"], fields.get("Cached", 0) + fields.get("Buffers", 0), is_limited)


def _own_groups(proc: Path, cgroup: Path, version: _CgroupVersion) -> Iterator[Path]:
    """Yield the groups that this process is in, from the root down: each may have a limit."""
    own, path = "/", proc / "self" / "cgroup"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        _, controllers, group = line.split(":", 2)
        if version.controller in controllers.split(","):
            own = group
    # a container sees its own group as the root, whatever the path of the outside says
    folder = cgroup / version.folder
    for part in ("", *(part for part in own.split("/") if part)):
        folder = folder / part
        if (folder / version.limit).is_file():
            yield folder


def shares_memory(gpu_name: str, is_integrated: bool) -> bool:
    """Tell whether a GPU takes its memory from the host's; ``is_integrated`` is what CUDA says of it."""
    return is_integrated or any(name in gpu_name for name in _SHARING_GPUS)


def default_floor(memory: Memory) -> int:
    """Return the bytes that stay free where a GPU shares the memory: 4 GiB, on small machines a twentieth."""
    return min(_MOST_FLOOR, int(memory.total * _FLOOR_SHARE))


def lockable_bytes(memory: Memory) -> int:
    """Return how much may be page-locked: never swapped out, so the same amount stays free as `default_floor` says."""
    return max(0, memory.available - default_floor(memory))


def process_bytes(key: str, proc: Path = Path("/proc")) -> int:
    """Return a line of this process's status, such as VmRSS or VmSwap, in bytes; 0 where there is none."""
    lines = (proc / "self" / "status").read_text(encoding="ascii", errors="replace").splitlines()
    found = next((line for line in lines if line.startswith(f"{key}:")), None)
    return 0 if found is None else int(found.split()[1]) * 1024


def gib(num_bytes: float) -> str:
    """Return an amount of memory to read."""
    return f"{num_bytes / GIB:.1f} GiB"
