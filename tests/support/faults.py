"""An allocator with a limit, for models on the CPU: memory runs out at a chosen layer, on the way there or back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Faults:
    """Raises `torch.OutOfMemoryError` where ``is_too_large`` of the hidden states ``[B, S, D]`` at ``layer`` says so.

    ``place`` is ``forward``, before the layer computes, or ``backward``, when the gradient of its output arrives: by
    then the layers above it have added to theirs.
    """

    def __init__(self, layer: nn.Module, place: str, is_too_large: Callable[[torch.Tensor], bool]) -> None:
        self.is_too_large = is_too_large
        self.shapes: list[tuple[int, int]] = []
        """Rows and length of every call."""
        self.num_raised = 0
        if place == "forward":
            layer.register_forward_pre_hook(self._before, prepend=True)
        else:
            layer.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._check(args[0])

    def _after(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return _Check.apply(output, self) if torch.is_grad_enabled() else output

    def _check(self, hidden: torch.Tensor) -> None:
        self.shapes.append((hidden.shape[0], hidden.shape[1]))
        if self.is_too_large(hidden):
            self.num_raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. The test has no more.")


class _Check(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, faults):
        ctx.faults = faults
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        ctx.faults._check(grad)
        return grad, None


def more_positions_than(limit: int) -> Callable[[torch.Tensor], bool]:
    return lambda hidden: hidden.shape[0] * hidden.shape[1] > limit
