"""A floor under the machine's memory, and the thread that stops a run which would go through it.

Where GPU and host share one memory, a run that takes too much makes the machine swap, and a machine that swaps its
training cannot be logged into to end it. So the memory that is left is looked at four times a second, from a thread:
a quarter of a millisecond each time. Below the floor the main thread gets a signal, whose handler raises
`LowMemoryStop` there, and has `GRACE_S` to leave: files are closed, trackers told. When it does not, because it is
inside one long call, or when the memory falls to half of the floor meanwhile, the thread prints the message and ends
the process. No checkpoint is written then, since gathering one takes memory; the last one is whole, whatever happens.

Loading can take memory faster than the thread looks, so its stream asks `MemoryFloor.require` before each tensor.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from nemo_automodel.shared.errors import LowMemoryStop, UserError
from nemo_automodel.shared.memory import (
    FLUSH,
    GIB,
    Memory,
    default_floor,
    gib,
    process_bytes,
    read_memory,
    shares_memory,
)

logger = logging.getLogger(__name__)

INTERVAL_S = 0.25
GRACE_S = 3.0
MOST_SWAPPED = GIB // 2
"""More of this process in swap than at the start of the watch: the machine swaps, however much seems available."""

_REMEDY = (
    f"Free cached files with `{FLUSH}`, end what else holds memory (`automodel doctor`), or make the run smaller: "
    "--step_scheduler.local_batch_size 1, --distributed.activation_checkpointing full, a smaller "
    "--packed_sequence.packed_sequence_size, or 4 bits (`quantization`); `automodel plan` says what fits, on a DGX "
    "Spark with --gpu gb10."
)


@dataclass(frozen=True)
class MemoryFloor:
    """Bytes of memory that stay available to everybody else."""

    num_bytes: int
    holds_model: bool = True
    """The model lies in this memory; false for a GPU with memory of its own."""
    read: Callable[[], Memory] = read_memory

    def require(self, num_bytes: int, what: str) -> None:
        """Return if ``what``, a part of the model, does not cross the floor with its bytes.

        Raises:
            LowMemoryStop: it would be. Memory that PyTorch keeps for later was given back before.
        """
        wanted = num_bytes if self.holds_model else 0
        if self.read().available - wanted >= self.num_bytes:
            return
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        available = self.read().available
        if available - wanted < self.num_bytes:
            left = f"{gib(available)} of memory are left and {what} takes {gib(wanted)} more"
            raise LowMemoryStop(self.message("loading the model", left, "Training had not begun."))

    def message(self, doing: str, left: str, state: str) -> str:
        """Return the one line that says why a run was stopped, what became of it, and what to change."""
        held = f"{gib(process_bytes('VmRSS'))} on the host"
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            held += f" and {gib(torch.cuda.memory_reserved())} on the GPU"
        return (
            f"Stopped while {doing}, before the machine swaps: {left}, and the floor is {gib(self.num_bytes)} "
            f"(`unified_memory.floor_gib`). This process holds {held}. {state} {_REMEDY}"
        )


def floor_for(device: torch.device, floor_gib: float | None = None) -> MemoryFloor | None:
    """Return the floor for a run on ``device``: the one asked for, else one where the GPU shares the host's memory.

    Raises:
        UserError: a floor is asked for on a system that does not say how much memory is left.
    """
    is_shared = device.type == "cuda" and device_shares_memory(device)
    if floor_gib == 0 or (floor_gib is None and not is_shared):
        return None
    if not Path("/proc/meminfo").is_file():
        raise UserError(
            "`unified_memory.floor_gib` is set, but this system has no /proc/meminfo, which says how much memory is "
            "left. Leave it out; it is for Linux."
        )
    num_bytes = default_floor(read_memory()) if floor_gib is None else int(floor_gib * GIB)
    return MemoryFloor(num_bytes, holds_model=is_shared or device.type != "cuda")


def device_shares_memory(device: torch.device) -> bool:
    """Tell whether a CUDA device takes its memory from the host's."""
    properties: Any = torch.cuda.get_device_properties(device)
    return shares_memory(properties.name, bool(properties.is_integrated))


class MemoryWatch:
    """Watches while it is entered; does nothing without a floor.

    Outside of the main thread nothing can be raised where it would help, so there the process is ended at once.
    """

    def __init__(self, floor: MemoryFloor | None, doing: str, state: str) -> None:
        """``doing`` is what is going on, ``state`` the sentence about what is left of the run when it is stopped."""
        self._floor = floor
        self._doing = doing
        self._state = state
        self._message = ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._old_handler: Any = None

    def __enter__(self) -> MemoryWatch:
        if self._floor is None:
            return self
        self._over.clear()
        self._swapped_before = process_bytes("VmSwap")
        self._may_raise = threading.current_thread() is threading.main_thread()
        if self._may_raise:
            self._old_handler = signal.signal(_signal_number(), self._raise)
        self._thread = threading.Thread(target=self._run, args=(self._floor,), name="memory watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        self._thread = None
        if self._may_raise:
            signal.signal(_signal_number(), self._old_handler)
        if self._message and error is not None and not isinstance(error, LowMemoryStop):
            # it was raised within something that turns whatever it meets into an error of its own
            raise LowMemoryStop(self._message) from error

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self._over.is_set():
            raise LowMemoryStop(self._message)

    def _run(self, floor: MemoryFloor) -> None:
        while not self._over.wait(INTERVAL_S):
            left = self._what_is_wrong(floor)
            if left is None:
                continue
            self._message = floor.message(self._doing, left, self._state)
            if self._may_raise:
                signal.pthread_kill(threading.main_thread().ident or 0, _signal_number())
                self._wait_for_the_end(floor)
            if not self._over.is_set():
                os.write(2, f"error: {self._message}\n".encode())
                os._exit(LowMemoryStop.exit_status)

    def _what_is_wrong(self, floor: MemoryFloor) -> str | None:
        available = floor.read().available
        if available < floor.num_bytes:
            return f"{gib(available)} of memory are left"
        swapped = process_bytes("VmSwap") - self._swapped_before
        if swapped > MOST_SWAPPED:
            return f"{gib(swapped)} of this process went to swap, {gib(available)} of memory are left"
        return None

    def _wait_for_the_end(self, floor: MemoryFloor) -> None:
        """Return when the main thread has left, has used up its time, or the rest of the memory goes too fast."""
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and floor.read().available >= floor.num_bytes // 2:
            if self._over.wait(INTERVAL_S / 5):
                return


def _signal_number() -> int:
    """Return a signal that nobody else sends or waits for; those that stop a run with a checkpoint are others."""
    return signal.SIGRTMIN + 9
