"""One look at all adapters of a model each time it is called, instead of one look a layer.

Stores copy their adapters in when these have changed, so somebody must find out. Layer by layer that is hundreds of
small looks and, after an optimizer step, hundreds of small copies, which a small model waits for: its kernels are
shorter than the time it takes to start them. A watched model looks and copies once, at the beginning of a training
pass, in one kernel over all stores. Whoever calls a layer without its model, recomputes it on the way back
or evaluates, still has every store look for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nemo_automodel.components.fast.weight_store import WeightStore, refresh
from nemo_automodel.kernels.copy_many import CopyMany


class Watch:
    """Keeps the stores of a model fresh while it computes."""

    def __init__(self, model: nn.Module, stores: Sequence[WeightStore]) -> None:
        self.stores = tuple(stores)
        self._copy = CopyMany()
        model.register_forward_pre_hook(self._begin)
        # also after an error: what is fresh now may not be at the next call
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            refresh(self.stores, self._copy)
            for store in self.stores:
                store.is_fresh = True

    def _end(self, *_: Any) -> None:
        for store in self.stores:
            store.is_fresh = False
