"""The RMSNorm in front of the output head, as one pass forward and one back, and one more where its weight learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nemo_automodel.kernels.norm import rms_norm, rms_norm_backward
from nemo_automodel.kernels.norm_grad import norm_weight_grad

_FAST_CLASSES: dict[type[nn.Module], type[FastRMSNorm]] = {}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        y_TD, rstd_T = rms_norm(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, rstd_T)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_D, rstd_T = ctx.saved_tensors
        dy_TD = grad_outputs[0].contiguous()
        dweight_D = norm_weight_grad(dy_TD, x_TD, rstd_T).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return rms_norm_backward(dy_TD, x_TD, weight_D, rstd_T), dweight_D, None


class FastRMSNorm(nn.Module):
    """A Hugging Face RMSNorm in one pass. Made by `speed_up_norm`, never built."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise ``[..., D]``."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        y_TD: torch.Tensor = _Norm.apply(x_TD, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return y_TD.view(hidden_states.shape)


def speed_up_norm(norm: nn.Module) -> None:
    """Exchange the class of a Hugging Face RMSNorm for its fast form, in place."""
    base = type(norm)
    if base not in _FAST_CLASSES:
        _FAST_CLASSES[base] = type(f"Fast{base.__name__}", (FastRMSNorm, base), {})
    norm.__class__ = _FAST_CLASSES[base]
