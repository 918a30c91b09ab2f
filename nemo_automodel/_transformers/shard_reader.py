"""Safetensors files read tensor by tensor in plain reads, so that what is read is not kept.

The usual way maps a file into memory. Pages of it then count as the process's own until the system takes them back, and
on a machine whose GPU shares the memory they compete with the model. Here a tensor is read into its final memory, or
through a small buffer onto the GPU, and the system is told to drop the file's pages from its cache.

A file is: the length of the header (8 bytes, little-endian), the header (JSON: name → dtype, shape, first and last byte
of the data), the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BUFFER_BYTES = 32 * 2**20
"""What the host holds of a tensor on its way to a GPU."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_index(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return every tensor of the files by name, in the order in which they lie there."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            found[name] = StoredTensor(path, dtype, shape, 8 + length + first, end - first)
    return found


def read_tensors(
    index: dict[str, StoredTensor], names: Iterable[str], device: torch.device, drops_unwritten: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors on ``device``, one at a time. Names that lie side by side in one file are read fastest.

    The cache keeps pages that are not on the disk yet, as after a download; with ``drops_unwritten`` each file is
    waited for until it is there, so that they can be dropped.

    Raises:
        EOFError: a file ends before its data do.
    """
    buffer = None if device.type == "cpu" else torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
    path, file = None, -1
    try:
        for name in names:
            stored = index[name]
            if stored.path != path:
                if file >= 0:
                    _close(file)
                path, file = stored.path, os.open(stored.path, os.O_RDONLY)
                if drops_unwritten:
                    os.fsync(file)
            yield name, _read_tensor(file, stored, device, buffer)  # not through a variable: that would keep it
    finally:
        if file >= 0:
            _close(file)


def drop_cached(paths: Iterable[Path]) -> None:
    """Have the system forget the contents of files that others have read."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        _close(file)


def _close(file: int) -> None:
    _drop(file, 0, 0)  # also what was read ahead, and the edges of tensors
    os.close(file)


def _drop(file: int, offset: int, num_bytes: int) -> None:
    """Tell the system that these bytes are not wanted again; 0 bytes: all from ``offset`` on."""
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _read_tensor(file: int, stored: StoredTensor, device: torch.device, buffer: torch.Tensor | None) -> torch.Tensor:
    raw = torch.empty(stored.num_bytes, dtype=torch.uint8, device=device)
    if buffer is None:
        _read(file, stored.offset, raw)
    else:
        for first in range(0, stored.num_bytes, _BUFFER_BYTES):
            part = buffer[: min(_BUFFER_BYTES, stored.num_bytes - first)]
            _read(file, stored.offset + first, part)
            raw[first : first + len(part)].copy_(part)
    if stored.num_bytes:
        _drop(file, stored.offset, stored.num_bytes)
    return raw.view(stored.dtype).view(stored.shape)


def _read(file: int, offset: int, out: torch.Tensor) -> None:
    view = memoryview(out.numpy())  # type: ignore[arg-type]
    while view:
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset}, before its data do")
        view, offset = view[count:], offset + count
