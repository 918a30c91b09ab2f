"""What a checkpoint held when it was saved: the size and checksum of every file. Free of torch.

Formats notice some damage and not the rest: a truncated safetensors file is refused, one with a flipped bit in a weight
loads, and the run goes on with a number nobody trained. So every save ends with `manifest.json`, and every load begins
by comparing all files with it, before anything in memory or on the disk is changed. It guards against accidents, not
against an enemy, who would write the manifest too; what a hostile file may do is limited by how it is read (`state`).

The checksum is XXH3 with 128 bits, which runs at memory speed (17 GB/s on one core of a server), so a check costs what
reading the files costs, and the load that follows finds them in memory. Files are read side by side. The numbers are
those of the tool ``xxh128sum``.

Documents beside the files (`README.md`, hidden files such as those of file managers) may be added to a checkpoint; any
other file that the manifest does not name could be one that a loader picks up, and is refused.
"""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from nemo_automodel.components.checkpoint.disk import write_file
from nemo_automodel.components.checkpoint.layout import INCOMPLETE_MARKER, complete_checkpoints
from nemo_automodel.shared.errors import UserError

MANIFEST_FILE = "manifest.json"

_FORMAT = 1
_ALGORITHM = "xxh3_128"
_NUM_BYTES_AT_ONCE = 2**24
_MAX_NUM_THREADS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """One file as it was saved."""

    num_bytes: int
    checksum: str
    """Hexadecimal, as ``xxh128sum`` prints it."""


def write_manifest(checkpoint: Path) -> None:
    """Record every file below ``checkpoint``, which nothing may change afterwards.

    Raises:
        OSError: a file cannot be read or the manifest cannot be written.
    """
    names = [name for name in _file_names(checkpoint) if name not in (MANIFEST_FILE, INCOMPLETE_MARKER)]
    files = {
        name: {"num_bytes": record.num_bytes, "checksum": record.checksum}
        for name, record in _records(checkpoint, names).items()
    }
    content = {"format": _FORMAT, "algorithm": _ALGORITHM, "checksum": _checksum_of(files), "files": files}
    write_file(checkpoint / MANIFEST_FILE, json.dumps(content, indent=1).encode() + b"\n")


def verify(checkpoint: Path, folders: tuple[str, ...] = ("",)) -> bool:
    """Compare the files of ``checkpoint``, or only those below some of its folders, with the manifest; read-only.

    Returns whether there was a manifest: checkpoints of the reference and those of earlier versions have none, which is
    said in one line.

    Raises:
        UserError: a file is missing, has another size or other bytes, or was added; or the manifest itself is damaged.
    """
    path = checkpoint / MANIFEST_FILE
    if not path.is_file():
        logger.warning(
            "%s has no %s, so its files cannot be checked for damage. Loading it as it is", checkpoint, path.name
        )
        return False
    start_s = time.perf_counter()
    expected = {name: record for name, record in _read(path).items() if name.startswith(folders)}
    added = _added(checkpoint, expected, folders)
    problems = [f"`{name}` is missing" for name in expected if not (checkpoint / name).is_file()]
    problems += [problem for name, record in expected.items() if (problem := _other_size(checkpoint, name, record))]
    problems += [f"`{name}` was added after it was saved" for name in added]
    if not problems:  # reading everything is for what nothing cheaper tells
        try:
            found = _records(checkpoint, list(expected))
        except OSError as error:
            raise UserError(f"`{error.filename}` cannot be read: {error.strerror}. {_remedy(checkpoint)}") from error
        problems = [
            f"the bytes of `{name}` are not those that were saved" for name in expected if found[name] != expected[name]
        ]
    if problems:
        more = f" ({len(problems) - 1} more of its files differ)" if len(problems) > 1 else ""
        raise UserError(f"`{checkpoint}` is damaged: {problems[0]}{more}. {_remedy(checkpoint, bool(added))}")
    num_bytes = sum(record.num_bytes for record in expected.values())
    logger.info(
        "Checked %d files of %s against its manifest (%.2f GB in %.1f s): whole",
        *(len(expected), checkpoint, num_bytes / 1e9, time.perf_counter() - start_s),
    )
    return True


def _read(path: Path) -> dict[str, FileRecord]:
    try:
        content: Any = json.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["algorithm"] != _ALGORITHM:
            raise UserError(
                f"`{path}` is of format {content['format']} with {content['algorithm']}, but this version knows format "
                f"{_FORMAT} with {_ALGORITHM}. Use the version that wrote the checkpoint."
            )
        if content["checksum"] != _checksum_of(content["files"]):
            raise ValueError("checksum")
        records = {name: FileRecord(**record) for name, record in content["files"].items()}
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in records):
            raise ValueError("a name outside of the checkpoint")
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"`{path}` is damaged ({type(error).__name__}). {_remedy(path.parent)}") from error
    return records


def _checksum_of(files: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _file_names(root: Path) -> list[str]:
    """Return every file below ``root`` by its name with forward slashes, sorted."""
    return sorted(
        Path(directory, name).relative_to(root).as_posix() for directory, _, names in os.walk(root) for name in names
    )


def _records(root: Path, names: list[str]) -> dict[str, FileRecord]:
    num_threads = min(_MAX_NUM_THREADS, os.cpu_count() or 1, max(len(names), 1))
    with ThreadPoolExecutor(num_threads) as pool:
        return dict(zip(names, pool.map(lambda name: _record(root / name), names), strict=True))


def _record(path: Path) -> FileRecord:
    digest, num_bytes, buffer = xxhash.xxh3_128(), 0, bytearray(_NUM_BYTES_AT_ONCE)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(buffer):
            digest.update(view[:num_read])
            num_bytes += num_read
    return FileRecord(num_bytes, digest.hexdigest())


def _other_size(checkpoint: Path, name: str, record: FileRecord) -> str | None:
    path = checkpoint / name
    if not path.is_file() or path.stat().st_size == record.num_bytes:
        return None
    return f"`{name}` has {path.stat().st_size:,} bytes, but {record.num_bytes:,} were saved"


def _added(checkpoint: Path, expected: dict[str, FileRecord], folders: tuple[str, ...]) -> list[str]:
    """Return files that the manifest does not name and that are no documents."""
    found = [name for name in _file_names(checkpoint) if name.startswith(folders) and name not in expected]
    return [name for name in found if name != MANIFEST_FILE and not _is_document(name)]


def _is_document(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() == ".md" or any(part.startswith(".") for part in path.parts)


def _remedy(checkpoint: Path, is_added: bool = False) -> str:
    if is_added:
        return "Move that file out of the checkpoint."
    checkpoint = checkpoint.resolve() if checkpoint.is_symlink() else checkpoint
    others = [path for path in complete_checkpoints(checkpoint.parent) if path.resolve() != checkpoint.resolve()]
    if not others:
        return "Restore it from a copy, or train again from the start."
    away = f"mv {checkpoint} {checkpoint}-damaged"
    return f"Restore it from a copy, or move it away ({away}) and go on from `{others[-1]}`."
