"""DoRA on fast layers: outputs of adapted layers scaled to learned row lengths (Liu et al. 2024).

``y = c ∘ (W·x + s·B·A·x) + b`` with ``c = m / |W + s·B·A|``, a number an output; the norm has no gradient (section 4.3
of the paper). `Rescaled` puts this around a store: what the store gives is multiplied by c, gradients are multiplied by
c before the store sees them, and ``dm = Σ dy ∘ z / |W + s·B·A|`` needs the outputs z before scaling, which are made
again instead of kept. The price is a product more for each adapted matrix on the way back, about a third of a step, and
a copy of the gradient at hand. Norms are taken once after an optimizer step, over `_CHUNK_ROWS` rows at a time.

Shapes: as in `weight_store`.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_automodel.components.fast.weight_store import WeightStore
from nemo_automodel.kernels.fp8 import Rounded
from nemo_automodel.kernels.lora import Update

_CHUNK_ROWS = 2048


class RowScales:
    """c and the norms of a store's rows, made again when its adapters have changed. Rows without an adapter have 1."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self._seen: list[int] | None = None
        self._scale_N = self._norm_N = torch.empty(0)

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return c in the store's dtype and the norms in that of the adapters, ``[N]``. The store is prepared."""
        if self._seen is not self.store.adapters_seen:
            self._seen = self.store.adapters_seen
            with torch.no_grad():
                self._measure()
        return self._scale_N, self._norm_N

    def _measure(self) -> None:
        scales, norms = [], []
        for slot in self.store.slots:
            weight, adapter = slot.linear.weight, slot.adapter
            magnitude = None if adapter is None else adapter.magnitude
            if adapter is None or magnitude is None:
                scales.append(torch.ones(len(weight), dtype=self.store.dtype, device=weight.device))
                norms.append(torch.ones(len(weight), dtype=weight.dtype, device=weight.device))
                continue
            a, b = adapter.lora_A.weight, adapter.lora_B.weight
            norm = torch.cat(
                [
                    torch.linalg.norm(rows.to(a.dtype) + adapter.scaling * (b_rows @ a), dim=1)
                    for rows, b_rows in zip(torch.split(weight, _CHUNK_ROWS), torch.split(b, _CHUNK_ROWS), strict=True)
                ]
            )
            scales.append((magnitude / norm).to(self.store.dtype))
            norms.append(norm)
        self._scale_N, self._norm_N = torch.cat(scales), torch.cat(norms)


class Rescaled:
    """A store under row scales, for one forward and backward pass. Its input gradients need `low_grad` first."""

    def __init__(self, store: WeightStore, scales: RowScales) -> None:
        self.store, self._scales = store, scales
        self._dz_TM: torch.Tensor

    def __getattr__(self, name: str) -> Any:
        """Everything that no scale changes is the store's."""
        return getattr(self.store, name)

    def from_row(self, first_row: int) -> Rescaled:
        """Return what computes the rows of inputs from ``first_row`` on: the same."""
        return self

    @property
    def b_NR(self) -> torch.Tensor | None:
        """Nothing: gradients must be scaled before anybody multiplies them with B."""
        return None

    def _scaled_(self, y_TM: torch.Tensor) -> torch.Tensor:
        scale_N, _ = self._scales.get()
        y_TM[:, : self.store.num_out].mul_(scale_N)
        return y_TM

    def forward(self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None) -> torch.Tensor:
        """Return the outputs; see `WeightStore.forward`."""
        return self._scaled_(self.store.forward(x_TM, low_TR, rounded))

    def pending(self, low_TR: torch.Tensor | None) -> Update | None:
        """Return None: what is scaled must be complete."""
        return None

    def forward_pending(
        self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None
    ) -> torch.Tensor:
        """Return the outputs, complete."""
        return self.forward(x_TM, low_TR, rounded)

    def forward_added(self, residual_TN: torch.Tensor, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return residual + outputs."""
        return residual_TN + self.forward(x_TM, low_TR)[:, : self.store.num_out]

    def low_grad(self, dy_TM: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient of `low`; see `WeightStore.low_grad`. The scaled gradient is kept for what follows."""
        scale_N, _ = self._scales.get()
        dz_TM = self.store.output_buffer(dy_TM.shape[0])
        torch.mul(dy_TM[:, : self.store.num_out], scale_N, out=dz_TM[:, : self.store.num_out])
        self._dz_TM = dz_TM
        return self.store.low_grad(dz_TM)

    def dgrad(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the inputs; see `WeightStore.dgrad`."""
        return self.store.dgrad(self._dz_TM, dlow_TR)

    def dgrad_pending(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> tuple[torch.Tensor, Update | None]:
        """Return the gradient of the inputs and what is still to be added to it."""
        return self.store.dgrad_pending(self._dz_TM, dlow_TR)

    def adapter_grads(
        self, x_TM: torch.Tensor, dy_TM: torch.Tensor, low_TR: torch.Tensor | None, dlow_TR: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return the gradients of A, B and m of every adapter; see `WeightStore.adapter_grads`."""
        store, (_, norm_N) = self.store, self._scales.get()
        pairs = store.adapter_grads(x_TM, self._dz_TM, low_TR, dlow_TR)
        z_TN = store.forward(x_TM, low_TR)[:, : store.num_out]
        dm_N = (dy_TM[:, : store.num_out] * z_TN).sum(dim=0, dtype=norm_N.dtype) / norm_N
        grads, row = [], 0
        for slot in store.slots:
            rows = slice(row, row + slot.linear.out_features)
            row = rows.stop
            if slot.adapter is not None:
                grads += [pairs.pop(0), pairs.pop(0)]
                if slot.adapter.magnitude is not None:
                    grads.append(dm_N[rows].to(slot.adapter.magnitude.dtype))
        return grads
