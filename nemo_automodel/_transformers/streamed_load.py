"""Models filled tensor by tensor from safetensors files, so that the host never holds more than the one being read.

The model is built on the meta device, where weights have shapes and no memory. `fill` then reads the files in the order
of their bytes (`shard_reader`), puts each tensor where it belongs, on its device, and forgets it: the host holds one
tensor on a CPU and buffers of 64 MB on a GPU. `quantized_load` packs tensors on the way, `load_plain` leaves them as
they are. The usual way, Transformers', maps whole files into memory: slower than the disk, and where the GPU has no
memory of its own, the pages of the files compete with the model. It is left to models on a CPU.

With a floor under the machine's memory, what a tensor takes is asked for before it is read, and what was read leaves
the cache of files: its pages count as used when a GPU that shares the memory asks for some.

Names in the files must be the names of the model, and the model Transformers' own. Where that is not so, Transformers
reads the files, and the log says why.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from nemo_automodel._transformers.model_source import check_safetensors, read_json
from nemo_automodel._transformers.shard_reader import StoredTensor, read_index, read_tensors
from nemo_automodel.components.quantization.bnb_format import STATE_KEYS
from nemo_automodel.components.training.memory_watch import MemoryFloor

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_LEGACY_BUFFER = "*rotary_emb.inv_freq"


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

    def num_bytes_of(self, model: PreTrainedModel) -> int:
        """Return the bytes of a model from `build_empty` once it is filled; weights packed in the files stay so."""
        tensors = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        dense: int = sum(t.numel() * t.element_size() for name, t in tensors.values() if name not in self.states)
        packed = [name for weight, names in self.states.items() for name in (weight, *names)]
        return dense + sum(self.index[name].num_bytes for name in packed if name in self.index)


def find_files(source: str, hub: dict[str, Any]) -> Files | None:
    """Return the safetensors files of a directory or of a Hub name, fetched if need be; None if there are none.

    Raises:
        UserError: one is damaged, or holds numbers of a kind that PyTorch does not have.
    """
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
    paths = [directory / shard for shard in shards]
    for path in paths:
        check_safetensors(path)
    return Files(directory, read_index(paths))


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


@dataclass(frozen=True)
class Filling:
    """How `fill` goes about it."""

    put: Callable[[Any, str, torch.Tensor, dict[str, torch.Tensor]], None]
    """Takes the module of a tensor, its name, itself, and what belongs to it where it is packed in the files."""
    num_bytes: int
    """Of the model once it is filled."""
    floor: MemoryFloor | None = None


def load_plain(
    model: PreTrainedModel, files: Files, blueprint: Blueprint, floor: MemoryFloor | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fill a model from `build_empty` with weights that are not packed; return what `fill` does.

    Raises:
        LowMemoryStop: reading on would cross ``floor``.
    """

    def put(module: Any, name: str, tensor: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        place(module, name.rpartition(".")[2], tensor)

    return fill(model, files, blueprint, Filling(put, files.num_bytes_of(model), floor))


def fill(
    model: PreTrainedModel, files: Files, blueprint: Blueprint, filling: Filling
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fill a model from `build_empty`; return it and what Transformers would report of the loading.

    Raises:
        LowMemoryStop: the model, or the next tensor of it, would cross the floor.
    """
    report: dict[str, Any] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    tensors = model.state_dict(keep_vars=True)
    names: list[str] = []
    for name, stored in files.weights.items():
        if name not in tensors:
            report["unexpected_keys"] += [] if fnmatch(name, _LEGACY_BUFFER) else [name]
        elif name not in files.states and stored.shape != tensors[name].shape:
            report["mismatched_keys"].append((name, stored.shape, tuple(tensors[name].shape)))
        else:
            names += [name, *files.states.get(name, [])]
    if report["mismatched_keys"]:
        return model, report
    floor = filling.floor
    if floor is not None:
        floor.require(filling.num_bytes, "the model")
    asking = names if floor is None else _asking_first(names, files, floor)
    started = time.perf_counter()
    stream = read_tensors(files.index, asking, blueprint.device, drops_cached=floor is not None)
    for name, tensor, state in _grouped(stream, files):
        filling.put(model.get_submodule(name.rpartition(".")[0]), name, tensor, state)
        del tensor, state
    num_bytes = sum(files.index[name].num_bytes for name in names)
    logger.info("Weights: %.1f GB read in %.1f s.", num_bytes / 1e9, time.perf_counter() - started)
    finish(model, blueprint)
    if (files.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(files.directory)
    return model.eval(), report  # type: ignore[no-untyped-call]


def _asking_first(names: Iterable[str], files: Files, floor: MemoryFloor) -> Iterator[str]:
    """Yield names, each once there is room for its tensor; the reader takes a name when it is about to read."""
    for name in names:
        floor.require(files.index[name].num_bytes, f"`{name}`")
        yield name


def plain_obstacle(model: PreTrainedModel, files: Files | None) -> str | None:
    """Return why the files cannot be read in a stream as they are, None if they can."""
    if files is not None and (files.directory / _ADAPTER).is_file():
        return "there is an adapter beside them"
    if files is not None and files.states:
        return "they are packed in 4 bits"
    if not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is not a class of Transformers"
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return f"{type(model).__name__} keeps layers in fp32"
    if get_model_conversion_mapping(model, add_legacy=False):
        return f"weights of {type(model).__name__} are converted as they are read"
    return names_obstacle(model, files)


def names_obstacle(model: PreTrainedModel, files: Files | None) -> str | None:
    """Return what keeps `fill` from finding every weight, None if it finds them."""
    if files is None:
        return "there are no safetensors files"
    missing = _missing(model, files)
    return f"the files do not have `{missing[0]}` ({len(missing)} such weights)" if missing else None


def _missing(model: PreTrainedModel, files: Files) -> list[str]:
    """Return the weights that no file has, under none of their names."""
    stored, tensors = files.weights, model.state_dict(keep_vars=True)
    there = {id(tensor) for name, tensor in tensors.items() if name in stored}
    return [name for name, tensor in tensors.items() if id(tensor) not in there]


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


def place(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of one on the meta device, in the dtype of that."""
    old = getattr(module, key)
    tensor = tensor.to(old.dtype)
    if isinstance(old, nn.Parameter):
        setattr(module, key, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        module.register_buffer(key, tensor)


def finish(model: PreTrainedModel, blueprint: Blueprint) -> None:
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
            _compute_buffers(model, module, empty)
            for key in empty:
                assert not bool(module.get_buffer(key).isnan().any()), f"`{name}.{key}` is not made by Transformers"
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    assert not left, f"{left[:3]} have no memory"


def _compute_buffers(model: PreTrainedModel, module: nn.Module, empty: list[str]) -> None:
    """Have Transformers compute a module's buffers and nothing else: Gemma's embedding has one beside its weight."""
    held: list[Any] = [*module.parameters(recurse=False)]
    held += [buffer for key, buffer in module.named_buffers(recurse=False) if key not in empty]
    for tensor in held:
        tensor._is_hf_initialized = True  # Transformers' mark for what its functions leave alone
    versions = [tensor._version for tensor in held]
    with torch.no_grad():
        model._init_weights(module)  # type: ignore[no-untyped-call]
    changed = versions != [tensor._version for tensor in held]
    assert not changed, f"{type(module).__name__} draws its weights anew while its buffers are computed"
