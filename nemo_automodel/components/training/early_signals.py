"""Signals that ask a run to save and stop, while there is nothing to save yet. Free of torch.

Left alone, SIGTERM and SIGUSR1 end a process without a word, and what it was cleaning up stays. Until the first step,
where the schedule takes over, they end the run as Ctrl-C does: by an exception in the main thread, so that files are
closed and helpers are stopped, and with one line that says what became of the run. The exit status is 128 plus the
signal's number, as a shell says it: nothing was trained, so whoever started the run must not take it for done.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from nemo_automodel.shared.errors import StoppedEarly


@contextmanager
def stop_in_words(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Let ``signals`` raise `StoppedEarly` inside the block; Ctrl-C stays what it is.

    Outside of the main thread, where Python delivers no signal, nothing changes.
    """
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a helper that was forked inside the block
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise StoppedEarly(
            f"{signal.Signals(number).name} received before the first step: nothing was trained, so there is nothing "
            "to save, and checkpoints of before are untouched. The same command starts again.",
            128 + number,
        )

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {each: signal.signal(each, stop) for each in signals if each != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
