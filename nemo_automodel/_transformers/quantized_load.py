"""Models in 4 bits without their full-size weights ever being there: read in a stream, or made of random codes.

`load_packed` reads the files tensor by tensor (`streamed_load`), packs each weight on its device (`kernels/nf4.py`) and
forgets it: the GPU holds the packed model and one weight. Files that bitsandbytes has packed before are read as they
are. `build_packed` draws random codes instead, layer by layer, so that a model of any size can be measured without its
files.

Where names in the files are not those of the model, or a layer is not what it seems, Transformers' loader with
bitsandbytes does the work (`assemble`), and the log says why. Its layers are not packed in the way that the fast
decoder layers read. The environment variable ``AUTOMODEL_BNB_STREAMING=0`` asks for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel._transformers.streamed_load import (
    Blueprint,
    Files,
    Filling,
    fill,
    finish,
    names_obstacle,
    place,
)
from nemo_automodel.components.quantization.bnb_format import packed_of
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.components.training.memory_watch import MemoryFloor
from nemo_automodel.kernels.nf4 import quantize, random_packed

_PACKED_BYTES = 0.52
"""Of a weight in 4 bits, with its scales."""


@dataclass(frozen=True)
class FourBit:
    """How linear layers are packed."""

    quant_type: str = "nf4"
    is_nested: bool = True
    compute_dtype: torch.dtype = torch.bfloat16
    storage_dtype: torch.dtype = torch.bfloat16
    skip: tuple[str, ...] = ()
    """Names, or parts of names between dots, of layers that stay as they are; the output head always does."""


def model_obstacle(model: PreTrainedModel) -> str | None:
    """Return why the layers of a model cannot be packed here, None if they can."""
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        return f"{type(model).__name__} has no output head, and which of its layers stay as they are is not known"
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return f"{type(model).__name__} keeps layers in fp32"
    return None


def file_obstacle(model: PreTrainedModel, files: Files | None) -> str | None:
    """Return why the files cannot be read in a stream, None if they can."""
    if os.environ.get("AUTOMODEL_BNB_STREAMING") == "0":
        return "AUTOMODEL_BNB_STREAMING is 0"
    return names_obstacle(model, files)


def load_packed(
    model: PreTrainedModel, files: Files, blueprint: Blueprint, four_bit: FourBit, floor: MemoryFloor | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fill a model from `build_empty`; return it and what Transformers would report of the loading.

    Raises:
        UserError: weights in 4 bits are stored in a format of their own.
        LowMemoryStop: reading on would cross ``floor``.
    """
    wanted = {} if files.states else linears_to_pack(model, four_bit)  # files decide what they have packed

    def pack(module: Any, name: str, tensor: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        owner, _, key = name.rpartition(".")
        if state:
            packed, unpacked_dtype = packed_of(tensor, state, name, blueprint.device)
            Linear4bit.pack(module, packed, four_bit.compute_dtype, tensor.dtype).unpacked_dtype = unpacked_dtype
        elif owner in wanted and key == "weight":
            packed = quantize(tensor.to(blueprint.dtype), four_bit.quant_type, four_bit.is_nested)
            Linear4bit.pack(module, packed, four_bit.compute_dtype, four_bit.storage_dtype)
        else:
            place(module, key, tensor)

    num_packed = sum(layer.weight.numel() for layer in wanted.values())
    num_bytes = files.num_bytes_of(model) - num_packed * blueprint.dtype.itemsize + int(num_packed * _PACKED_BYTES)
    return fill(model, files, blueprint, Filling(pack, num_bytes, floor))


def build_packed(model: PreTrainedModel, blueprint: Blueprint, four_bit: FourBit) -> PreTrainedModel:
    """Fill a model from `build_empty` with random codes, and with random weights where it is not packed."""
    std = model.config.get_text_config().initializer_range
    for layer in linears_to_pack(model, four_bit).values():
        shape = (layer.out_features, layer.in_features)
        packed = random_packed(shape, std, blueprint.device, four_bit.quant_type, four_bit.is_nested)
        packed_layer = Linear4bit.pack(layer, packed, four_bit.compute_dtype, four_bit.storage_dtype)
        if packed_layer.bias is not None:
            place(packed_layer, "bias", torch.zeros(layer.out_features, dtype=blueprint.dtype, device=blueprint.device))
    for module in model.modules():
        meta = [key for key, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
        for key in meta:
            place(module, key, torch.empty_like(module.get_parameter(key), device=blueprint.device))
        if meta:
            with torch.no_grad():
                model._init_weights(module)  # type: ignore[no-untyped-call]
    finish(model, blueprint)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def linears_to_pack(model: PreTrainedModel, four_bit: FourBit) -> dict[str, nn.Linear]:
    """Return the layers that are packed, by name: all linear ones but the output head and those to skip."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not _is_skipped(name, four_bit.skip)
    }


def _is_skipped(name: str, skip: tuple[str, ...]) -> bool:
    return any(f".{entry}." in f".{name}." for entry in skip)
