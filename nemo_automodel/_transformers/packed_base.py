"""What the weights of a base were while a QLoRA adapter was trained on it: rounded to 4 or 8 bits.

They are rounded again here, one weight at a time and the way they are when a model is loaded, so that an adapter that
learned to undo the rounding is merged into the weights it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_automodel._transformers.merge import skeleton_of
from nemo_automodel._transformers.model_source import load_config
from nemo_automodel._transformers.quantized_load import FourBit, linears_to_pack
from nemo_automodel.components.quantization.config import QuantizationConfig
from nemo_automodel.kernels.nf4 import dequantize, quantize
from nemo_automodel.shared.dtypes import parse_dtype
from nemo_automodel.shared.imports import require


def base_as_packed(
    base: Path, quantization: QuantizationConfig, torch_dtype: Any, trust_remote_code: bool = False
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return a function (name, weight of the base) → the weight as training saw it.

    ``torch_dtype`` is the one that training loaded the base in; ``auto`` or None is the stored one.
    """
    if quantization.load_in_8bit:
        require("bitsandbytes", "Merging into a base that was rounded to 8 bits")
    skeleton = skeleton_of(load_config(str(base), trust_remote_code, {}, {}), trust_remote_code)
    packed = {f"{name}.weight" for name in linears_to_pack(skeleton, FourBit())}
    loaded = None if torch_dtype in (None, "auto") else parse_dtype(torch_dtype)

    def stored_as(name: str, weight: torch.Tensor) -> torch.Tensor:
        weight = weight if loaded is None else weight.to(loaded)
        return _rounded(weight, quantization) if name in packed else weight

    return stored_as


def _rounded(weight: torch.Tensor, quantization: QuantizationConfig) -> torch.Tensor:
    if quantization.load_in_8bit:
        from bitsandbytes import functional

        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        rounded: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales)
        return rounded.to(weight.dtype)
    packed = quantize(weight, quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant)
    return dequantize(packed, torch.empty_like(weight, memory_format=torch.contiguous_format))
