"""Other programs, asked with a deadline: one that hangs is cut off with everything it started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT_S = 5.0
"""A healthy program says its version within a fraction of a second."""


@dataclass(frozen=True)
class Ran:
    """How a program ended."""

    status: int | None
    """Its exit status; None: it was cut off, or could not be started."""
    output: str = ""
    errors: str = ""
    is_missing: bool = False
    timed_out: bool = False

    @property
    def is_good(self) -> bool:
        """Tell whether it ended with status 0."""
        return self.status == 0

    def reason(self) -> str:
        """Return the last line it wrote about what went wrong."""
        lines = [line.strip() for line in (self.errors or self.output).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self.status}"


def run_program(words: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> Ran:
    """Run a program of PATH, in English, with nothing to read; it gets ``timeout_s`` seconds."""
    path = shutil.which(words[0])
    if path is None:
        return Ran(None, is_missing=True)
    try:
        process = subprocess.Popen(
            [path, *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,  # its children hold the pipes open, so they must go with it
        )
    except OSError as error:
        return Ran(None, errors=f"it cannot be started: {error.strerror}")
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end_group(process)
        return Ran(None, timed_out=True)
    return Ran(process.returncode, output, errors)


def end_group(process: subprocess.Popen[str]) -> None:
    """End a program that was started as the head of a session, and its children, and let go of its pipes.

    A program stuck in a system call, as nvidia-smi is when the driver hangs, does not die: it is left behind.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
