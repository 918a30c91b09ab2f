"""Weights that learn, multiplied in 8 bits: 16-bit numbers for the optimizer, rounded to E4M3 for the products.

The packed matrix of `TrainedStore` stays what learns. Once a step it is rounded, a scale for each output channel, and
all micro-batches of the step multiply by the same bytes, forward and for the gradient of the inputs, as `Fp8Store`
does. The gradient of the weights is a product in the dtype of the model: it is a third of the work, and what it loses
to rounding goes straight into the weights. `Fp8Scheme.weight_grads` has it in 8 bits as well.

Whether weights have changed is told by the steps of optimizers, by operations that write to them and by other memory,
as for adapters (`weight_store`). The price is memory: a byte a weight for each copy, or none and a pass over the
weights in each direction of every micro-batch (``copies=0``: 3 bytes a weight there and back each, on an H100 about
6 % of an 8B model's step with 4096 tokens).

`Fp8TrainedLinear` is a single layer of a model without fast layers, by the same store.

Shapes as in `weight_store`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from nemo_automodel.components.fast.fp8_linear import E4M3
from nemo_automodel.components.fast.fp8_store import Fp8Products, Fp8Scheme
from nemo_automodel.components.fast.names import Slot
from nemo_automodel.components.fast.nf4_store import Scratch
from nemo_automodel.components.fast.trained_layer import TrainedStore
from nemo_automodel.kernels import fp8, fp8_grad
from nemo_automodel.kernels.weight_grad import add_grad


class Fp8TrainedStore(Fp8Products, TrainedStore):
    """Weights in the dtype of the model that learn, all or some of them, and are multiplied in 8 bits."""

    scheme: ClassVar[Fp8Scheme] = Fp8Scheme(copies=1)

    def _pack(self) -> None:
        super()._pack()
        device, copies = self._weight_NK.device, self.scheme.copies
        self._scale_N1 = torch.empty((self.num_out, 1), dtype=torch.float32, device=device)
        self._ones_K1 = torch.ones((self.num_in, 1), dtype=torch.float32, device=device)
        self._bytes_NK = self._bytes_KN = None
        if copies > 0:
            self._bytes_NK = torch.empty((self.num_out, self.num_in), dtype=E4M3, device=device)
        if copies == 2 and not self._is_plain:
            self._bytes_KN = torch.empty((self.num_in, self.num_out), dtype=E4M3, device=device)
        self._scratch = Scratch.of(device)

    # Rounding.

    def _adapter_state(self) -> list[int]:
        # what is copied when it has changed are the weights themselves, into 8 bits
        return [*super()._adapter_state(), *(slot.linear.weight._version for slot in self.slots)]

    def find_changes(self) -> bool:
        """Round the weights again if they have changed; see `WeightStore.find_changes`."""
        has_changed = super().find_changes()
        if has_changed and self._bytes_NK is not None:
            self._round(self._bytes_NK)
            if self._bytes_KN is not None:
                fp8.transpose_bytes(self._bytes_NK, self._bytes_KN)
        return has_changed

    def _round(self, out_NK: torch.Tensor) -> torch.Tensor:
        """Write the weights in E4M3 to ``out_NK`` and their scales beside them."""
        emulate = self.scheme.emulate
        if self.scheme.by_rows:
            fp8.quantize_rows(self._weight_NK, emulate=emulate, out=fp8.Rounded(out_NK, self._scale_N1))
        else:
            scale_11 = fp8.scale_of(fp8.largest(self._weight_NK))
            fp8.quantize_by(self._weight_NK, scale_11, emulate=emulate, out_MK=out_NK)
            self._scale_N1.copy_(scale_11.expand_as(self._scale_N1))
        return out_NK

    def forward_bytes(self) -> torch.Tensor:
        """Return the weights in E4M3; where they are not kept, in memory that the next product overwrites."""
        if self._bytes_NK is not None:
            return self._bytes_NK
        return self._round(self._scratch.matrix(self.num_out, self.num_in, E4M3))

    def backward_bytes(self) -> torch.Tensor:
        """Return the same bytes transposed, of weights that have not changed since."""
        if self._bytes_NK is not None and self._is_plain:
            return self._bytes_NK.t()
        if self._bytes_KN is not None:
            return self._bytes_KN
        out_KN = self._scratch.matrix(self.num_in, self.num_out, E4M3)
        if self._bytes_NK is not None:
            fp8.transpose_bytes(self._bytes_NK, out_KN)
            return out_KN
        return fp8_grad.quantize_transposed(self._weight_NK, self._scale_N1, emulate=self.scheme.emulate, out_CP=out_KN)

    # Gradients of the weights.

    def weight_grad(self, dy_TN: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        """Return dyᵀ·x for some of the outputs."""
        if not self.scheme.weight_grads:
            return dy_TN.t() @ x_TK
        return fp8_grad.weight_grad(dy_TN, x_TK, self.scheme.by_rows, emulate=self.scheme.emulate)

    def _add_product(self, weights: list[torch.Tensor], dy_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
        if self.scheme.weight_grads:  # such a product cannot add to what is there
            add_grad(weights, self.weight_grad(dy_TN, x_TK))
        else:
            super()._add_product(weights, dy_TN, x_TK)


class _Product(torch.autograd.Function):
    """``x·Wᵀ`` by a store of one layer."""

    @staticmethod
    def forward(ctx: Any, x_TK: torch.Tensor, weight_NK: torch.Tensor, store: Fp8TrainedStore) -> torch.Tensor:
        ctx.store = store
        ctx.save_for_backward(x_TK, weight_NK)
        return store.forward(x_TK, None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x_TK, _ = ctx.saved_tensors  # refused where the weight has changed since
        dy_TN = grad_outputs[0].contiguous()
        dx_TK = ctx.store.dgrad(dy_TN, None) if ctx.needs_input_grad[0] else None
        dw_NK = ctx.store.weight_grad(dy_TN, x_TK) if ctx.needs_input_grad[1] else None
        return dx_TK, dw_NK, None


class Fp8TrainedLinear(nn.Linear):
    """A linear layer that learns and multiplies in 8 bits. Made from an existing layer by `attach`."""

    fp8_store: Fp8TrainedStore

    @staticmethod
    def attach(linear: nn.Linear, store: type[Fp8TrainedStore]) -> Fp8TrainedLinear:
        """Turn ``linear`` itself into such a layer and return it; its weight and bias keep their names."""
        assert type(linear) is nn.Linear, "a class of its own may compute something else"
        linear.fp8_store = store([Slot("weight", linear, None)])  # type: ignore[assignment]
        linear.__class__ = Fp8TrainedLinear
        assert isinstance(linear, Fp8TrainedLinear)
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        store = self.fp8_store
        if not torch.is_grad_enabled():
            store.forget_adapters()  # evaluation must not show weights that are gone, and has the time
        store.prepare()
        y_TN: torch.Tensor = _Product.apply(x.reshape(-1, self.in_features), self.weight, store)  # type: ignore[no-untyped-call]
        y = y_TN.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
