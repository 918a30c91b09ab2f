"""Which checkpoint a run goes on from. Free of torch.

Without ``checkpoint.restore_from`` a run looks only into its own directory. With it the user's word counts: a pointer
of the checkpoint directory, a directory name below it, or a path anywhere.
"""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_automodel.components.checkpoint.layout import complete_checkpoints, missing_parts
from nemo_automodel.components.checkpoint.pointers import LATEST, POINTERS, read_pointer
from nemo_automodel.shared.errors import UserError

_NUM_LISTED = 10

logger = logging.getLogger(__name__)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return what ``LATEST`` of a run names, else its complete checkpoint with the highest step, else None.

    The pointers of a shared directory follow the run that saved last; one that names another run's checkpoint says
    nothing about this run.
    """
    checkpoints = complete_checkpoints(run_dir)
    target = read_pointer(run_dir, LATEST)
    if target is not None and target.parent.resolve() == run_dir.resolve():
        if run_dir / target.name in checkpoints:
            return run_dir / target.name
        logger.warning("%s names %s, which is not a complete checkpoint", run_dir / LATEST, target)
    return checkpoints[-1] if checkpoints else None


def find_restore(checkpoint_dir: Path, run_dir: Path, restore_from: str | None) -> Path | None:
    """Return the checkpoint to load, or None for a fresh start.

    Raises:
        UserError: ``restore_from`` names nothing, or something that is not a complete checkpoint. Only ``LATEST`` may
            name nothing: the first start of a run that is always started with it.
    """
    if restore_from is None:
        return newest_checkpoint(run_dir)
    target = _named(checkpoint_dir, run_dir, restore_from)
    if target is None:
        if restore_from == LATEST:
            return newest_checkpoint(run_dir)
        raise UserError(
            f"`checkpoint.restore_from: {restore_from}` is neither a pointer ({', '.join(POINTERS)}) nor a checkpoint "
            f"in `{checkpoint_dir}` nor a path. {_what_is_there(checkpoint_dir)}"
        )
    missing = missing_parts(target)
    if missing:
        inside = [path for path in (newest_checkpoint(target),) if path is not None]
        hint = f"Did you mean `{inside[0]}`?" if inside else _what_is_there(checkpoint_dir)
        raise UserError(
            f"`checkpoint.restore_from: {restore_from}`: `{target}` is not a complete checkpoint; it lacks "
            f"{', '.join(missing)}. {hint}"
        )
    return target


def _named(checkpoint_dir: Path, run_dir: Path, restore_from: str) -> Path | None:
    if restore_from in POINTERS:
        return read_pointer(checkpoint_dir, restore_from)
    path = Path(restore_from).expanduser()
    for candidate in (checkpoint_dir / path, run_dir / path, path):
        pointed = read_pointer(candidate.parent, candidate.name) if candidate.name in POINTERS else None
        if pointed is not None:
            return pointed
        if candidate.exists():
            return candidate
    return None


def _what_is_there(checkpoint_dir: Path) -> str:
    names = [path.name for path in complete_checkpoints(checkpoint_dir)]
    if not names:
        return f"`{checkpoint_dir}` holds no complete checkpoint."
    return f"Complete checkpoints in `{checkpoint_dir}`: {', '.join(names[-_NUM_LISTED:])}."
