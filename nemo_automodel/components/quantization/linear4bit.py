"""A linear layer whose weight is stored in 4 bits. It needs no package beside PyTorch.

The layer is an ``nn.Linear`` with another class: name, bias and place in the model stay, ``weight`` holds the codes,
and state dicts have the keys and bytes of bitsandbytes' layer of the same name. A call unpacks the matrix, multiplies
and forgets it, and the backward pass unpacks it again: nothing of its full size outlives a product. Inputs are cast to
the compute dtype and outputs back, as bitsandbytes does. Where decoder layers are fast, a store of `components/fast`
takes the codes from here and this class computes nothing.

The codes lie in a parameter of the storage dtype, which is only a name for bytes: no cast reaches them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nemo_automodel.components.quantization.bnb_format import STATE_KEYS, packed_of, state_of
from nemo_automodel.kernels.nf4 import Packed, dequantize


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Linear4bit) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.unpacked())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad_outputs[0] @ ctx.layer.unpacked(), None


class Linear4bit(nn.Linear):
    """A frozen linear layer in 4 bits. Made from an existing layer by `pack`, never built."""

    compute_dtype: torch.dtype
    unpacked_dtype: torch.dtype
    """What state dicts say the matrix was before."""
    _packed: Packed

    @staticmethod
    def pack(layer: nn.Linear, packed: Packed, compute_dtype: torch.dtype, storage_dtype: torch.dtype) -> Linear4bit:
        """Turn ``layer`` itself into a packed layer with the weight ``packed``, and return it. The old weight goes.

        The layer may be on the meta device; its bias stays where it is.
        """
        assert type(layer) is nn.Linear
        assert packed.shape == (layer.out_features, layer.in_features)
        unpacked_dtype = layer.weight.dtype
        layer.__class__ = Linear4bit
        assert isinstance(layer, Linear4bit)
        layer.compute_dtype, layer.unpacked_dtype = compute_dtype, unpacked_dtype
        layer._set(packed, storage_dtype)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return layer

    def _set(self, packed: Packed, storage_dtype: torch.dtype) -> None:
        codes = packed.codes.view(storage_dtype).unsqueeze(1)
        self.register_parameter("weight", nn.Parameter(codes, requires_grad=False))
        self._packed = packed

    @property
    def packed(self) -> Packed:
        """The weight. Its codes are the memory of ``weight``."""
        return replace(self._packed, codes=self.weight.detach().view(torch.uint8).flatten())

    def unpacked(self) -> torch.Tensor:
        """Return the weight ``[out, in]`` in the compute dtype."""
        packed = self.packed
        return dequantize(packed, torch.empty(packed.shape, dtype=self.compute_dtype, device=packed.codes.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        y: torch.Tensor = _PackedProduct.apply(x.to(self.compute_dtype), self)  # type: ignore[no-untyped-call]
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear4bit:
        """Move the weight where ``fn`` moves tensors to; dtypes are for the bias and the adapter only."""
        packed, storage_dtype = self.packed, self.weight.dtype
        self._parameters["weight"] = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, dtype=torch.uint8, device=packed.codes.device)).device
        self._set(packed.to(device), storage_dtype)
        return self

    # State dicts in bitsandbytes' format.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in state_of(self.packed, self.unpacked_dtype).items():
            destination[f"{prefix}weight.{key}"] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = {}
        for key in STATE_KEYS:
            if f"{prefix}weight.{key}" in state_dict:
                state[key] = state_dict.pop(f"{prefix}weight.{key}")
        if state:
            codes, device = state_dict[f"{prefix}weight"], self.weight.device
            packed, self.unpacked_dtype = packed_of(codes, state, f"{prefix}weight", device)
            assert packed.shape == self._packed.shape
            self._set(replace(packed, codes=packed.codes.clone()), codes.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Describe the storage beside the layer."""
        return f"{super().extra_repr()}, {self._packed.quant_type}, double_quant={self._packed.is_nested}"
