"""Float64 oracles of the kernels, by autograd from the textbook formulas, and how close a kernel must come.

fp32 must agree with float64 to rounding; 16 bits may be at most 1.1 times as far from it as the plain PyTorch form is.
The 16 bits are those of fp16: Triton's interpreter cuts bf16 off instead of rounding it. `benchmarks/fast_core.py`
holds bf16 to the same rule on a GPU.
"""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.float16]
FP32_TOLERANCE = 3e-6
HALF_FACTOR = 1.1


def filled(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory full of NaN: what a kernel does not write, a comparison sees."""
    return torch.full(shape, float("nan"), dtype=dtype)


def in_wider_buffer(tensor: torch.Tensor, extra: int) -> torch.Tensor:
    """Return an equal matrix whose rows lie in a buffer ``extra`` columns wider, NaN behind them."""
    buffer = filled(tensor.shape[0], tensor.shape[1] + extra, dtype=tensor.dtype)
    buffer[:, : tensor.shape[1]] = tensor
    return buffer[:, : tensor.shape[1]]


def error(result: torch.Tensor, oracle: torch.Tensor) -> float:
    """Return the relative error in the 2-norm; NaN anywhere gives NaN."""
    return float((result.double() - oracle).norm() / oracle.norm())


def assert_close(result: torch.Tensor, oracle: torch.Tensor, plain: torch.Tensor | None = None) -> None:
    """Hold a kernel's result against the oracle; ``plain`` is what the PyTorch form gives in the same dtype."""
    assert result.shape == oracle.shape
    if result.dtype == torch.float32:
        assert error(result, oracle) <= FP32_TOLERANCE
    else:
        assert plain is not None
        assert error(result, oracle) <= HALF_FACTOR * error(plain, oracle) + 1e-9


def rms_norm_64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
