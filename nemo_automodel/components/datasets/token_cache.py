"""Tokenised rows in files, so that no row is tokenised twice.

A *store* is a directory of chunk files, each with the tokens of some rows, in any order. It belongs to one *key*: the
bytes of the data, which rows of them, the tokenizer, the template, every option that shapes tokens or labels, and the
code that does it. Whatever changes any of these makes another store; the order of the rows, the size of a pack and the
packing strategy do not.

A chunk is written beside its place and renamed, so a file that is there is whole; it is mapped into memory, not read,
so that several processes of a host share it. None is believed: a digest over key and content is checked first, and a
file that fails is made anew. Only one process of a host writes, the one that holds the lock; what it has written stays
when it is killed. The price is 8 bytes on disk for every token, until no run has used them for a month
(``cache_expiry``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from nemo_automodel.components.datasets.cache_expiry import hold_store, remove_unused
from nemo_automodel.shared.cache import cache_directory

logger = logging.getLogger(__name__)

FORMAT = "nemo_automodel tokens 1"
"""Part of every key: a new layout of the files is another one."""

_MAGIC = b"NMTOKENS"
_DIGEST_BYTES = 16
_INTS = np.dtype("<i4")


class TokenizedRow(NamedTuple):
    """The tokens of one row as they are stored."""

    ids: np.ndarray
    """int32 ``[T]``, cut by ``truncation``, not padded."""
    labels: np.ndarray
    """int32 ``[T]``"""
    num_learned: int
    """Labels that are not -100."""
    num_tokens: int
    """Tokens of the row before it was cut."""
    num_learned_cut: int
    """How many of those that were cut off would be learned."""


def key_of(parts: Sequence[object]) -> str:
    """Return the key of plain values (whatever JSON can write), 32 hexadecimal digits."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tokens_directory() -> Path:
    """Return the directory that holds all stores."""
    return cache_directory("tokens")


class _Chunk(NamedTuple):
    """What a file of a store holds, mapped into memory.

    Layout of the file: magic, digest, then little-endian int32: number of rows R and of tokens T; rows, lengths,
    learned labels, tokens before cutting, learned tokens cut off, each ``[R]``; ids and labels, each ``[T]``.
    """

    rows: np.ndarray
    facts: np.ndarray
    """``[R, 4]``: length, learned labels, tokens before cutting, learned tokens cut off."""
    ids: np.ndarray
    labels: np.ndarray


def _read_chunk(path: Path, key: str, num_rows_of_set: int) -> _Chunk:
    """Open and check a file.

    Raises:
        ValueError: it is not a whole chunk of this key.
    """
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = len(_MAGIC) + _DIGEST_BYTES
    if memory[: len(_MAGIC)] != _MAGIC or (len(memory) - start) % _INTS.itemsize:
        raise ValueError("not a chunk")
    with memoryview(memory) as view, view[start:] as body:
        if view[len(_MAGIC) : start] != _digest(key, body):
            raise ValueError("another digest")
    numbers = np.frombuffer(memory, dtype=_INTS, offset=start)
    num_rows, num_tokens = int(numbers[0]), int(numbers[1])
    head = 2 + 5 * num_rows
    if len(numbers) != head + 2 * num_tokens:
        raise ValueError("another length")
    rows = numbers[2 : 2 + num_rows]
    if num_rows and rows.max() >= num_rows_of_set:
        raise ValueError("another set")
    ids, labels = numbers[head:].reshape(2, num_tokens)
    return _Chunk(rows, numbers[2 + num_rows : head].reshape(4, num_rows).T, ids, labels)


def _digest(key: str, body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES, key=key.encode()).digest()


class TokenStore:
    """The rows of one key that are there, and the way to add more."""

    def __init__(self, directory: Path, key: str, num_rows: int, hold: IO[bytes] | None = None) -> None:
        self.directory, self.key, self.num_rows = directory, key, num_rows
        self._hold = hold
        """While it is open, here or in a process forked from this one, nobody removes the store."""
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []
        """Ids and labels of each chunk."""
        self._seen: set[str] = set()
        self._owner, self._is_refreshing = os.getpid(), threading.Lock()
        # for each row: the number of its chunk (-1: not there), where its tokens begin there, and the chunk's facts
        self._chunk_of, self._starts = np.full(num_rows, -1, np.int32), np.zeros(num_rows, np.int64)
        self._facts = np.zeros((num_rows, 4), np.int32)
        self._lock: IO[bytes] | None = None

    def __contains__(self, row: int) -> bool:
        return bool(self._chunk_of[row] >= 0)

    def __getitem__(self, row: int) -> TokenizedRow:
        ids, labels = self._chunks[self._chunk_of[row]]
        length, *counts = self._facts[row].tolist()
        start = int(self._starts[row])
        return TokenizedRow(ids[start : start + length], labels[start : start + length], *counts)

    @property
    def num_there(self) -> int:
        """Number of rows that are there."""
        return int((self._chunk_of >= 0).sum())

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Return those of ``rows`` that are not there, in their order."""
        found: np.ndarray = rows[self._chunk_of[rows] < 0]
        return found

    def refresh(self) -> None:
        """Look for chunks that were added, by this process or another one; threads of one process may.

        The holder of the lock removes a damaged one, so that it is made anew.
        """
        if os.getpid() == self._owner:
            with self._is_refreshing:
                self._refresh()
        else:
            self._refresh()  # a forked process has one thread, and its copy of the lock may have been taken

    def _refresh(self) -> None:
        names = {entry.name for entry in os.scandir(self.directory) if entry.name.endswith(".chunk")}
        for name in sorted(names - self._seen):
            path = self.directory / name
            try:
                chunk = _read_chunk(path, self.key, self.num_rows)
            except FileNotFoundError:
                continue
            except ValueError:
                if self._lock is not None:
                    logger.warning("The token cache's file %s is damaged. Its rows are tokenised again.", path)
                    path.unlink()
                continue
            lengths = chunk.facts[:, 0]
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            # other threads read a row once it is said to be there, so that comes last, and nothing of it changes then
            is_new = self._chunk_of[chunk.rows] < 0
            rows = chunk.rows[is_new]
            self._chunks.append((chunk.ids, chunk.labels))
            self._starts[rows], self._facts[rows] = starts[is_new], chunk.facts[is_new]
            self._chunk_of[rows] = len(self._chunks) - 1
            self._seen.add(name)

    def write(self, rows: Sequence[int], tokenized: Sequence[TokenizedRow]) -> None:
        """Add a chunk; it appears whole or not at all.

        Raises:
            OSError: no room, no permission.
        """
        lengths = [len(row.ids) for row in tokenized]
        parts = [
            np.array([len(rows), sum(lengths)]),
            np.array(rows),
            np.array(lengths),
            np.array([row.num_learned for row in tokenized]),
            np.array([row.num_tokens for row in tokenized]),
            np.array([row.num_learned_cut for row in tokenized]),
            *(row.ids for row in tokenized),
            *(row.labels for row in tokenized),
        ]
        body = np.concatenate(parts).astype(_INTS).tobytes()
        # the name says which rows, so that two writers that do not see each other's lock do not get in each other's way
        name = hashlib.blake2b(np.array(rows, dtype="<i8").tobytes(), digest_size=12).hexdigest()
        temporary = self.directory / f"{name}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(_MAGIC + _digest(self.key, body) + body)
            temporary.replace(self.directory / f"{name}.chunk")
        finally:
            temporary.unlink(missing_ok=True)

    def try_lock(self) -> bool:
        """Become the one process of this host that writes; false while another one is."""
        if self._lock is not None:
            return True
        lock = (self.directory / "lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self._lock = lock
        for leftover in self.directory.glob("*.tmp"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        return True

    def unlock(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # also for processes that were forked with it
            self.forget_lock()

    def forget_lock(self) -> None:
        """Close this process's copy of the lock of the process it was forked from."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def open_store(key: str | None, num_rows: int, cache: bool | str, days: int | None = None) -> TokenStore:
    """Open the store of a key; without one, or with ``cache`` false, in a directory that goes when the store does.

    ``cache`` may name the directory of all stores. One line says how much is there. Other stores that have not been
    used for ``days`` days are removed.
    """
    if key is None or cache is False:
        return _private_store(num_rows)
    directory = (Path(cache).expanduser() if isinstance(cache, str) else tokens_directory()) / key
    try:
        hold_of_store = hold_store(directory)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        logger.warning(
            "Nothing can be written to the token cache %s (%s), so rows are tokenised for this run only. Set "
            "`packed_sequence.cache` to another directory, or to false.", directory, error.strerror
        )  # fmt: skip
        return _private_store(num_rows)
    store = TokenStore(directory, key, num_rows, hold_of_store)
    store.refresh()
    if days is not None:
        remove_unused(directory.parent, days)
    found = store.num_there
    what = "has none" if found == 0 else "has all" if found == num_rows else f"has {found:,}"
    logger.info("Token cache %s %s of the %s rows.", directory, what, f"{num_rows:,}")
    return store


def _private_store(num_rows: int) -> TokenStore:
    directory = Path(tempfile.mkdtemp(prefix="nemo_automodel_tokens_"))
    store = TokenStore(directory, "", num_rows)
    weakref.finalize(store, _remove, directory, os.getpid())
    return store


def _remove(directory: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked from it
        shutil.rmtree(directory, ignore_errors=True)
