"""Where the tokens of a shared document stand: ``[prefix][branch 1][branch 2]…``."""

from __future__ import annotations

import numpy as np


def branch_places(branches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return position and branch number of every token, both int64 ``[T]``.

    ``branches`` int32 ``[K]`` holds the lengths of the prefix and of each branch. The prefix is branch 0; each branch's
    positions go on where the prefix ends.
    """
    numbers = np.repeat(np.arange(len(branches)), branches)
    starts = np.cumsum(branches) - branches
    positions = np.arange(len(numbers)) - starts[numbers]
    positions[numbers > 0] += branches[0]
    return positions, numbers
