"""Writing that survives a crash, and one clear line where writing fails. Free of torch.

A file that was written is not on the disk yet, and a name that was given is not either: both need an fsync, the name
one on its directory. Everything here pays for it, because what is written with these functions is read after a crash.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import IO

from nemo_automodel.components.checkpoint.layout import temporary_path
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.system_errors import system_error

_GIB = 2**30
_LOCK_FILE = ".lock"
_FULL_BELOW_NUM_BYTES = 2**20
"""A disk with less free space than this counts as full when a writer fails without saying why."""

logger = logging.getLogger(__name__)

_held: dict[Path, IO[bytes]] = {}


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` to a new file and to the disk; missing parent directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, never a part."""
    temporary = temporary_path(path.parent)
    write_file(temporary, data)
    temporary.replace(path)
    sync_path(path.parent)


def read_name(path: Path) -> str:
    """Return the name that a small text file holds; from a damaged file comes one that nothing has."""
    return path.read_bytes().decode(errors="replace").replace("\0", "\ufffd").strip()


def sync_path(path: Path) -> None:
    """Bring a file's contents, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a directory; its names are then as safe as they get there
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EOPNOTSUPP)):
            raise
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Bring a directory and everything in it to the disk."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_path(Path(directory, name))
        sync_path(Path(directory))


def check_writable(directory: Path, num_bytes_needed: int = 0) -> None:
    """Make ``directory`` and prove that it takes files and has room, before anything is trained.

    Raises:
        UserError: a file stands in the way, permission is missing, or fewer than ``num_bytes_needed`` bytes are free.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(directory)
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"`{directory}` cannot hold checkpoints: a file has this name, or the name of a directory above it. "
            "Move the file or set --checkpoint.checkpoint_dir to another place."
        ) from None
    except OSError as error:
        raise UserError(f"{_reason(error, directory)} {_remedy(error)}") from error
    if shutil.disk_usage(directory).free < num_bytes_needed:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise UserError(
            f"A checkpoint needs about {_size(num_bytes_needed)}. {_reason(full, directory)} {_remedy(full)}"
        )


def warn_if_crowded(directory: Path, num_bytes_each: int, num_checkpoints: int) -> None:
    """Say so when ``num_checkpoints`` of that size, at least two, will not fit; the first one is known to."""
    room = shutil.disk_usage(directory).free // max(num_bytes_each, 1)
    if room < num_checkpoints:
        logger.warning(
            "This run will hold up to %d checkpoints of about %s, but the disk of `%s` has room for %d. A save "
            "without room is skipped. Free some space or set --checkpoint.max_recent_checkpoints %d.",
            *(num_checkpoints, _size(num_bytes_each), directory, room, max(1, room - 2)),
        )


def explain_write_failure(directory: Path, error: BaseException) -> str | None:
    """Return one line that says why writing into ``directory`` failed, or None when the disk is not the cause.

    Writers wrap the system's error: as a cause or context, in a dictionary of ranks, or only in words.
    """
    found = system_error(error)
    if found is None and shutil.disk_usage(directory).free < _FULL_BELOW_NUM_BYTES:
        found = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None if found is None else f"{_reason(found, directory)} {_remedy(found)}"


def _reason(error: OSError, directory: Path) -> str:
    number = error.errno
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(directory).free if directory.exists() else 0
        what = "has no room" if number == errno.ENOSPC else "takes no more files of yours (quota)"
        if number == errno.ENOSPC and _has_no_inode(directory):
            what = "has no room for another file, however small (its inodes are used up)"
        return f"The disk of `{directory}` {what}: {_size(free)} free."
    if number in (errno.EACCES, errno.EPERM):
        return f"`{directory}` cannot be written: no permission."
    if number == errno.EROFS:
        return f"`{directory}` cannot be written: the file system is read-only."
    what = f" (`{error.filename}`)" if error.filename else ""
    return f"`{directory}` cannot be written: {error.strerror}{what}."


def _has_no_inode(directory: Path) -> bool:
    if not directory.exists():
        return False
    counts = os.statvfs(directory)
    return counts.f_files > 0 and counts.f_favail == 0  # file systems without a limit say 0 of 0


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB / 100 else f"{num_bytes / 2**20:.2f} MiB"


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            "Free some space, keep fewer checkpoints (--checkpoint.max_recent_checkpoints 2), or set "
            "--checkpoint.checkpoint_dir to another disk."
        )
    return "Mend it or set --checkpoint.checkpoint_dir to another place."


def hold(directory: Path) -> bool:
    """Keep ``directory`` for this process, so that two runs never write into one; False when another process has it.

    The lock belongs to the process and goes with it, however it dies. A file system without locks goes without.
    """
    key = directory.resolve()
    if key in _held:
        return True
    file = (directory / _LOCK_FILE).open("wb")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    _held[key] = file
    return True
