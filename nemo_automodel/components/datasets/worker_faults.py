"""Workers of a loader that die or hang end the run with one line.

A process that dies (memory ran out) is noticed by torch, by a signal that may come at any moment of the main thread, or
by a broken pipe. One that hangs (a network drive, a deadlock in a library) is noticed by a watch: a thread that kills
the workers when the main thread has waited longer than ``timeout`` for a batch. Torch's own time limit is not enough,
because the main thread may stick in the middle of a message, where that limit does not count. Whatever is raised then
names a process at best; here it becomes a message with the worker, the rows it was to bring and the ways out.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Protocol

from nemo_automodel.shared.errors import UserError

_DEATH_S = 1.0
"""How long a process whose pipe broke may take until its end is known."""


def leave_signals_to_parent(worker: int) -> None:
    """Let a worker live through signals that stop a run: the run still wants a checkpoint, and maybe a batch for it.

    Ctrl-C reaches every process of a terminal, and a cluster's SIGTERM every process of a job. A worker ends when its
    parent tells it to or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _deaths_raise_nothing() -> Iterator[None]:
    """Keep torch's handler from raising an error where a worker dies: this one is known, or wanted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


class WorkerWatch:
    """Kills the processes that somebody waits for longer than ``timeout_s``.

    ``waiting`` is the time of a wait. The price is a thread that wakes up a few times in ``timeout_s``.
    """

    def __init__(self, workers: Sequence[BaseProcess], timeout_s: float) -> None:
        self.workers, self.timeout_s = list(workers), timeout_s
        self.has_killed = False
        _workers[:] = [worker for worker in _workers if _is_ours(worker)] + self.workers
        self._since: float | None = None
        self._is_over = threading.Event()
        if self.workers and timeout_s > 0:
            threading.Thread(target=self._look, name="loader-watch", daemon=True).start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that a batch is waited for."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def end(self) -> None:
        """Stop watching."""
        self._is_over.set()

    def kill(self) -> None:
        """End all processes at once and wait for that: one that hangs would keep the program from ending."""
        self.end()
        with _deaths_raise_nothing():
            for worker in self.workers:
                worker.kill()
            for worker in self.workers:
                worker.join(_DEATH_S)

    def _look(self) -> None:
        while not self._is_over.wait(min(self.timeout_s / 10, 5.0)):
            since = self._since
            if since is not None and time.monotonic() - since > self.timeout_s:
                self.has_killed = True
                for worker in self.workers:
                    worker.kill()
                return


_workers: list[BaseProcess] = []
"""All that may be alive, held here: a loader that nobody refers to may have left some in what is not collected yet."""


@atexit.register
def _kill_all() -> None:
    """End what is left at the end of the program, which would wait for processes that hang and ignore SIGTERM."""
    WorkerWatch([worker for worker in _workers if _is_ours(worker)], 0).kill()


def _is_ours(worker: BaseProcess) -> bool:
    """Tell whether a worker lives and is this process's own: one that was forked from it knows its workers too."""
    parent: int = worker._parent_pid  # type: ignore[attr-defined]
    return parent == os.getpid() and worker.is_alive()


class WorkedLoader(Protocol):
    """A loader as it is seen here."""

    section: str
    """Of the settings."""
    watch: WorkerWatch

    def next_worker(self) -> int | None:
        """Return the number of the worker whose turn it is, None where that is not known."""

    def next_rows(self) -> str:
        """Name the rows of the batch that comes next, nothing where they have no numbers."""


@contextlib.contextmanager
def explained_faults(loaders: Sequence[WorkedLoader]) -> Iterator[None]:
    """Turn what a dead or hung worker of these loaders leads to into one line; none of them is left after an error.

    Raises:
        UserError: a worker died or hung.
    """
    try:
        yield
    except BaseException as error:
        with _deaths_raise_nothing():
            told = _explain(error, loaders)
            for loader in loaders:
                loader.watch.kill()
        if told is None:
            raise
        raise told from error


def _explain(error: BaseException, loaders: Sequence[WorkedLoader]) -> UserError | None:
    """Return what a worker has to do with an error, None where it is what it seems."""
    if not isinstance(error, RuntimeError | EOFError | OSError):
        return None
    may_come = not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)
    message = _end_of_worker(loaders, _DEATH_S if may_come else 0.0)
    return None if message is None else UserError(message)


def _end_of_worker(loaders: Sequence[WorkedLoader], patience_s: float) -> str | None:
    """Return what happened to a worker, None where all are well."""
    deadline = time.monotonic() + patience_s
    while True:
        for loader in loaders:
            if loader.watch.has_killed:
                return _of_hung_worker(loader)
            for number, worker in enumerate(loader.watch.workers):
                if worker.exitcode:
                    return _of_dead_worker(loader, number, worker.exitcode)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.01)


def _of_dead_worker(loader: WorkedLoader, number: int, status: int) -> str:
    if status == -signal.SIGBUS:
        how = "was killed (SIGBUS), because /dev/shm is full (df -h /dev/shm)"
    elif status < 0:
        how = f"was killed ({signal.Signals(-status).name}), often because memory ran out"
    else:
        how = f"ended with status {status}, which only code of the data set or a library does"
    workers = loader.watch.workers
    return (
        f"Worker {number} of `{loader.section}` (process {workers[number].pid}) {how}. The run stops; the last "
        f"checkpoint is untouched. Use fewer workers, --{loader.section}.num_workers {len(workers) // 2}, and start "
        "again to go on."
    )


def _of_hung_worker(loader: WorkedLoader) -> str:
    number, rows, seconds = loader.next_worker(), loader.next_rows(), loader.watch.timeout_s
    workers = f"The workers of `{loader.section}` have"
    if number is not None:
        workers = f"Worker {number} of `{loader.section}` (process {loader.watch.workers[number].pid}) has"
    to_bring = f" It was to bring {rows}." if rows else ""
    return (
        f"{workers} brought no batch for {seconds:g} s.{to_bring} The run stops; the last checkpoint is untouched. "
        f"Look at what these rows wait for (a network drive, a lock), read without workers, "
        f"--{loader.section}.num_workers 0, or wait longer, --{loader.section}.timeout {seconds * 6:g}"
    )
