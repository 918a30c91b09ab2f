"""Which stores of the token cache are in use, and the end of those that nobody has used for long.

A change to the data, a template or our own code makes another store and leaves the old one behind, so without an end
the cache only grows. Whoever opens a store holds a shared lock on its file ``in_use``, which the kernel takes back with
the process, and touches the file: its time is that of the last use. Whoever removes takes the lock exclusively, looks
at the time once more, and moves the store away under the lock, so nobody can open half a store. Where locks do not
work nothing is removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

_IN_USE = "in_use"
_DAY_S = 86400
_STORE = re.compile(r"[0-9a-f]{32}")
_MOVED_AWAY = re.compile(r"[0-9a-f]{32}\.\d+\.removed")
_FILES = re.compile(rf".*\.chunk|.*\.tmp|lock|{_IN_USE}")


def hold_store(directory: Path) -> IO[bytes] | None:
    """Make the directory of a store if there is none, and keep it from being removed while the result is open.

    None where the file system knows no locks.

    Raises:
        OSError: the directory cannot be made or written.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            file = (directory / _IN_USE).open("ab")
        except FileNotFoundError:  # moved away just now
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:
            file.close()
            return None
        if _is_in(file, directory):
            os.utime(file.fileno())
            return file
        file.close()  # it was moved away while we waited


def _is_in(file: IO[bytes], directory: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), (directory / _IN_USE).stat())
    except FileNotFoundError:
        return False


def remove_unused(root: Path, days: int) -> None:
    """Remove the stores in ``root`` that nobody uses or has used for so many days; one line says what went.

    Only directories are touched that hold what a store holds and nothing else.
    """
    num_stores = num_bytes = 0
    for directory in sorted(path for path in root.iterdir() if path.is_dir()):
        if _MOVED_AWAY.fullmatch(directory.name):
            shutil.rmtree(directory, ignore_errors=True)  # by a process that was killed meanwhile
        elif _STORE.fullmatch(directory.name) and _is_old(directory, days) and _holds_a_store_only(directory):
            moved = _move_away(directory, days)
            if moved is not None:
                num_stores += 1
                num_bytes += sum(file.stat().st_size for file in moved.iterdir())
                shutil.rmtree(moved, ignore_errors=True)
    if num_stores:
        what = "1 key" if num_stores == 1 else f"{num_stores:,} keys"
        logger.info(
            "Token cache %s: removed %s with %.3f GB that no run has used for %d days.",
            root,
            what,
            num_bytes / 1e9,
            days,
        )


def _is_old(directory: Path, days: int) -> bool:
    try:
        used = (directory / _IN_USE).stat().st_mtime
    except FileNotFoundError:  # of an earlier version: a file that is added touches the directory
        try:
            used = directory.stat().st_mtime
        except FileNotFoundError:
            return False
    return time.time() - used > days * _DAY_S


def _holds_a_store_only(directory: Path) -> bool:
    try:
        entries = list(directory.iterdir())
    except FileNotFoundError:  # another process was faster
        return False
    return all(entry.is_file() and _FILES.fullmatch(entry.name) for entry in entries)


def _move_away(directory: Path, days: int) -> Path | None:
    """Move a store aside under its locks; None while somebody uses it or where it was used meanwhile."""
    has_time = (directory / _IN_USE).exists()
    with ExitStack() as files:
        try:
            for name in ("lock", _IN_USE):  # earlier versions know only the first one
                file = files.enter_context((directory / name).open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if has_time and not _is_old(directory, days):
                return None
            return directory.rename(directory.with_name(f"{directory.name}.{os.getpid()}.removed"))
        except OSError:
            return None
