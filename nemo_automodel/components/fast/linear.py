"""A frozen linear layer with an adapter as one autograd function: for decoder layers that have no fast form.

Written out, an adapter is three products, a scaling, a cast and a sum, each a pass over the layer's outputs with
something kept for the way back. Here ``y = x·Wᵀ + b`` is made first and ``(x·Aᵀ)·(s·B)ᵀ`` is added in place by the
accumulator of the second product; backward does the same with ``dx = dy·W + (dy·s·B)·A``. Kept are x, which layers that
share an input share, and x·Aᵀ, R numbers a token. A and s·B lie in the dtype of the layer and are made again when they
have changed, not in every call. The price against whole layers of `decoder_layer`: every output is read and written
once more, and norms, activations and attention are Transformers' own.

Whatever stores a layer's weights is a `WeightStore` of one slot, so other precisions come through the same door;
`InPlaceStore` is for weights that stay where Transformers put them.

Shapes: T tokens, K inputs, N outputs, R ranks rounded up.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from nemo_automodel.components.fast.dropout import AdapterDropout, Dropped
from nemo_automodel.components.fast.names import Adapter, Slot
from nemo_automodel.components.fast.weight_store import WeightStore
from nemo_automodel.kernels.fp8 import Rounded
from nemo_automodel.kernels.lora import Update

_FUSED_CLASSES: dict[type[nn.Module], type[FusedLinear]] = {}


class InPlaceStore(WeightStore):
    """One layer's weight, in the dtype and the memory that it has; A and s·B beside it."""

    def _pack(self) -> None:
        (slot,) = self.slots
        self.margin = 0
        weight = slot.linear.weight
        self._a_RK = torch.zeros((self.rank_width, self.num_in), dtype=weight.dtype, device=weight.device)
        self._b_NR = torch.zeros((self.num_out, self.rank_width), dtype=weight.dtype, device=weight.device)

    @property
    def _weight_NK(self) -> torch.Tensor:
        return self.slots[0].linear.weight.detach()

    def base_outputs(self, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return x·Wᵀ + b, the bias added in the accumulator."""
        if self.bias_N is None:
            return torch.mm(x_TM, self._weight_NK.t())
        return torch.addmm(self.bias_N, x_TM, self._weight_NK.t())

    def pending(self, low_TR: torch.Tensor | None) -> Update | None:
        """Return the update."""
        return None if low_TR is None else self._update(low_TR)

    def forward_pending(
        self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None
    ) -> torch.Tensor:
        """Return x·Wᵀ."""
        return torch.mm(x_TM, self._weight_NK.t())

    def dgrad_pending(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> tuple[torch.Tensor, Update | None]:
        """Return dy·W, and the adapter's share."""
        return torch.mm(dy_TM, self._weight_NK), None if dlow_TR is None else self._dgrad_update(dlow_TR)

    def forward(self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None) -> torch.Tensor:
        """Return the outputs; see `WeightStore.forward`."""
        y_TN = self.forward_pending(x_TM, low_TR)
        return y_TN if low_TR is None else y_TN.addmm_(low_TR, self._b_NR.t())

    def forward_added(self, residual_TN: torch.Tensor, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return residual + outputs."""
        y_TN = torch.addmm(residual_TN, x_TM, self._weight_NK.t())
        return y_TN if low_TR is None else y_TN.addmm_(low_TR, self._b_NR.t())

    def dgrad(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the inputs; see `WeightStore.dgrad`."""
        dx_TK = torch.mm(dy_TM, self._weight_NK)
        return dx_TK if dlow_TR is None else dx_TK.addmm_(dlow_TR, self._a_RK)


class LinearCore:
    """The computation of one linear layer with its adapter.

    ``keeps_products``: somebody keeps the results of whole products to use them again when the layer is recomputed
    (selective recomputation of Transformers' layers), so what the base weights give must not be overwritten.
    """

    def __init__(self, store: WeightStore, keeps_products: bool = False, dropout: AdapterDropout | None = None) -> None:
        self.store = store
        self.keeps_products = keeps_products
        self.dropout = dropout
        self._masked: WeightStore | Dropped = store

    def with_masks(self, device: torch.device) -> LinearCore:
        """Return this computation under masks of its own, for one forward and backward pass."""
        if self.dropout is None:
            return self
        masked = copy.copy(self)
        masked._masked = self.dropout.over(self.store, self.dropout.draw_seed(device))
        return masked

    def forward(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the outputs ``[T, N]`` and x·Aᵀ."""
        store = self._masked
        low_TR = store.low(x_TK)
        y_TN = store.base_outputs(x_TK, low_TR)
        if isinstance(store, Dropped) and store.is_post and low_TR is not None:
            return store.add_masked(y_TN.clone() if self.keeps_products else y_TN, low_TR), low_TR
        update = store.pending(low_TR)
        if update is not None:
            out_TN = torch.empty_like(y_TN) if self.keeps_products else y_TN
            y_TN = torch.addmm(y_TN, update.low_TR, update.factor_RN, out=out_TN)
        return y_TN, low_TR

    def backward(
        self, dy_TN: torch.Tensor, x_TK: torch.Tensor, low_TR: torch.Tensor | None, wants_dx: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the gradient of the inputs, None unless wanted, and those of A and B."""
        store = self._masked
        if dy_TN.stride(1) != 1:  # three products read it
            dy_TN = dy_TN.contiguous()
        dlow_TR = store.low_grad(dy_TN)
        grads = store.adapter_grads(x_TK, dy_TN, low_TR, dlow_TR)
        return store.dgrad(dy_TN, dlow_TR) if wants_dx else None, grads


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, core: LinearCore, *weights: torch.Tensor) -> torch.Tensor:
        y_TN, low_TR = core.forward(x.reshape(-1, x.shape[-1]))
        ctx.save_for_backward(x, low_TR)
        ctx.core = core
        # to autograd this is no view: models may write to a layer's outputs, which views made here would forbid
        y: torch.Tensor = torch.ops.aten._unsafe_view(y_TN, [*x.shape[:-1], y_TN.shape[1]])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low_TR = ctx.saved_tensors
        (dy,) = grad_outputs
        dx_TK, grads = ctx.core.backward(
            dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), low_TR, ctx.needs_input_grad[0]
        )
        return None if dx_TK is None else dx_TK.view(x.shape), None, *grads


class FusedLinear(nn.Module):
    """A linear layer with an adapter, computed by a `LinearCore`. Made by `fuse_linear`, never built."""

    fused_core: LinearCore

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., K]`` to ``[..., N]``. Under autocast, or for another dtype, the layer's own class computes."""
        core = self.fused_core
        store = core.store
        # what has no memory, as when a run is planned, knows no autocast either
        if x.dtype != store.dtype or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
            plain: torch.Tensor = super().forward(x)
            return plain
        if torch.is_grad_enabled():
            store.prepare()
            core = core.with_masks(x.device) if self.training else core
            y: torch.Tensor = _LinearFunction.apply(x, core, *store.parameters())  # type: ignore[no-untyped-call]
            return y
        store.forget_adapters()  # evaluation must not show adapters that are gone, and has the time
        store.prepare()
        core = core.with_masks(x.device) if self.training else core
        y_TN, _ = core.forward(x.reshape(-1, x.shape[-1]))
        return y_TN.view(*x.shape[:-1], y_TN.shape[1])


def fuse_linear(
    linear: nn.Linear,
    adapter: Adapter,
    store: type[WeightStore] = InPlaceStore,
    keeps_products: bool = False,
    dropout: AdapterDropout | None = None,
) -> None:
    """Exchange the class of a frozen linear layer with an adapter for its fused form, in place."""
    assert not isinstance(linear, FusedLinear), "a layer is fused once"
    linear.fused_core = LinearCore(store([Slot("", linear, adapter)]), keeps_products, dropout)  # type: ignore[assignment]
    base: type[nn.Module] = type(linear)
    if base not in _FUSED_CLASSES:
        _FUSED_CLASSES[base] = type(f"Fused{base.__name__}", (FusedLinear, base), {})
    linear.__class__ = _FUSED_CLASSES[base]  # type: ignore[assignment]
