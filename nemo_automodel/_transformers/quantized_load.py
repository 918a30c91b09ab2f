"""Models in 4 bits without their full-size weights ever being there: read in a stream, or made of random codes.

The model is built on the meta device, where weights have shapes and no memory. `load_packed` then reads the safetensors
files tensor by tensor (`shard_reader`), packs each weight on its device (`kernels/nf4.py`) and forgets it: the host
holds one tensor on a CPU and a buffer of 32 MB on a GPU, the GPU the packed model and one weight. Files that
bitsandbytes has packed before are read as they are. `build_packed` draws random codes instead, layer by layer, so that
a model of any size can be measured without its files.

Names in the files must be the names of the model. Where they are not, or a layer is not what it seems, Transformers'
loader with bitsandbytes does the work (`assemble`), and the log says why. Its layers are not packed in the way that the
fast decoder layers read. The environment variable ``AUTOMODEL_BNB_STREAMING=0`` asks for it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from nemo_automodel._transformers.model_source import read_json
from nemo_automodel._transformers.shard_reader import StoredTensor, read_index, read_tensors
from nemo_automodel.components.quantization.bnb_format import STATE_KEYS, packed_of
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.kernels.nf4 import quantize, random_packed

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LEGACY_BUFFER = "*rotary_emb.inv_freq"


@dataclass(frozen=True)
class FourBit:
    """How linear layers are packed."""

    quant_type: str = "nf4"
    is_nested: bool = True
    compute_dtype: torch.dtype = torch.bfloat16
    storage_dtype: torch.dtype = torch.bfloat16
    skip: tuple[str, ...] = ()
    """Names, or parts of names between dots, of layers that stay as they are; the output head always does."""


@dataclass(frozen=True)
class Blueprint:
    """The model to be built."""

    auto_class: Any
    config: PretrainedConfig
    dtype: torch.dtype
    device: torch.device
    attn_implementation: str | None
    trust_remote_code: bool = False


@dataclass
class Files:
    """The tensors of a model's files."""

    directory: Path
    index: dict[str, StoredTensor]
    states: dict[str, list[str]] = field(init=False)
    """Weights that are packed already → the names of what belongs to them."""

    def __post_init__(self) -> None:
        self.states = {}
        for name in self.index:
            weight, _, key = name.partition(".weight.")
            if key in STATE_KEYS:
                self.states.setdefault(f"{weight}.weight", []).append(name)

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """All tensors but those that belong to packed weights."""
        inner = {name for names in self.states.values() for name in names}
        return {name: stored for name, stored in self.index.items() if name not in inner}


def find_files(source: str, hub: dict[str, Any]) -> Files | None:
    """Return the safetensors files of a directory or of a Hub name, fetched if need be; None if there are none."""
    directory, inner = Path(source), hub.get("subfolder", "")
    if not directory.is_dir():
        keywords = {key: value for key, value in hub.items() if key != "subfolder"}
        patterns = [str(Path(inner) / name) for name in ("model*.safetensors", _INDEX, "generation_config.json")]
        directory = Path(snapshot_download(source, allow_patterns=patterns, **keywords))
    directory /= inner
    if (directory / _INDEX).is_file():
        shards = sorted(set(read_json(directory / _INDEX)["weight_map"].values()))
    elif (directory / _SINGLE).is_file():
        shards = [_SINGLE]
    else:
        return None
    return Files(directory, read_index(directory / shard for shard in shards))


def build_empty(blueprint: Blueprint) -> PreTrainedModel:
    """Return the model on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = blueprint.auto_class.from_config(
            blueprint.config,
            dtype=blueprint.dtype,
            attn_implementation=blueprint.attn_implementation,
            trust_remote_code=blueprint.trust_remote_code,
        )
    return model


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
    if files is None:
        return "there are no safetensors files"
    missing = _missing(model, files)
    return f"the files do not have `{missing[0]}` ({len(missing)} such weights)" if missing else None


def _missing(model: PreTrainedModel, files: Files) -> list[str]:
    """Return the weights that no file has, under none of their names."""
    stored, tensors = files.weights, model.state_dict(keep_vars=True)
    there = {id(tensor) for name, tensor in tensors.items() if name in stored}
    return [name for name, tensor in tensors.items() if id(tensor) not in there]


def load_packed(
    model: PreTrainedModel, files: Files, blueprint: Blueprint, four_bit: FourBit
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fill a model from `build_empty`; return it and what Transformers would report of the loading.

    Raises:
        UserError: weights in 4 bits are stored in a format of their own.
    """
    report: dict[str, Any] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    tensors = model.state_dict(keep_vars=True)
    wanted = {} if files.states else linears_to_pack(model, four_bit)  # files decide what they have packed
    names = []
    for name, stored in files.weights.items():
        if name not in tensors:
            report["unexpected_keys"] += [] if fnmatch(name, _LEGACY_BUFFER) else [name]
        elif name not in files.states and stored.shape != tensors[name].shape:
            report["mismatched_keys"].append((name, stored.shape, tuple(tensors[name].shape)))
        else:
            names += [name, *files.states.get(name, [])]
    if report["mismatched_keys"]:
        return model, report
    for name, tensor, state in _grouped(read_tensors(files.index, names, blueprint.device), files):
        owner, _, key = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        if state:
            packed, unpacked_dtype = packed_of(tensor, state, name, blueprint.device)
            Linear4bit.pack(module, packed, four_bit.compute_dtype, tensor.dtype).unpacked_dtype = unpacked_dtype
        elif owner in wanted and key == "weight":
            packed = quantize(tensor.to(blueprint.dtype), four_bit.quant_type, four_bit.is_nested)
            Linear4bit.pack(module, packed, four_bit.compute_dtype, four_bit.storage_dtype)
        else:
            _place(module, key, tensor)
        del tensor, state
    _finish(model, blueprint)
    if (files.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(files.directory)
    return model.eval(), report  # type: ignore[no-untyped-call]


def build_packed(model: PreTrainedModel, blueprint: Blueprint, four_bit: FourBit) -> PreTrainedModel:
    """Fill a model from `build_empty` with random codes, and with random weights where it is not packed."""
    std = model.config.get_text_config().initializer_range
    for layer in linears_to_pack(model, four_bit).values():
        shape = (layer.out_features, layer.in_features)
        packed = random_packed(shape, std, blueprint.device, four_bit.quant_type, four_bit.is_nested)
        packed_layer = Linear4bit.pack(layer, packed, four_bit.compute_dtype, four_bit.storage_dtype)
        if packed_layer.bias is not None:
            _place(
                packed_layer, "bias", torch.zeros(layer.out_features, dtype=blueprint.dtype, device=blueprint.device)
            )
    for module in model.modules():
        meta = [key for key, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
        for key in meta:
            _place(module, key, torch.empty_like(module.get_parameter(key), device=blueprint.device))
        if meta:
            with torch.no_grad():
                model._init_weights(module)  # type: ignore[no-untyped-call]
    _finish(model, blueprint)
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


def _grouped(
    tensors: Iterator[tuple[str, torch.Tensor]], files: Files
) -> Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor]]]:
    """Yield weights with what belongs to them."""
    for name, tensor in tensors:
        state = {}
        for _ in files.states.get(name, []):
            inner, value = next(tensors)
            state[inner.removeprefix(f"{name}.")] = value
        yield name, tensor, state
        del tensor, state  # else they would stay while the next is read


def _place(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of one on the meta device, in the dtype of that."""
    old = getattr(module, key)
    tensor = tensor.to(old.dtype)
    if isinstance(old, nn.Parameter):
        setattr(module, key, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        module.register_buffer(key, tensor)


def _finish(model: PreTrainedModel, blueprint: Blueprint) -> None:
    """Tie what is tied, and compute the buffers that no file holds."""
    model.tie_weights()
    for name, module in list(model.named_modules()):
        empty = [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for key in empty:
            dtype = module.get_buffer(key).dtype
            fill = math.nan if dtype.is_floating_point else -1
            shape = module.get_buffer(key).shape
            module.register_buffer(key, torch.full(shape, fill, dtype=dtype, device=blueprint.device), persistent=False)
        if empty:
            with torch.no_grad():
                model._init_weights(module)  # type: ignore[no-untyped-call]
            for key in empty:
                assert not bool(module.get_buffer(key).isnan().any()), f"`{name}.{key}` is not made by Transformers"
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    assert not left, f"{left[:3]} have no memory"
