"""How a written checkpoint becomes the newest one. Free of torch.

Publishing takes several steps: the directory gets its name, then the pointers move. A note, `.publishing`, is on the
disk before the first of them and gone after the last, so that the next run can finish what a crash cut short: when the
named directory is there it is complete, and only pointers are missing; when it is not, nothing has happened yet.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_automodel.components.checkpoint.disk import read_name, replace_file, sync_path
from nemo_automodel.components.checkpoint.layout import (
    INCOMPLETE_MARKER,
    LOSSES_FILE,
    complete_checkpoints,
    delete_checkpoint,
    missing_parts,
    remove_leftovers,
)
from nemo_automodel.components.checkpoint.pointers import (
    LATEST,
    LOWEST_VAL,
    POINTERS,
    move_pointer,
    read_pointer,
    remove_pointer,
)

_NOTE = ".publishing"
_TRAIN_LOSS = "train_loss"
_DEFAULT_METRIC_KEYS = ("default", "val_loss")

logger = logging.getLogger(__name__)


def pointer_directories(run_dir: Path, checkpoint_dir: Path) -> list[Path]:
    """Return the directories whose pointers follow the run: its own and, for a later run, the shared one above it."""
    is_below = run_dir.resolve().parent == checkpoint_dir.resolve()
    return [run_dir, checkpoint_dir] if is_below else [run_dir]


def publish(staged: Path, target: Path, pointer_dirs: Sequence[Path], best_metric_key: str) -> None:
    """Give a checkpoint that is wholly on the disk its name, and move the pointers to it."""
    run_dir = target.parent
    replace_file(run_dir / _NOTE, target.name.encode())
    (staged / INCOMPLETE_MARKER).unlink()
    sync_path(staged)
    staged.rename(target)
    sync_path(run_dir)
    _move_pointers(target, pointer_dirs, best_metric_key)
    (run_dir / _NOTE).unlink()


def recover(run_dir: Path, pointer_dirs: Sequence[Path], best_metric_key: str) -> None:
    """Bring a directory to the state after the last whole save: leftovers go, unfinished pointer moves are finished."""
    note = run_dir / _NOTE
    if note.is_file():
        target = run_dir / read_name(note)
        if target.parent == run_dir and not missing_parts(target):
            logger.info("%s was published, but the pointers did not move before the run ended. Moving them", target)
            _move_pointers(target, pointer_dirs, best_metric_key)
        note.unlink()
    remove_leftovers(run_dir)


def keep_recent(run_dir: Path, num_kept: int, pointer_dirs: Sequence[Path], best_metric_key: str) -> None:
    """Delete all but the newest checkpoints, the best one, and those that a pointer names."""
    checkpoints = complete_checkpoints(run_dir)
    targets = [read_pointer(directory, name) for directory in pointer_dirs for name in POINTERS]
    kept = {
        path.resolve()
        for path in [*targets, *checkpoints[-num_kept:], best_checkpoint(run_dir, best_metric_key)]
        if path
    }
    for path in checkpoints:
        if path.resolve() not in kept:
            delete_checkpoint(path)


def best_checkpoint(run_dir: Path, best_metric_key: str) -> Path | None:
    """Return the complete checkpoint with the lowest validation loss, or None when none has one."""
    scored = [
        (loss, path) for path in complete_checkpoints(run_dir) if (loss := _loss(path, best_metric_key)) is not None
    ]
    return min(scored, key=lambda item: item[0])[1] if scored else None


def validation_loss(losses: Mapping[str, float | None], best_metric_key: str) -> float | None:
    """Return the loss that decides ``LOWEST_VAL``: the set named by ``best_metric_key``, or the only one there is.

    ``default`` and ``val_loss`` are two names of the plain validation set. A loss that is not finite is no candidate.
    """
    names = [name for name in losses if name != _TRAIN_LOSS]
    if best_metric_key in _DEFAULT_METRIC_KEYS:
        wanted = [name for name in names if name in _DEFAULT_METRIC_KEYS] or (names if len(names) == 1 else [])
    else:
        wanted = [name for name in names if name == best_metric_key]
    value = losses[wanted[0]] if wanted else None
    return value if value is not None and math.isfinite(value) else None


def _loss(path: Path, best_metric_key: str) -> float | None:
    try:
        return validation_loss(json.loads((path / LOSSES_FILE).read_text()), best_metric_key)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        logger.warning("%s cannot be read; the checkpoint is no candidate for %s", path / LOSSES_FILE, LOWEST_VAL)
        return None


def _move_pointers(latest: Path, pointer_dirs: Sequence[Path], best_metric_key: str) -> None:
    best = best_checkpoint(latest.parent, best_metric_key)
    for directory in pointer_dirs:
        move_pointer(directory, LATEST, latest)
        if best is not None:
            move_pointer(directory, LOWEST_VAL, best)
        else:
            # pointers speak of one run; the best of another one would be taken for this one's
            remove_pointer(directory, LOWEST_VAL)
