"""The optimizer's step inside the backward pass: a weight is updated and its gradient freed once that is complete.

So the gradients of all weights are never there together: 16 GB less for an 8B model in bfloat16. The price: a step has
one micro-batch, and nothing can be done to all gradients at once, such as clipping to their norm. The norm is summed up
all the same and known after the step.

Whether a step is sick must be known before its first update, so the first gradients, those of the output head, are
waited for: where they are not finite, nothing of the step is applied. What goes wrong below them is seen too late.

Memory that runs out in the middle would be seen too late as well, so a step may be rehearsed: all is computed and
updated as in earnest, and after each update weights and optimizer state are put back from copies on the host. It takes
as much memory as the step on the device, on the host as much as a layer's weights and state, and the time of a step and
of moving all weights there and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class StepInBackward:
    """Takes the steps of ``optimizer`` in backward passes from now on.

    ``shared`` are weights to which one backward pass adds more than once, such as an embedding that is the head as
    well: they wait for `finish`.

    Whoever wants the steps keeps this object: once it is gone, backward passes leave their gradients as usual.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shared: Sequence[torch.Tensor] = ()) -> None:
        self._optimizer = optimizer
        self._shared = list(shared)
        shared_ids = {id(weight) for weight in shared}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._own = [p for p in parameters if id(p) not in shared_ids]
        self._squares: list[torch.Tensor] = []
        self._is_sick: bool | None = None
        self._holds = False
        self._held: dict[torch.Tensor, torch.Tensor] = {}
        """Gradients of the step's first parts, apart from those of the last one, which say what is complete."""
        self._is_rehearsal = False
        self._new_states: list[Any] = []
        """What the optimizer would keep from now on; the rehearsal holds its memory."""
        # torch holds a parameter's hooks where the garbage collector does not look, so one that held its parameter,
        # as this object does, would keep model and optimizer for ever
        release = partial(_call_if_there, WeakMethod(self._release))
        for parameter in self._own:
            parameter.register_post_accumulate_grad_hook(release)

    @property
    def has_updated(self) -> bool:
        """Whether weights were updated since `begin` and are not as before."""
        return self._is_sick is False and not self._is_rehearsal

    def begin(self) -> None:
        """Start a step; its backward pass comes next."""
        self._squares, self._is_sick, self._new_states = [], None, []
        self._holds, self._held = False, {}

    def hold(self, holds: bool) -> None:
        """Keep the gradients of backward passes from now on and update nothing; or no longer, in the last one."""
        if self._holds and not holds:
            self._held = {weight: weight.grad for weight in self._own if weight.grad is not None}
            for weight in self._own:
                weight.grad = None
        self._holds = holds

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Within it a step, `finish` included, takes its memory and leaves weights and optimizer as they were."""
        self._is_rehearsal = True
        try:
            yield
        finally:
            self._is_rehearsal = False
            for parameter in (*self._own, *self._shared):
                parameter.grad = None
            self.begin()

    def finish(self) -> torch.Tensor:
        """Update what is left and return the norm of all gradients of the step, a float32 scalar on their device."""
        for weight, grad in self._held.items():  # what the last part did not use
            weight.grad = grad
        self._held = {}
        self._step(self._own + self._shared)
        return torch.stack(self._squares).sum().sqrt()

    def _release(self, parameter: torch.Tensor) -> None:
        """Update every weight that has a gradient: where layers make many at once, the first of them calls for all."""
        if parameter.grad is None or self._holds:
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
        for weight, grad in zip(ready, grads, strict=True):
            if weight in self._held:
                grad += self._held.pop(weight)
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum()
        self._squares.append(square)
        if self._is_sick is None:
            self._is_sick = not math.isfinite(square.item())
        if not self._is_sick:
            with self._put_back(ready) if self._is_rehearsal else nullcontext():
                self._optimizer.step()
        for weight in ready:
            weight.grad = None

    @contextmanager
    def _put_back(self, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        """Undo afterwards what is done to ``weights``, their state and the optimizer's own numbers."""
        optimizer = self._optimizer
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        states = [optimizer.state.get(weight) for weight in weights]
        entries = [None if state is None else dict(state) for state in states]
        copies = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _plain_tensors([weights, entries])]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, copy in copies:
                    tensor.copy_(copy)
            for weight, state, kept in zip(weights, states, entries, strict=True):
                if state is None or kept is None:
                    self._new_states.append(optimizer.state.pop(weight, None))
                else:
                    state.clear()
                    state.update(kept)
            for group, numbers in zip(optimizer.param_groups, groups, strict=True):
                group.update(numbers)


def _call_if_there(find: WeakMethod[Callable[[torch.Tensor], None]], parameter: torch.Tensor) -> None:
    method = find()
    if method is not None:
        method(parameter)


def _plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value, in place of those of torchao's kinds what they consist of."""
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _plain_tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _plain_tensors(item)
    elif isinstance(value, dict):
        yield from _plain_tensors(list(value.values()))
