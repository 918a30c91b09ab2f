"""Safetensors files as one long list of tensors, read and written without ever holding a model.

A directory is read tensor by tensor out of memory-mapped files. What is written is cut into files of at most
``max_bytes``; their names count the files, so the sizes are added up first, from the headers. The memory needed is
that of one file being written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_automodel.shared.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
MAX_BYTES = 4 * 10**9

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None
    """None: it is made, not read."""

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def list_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Return every tensor of a Hugging Face directory, by name, without reading it.

    Raises:
        UserError: there are no safetensors files.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = [path.name for path in sorted(directory.glob("model*.safetensors"))]
    if not files:
        raise UserError(
            f"`{directory}` holds no weights in safetensors (model.safetensors), and other formats can run code when "
            "they are read. Load and save the model once with Transformers, which writes safetensors."
        )
    found: dict[str, TensorInfo] = {}
    for name in files:
        with safe_open(directory / name, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = weights.get_slice(key)
                if part.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"`{directory / name}` stores `{key}` as {part.get_dtype()}, a quantised format. Name the "
                        "model in full precision instead, with --base."
                    )
                found[key] = TensorInfo(tuple(part.get_shape()), _DTYPES[part.get_dtype()], directory / name)
    return found


def read_tensor(name: str, info: TensorInfo) -> torch.Tensor:
    """Read one tensor of `list_tensors`."""
    assert info.file is not None
    with safe_open(info.file, framework="pt") as weights:
        tensor: torch.Tensor = weights.get_tensor(name)
    return tensor


def main_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return the float dtype that most bytes are stored in; what differs from it was kept so on purpose."""
    sizes: dict[torch.dtype, int] = {}
    for info in tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


def write_tensors(
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    make: Callable[[str], torch.Tensor],
    max_bytes: int = MAX_BYTES,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write ``tensors``, each made by ``make(name)`` when its file is written, and the index where there are several.

    ``advance`` is told the bytes of every tensor made.

    Raises:
        OSError: a file cannot be written.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.num_bytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {}
        for name in names:
            content[name] = make(name).contiguous()
            advance(tensors[name].num_bytes)
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(info.num_bytes for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
