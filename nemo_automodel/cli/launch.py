"""Several processes of a run on this machine, started together and ended together.

Each is this program again, with the variables that torchrun sets, so both ways to start a run are one. This process
only waits: it imports no torch. Signals that ask to stop are passed on, and the run saves and leaves. When a process
ends badly the others notice by themselves and leave; those that have not done so after ``GRACE_S`` are killed. So the
command never outlives its run, nor the run its command.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from nemo_automodel.shared.processes import LAUNCHER

GRACE_S = 20.0
"""Time that the others have once a process ended badly; they need at most `peer_watch.GRACE_S` of it."""
PROGRAM = ["-m", "nemo_automodel.cli.app"]
"""What every process runs."""
_LOOK_S = 0.1
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Ctrl-C is not: the terminal sends it to all processes itself, and two mean stop at once."""


def launch(words: Sequence[str], num_processes: int) -> int:
    """Run ``automodel`` with ``words`` as so many processes and return the exit status of the run.

    That is the first process's, or the one of another that ended badly; 128 plus its number for a signal.
    """
    port = _free_port()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (*_PASSED_ON, signal.SIGINT)}
    started: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in started:
            if process.poll() is None and number != signal.SIGINT:
                process.send_signal(number)

    for number in before:
        signal.signal(number, pass_on)
    try:
        for rank in range(num_processes):
            started.append(_start(words, rank, num_processes, port))
        for number in list(asked):  # what arrived meanwhile
            pass_on(number, None)
        return _wait(started)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(words: Sequence[str], rank: int, num_processes: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER: str(os.getpid()),
    }
    # as many threads as there are cores in each of them would be in each other's way
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    return subprocess.Popen(
        [sys.executable, *PROGRAM, *words], env=environment, stdin=None if rank == 0 else subprocess.DEVNULL
    )


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    deadline: float | None = None
    first_bad = 0
    while any(process.poll() is None for process in started):
        if deadline is None and any(process.poll() for process in started):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            first_bad = _end(started)
        time.sleep(_LOOK_S)
    statuses = [process.wait() for process in started]
    bad = [status for status in statuses if status]
    return 0 if not bad else _as_status(first_bad or statuses[0] or bad[0])


def _end(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Kill those that still run, say why, and return the status of the one that failed.

    They did not notice it, so nobody has said so yet.
    """
    failed, status = next((rank, process.poll() or 0) for rank, process in enumerate(started) if process.poll())
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    stuck = [rank for rank, process in enumerate(started) if process.poll() is None]
    for rank in stuck:
        started[rank].kill()
        started[rank].wait()
    ranks = ", ".join(map(str, stuck))
    sys.stderr.write(f"error: Lost rank {failed}: it {how}. Rank {ranks} did not end by itself and was killed.\n")
    return status


def _as_status(status: int) -> int:
    return 128 - status if status < 0 else status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
