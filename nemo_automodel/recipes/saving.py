"""A save of all processes of a run, and whether there is room for it.

``Checkpointer`` writes for one process. Where there are several, the first one writes: it gets from each of the others
what that one has for itself, the position in its data and its random numbers. Where the optimizer is shared out
nobody has its whole state, so all write their shares at the same time, into one archive.

The price is that everybody waits until the first one is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_automodel.components.checkpoint import dcp
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer, SaveError
from nemo_automodel.components.checkpoint.disk import check_writable, warn_if_crowded
from nemo_automodel.components.checkpoint.optimizer_state import OPTIM_KEY, optimizer_entries
from nemo_automodel.components.checkpoint.parts import Parts, files_of_rank
from nemo_automodel.components.checkpoint.witness import Witness
from nemo_automodel.components.distributed.ranks import Ranks
from nemo_automodel.components.training.step_scheduler import Step, StepScheduler
from nemo_automodel.recipes.settings import RunSettings

logger = logging.getLogger(__name__)


class JointState:
    """The state of an optimizer that is shared out, written by all processes into one archive, a file each.

    The first process meets the others in the middle of its save, when it has made the directory. Whatever becomes of
    that save, it calls ``end``, so that nobody waits for a meeting that never comes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._have_met = ranks, False

    def write(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Write, in the first process, with the others."""
        self._have_met = True
        self._ranks.share(directory)
        self._write(directory, state)

    def end(self) -> None:
        """Let the others go on where the first process's save failed before it met them."""
        if not self._have_met:
            self._ranks.share(None)

    def join(self, state: Mapping[str, Any]) -> None:
        """Write, in another process, with the first one, which says so where it fails."""
        directory = self._ranks.share()
        if directory is None:
            return
        try:
            self._write(directory, state)
        except dcp.WriteError:
            return

    def _write(self, directory: Path, state: Mapping[str, Any]) -> None:
        with self._ranks.in_company("saving", is_patient=True):
            dcp.write(directory, state, self._ranks.patient_group)


def check_room(run_dir: Path, num_bytes: int, settings: RunSettings, schedule: StepScheduler) -> None:
    """Refuse a disk that cannot take a checkpoint of ``num_bytes``; warn where it cannot take all that will come.

    Raises:
        UserError: there is no room, or the directory cannot be written.
    """
    check_writable(run_dir, num_bytes)
    warn_if_crowded(run_dir, num_bytes, _most_checkpoints(settings, schedule))


def _most_checkpoints(settings: RunSettings, schedule: StepScheduler) -> int:
    """Return how many checkpoints will be there at once, as far as that is known; at least 1."""
    num_steps, every = schedule.most_steps, settings.step_scheduler.ckpt_every_steps
    num_saves = 1 if num_steps is None or every is None else -(-(num_steps - schedule.step) // every)
    kept = settings.checkpoint.max_recent_checkpoints
    # the best one is kept beside the newest, and a new one is whole before an old one goes
    return max(1, num_saves if kept is None else min(num_saves, kept + 2))


def save_together(
    checkpointer: Checkpointer,
    ranks: Ranks,
    step: Step,
    losses: Mapping[str, float],
    parts: Parts,
    make_witness: Callable[[], Witness | None],
) -> None:
    """Save the run after ``step``; every process calls it, and all return together.

    ``make_witness`` is asked in the first process alone, for what a resume will compare itself with. A save that fails
    is logged and the run goes on, unless it was the last chance of this session.

    Raises:
        SaveError: it was.
    """
    files = ranks.gather(files_of_rank(parts.rank, parts.train_loader, parts.rng) if ranks.are_several else {})
    joint = JointState(ranks) if parts.is_share else None
    if ranks.is_first:
        parts.witness = make_witness()
        for files_of_other in files[1:]:
            parts.files_of_others |= files_of_other
        _write(checkpointer, step, losses, parts, joint)
    elif joint is not None:
        joint.join({OPTIM_KEY: optimizer_entries(parts.model, parts.optimizer)})
    ranks.wait_for_all()


def _write(
    checkpointer: Checkpointer, step: Step, losses: Mapping[str, float], parts: Parts, joint: JointState | None
) -> None:
    if joint is not None:
        parts.write_state = joint.write
    is_last_chance = step.is_last or step.is_preempted
    try:
        checkpointer.save(step.index, step.epoch, parts, losses, is_last_step=step.is_last)
        if is_last_chance:
            checkpointer.finish()
    except SaveError as error:
        if is_last_chance:
            raise
        logger.error("%s The run goes on, and the next save tries again.", error)
    finally:
        if joint is not None:
            joint.end()
