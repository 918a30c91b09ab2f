"""A CUDA graph for the CPU: the operations of some work on tensors that stay, to be done again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, results))
        return results

    def play(self) -> None:
        """Do every operation again and put its results where the first ones are, unseen by autograd as on a GPU."""
        touched = [t for _, args, kwargs, results in self.steps for t in tree_flatten((args, kwargs, results))[0]]
        tensors = tuple({id(t): t for t in touched if isinstance(t, torch.Tensor)}.values())
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensors):
            for func, args, kwargs, results in self.steps:
                again, before = tree_flatten(func(*args, **kwargs))[0], tree_flatten(results)[0]
                for new, old in zip(again, before, strict=True):
                    if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


class TapeRecorder:
    """Records as a GPU does, but for memory, which no recording shares. What is not recorded is not done again."""

    def __init__(self, has_room: bool = True) -> None:
        self.room, self.num_recorded, self.num_played = has_room, 0, 0

    def has_room(self) -> bool:
        return self.room

    def held_bytes(self) -> int:
        return 1000 * self.num_recorded

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_recorded += 1
        with _Tape() as tape:
            work()
        is_first = True

        def replay() -> None:
            nonlocal is_first
            self.num_played += 1
            if not is_first:
                tape.play()
            is_first = False

        return replay
