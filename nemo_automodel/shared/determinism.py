"""Whether the same run must give the same bits, asked by whoever has a choice between kernels.

PyTorch's own switch is the one place where it stands: a recipe sets it (`components/training/determinism`), and so may
anybody who builds a model in Python, with ``torch.use_deterministic_algorithms(True)``.
"""

from __future__ import annotations

import torch


def is_deterministic() -> bool:
    """Tell whether only kernels may run that add in a fixed order; a warning instead of an error does not count."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
