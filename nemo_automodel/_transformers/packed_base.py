"""What the weights of a base were while a QLoRA adapter was trained on it: rounded to 4 or 8 bits.

They are rounded again here, one weight at a time and the way bitsandbytes does it when a model is loaded, so that an
adapter that learned to undo the rounding is merged into the weights it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_automodel._transformers.merge import skeleton_of
from nemo_automodel._transformers.model_source import load_config
from nemo_automodel.components.quantization.config import QuantizationConfig
from nemo_automodel.shared.dtypes import parse_dtype
from nemo_automodel.shared.imports import require


def base_as_packed(
    base: Path, quantization: QuantizationConfig, torch_dtype: Any, trust_remote_code: bool = False
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return a function (name, weight of the base) → the weight as training saw it.

    ``torch_dtype`` is the one that training loaded the base in; ``auto`` or None is the stored one.
    """
    require("bitsandbytes", "Merging into the rounded base")
    skeleton = skeleton_of(load_config(str(base), trust_remote_code, {}, {}), trust_remote_code)
    packed = _packed_names(skeleton)
    loaded = None if torch_dtype in (None, "auto") else parse_dtype(torch_dtype)

    def stored_as(name: str, weight: torch.Tensor) -> torch.Tensor:
        weight = weight if loaded is None else weight.to(loaded)
        return _rounded(weight, quantization) if name in packed else weight

    return stored_as


def _packed_names(skeleton: Any) -> set[str]:
    """Return the weights that bitsandbytes packs: linear layers, but not the head, tied weights or the last module."""
    head = skeleton.get_output_embeddings()
    tied = set(skeleton.all_tied_weights_keys) | set(skeleton.all_tied_weights_keys.values())
    last = list(skeleton.named_parameters())[-1][0]
    return {
        f"{name}.weight"
        for name, module in skeleton.named_modules()
        if type(module) is nn.Linear and module is not head and f"{name}.weight" not in {*tied, last}
    }


def _rounded(weight: torch.Tensor, quantization: QuantizationConfig) -> torch.Tensor:
    from bitsandbytes import functional

    if quantization.load_in_8bit:
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        rounded: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales)
        return rounded.to(weight.dtype)
    codes, state = functional.quantize_4bit(
        weight.contiguous(),
        compress_statistics=quantization.bnb_4bit_use_double_quant,
        quant_type=quantization.bnb_4bit_quant_type,
        quant_storage=parse_dtype(quantization.bnb_4bit_quant_storage),
    )
    return functional.dequantize_4bit(codes, state).to(weight.dtype)
