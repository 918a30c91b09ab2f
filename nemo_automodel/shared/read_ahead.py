"""Weight files read into the system's cache while the program is still busy with other things.

A run imports libraries and wakes the GPU for seconds before it wants the first weight, and the disk is idle all that
time. `start` reads the files in threads meanwhile, into memory that belongs to the system, so that whoever loads the
model finds the first gigabytes there; `stop` is called when the loading begins. Nothing depends on it: files that
cannot be read are left to whoever wants them and can say so.

Only for machines whose GPU has memory of its own, and for half of the host's memory at most: where both share one,
cached files would be in the model's way. Free of torch, which takes longer to import than this may take to begin.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from nemo_automodel.shared.memory import read_memory, shares_memory

_DRIVER = Path("/proc/driver/nvidia/gpus")
_PIECE_BYTES = 16 * 2**20
_NUM_THREADS = 4

_is_over = threading.Event()
_threads: list[threading.Thread] = []


def start(paths: Sequence[Path], driver: Path = _DRIVER) -> bool:
    """Begin to read files in their order, or return false where that would be of no use."""
    if not has_gpu_memory(driver) or not paths:
        return False
    stop()
    _is_over.clear()
    work = _Work(paths, read_memory().available // 2)
    for _ in range(_NUM_THREADS):
        thread = threading.Thread(target=work.run, name="read ahead", daemon=True)
        thread.start()
        _threads.append(thread)
    return True


def stop() -> None:
    """End the reading; returns at once when none is going on."""
    _is_over.set()
    while _threads:
        _threads.pop().join()


def has_gpu_memory(driver: Path = _DRIVER) -> bool:
    """Tell whether there is an NVIDIA GPU and it has memory of its own, by what the driver's folder says."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in driver.glob("*/information")]
    return bool(texts) and not any(shares_memory(text, is_integrated=False) for text in texts)


class _Work:
    """Pieces of files in order, handed out to threads."""

    def __init__(self, paths: Sequence[Path], most_bytes: int) -> None:
        sizes = [(path, path.stat().st_size) for path in paths]
        pieces = [(path, first) for path, size in sizes for first in range(0, size, _PIECE_BYTES)]
        self._pieces = iter(pieces[: most_bytes // _PIECE_BYTES])
        self._lock = threading.Lock()

    def run(self) -> None:
        buffer = bytearray(_PIECE_BYTES)
        with contextlib.suppress(OSError):
            while not _is_over.is_set() and (piece := self._next()) is not None:
                file = os.open(piece[0], os.O_RDONLY)
                try:
                    os.preadv(file, [buffer], piece[1])
                finally:
                    os.close(file)

    def _next(self) -> tuple[Path, int] | None:
        with self._lock:
            return next(self._pieces, None)
