"""Nested states as torch distributed checkpoints (DCP), written and read by one process without a process group.

DCP keeps every tensor as its own entry, which is what lets another number of processes read it later. Two kinds of its
contents are pickles, though, and torch reads them as such: `.metadata` with plain ``pickle``, every value that is no
tensor with ``weights_only=False``. Both doors are closed here: the metadata's unpickler admits the classes that
describe tensors and nothing else, and values are read with ``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nemo_automodel.components.checkpoint.state import guarded

METADATA_FILE = ".metadata"

_MIN_DEPTH = 2
"""A state is a dictionary of dictionaries, so every value stands below at least two keys."""

Place = tuple[str | int, ...]
"""Where a value stands in the nested state: keys and list positions from the outside in."""

_ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "collections": {"OrderedDict"},
}
"""What a description of tensors is made of, by module; nothing here does anything but hold values."""


class WriteError(OSError):
    """DCP could not write; the cause is the system's error."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.removesuffix("._local")  # where Python 3.13 keeps its paths
        if name not in _ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"Unsupported GLOBAL {module}.{name}")
        return super().find_class(module, name)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # without the directory: a checkpoint tells nobody where it was made


class _Reader(FileSystemReader):
    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """Puts values that are no tensors into ``values``; tensors are read in place."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(flatten_state_dict=False)
        self._values = values

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self._values[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


def write(directory: Path, state: Mapping[str, Any], processes: ProcessGroup | None = None) -> None:
    """Write a nested dictionary of tensors and plain values into ``directory``, down to the disk.

    With ``processes`` all of them call it with a part each and wait for each other; what is there under the same name
    is written once.

    Raises:
        OSError: no space, no permission.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(
                dict(state),
                storage_writer=_Writer(directory),
                process_group=processes,
                no_dist=processes is None,
            )
        except CheckpointException as error:
            # not an Exception for Python, and its causes hide in a dictionary of ranks
            cause = next(iter(error.failures.values()))[0]
            raise WriteError(f"{type(cause).__name__} in {directory}") from cause


class Archive:
    """A DCP directory opened for reading.

    Raises:
        UserError: the metadata is missing, damaged, or names classes that do not describe tensors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metadata: Metadata = guarded(directory / METADATA_FILE, self._read_metadata)
        self._paths: dict[str, Place] = dict(self._metadata.planner_data)

    def _read_metadata(self) -> Metadata:
        metadata = _MetadataUnpickler(io.BytesIO((self.directory / METADATA_FILE).read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"a {type(metadata).__name__} instead of metadata")
        for entry in metadata.storage_data.values():
            if Path(entry.relative_path).name != entry.relative_path:
                raise ValueError(f"a file outside of the checkpoint: {entry.relative_path}")
        if set(metadata.planner_data) != set(metadata.state_dict_metadata):
            raise ValueError("names and values differ")
        for name, place in metadata.planner_data.items():
            if not _is_description(metadata.state_dict_metadata[name]) or len(tuple(place)) < _MIN_DEPTH:
                raise ValueError(f"no description of {name}")
        return metadata

    def describe(self) -> dict[Place, tuple[torch.Size, torch.dtype] | None]:
        """Return shape and dtype of every tensor, and None for other values, by their place in the nested state."""
        described: dict[Place, tuple[torch.Size, torch.dtype] | None] = {}
        for name, path in self._paths.items():
            entry = self._metadata.state_dict_metadata[name]
            if isinstance(entry, TensorStorageMetadata):
                described[path] = (entry.size, entry.properties.dtype)
            else:
                described[path] = None
        return described

    def read(
        self, into: Mapping[Place, torch.Tensor], skips: Callable[[Place], bool] = lambda place: False
    ) -> dict[str, Any]:
        """Return the nested state. Tensors named in ``into`` are overwritten and returned; others are new, on the CPU.

        What ``skips`` says is neither read nor returned.

        Raises:
            UserError: a file is missing, damaged, or holds objects that loading would have to run.
        """
        flat: dict[str, Any] = {}
        wanted = {name: path for name, path in self._paths.items() if not skips(path)}
        for name, path in wanted.items():
            entry = self._metadata.state_dict_metadata[name]
            if not isinstance(entry, TensorStorageMetadata):
                flat[name] = None
            elif path in into:
                flat[name] = into[path]
            else:
                flat[name] = guarded(self.directory, partial(torch.empty, entry.size, dtype=entry.properties.dtype))
        guarded(self.directory, lambda: self._load(flat))
        return guarded(self.directory, lambda: _nest(wanted, flat))

    def _load(self, flat: dict[str, Any]) -> None:
        reader, planner = _Reader(self.directory, self._metadata), _Planner(flat)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                load(dict(flat), storage_reader=reader, planner=planner, no_dist=True)
            except CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from None


def _is_description(entry: Any) -> bool:
    if isinstance(entry, TensorStorageMetadata):
        return isinstance(entry.size, torch.Size) and isinstance(entry.properties.dtype, torch.dtype)
    return isinstance(entry, BytesStorageMetadata)


def _nest(paths: Mapping[str, Place], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Put values back where they stood; list positions become the keys of a dictionary."""
    nested: dict[str, Any] = {}
    for name, path in paths.items():
        place: dict[Any, Any] = nested
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = flat[name]
    return nested
