"""Dropout on the adapters of a fast layer: over their outputs (``post``) or, as PEFT does, over their inputs (``pre``).

``post``: ``y = W·x + D ∘ (s·B·A·x)``; ``pre``: ``y = W·x + s·B·A·(D ∘ x)``, each adapter with a mask of its own. D is 0
with probability p and 1/(1 − p) otherwise.

A mask cannot pass through a product with its matrix. So ``post`` takes the update out of the outputs' product and
``pre`` out of the input gradient's. A pass of its own adds it under the mask, and SwiGLU's backward pass, which reads
that gradient anyway. Everything else stays folded. `Dropped` puts this around any store: it asks the store for the base
alone, and the masks are made again from the seed whenever they are needed (`kernels/dropout.py`). Nothing is kept but
the seed, which is drawn from the device's generator, so it follows the run's seed and a saved state of its random
numbers, without waiting for the device.

Shapes: as in `weight_store`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_automodel.components.fast.weight_store import WeightStore
from nemo_automodel.kernels.dropout import Dropout
from nemo_automodel.kernels.dropped_products import dropped_grad, dropped_low
from nemo_automodel.kernels.fp8 import Rounded
from nemo_automodel.kernels.lora import Update, add_update_

_STREAMS_PER_STORE = 4


@dataclass(frozen=True)
class AdapterDropout:
    """What a model's adapters are trained with. ``position`` is pre or post."""

    probability: float
    position: str

    def __str__(self) -> str:
        return f"dropout {self.probability:g} {self.position}"

    def draw_seed(self, device: torch.device) -> torch.Tensor:
        """Draw the seed of one forward pass of one layer, on the device."""
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)

    def over(self, store: WeightStore, seed: torch.Tensor, number: int = 0) -> Dropped:
        """Return the store with the masks of one pass over its adapters; ``number`` tells stores of it apart."""
        first = number * _STREAMS_PER_STORE
        # after the product one matrix holds the outputs of all adapters, before it all of them read the same one
        num_masks = 1 if self.position == "post" else len(store.slots)
        masks = tuple(Dropout(seed, first + slot, self.probability) for slot in range(num_masks))
        return Dropped(store, masks, self.position == "post")


class Dropped:
    """A store whose adapters are under masks, for one forward and backward pass."""

    def __init__(self, store: WeightStore, masks: tuple[Dropout, ...], is_post: bool) -> None:
        self.store, self.masks, self.is_post = store, masks, is_post

    def __getattr__(self, name: str) -> Any:
        """Everything that no mask changes is the store's."""
        return getattr(self.store, name)

    @property
    def input_mask(self) -> Dropout | None:
        """The mask over the inputs of a store of one layer."""
        return None if self.is_post else self.masks[0]

    def from_row(self, first_row: int) -> Dropped:
        """Return the store under the same masks for the rows of inputs from ``first_row`` on."""
        if first_row == 0:
            return self
        masks = tuple(replace(mask, first_row=first_row) for mask in self.masks)
        return Dropped(self.store, masks, self.is_post)

    def low(self, x_TM: torch.Tensor) -> torch.Tensor | None:
        """Return x·Aᵀ; see `WeightStore.low`."""
        store, a_RK = self.store, self.store.a_RK
        if self.is_post or a_RK is None:
            return store.low(x_TM)
        return dropped_low(x_TM[:, : store.num_in], a_RK.t(), store.rank_parts, self.masks)

    def low_grad(self, dy_TM: torch.Tensor) -> torch.Tensor | None:
        """Return dy·(s·B); see `WeightStore.low_grad`."""
        store, b_NR = self.store, self.store.b_NR
        if not self.is_post or b_NR is None:
            return store.low_grad(dy_TM)
        return dropped_low(dy_TM[:, : store.num_out], b_NR, store.rank_parts, self.masks)

    def adapter_grads(
        self, x_TM: torch.Tensor, dy_TM: torch.Tensor, low_TR: torch.Tensor | None, dlow_TR: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return the gradients of the adapters; see `WeightStore.adapter_grads`."""
        if low_TR is None or dlow_TR is None:
            return []
        x_TK, dy_TN = x_TM[:, : self.store.num_in], dy_TM[:, : self.store.num_out]
        parts = self.store.rank_parts
        if self.is_post:
            da_RK, db_NR = torch.mm(dlow_TR.t(), x_TK), dropped_grad(dy_TN, low_TR, parts, self.masks)
        else:
            da_RK, db_NR = dropped_grad(x_TK, dlow_TR, parts, self.masks).t(), torch.mm(dy_TN.t(), low_TR)
        return self.store.split_grads(da_RK, db_NR)

    @property
    def output_mask(self) -> Dropout | None:
        """The mask over the adapters' outputs."""
        return self.masks[0] if self.is_post else None

    def pending(self, low_TR: torch.Tensor | None) -> Update | None:
        """Return what `forward_pending` leaves to be added, under its mask if there is one."""
        if not self.is_post or low_TR is None:
            return self.store.pending(low_TR)
        b_NR = self.store.b_NR
        assert b_NR is not None
        return Update(low_TR, b_NR.t(), self.store.rank_parts, self.masks)

    def base_outputs(self, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return the base's outputs, the bias added; `add_masked` adds the adapters'."""
        return self.store.base_outputs(x_TM, None if self.is_post else low_TR)

    def forward_pending(
        self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None
    ) -> torch.Tensor:
        """Return the outputs without `pending`."""
        return self.store.forward_pending(x_TM, None if self.is_post else low_TR, rounded)

    def forward(self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None) -> torch.Tensor:
        """Return the outputs; see `WeightStore.forward`."""
        if not self.is_post or low_TR is None:
            return self.store.forward(x_TM, low_TR, rounded)
        y_TM = self.store.forward(x_TM, None, rounded)
        self.add_masked(y_TM[:, : self.store.num_out], low_TR)
        return y_TM

    def forward_added(self, residual_TN: torch.Tensor, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return residual + outputs."""
        if not self.is_post or low_TR is None:
            return self.store.forward_added(residual_TN, x_TM, low_TR)
        if self.store.margin == 0:  # one pass adds both; in a product's accumulator the residual costs none
            return self.add_masked(self.store.forward_pending(x_TM, None), low_TR, residual_TN)
        return self.add_masked(self.store.forward_added(residual_TN, x_TM, None), low_TR)

    def add_masked(
        self, y_TN: torch.Tensor, low_TR: torch.Tensor, residual_TN: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add the adapters' outputs under their mask, and the residual, in place."""
        update = self.pending(low_TR)
        assert update is not None
        return add_update_(y_TN, update, residual_TN)

    def dgrad_pending(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> tuple[torch.Tensor, Update | None]:
        """Return the gradient of the inputs and what is still to be added to it."""
        if self.is_post or dlow_TR is None:
            return self.store.dgrad_pending(dy_TM, dlow_TR)
        dx_TK, _ = self.store.dgrad_pending(dy_TM, None)
        return dx_TK, self._dgrad_update(dlow_TR)

    def dgrad(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the inputs; see `WeightStore.dgrad`."""
        if self.is_post or dlow_TR is None:
            return self.store.dgrad(dy_TM, dlow_TR)
        return add_update_(self.store.dgrad(dy_TM, None), self._dgrad_update(dlow_TR))

    def _dgrad_update(self, dlow_TR: torch.Tensor) -> Update:
        a_RK = self.store.a_RK
        assert a_RK is not None
        return Update(dlow_TR, a_RK, self.store.rank_parts, self.masks)
