"""Safetensors files read tensor by tensor in plain reads, so that what is read is not kept.

The usual way maps a file into memory. Pages of it then count as the process's own until the system takes them back, and
on a machine whose GPU shares the memory they compete with the model. Here a tensor is read into its final memory on a
CPU. On its way to a GPU it goes in pieces through a few page-locked buffers, which threads fill while the pieces before
are copied: the disk is never waited for by the GPU, nor the GPU by the disk. Where it is asked for, the system is told
to drop the file's pages from its cache.

A file is: the length of the header (8 bytes, little-endian), the header (JSON: name → dtype, shape, first and last byte
of the data), the data.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_automodel.shared.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
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
_PIECE_BYTES = 16 * 2**20
_NUM_AHEAD = 4
"""Pieces, and threads that read them: the host holds 64 MiB of what is on its way to a GPU."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_index(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return every tensor of the files by name, in the order in which they lie there.

    Raises:
        UserError: a tensor has numbers of another kind.
    """
    found: dict[str, StoredTensor] = {}
    for path in paths:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise UserError(
                    f"`{name}` in `{path}` holds numbers of the kind {entry['dtype']}, which cannot be read. Use a "
                    f"copy of the model in one of {', '.join(_DTYPES)}."
                )
            first, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            found[name] = StoredTensor(path, dtype, shape, 8 + length + first, end - first)
    return found


def read_tensors(
    index: dict[str, StoredTensor],
    names: Iterable[str],
    device: torch.device,
    drops_cached: bool = False,
    num_ahead: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors on ``device``, one at a time. Names that lie side by side in one file are read fastest.

    With ``drops_cached`` nothing of the files stays in the system's cache: pages that are not on the disk yet, as after
    a download, are waited for. ``num_ahead`` pieces are read before they are asked for; by default none on a CPU, where
    they would be memory beside the model. A name is taken just before the memory of its tensor is.

    Raises:
        EOFError: a file ends before its data do.
    """
    if num_ahead is None:
        num_ahead = 0 if device.type == "cpu" else _NUM_AHEAD
    arriving = (_Arriving(name, index[name], device) for name in names)
    with _OpenFiles(drops_cached) as files:
        if num_ahead == 0:
            for tensor in arriving:
                files.read(tensor.stored, 0, tensor.raw)
                yield tensor.name, tensor.take()
        else:
            with ThreadPoolExecutor(num_ahead, thread_name_prefix="weights") as threads:
                yield from _read_ahead(arriving, files, threads, [_Buffer(device) for _ in range(num_ahead)])


def _read_ahead(
    arriving: Iterable[_Arriving], files: _OpenFiles, threads: ThreadPoolExecutor, buffers: list[_Buffer]
) -> Iterator[tuple[str, torch.Tensor]]:
    waiting: deque[_Piece] = deque()
    pieces = (
        (tensor, first)
        for tensor in arriving
        for first in range(0, max(tensor.stored.num_bytes, 1), _PIECE_BYTES)  # one of nothing is the last one, too
    )
    for number, (tensor, first) in enumerate(pieces):
        if len(waiting) == len(buffers):
            yield from _landed(waiting.popleft())
        waiting.append(_Piece(tensor, first, buffers[number % len(buffers)], files, threads))
    while waiting:
        yield from _landed(waiting.popleft())


def _landed(piece: _Piece) -> Iterator[tuple[str, torch.Tensor]]:
    piece.land()
    if piece.is_last:
        yield piece.tensor.name, piece.tensor.take()


class _Arriving:
    """A tensor on its way."""

    def __init__(self, name: str, stored: StoredTensor, device: torch.device) -> None:
        self.name, self.stored = name, stored
        self.raw = torch.empty(stored.num_bytes, dtype=torch.uint8, device=device)

    def take(self) -> torch.Tensor:
        """Hand the tensor out and forget it: what the caller drops is free, although frames here still hold this."""
        raw = self.raw
        del self.raw
        return raw.view(self.stored.dtype).view(self.stored.shape)


class _Piece:
    """A part of a tensor that a thread reads."""

    def __init__(
        self, tensor: _Arriving, first: int, buffer: _Buffer, files: _OpenFiles, threads: ThreadPoolExecutor
    ) -> None:
        self.tensor, self.first, self.buffer = tensor, first, buffer
        self.num_bytes = min(_PIECE_BYTES, tensor.stored.num_bytes - first)
        self.is_last = first + self.num_bytes == tensor.stored.num_bytes
        self._read: Future[None] = threads.submit(buffer.fill, files, tensor.stored, first, self.num_bytes)

    def land(self) -> None:
        """Wait until it is read, and send it to its place."""
        self._read.result()
        self.buffer.send(self.tensor.raw[self.first : self.first + self.num_bytes])


class _Buffer:
    """Host memory between a file and a GPU, used again once its last copy is over."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._bytes = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
        self._sent = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    def fill(self, files: _OpenFiles, stored: StoredTensor, first: int, num_bytes: int) -> None:
        if self._sent is not None:
            self._sent.synchronize()  # at once before the first copy
        files.read(stored, first, self._bytes[:num_bytes])

    def send(self, target: torch.Tensor) -> None:
        target.copy_(self._bytes[: len(target)], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class _OpenFiles:
    """Files by path, each opened once."""

    def __init__(self, drops_cached: bool) -> None:
        self._drops_cached = drops_cached
        self._opened: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._opened.values():
            if self._drops_cached:
                _drop(file, 0, 0)  # also what was read ahead, and the edges of tensors
            os.close(file)

    def read(self, stored: StoredTensor, first: int, out: torch.Tensor) -> None:
        """Fill ``out`` with the bytes of a tensor from its ``first`` on."""
        file = self._open(stored.path)
        view, offset = memoryview(out.numpy()), stored.offset + first  # type: ignore[arg-type]
        while view:
            count = os.preadv(file, [view], offset)
            if count == 0:
                raise EOFError(f"the file ends at byte {offset}, before its data do")
            view, offset = view[count:], offset + count
        if self._drops_cached and len(out):
            _drop(file, stored.offset + first, len(out))

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._opened:
                self._opened[path] = os.open(path, os.O_RDONLY)
                if self._drops_cached:
                    os.fsync(self._opened[path])
            return self._opened[path]


def drop_cached(paths: Iterable[Path]) -> None:
    """Have the system forget the contents of files that others have read."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        _drop(file, 0, 0)
        os.close(file)


def _drop(file: int, offset: int, num_bytes: int) -> None:
    """Tell the system that these bytes are not wanted again; 0 bytes: all from ``offset`` on."""
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_DONTNEED)
