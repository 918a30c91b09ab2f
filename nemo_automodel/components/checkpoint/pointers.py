"""``LATEST`` and ``LOWEST_VAL``: links to checkpoints that move in one step. Free of torch.

A pointer is a relative symbolic link, so that a directory can be moved or copied as a whole. Where the file system has
no links it is a text file, ``LATEST.txt``, with the same path in it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from nemo_automodel.components.checkpoint.disk import read_name, replace_file, sync_path
from nemo_automodel.components.checkpoint.layout import temporary_path
from nemo_automodel.shared.errors import UserError

LATEST = "LATEST"
LOWEST_VAL = "LOWEST_VAL"
POINTERS = (LATEST, LOWEST_VAL)

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without symbolic links answer."""


def read_pointer(directory: Path, name: str) -> Path | None:
    """Return where a pointer points, whether or not something is there; None when there is no pointer."""
    link, text = directory / name, directory / f"{name}.txt"
    if link.is_symlink():
        return Path(os.path.normpath(directory / os.readlink(link)))
    if text.is_file():
        return Path(os.path.normpath(directory / read_name(text)))
    return None


def move_pointer(directory: Path, name: str, target: Path) -> None:
    """Let a pointer of ``directory`` name ``target``; a reader sees the old target or the new one."""
    link, text = directory / name, directory / f"{name}.txt"
    destination = os.path.relpath(target, directory)
    temporary = temporary_path(directory)
    try:
        temporary.symlink_to(destination)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        replace_file(text, destination.encode())
        link.unlink(missing_ok=True)
    else:
        temporary.replace(link)
        text.unlink(missing_ok=True)
    sync_path(directory)


def remove_pointer(directory: Path, name: str) -> None:
    """Remove a pointer where there is one."""
    (directory / name).unlink(missing_ok=True)
    (directory / f"{name}.txt").unlink(missing_ok=True)


def check_pointer_places(directory: Path) -> None:
    """Refuse a directory in which something that is no link has a pointer's name.

    Raises:
        UserError: for example a directory ``LATEST``, which a copy that followed links leaves behind.
    """
    for name in POINTERS:
        path = directory / name
        if path.exists() and not path.is_symlink():
            kind = "directory" if path.is_dir() else "file"
            raise UserError(
                f"`{path}` is a {kind}, but the run needs this name for a link to a checkpoint. "
                f"Rename it: mv {path} {path}-copy"
            )
