"""How much memory is left, the floor under it, and the thread that ends a process that goes through it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint.tiny_run import in_child

from nemo_automodel.components.config.run_safely import run_safely
from nemo_automodel.components.training import memory_watch
from nemo_automodel.components.training.config import UnifiedMemoryConfig
from nemo_automodel.components.training.memory_watch import MemoryFloor, MemoryWatch, floor_for
from nemo_automodel.shared.errors import ConfigError, LowMemoryStop
from nemo_automodel.shared.memory import GIB, Memory, default_floor, process_bytes, read_memory, shares_memory

CPU = torch.device("cpu")
FLUSH = "Free cached files with `sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'`"


def write_proc(tmp_path: Path, available_gib: int, groups: str = "") -> Path:
    values = {"MemTotal": 128, "MemFree": 1, "MemAvailable": available_gib, "Buffers": 1, "Cached": 3}
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("".join(f"{name}:  {value * 2**20} kB\n" for name, value in values.items()))
    (proc / "self/cgroup").write_text(groups)
    return proc


def write_group(folder: Path, limit: int | str, used: int = 0, inactive: int = 0, version: int = 2) -> None:
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


def test_the_tightest_group_above_a_process_counts(tmp_path):
    proc, cgroup = write_proc(tmp_path, 100, "0::/user.slice/run-7.scope\n"), tmp_path / "cgroup"
    assert read_memory(proc, cgroup) == Memory(128 * GIB, 100 * GIB, GIB, 4 * GIB)
    write_group(cgroup / "user.slice", 40 * GIB, used=30 * GIB, inactive=2 * GIB)
    write_group(cgroup / "user.slice/run-7.scope", "max", used=10 * GIB)
    write_group(cgroup / "other.slice", GIB, used=GIB)
    assert read_memory(proc, cgroup) == Memory(40 * GIB, 12 * GIB, GIB, 4 * GIB, is_limited=True)
    write_group(cgroup / "user.slice/run-7.scope", 20 * GIB, used=13 * GIB)
    assert read_memory(proc, cgroup) == Memory(20 * GIB, 7 * GIB, GIB, 4 * GIB, is_limited=True)
    write_group(cgroup / "user.slice/run-7.scope", 20 * GIB, used=21 * GIB)  # over it for a moment
    assert read_memory(proc, cgroup).available == 0


def test_groups_of_version_1(tmp_path):
    proc = write_proc(tmp_path, 100, "9:cpu,cpuacct:/jobs\n4:memory:/jobs/12\n0::/\n")
    cgroup = tmp_path / "cgroup"
    write_group(cgroup / "memory", 2**63 - 4096, used=90 * GIB, version=1)  # version 1 says so of "no limit"
    write_group(cgroup / "memory/jobs/12", 16 * GIB, used=9 * GIB, inactive=3 * GIB, version=1)
    assert read_memory(proc, cgroup) == Memory(16 * GIB, 10 * GIB, GIB, 4 * GIB, is_limited=True)


def test_a_machine_that_has_less_than_its_group_allows(tmp_path):
    proc, cgroup = write_proc(tmp_path, 6, "0::/\n"), tmp_path / "cgroup"
    write_group(cgroup, 64 * GIB, used=GIB)
    assert read_memory(proc, cgroup).available == 6 * GIB


def test_what_this_process_holds_is_what_it_allocates():
    before = process_bytes("VmRSS")
    block = torch.ones(32 * 2**20, dtype=torch.uint8)
    assert process_bytes("VmRSS") - before == pytest.approx(block.numel(), rel=0.1)
    assert process_bytes("NoSuchLine") == 0


def test_where_a_floor_is_by_itself():
    assert shares_memory("NVIDIA GB10", False)
    assert shares_memory("Orin", False)
    assert shares_memory("some GPU", True)
    assert not shares_memory("NVIDIA H100 80GB HBM3", False)
    assert default_floor(Memory(120 * GIB, 0, 0, 0)) == 4 * GIB
    assert default_floor(Memory(8 * GIB, 0, 0, 0)) == pytest.approx(0.4 * GIB, abs=1)
    assert floor_for(CPU) is None
    assert floor_for(CPU, 0) is None
    assert floor_for(CPU, 1.5) == MemoryFloor(3 * GIB // 2)
    with pytest.raises(ConfigError, match=r"`unified_memory\.floor_gib` is -1, but memory is not negative"):
        UnifiedMemoryConfig(floor_gib=-1)


def test_the_floor_counts_what_is_about_to_be_taken():
    floor = MemoryFloor(4 * GIB, read=lambda: Memory(120 * GIB, 10 * GIB, 0, 0))
    floor.require(6 * GIB, "the model")
    with pytest.raises(LowMemoryStop) as stop:
        floor.require(6 * GIB + 1, "the model")
    message = str(stop.value)
    assert message.startswith(
        "Stopped while loading the model, before the machine swaps: 10.0 GiB of memory are left and the model takes "
        "6.0 GiB more, and the floor is 4.0 GiB (`unified_memory.floor_gib`). This process holds "
    )
    assert f" on the host. Training had not begun. {FLUSH}, end what else holds memory" in message
    # a GPU with memory of its own takes nothing from the host
    MemoryFloor(4 * GIB, holds_model=False, read=floor.read).require(60 * GIB, "the model")


class Falling:
    """The machine's memory, that falls to something at a moment."""

    def __init__(self, to_gib: float, after_s: float = 0.2) -> None:
        self.to, self.at = to_gib, time.monotonic() + after_s

    def __call__(self) -> Memory:
        return Memory(120 * GIB, int((self.to if time.monotonic() >= self.at else 50) * GIB), 0, 0)


def watched(tmp_path: Path, to_gib: float, work, grace_s: float = memory_watch.GRACE_S) -> tuple[int, str]:
    """Do ``work(note)`` under a floor of 4 GiB in a process of its own; return exit status and what it noted."""

    def child():
        output = os.open(tmp_path / "output", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(output, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        memory_watch.GRACE_S = grace_s

        def inside():
            with MemoryWatch(MemoryFloor(4 * GIB, read=Falling(to_gib)), "training", "All is well."):
                try:
                    work()
                finally:
                    sys.stderr.write("left\n")

        return run_safely(inside)

    code, status = in_child(child)
    return code or status, (tmp_path / "output").read_text()


def think(for_s: float = 10.0) -> None:
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        sum(range(1000))


def test_the_main_thread_leaves_in_order(tmp_path):
    status, output = watched(tmp_path, 3.0, think)
    assert status == 3
    first, message = output.splitlines()
    assert first == "left"
    assert message.startswith(
        "error: Stopped while training, before the machine swaps: 3.0 GiB of memory are left, and the floor is 4.0 GiB "
    )
    assert f" All is well. {FLUSH}" in message


def test_a_sleeping_main_thread_is_woken(tmp_path):
    status, output = watched(tmp_path, 3.0, lambda: time.sleep(60))
    assert (status, output.splitlines()[0]) == (3, "left")


def long_call() -> None:
    torch.linalg.matrix_power(torch.eye(1500, dtype=torch.float64), 2**62 - 1)  # minutes, in one call


def test_one_long_call_does_not_hold_it_up(tmp_path):
    status, output = watched(tmp_path, 3.0, long_call, grace_s=0.5)
    assert status == 3
    (message,) = output.splitlines()
    assert message.startswith("error: Stopped while training, before the machine swaps: 3.0 GiB of memory are left")


def test_a_fast_fall_leaves_no_time_for_order(tmp_path):
    def never_leaves() -> None:
        try:
            think(60)
        except LowMemoryStop:
            think(60)

    status, output = watched(tmp_path, 1.9, never_leaves, grace_s=50)
    assert status == 3
    (message,) = output.splitlines()
    assert message.startswith("error: Stopped while training, before the machine swaps: 1.9 GiB of memory are left")


def test_nobody_swallows_it(tmp_path):
    def swallow() -> None:
        try:
            think()
        except Exception:
            think(60)

    assert watched(tmp_path, 3.0, swallow)[0] == 3


def test_what_others_make_of_it_is_still_it(tmp_path):
    def wrap() -> None:
        try:
            think()
        except BaseException as error:
            raise OSError("could not write") from error

    status, output = watched(tmp_path, 3.0, wrap)
    assert (status, output.splitlines()[0]) == (3, "left")
    assert output.splitlines()[1].startswith("error: Stopped while training, before the machine swaps: 3.0 GiB")


def test_memory_that_stays_ends_nothing(tmp_path):
    assert watched(tmp_path, 4.0, lambda: think(1.0)) == (0, "left\n")


def test_without_a_floor_there_is_no_thread():
    with MemoryWatch(None, "training", "") as watch:
        assert watch._thread is None


def test_swap_counts_as_well(monkeypatch):
    amounts = iter([GIB, GIB + memory_watch.MOST_SWAPPED, GIB + memory_watch.MOST_SWAPPED + GIB // 4])
    monkeypatch.setattr(memory_watch, "process_bytes", lambda key: next(amounts))
    floor = MemoryFloor(4 * GIB, read=lambda: Memory(120 * GIB, 20 * GIB, 0, 0))
    watch = MemoryWatch(floor, "training", "")
    watch._swapped_before = memory_watch.process_bytes("VmSwap")
    assert watch._what_is_wrong(floor) is None
    assert watch._what_is_wrong(floor) == "0.8 GiB of this process went to swap, 20.0 GiB of memory are left"
