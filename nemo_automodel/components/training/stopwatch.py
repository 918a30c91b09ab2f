"""Time on the device, measured without making it wait.

A GPU works through a queue while Python runs ahead. A mark is an event in that queue, so a span between two marks is
the time the device took for what was queued between them, idling included, and only reading it waits. On the CPU,
where nothing is queued, a mark is the time of day.
"""

from __future__ import annotations

import time

import torch

Mark = torch.cuda.Event | float


class Stopwatch:
    """Marks moments on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        """Return the moment when everything queued so far is done."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the time between two marks, waiting for the second."""
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float), "both marks are of one device"
            assert isinstance(end, float), "both marks are of one device"
            return end - start
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3  # CUDA tells milliseconds
