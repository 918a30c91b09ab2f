"""Which directory a run writes into, and whether it starts, goes on, or is done. Free of torch.

Several runs may be started with the same ``checkpoint.checkpoint_dir``, knowingly or because nobody set one. The rule
is that no run ever writes among another one's files, and that whatever would fail at the first save fails here instead,
before a model is loaded:

=====================================  =====================================  =====================================
in the directory                       ``checkpoint_dir`` not set             ``checkpoint_dir`` set by the user
=====================================  =====================================  =====================================
nothing of a run                       start there                            start there
this run, unfinished                   go on                                  go on
this run, finished                     say so                                 say so
another run                            a sub-directory with the run's name    refuse, with the ways out
=====================================  =====================================  =====================================

A run that left neither a checkpoint nor a log line is no run. ``checkpoint.restore_from`` is the user's word that the
named run goes on, whatever differs; the differences are said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_automodel.components.checkpoint.disk import check_writable, explain_write_failure, hold, replace_file
from nemo_automodel.components.checkpoint.identity import describe, differences, run_identity, run_name
from nemo_automodel.components.checkpoint.layout import (
    CONFIG_FILE,
    PROGRESS_FILE,
    RUN_CONFIG_FILE,
    complete_checkpoints,
    step_of,
)
from nemo_automodel.components.checkpoint.pointers import POINTERS, check_pointer_places
from nemo_automodel.components.checkpoint.publish import pointer_directories, recover
from nemo_automodel.components.checkpoint.restore import find_restore, newest_checkpoint
from nemo_automodel.shared.errors import UserError

_DEFAULT_NUM_EPOCHS = 10
"""What ``step_scheduler.num_epochs`` means when it is not there."""
_NUM_VALUES_TO_PASTE = 3


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run."""

    path: Path
    """Checkpoints, ``training.jsonl`` and ``validation.jsonl`` of the run belong here."""
    resume_from: Path | None
    """The checkpoint to load, None for a fresh start."""
    message: str
    """One line for the user: what was decided and why."""
    finished: bool = False
    """Nothing is left to train; ``message`` names the ways to go on."""


def choose_run_directory(checkpoint_dir: str | Path, is_default: bool, effective: Mapping[str, Any]) -> RunDirectory:
    """Decide where a run writes and what it goes on from, and make that directory ready.

    The directory is made, held for this process, and cleaned of what an interrupted save left behind; pointers that
    such a save did not move are moved. Nothing of another run is touched.

    Args:
        checkpoint_dir: ``checkpoint.checkpoint_dir``.
        is_default: whether the user left ``checkpoint_dir`` unset, so that sharing it is no decision of theirs.
        effective: the effective configuration, as it is saved in ``config.yaml``.

    Raises:
        UserError: another run is in a directory that the user named; a name the run will write is taken; the directory
            cannot be written or is in use; ``checkpoint.restore_from`` names no complete checkpoint.
    """
    try:
        return _choose(Path(checkpoint_dir), is_default, effective)
    except OSError as error:
        raise UserError(explain_write_failure(Path(checkpoint_dir), error) or str(error)) from error


def _choose(root: Path, is_default: bool, effective: Mapping[str, Any]) -> RunDirectory:
    check_writable(root)
    identity = run_identity(effective)
    settings = effective.get("checkpoint") or {}
    restore_from = settings.get("restore_from")
    if restore_from is not None:
        restore_from = str(restore_from)  # a directory may be named 12
    source = find_restore(root, root, restore_from) if restore_from else None
    path, note = _owner_of(source, root, identity) or _pick(root, is_default, identity)
    check_writable(path)
    if not hold(path):
        raise UserError(
            f"`{path}` is in use by another process. Wait for its end, or save elsewhere with "
            f"--checkpoint.checkpoint_dir {_free_name(root, 'again')}"
        )
    pointer_dirs = pointer_directories(path, root)
    for directory in pointer_dirs:
        check_pointer_places(directory)
    recover(path, pointer_dirs, settings.get("best_metric_key") or "default")

    # the pointers may have moved just now
    source = find_restore(root, root, restore_from) if source else None
    resume_from = source or newest_checkpoint(path)
    if resume_from is not None and _is_finished(resume_from, effective):
        return RunDirectory(path, resume_from, _finished_message(resume_from, root, effective), finished=True)
    _check_names(path, root, resume_from, restore_from)
    if not complete_checkpoints(path) and _identity_of(path) != identity:
        replace_file(path / RUN_CONFIG_FILE, yaml.safe_dump(dict(effective), sort_keys=False).encode())
    if resume_from is not None:
        start = f"Going on from `{resume_from}`."
    else:
        start = f"A fresh run: checkpoints go to `{path}`."
    return RunDirectory(path, resume_from, f"{start} {note}".rstrip())


def _owner_of(source: Path | None, root: Path, identity: Mapping[str, Any]) -> tuple[Path, str] | None:
    """Return the run directory below ``root`` that ``source`` lies in, None when it comes from elsewhere."""
    if source is None:
        return None
    parent = source.resolve().parent
    if parent == root.resolve():
        path = root
    elif parent.parent == root.resolve():
        path = root / parent.name
    else:
        return None
    found = differences(_identity_of(path) or {}, identity)
    return path, f"It was saved with other values: {describe(found)}; the new ones count." if found else ""


def _pick(root: Path, is_default: bool, identity: Mapping[str, Any]) -> tuple[Path, str]:
    below = root / run_name(identity)
    if _identity_of(root) == identity and _holds_a_run(root):
        return root, ""
    if is_default and _holds_a_run(below):
        return below, ""
    # a run that has only just started left nothing yet, but its process holds the directory
    if not _holds_a_run(root) and (not is_default or _identity_of(root) == identity or hold(root)):
        return root, ""
    found = differences(_identity_of(root) or {}, identity)
    if not is_default:
        raise UserError(_refusal(root, below.name, found))
    return below, (
        f"`{root}` holds another run, which stays as it is ({_what_differs(root, found)}); "
        f"{' and '.join(POINTERS)} in `{root}` will follow this one."
    )


def _holds_a_run(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    logs = [*directory.glob("training.jsonl"), *directory.glob("validation*.jsonl")]
    return bool(complete_checkpoints(directory)) or any(log.stat().st_size for log in logs)


def _identity_of(run_dir: Path) -> dict[str, Any] | None:
    """Return the identity of the run in a directory, None when no configuration of it can be read."""
    newest = newest_checkpoint(run_dir)
    effective = _read_yaml(newest / CONFIG_FILE if newest else run_dir / RUN_CONFIG_FILE)
    return run_identity(effective) if effective else None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _what_differs(root: Path, found: list[tuple[str, Any, Any]]) -> str:
    return f"it differs in {describe(found)}" if _identity_of(root) else "its configuration is unknown"


def _refusal(root: Path, name: str, found: list[tuple[str, Any, Any]]) -> str:
    remedies = [f"save elsewhere with --checkpoint.checkpoint_dir {_free_name(root, name)}"]
    can_go_back = _identity_of(root) is not None and len(found) <= _NUM_VALUES_TO_PASTE
    if can_go_back and all(old != "absent" and new != "absent" for _, old, new in found):
        remedies.append("go on with its values: " + " ".join(f"--{key} {old}" for key, old, _ in found))
    newest = newest_checkpoint(root)
    if newest is not None:
        remedies.append(f"let that run go on with the new values: --checkpoint.restore_from {newest.name}")
    return (
        f"`checkpoint.checkpoint_dir: {root}` holds another run ({_what_differs(root, found)}), and two runs are never "
        f"mixed. Either {'; or '.join(remedies)}"
    )


def _free_name(root: Path, suffix: str) -> Path:
    names = [root.with_name(f"{root.name}-{suffix}{'' if n == 1 else f'-{n}'}") for n in range(1, 100)]
    return next(name for name in names if not name.exists())


def _check_names(run_dir: Path, root: Path, resume_from: Path | None, restore_from: str | None) -> None:
    """Refuse to start where a checkpoint that the run will write has its name taken."""
    last_step = -1 if resume_from is None else step_of(resume_from)
    assert last_step is not None or restore_from is not None  # an automatic choice carries a checkpoint's name
    taken = [(step, path) for path in run_dir.iterdir() if (step := step_of(path)) is not None]
    taken = sorted(item for item in taken if last_step is None or item[0] > last_step)
    if not taken:
        return
    first = taken[0][1]
    start = "from the start" if resume_from is None else f"after `{resume_from}`"
    complete = complete_checkpoints(run_dir)
    remedies = [
        f"move it away (mv {first} {first}-old)",
        f"save elsewhere with --checkpoint.checkpoint_dir {_free_name(root, 'again')}",
    ]
    if complete and complete[-1] != resume_from:
        remedies.append(f"go on from the newest with --checkpoint.restore_from {complete[-1].name}")
    raise UserError(
        f"The run goes on {start}, but `{first}` is there and a checkpoint is never overwritten. Either "
        f"{'; or '.join(remedies)}"
    )


def _is_finished(checkpoint: Path, effective: Mapping[str, Any]) -> bool:
    """Tell whether ``effective`` asks for no step beyond ``checkpoint``.

    A run bounded by epochs ends at a step that only the finished run knew; it left a note of it.
    """
    step = step_of(checkpoint)
    if step is None:
        return False
    max_steps, num_epochs = _length(effective)
    if max_steps is not None and step + 1 >= max_steps:
        return True
    if not _was_last_step(checkpoint):
        return False
    old_max_steps, old_num_epochs = _length(_read_yaml(checkpoint / CONFIG_FILE))
    ended_by_epochs = old_max_steps is None or step + 1 < old_max_steps
    if not ended_by_epochs or old_num_epochs is None or num_epochs is None:
        return False
    return num_epochs <= old_num_epochs


def _length(effective: Mapping[str, Any]) -> tuple[int | None, int | None]:
    schedule = effective.get("step_scheduler") or {}
    return schedule.get("max_steps"), schedule.get("num_epochs", _DEFAULT_NUM_EPOCHS)


def _was_last_step(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / PROGRESS_FILE).read_text())["is_last_step"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False  # another program's checkpoint, which has no such file


def _finished_message(checkpoint: Path, root: Path, effective: Mapping[str, Any]) -> str:
    max_steps, num_epochs = _length(effective)
    step = step_of(checkpoint)
    assert step is not None
    if max_steps is not None and step + 1 >= max_steps:
        bound, longer = f"`step_scheduler.max_steps` is {max_steps}", f"--step_scheduler.max_steps {2 * (step + 1)}"
    else:
        bound = f"`step_scheduler.num_epochs` is {num_epochs}"
        longer = f"--step_scheduler.num_epochs {(num_epochs or 0) + 1}"
    return (
        f"This run is finished: `{checkpoint}` was its last step ({step + 1} done, {bound}). Train longer with "
        f"{longer}, or start anew with --checkpoint.checkpoint_dir {_free_name(root, 'again')}"
    )
