"""Garbage collection at a time of our choosing.

Python's collector runs whenever enough objects have been made, in the middle of a step. On many processes each run
makes all the others wait, at other moments; collecting at the same step everywhere pays for it once.
"""

from __future__ import annotations

import gc
from types import TracebackType


class GarbageCollection:
    """Inside the block, collects every ``every_steps`` steps only; ``None`` leaves everything to Python."""

    def __init__(self, every_steps: int | None) -> None:
        self.every_steps = every_steps
        self._was_enabled = False

    def __enter__(self) -> GarbageCollection:
        self._was_enabled = gc.isenabled()
        if self.every_steps is not None:
            gc.collect()
            gc.disable()
        return self

    def after_step(self, index: int) -> None:
        """Collect if step ``index`` (counted from 0) is due."""
        if self.every_steps is not None and (index + 1) % self.every_steps == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._was_enabled:
            gc.enable()
