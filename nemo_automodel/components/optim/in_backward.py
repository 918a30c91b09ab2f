"""The optimizer's step inside the backward pass: a weight is updated and its gradient freed once that is complete.

So the gradients of all weights are never there together: 16 GB less for an 8B model in bfloat16. The price: a step has
one micro-batch, and nothing can be done to all gradients at once, such as clipping to their norm. The norm is summed up
all the same and known after the step.

Whether a step is sick must be known before its first update, so the first gradients, those of the output head, are
waited for: where they are not finite, nothing of the step is applied. What goes wrong below them is seen too late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class StepInBackward:
    """Takes the steps of ``optimizer`` in backward passes from now on.

    ``shared`` are weights to which one backward pass adds more than once, such as an embedding that is the head as
    well: they wait for `finish`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shared: Sequence[torch.Tensor] = ()) -> None:
        self._optimizer = optimizer
        self._shared = list(shared)
        shared_ids = {id(weight) for weight in shared}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._own = [p for p in parameters if id(p) not in shared_ids]
        self._squares: list[torch.Tensor] = []
        self._is_sick: bool | None = None
        for parameter in self._own:
            parameter.register_post_accumulate_grad_hook(self._release)

    @property
    def has_updated(self) -> bool:
        """Whether weights were updated since `begin`."""
        return self._is_sick is False

    def begin(self) -> None:
        """Start a step; its backward pass comes next."""
        self._squares, self._is_sick = [], None

    def finish(self) -> torch.Tensor:
        """Update what is left and return the norm of all gradients of the step, a float32 scalar on their device."""
        self._step(self._own + self._shared)
        return torch.stack(self._squares).sum().sqrt()

    def _release(self, parameter: torch.Tensor) -> None:
        """Update every weight that has a gradient: where layers make many at once, the first of them calls for all."""
        if parameter.grad is None:
            return
        held = [weight.grad for weight in self._shared]
        for weight in self._shared:
            weight.grad = None
        self._step(self._own)
        for weight, grad in zip(self._shared, held, strict=True):
            weight.grad = grad

    def _step(self, weights: Sequence[torch.Tensor]) -> None:
        ready = [weight for weight in weights if weight.grad is not None]
        if not ready:
            return
        grads = [weight.grad for weight in ready if weight.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum()
        self._squares.append(square)
        if self._is_sick is None:
            self._is_sick = not math.isfinite(square.item())
        if not self._is_sick:
            self._optimizer.step()
        for weight in ready:
            weight.grad = None
