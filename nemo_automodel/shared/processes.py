"""Which of the processes of a run this is, as whoever started it says in the environment. Free of torch."""

from __future__ import annotations

import os

LAUNCHER = "AUTOMODEL_LAUNCHER_PID"
"""Set by ``automodel --nproc-per-node``: the process that started this one and waits for it."""


def rank() -> int:
    """Return the number of this process, from 0; ``RANK`` is set by torchrun and by our launcher."""
    return int(os.environ.get("RANK", "0"))


def num_processes() -> int:
    """Return how many processes this run was started as."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Tell whether this is the process that speaks and writes."""
    return rank() == 0 or num_processes() == 1


def was_started_as_rank() -> bool:
    """Tell whether a launcher made this process one of several (or of one), so that it starts no others."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ
