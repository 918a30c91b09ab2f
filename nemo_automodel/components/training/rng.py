"""Random numbers that a checkpoint can hold.

A run draws from four generators: Python's, NumPy's, torch's on the CPU and torch's on each CUDA device. All are seeded
together and saved together, in types that ``torch.load(weights_only=True)`` accepts.
"""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch


class StatefulRNG:
    """Seeds every generator at construction; its state is the state of all of them.

    With ``ranked`` every process draws other numbers: the seed is ``seed`` plus the rank.
    """

    def __init__(self, seed: int, ranked: bool = False) -> None:
        self.seed = seed + _rank() if ranked else seed
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)  # every CUDA device too

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the four generators."""
        return _capture()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue every generator where the state was taken."""
        _restore(state)


class ScopedRNG:
    """A block with random numbers of its own: seeded on entry, and the world outside never notices."""

    def __init__(self, seed: int, ranked: bool = False) -> None:
        self.seed = seed
        self.ranked = ranked
        self._outside: list[dict[str, Any]] = []

    def __enter__(self) -> ScopedRNG:
        self._outside.append(_capture())
        StatefulRNG(self.seed, self.ranked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _restore(self._outside.pop())


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _capture() -> dict[str, Any]:
    bit_generator, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    return {
        "random_rng_state": random.getstate(),
        "np_bit_generator": str(bit_generator),
        "np_keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "np_position": int(position),
        "np_has_gauss": int(has_gauss),
        "np_cached_gaussian": float(cached_gaussian),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(state: dict[str, Any]) -> None:
    version, internal, gauss_next = state["random_rng_state"]
    random.setstate((version, tuple(internal), gauss_next))
    np.random.set_state(
        (
            state["np_bit_generator"],
            np.asarray(state["np_keys"]).astype(np.uint32),
            state["np_position"],
            state["np_has_gauss"],
            state["np_cached_gaussian"],
        )
    )
    torch.set_rng_state(state["torch_rng_state"])
    saved = state["cuda_rng_state"]
    per_device = [saved] if isinstance(saved, torch.Tensor) else list(saved)
    # a run resumed on fewer devices, or on none, keeps what it can
    for device, device_state in enumerate(per_device[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, device)
