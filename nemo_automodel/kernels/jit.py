"""Triton where it is installed, and nothing in its place where it is not.

Modules with kernels import on every machine: without Triton ``jit`` leaves a kernel as the plain function it decorates,
which nobody calls, because every kernel has a PyTorch form beside it and `runs_triton` picks between the two.

To a type checker a kernel is a function it does not look into: its body is Triton's language and not Python, and its
arguments are pointers and numbers that no annotation describes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nemo_automodel.kernels.assembler import use_sound_one
from nemo_automodel.shared.imports import is_available

HAS_TRITON = is_available("triton")

if TYPE_CHECKING:
    from typing import no_type_check as jit

    tl: Any
elif HAS_TRITON:
    use_sound_one(os.environ, torch.version.cuda)
    import triton.language as tl
    from triton import jit
else:
    tl = None

    def jit(function: Callable[..., Any]) -> Any:
        """Leave ``function`` as it is."""
        return function


__all__ = ["HAS_TRITON", "jit", "next_power_of_2", "num_warps_for", "runs_triton", "tl"]


def runs_triton(tensor: torch.Tensor) -> bool:
    """Tell whether operations on ``tensor`` run as Triton kernels: on a GPU, with Triton installed."""
    return HAS_TRITON and tensor.is_cuda


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def num_warps_for(block_elements: int) -> int:
    """Return how many warps share a block so that each thread holds about 16 elements: 1 to 16."""
    return min(16, max(1, block_elements // 512))
