"""A frozen linear layer whose weight lies in 8 bits, for everything that does not go through a packed matrix.

The Hugging Face layer stays in its place with its name and gets this class: its weight is E4M3 (a view of the packed
matrix), its scales stand beside it. Where Transformers' modules compute, in generation with a cache for one, the weight
is made again in the dtype of the input, used and dropped; inputs are not rounded there, so this is a little more exact
than the packed product and slower. A state dict holds the weight as the layer multiplies by it, in the model's dtype
and in host memory: whatever reads it finds an ordinary model. What is loaded is packed at the next call.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nemo_automodel.kernels.fp8 import dequantize

E4M3 = torch.float8_e4m3fn
_FP8_CLASSES: dict[type[nn.Linear], type[nn.Linear]] = {}


class _Product(torch.autograd.Function):
    """``x·Wᵀ``, with W made anew in both directions: kept as a whole it would take the memory that 8 bits save."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: Fp8Linear) -> torch.Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.dequantized(x.dtype), linear.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_outputs[0] @ ctx.linear.dequantized(grad_outputs[0].dtype), None


class Fp8Linear(nn.Linear):
    """A frozen linear layer in E4M3 with a scale for each output. Made from an existing layer by `attach`."""

    scale_N1: torch.Tensor
    dense_dtype: torch.dtype
    """What the weight was before, and what a state dict holds."""

    @staticmethod
    def attach(linear: nn.Linear) -> Fp8Linear:
        """Turn ``linear`` itself into a layer that can hold 8 bits and return it. `hold` gives it its weight."""
        if not isinstance(linear, Fp8Linear):
            base = type(linear)
            if base not in _FP8_CLASSES:
                # behind what was added to the layer, an adapter, and before `nn.Linear`
                made = Fp8Linear if base is nn.Linear else type(f"Fp8{base.__name__}", (base, Fp8Linear), {})
                _FP8_CLASSES[base] = made
            linear.dense_dtype = linear.weight.dtype  # type: ignore[assignment]
            linear.__class__ = _FP8_CLASSES[base]
        assert isinstance(linear, Fp8Linear)
        return linear

    def hold(self, weight_NK: torch.Tensor, scale_N1: torch.Tensor) -> None:
        """Take a weight in E4M3 and its scales, fp32; both may be parts of larger ones."""
        self.weight.requires_grad_(False)
        self.weight.data = weight_NK
        self.scale_N1 = scale_N1

    @property
    def is_packed(self) -> bool:
        """Whether the weight is in E4M3: somebody may have put another in its place."""
        return self.weight.dtype == E4M3

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as a matrix of ``dtype``."""
        return dequantize(self.weight.detach(), self.scale_N1, dtype).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        if not self.is_packed:
            return super().forward(x)
        out: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Fp8Linear:
        """Move bytes as they are: what changes the dtype of a model means its numbers and not parts of them."""
        weight = self.weight
        if not self.is_packed:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        self._parameters["weight"] = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight.data = fn(weight.data.view(torch.uint8)).view(E4M3)
        self._parameters["weight"] = weight  # type: ignore[assignment]
        self.scale_N1 = fn(self.scale_N1.view(torch.uint8)).view(torch.float32)
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=weight.device)).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[prefix + "weight"] = self.dequantized(self.dense_dtype).cpu()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "weight")
        if self.is_packed and given is not None and given.shape == self.weight.shape:
            # dense until the store packs it, at the next call
            self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=self.dense_dtype), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
