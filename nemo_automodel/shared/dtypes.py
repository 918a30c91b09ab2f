"""Dtype names as users write them."""

from __future__ import annotations

import torch

from nemo_automodel.shared.errors import ConfigError, did_you_mean

_NAMES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "int8": torch.int8,
}


def parse_dtype(value: str | torch.dtype, key: str = "torch_dtype") -> torch.dtype:
    """Turn ``bf16``, ``bfloat16``, ``torch.bfloat16`` or a dtype into a dtype.

    Raises:
        ConfigError: the name is not a dtype; ``key`` is named in the message.
    """
    if isinstance(value, torch.dtype):
        return value
    name = str(value).removeprefix("torch.")
    if name not in _NAMES:
        raise ConfigError(
            f"`{key}: {value}` is not a dtype.{did_you_mean(name, _NAMES)} Use bfloat16, float16 or float32."
        )
    return _NAMES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
