"""Saving and loading a whole run.

A save happens beside the checkpoints: everything is written into a staging directory with a manifest of checksums,
brought to the disk, and renamed in one step; then the pointers move. Whatever goes wrong before the rename leaves the
last good checkpoint and the pointers as they were. A load checks what it can before it changes anything, and writes
nothing.

With ``is_async`` all of that happens in one thread beside training. The copies it writes from are made before the next
update (``wait_for_staging``, which the loop calls), and at most one save is under way: the next one waits for it. Its
failure is told by the next save, and by ``finish`` at the end.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from nemo_automodel.components.checkpoint import dcp
from nemo_automodel.components.checkpoint.changes import changes_since
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.checkpoint.disk import explain_write_failure, sync_tree, write_file
from nemo_automodel.components.checkpoint.layout import (
    DATALOADER_FILE,
    INCOMPLETE_MARKER,
    LOSS_GUARD_FILE,
    LOSSES_FILE,
    MODEL_DIR,
    OPTIM_DIR,
    PROGRESS_FILE,
    RNG_FILE,
    SCHEDULE_FILE,
    checkpoint_name,
    dataloader_file,
    num_ranks,
    rng_file,
    staging_path,
)
from nemo_automodel.components.checkpoint.manifest import verify, write_manifest
from nemo_automodel.components.checkpoint.model_dcp import has_model, read_model, write_model
from nemo_automodel.components.checkpoint.optimizer_state import OPTIM_KEY, OptimizerRestore
from nemo_automodel.components.checkpoint.parts import SCHED_KEY, Parts, Snapshot, take_snapshot
from nemo_automodel.components.checkpoint.publish import keep_recent, pointer_directories, publish
from nemo_automodel.components.checkpoint.restore import find_restore
from nemo_automodel.components.checkpoint.state import guarded, hand_over, read_rng_state, read_state
from nemo_automodel.shared.errors import UserError

_ADAM_NUM_STATES = 2

logger = logging.getLogger(__name__)


class SaveError(UserError):
    """A checkpoint could not be written; what was there before is untouched."""


class Checkpointer:
    """Saves and loads checkpoints of the run that owns ``run_dir``.

    Args:
        config: the ``checkpoint:`` section.
        run_dir: what ``choose_run_directory`` decided on; below ``config.checkpoint_dir`` for a later run in a shared
            directory, whose pointers then follow this run too.
    """

    def __init__(self, config: CheckpointingConfig, run_dir: str | Path) -> None:
        self.config = config
        self.run_dir = Path(run_dir)
        self.checkpoint_dir = Path(config.checkpoint_dir)
        self._pointer_dirs = pointer_directories(self.run_dir, self.checkpoint_dir)
        self._background: _Background | None = None

    def find_restore(self) -> Path | None:
        """Return the checkpoint that the run goes on from, or None for a fresh start.

        Raises:
            UserError: ``checkpoint.restore_from`` names no complete checkpoint.
        """
        return find_restore(self.checkpoint_dir, self.run_dir, self.config.restore_from)

    def save(
        self,
        step_index: int,
        epoch: int,
        parts: Parts,
        losses: Mapping[str, float],
        *,
        is_last_step: bool = False,
    ) -> Path:
        """Write a checkpoint, publish it, and return its directory.

        Args:
            step_index: the step that was just done, counted from 0.
            epoch: the epoch it belongs to.
            parts: the live run.
            losses: ``train_loss`` and one loss a validation set, by name (``val_loss`` for the plain one).
            is_last_step: nothing is left to train, so that a run bounded by epochs is known to be finished.

        In the background (``is_async``) the directory is there once ``finish`` or the next save returns, and the
        failure of the save before is logged.

        Raises:
            SaveError: no space, no permission, the name is taken, or the weights are not finite.
        """
        target = self.run_dir / checkpoint_name(epoch, step_index)
        try:
            self.finish()
        except SaveError as error:
            logger.error("%s This save tries again.", error)
        logger.info("Saving checkpoint to %s", target)
        if target.exists():
            raise SaveError(f"`{target}` is there already, and a checkpoint is never overwritten. Move it away.")
        _refuse_sick_weights(target, parts.model)
        snapshot = take_snapshot(parts)
        snapshot.files[LOSSES_FILE] = _to_json({name: _finite(loss) for name, loss in losses.items()})
        progress = {"step": step_index, "epoch": epoch, "is_last_step": is_last_step}
        snapshot.files[PROGRESS_FILE] = _to_json(progress)
        if not self.config.is_async:
            self._write(target, snapshot)
            return target
        self._background = _Background(snapshot.stage, lambda: self._write(target, snapshot))
        if self.config.wait_for_staging:
            self.wait_for_staging()
        return target

    def wait_for_staging(self) -> None:
        """Return when a save under way does not read the live weights any more; call it before changing them."""
        if self._background is not None:
            self._background.staged.wait()

    def finish(self) -> None:
        """Wait for a save under way.

        Raises:
            SaveError: it failed.
        """
        background, self._background = self._background, None
        if background is not None:
            background.result()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for a save under way, unless Ctrl-C asks to stop at once."""
        if kind is None:
            self.finish()
        elif issubclass(kind, Exception):
            try:
                self.finish()
            except SaveError as failure:
                logger.error("%s", failure)

    def _write(self, target: Path, snapshot: Snapshot) -> None:
        staged = staging_path(target)
        try:
            _write_files(staged, snapshot, self.config)
            sync_tree(staged)
            publish(staged, target, self._pointer_dirs, self.config.best_metric_key)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = explain_write_failure(self.run_dir, error)
            if reason is None:
                raise
            outcome = "was saved, but the pointers did not move" if target.exists() else "was not saved"
            raise SaveError(f"The checkpoint `{target}` {outcome}; earlier ones are untouched. {reason}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # what is left of a save that failed
        self._keep_recent()

    def load(self, path: Path, parts: Parts) -> None:
        """Bring the run back to where ``path`` was saved: data position, random numbers and everything else.

        Raises:
            UserError: a file is missing or damaged, holds objects that loading would have to run, or does not fit the
                run; nothing on the disk has changed.
        """
        self.finish()
        logger.info("Loading checkpoint from %s", path)
        verify(path)
        schedule = read_state(path / SCHEDULE_FILE)
        # after a change of the number of processes every one takes the first one's place: it counts the rows of all
        data_file, random_file = self._files_of(path, parts)
        data_position = read_state(path / data_file)
        random_state = self._random_state(path, random_file)
        nested = _load_weights(path, parts)
        if parts.lr_scheduler is not None:
            if SCHED_KEY not in nested:
                raise UserError(
                    f"`{path / OPTIM_DIR}` has no state of an `lr_scheduler`: the run was saved with a constant "
                    "learning rate. Remove `lr_scheduler`, or start a new run."
                )
            hand_over(path / OPTIM_DIR, parts.lr_scheduler, nested[SCHED_KEY])
        hand_over(path / SCHEDULE_FILE, parts.schedule, schedule)
        hand_over(path / data_file, parts.train_loader, data_position)
        if parts.loss_guard is not None and (path / LOSS_GUARD_FILE).is_file():
            remembered = guarded(path / LOSS_GUARD_FILE, lambda: json.loads((path / LOSS_GUARD_FILE).read_text()))
            hand_over(path / LOSS_GUARD_FILE, parts.loss_guard, remembered)
        if random_file is not None:  # last: everything above may draw random numbers
            hand_over(path / random_file, parts.rng, random_state)

    @staticmethod
    def _files_of(path: Path, parts: Parts) -> tuple[str, str | None]:
        """Return the names of this process's place in the data and of its random numbers, None: begin anew."""
        saved_by = num_ranks(path)
        if saved_by == parts.num_ranks:
            return dataloader_file(parts.rank), rng_file(parts.rank)
        return DATALOADER_FILE, rng_file(parts.rank) if parts.rank < saved_by else None

    def _random_state(self, path: Path, name: str | None) -> dict[str, Any]:
        if name is None:
            return {}
        if name == RNG_FILE:
            return read_rng_state(path, self.config.allow_legacy_pickle_restore)
        state: dict[str, Any] = read_state(path / name)
        return state

    def load_weights(self, path: Path, parts: Parts) -> None:
        """Take weights and optimizer back to ``path`` and leave everything else where it is.

        Raises:
            UserError: as ``load``.
        """
        self.finish()
        verify(path)
        _load_weights(path, parts)

    def _keep_recent(self) -> None:
        if self.config.max_recent_checkpoints is None:
            return
        try:
            keep_recent(
                self.run_dir, self.config.max_recent_checkpoints, self._pointer_dirs, self.config.best_metric_key
            )
        except OSError as error:
            logger.warning("An old checkpoint could not be deleted and stays: %s", error)


def estimate_num_bytes(model: nn.Module, saves_whole_model: bool) -> int:
    """Return about how many bytes a checkpoint takes: weights, and two optimizer states for each trained one."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return (whole if saves_whole_model else trained) + _ADAM_NUM_STATES * trained


def _load_weights(path: Path, parts: Parts) -> dict[str, Any]:
    """Load optimizer and model, and return what else the optimizer's archive holds."""
    archive = dcp.Archive(path / OPTIM_DIR)
    restore = OptimizerRestore(archive, parts.model, parts.optimizer, parts.is_share)
    nested = archive.read(restore.prepare(), restore.skips)
    restore.apply(nested[OPTIM_KEY], _changed_settings(path, parts.config_yaml))
    if has_model(path):
        read_model(path, parts.model_files.weights())
    else:
        parts.model_files.read(path / MODEL_DIR)
    return nested


def _refuse_sick_weights(target: Path, model: nn.Module) -> None:
    """Leave weights that went bad in the update just done out of every checkpoint.

    Saved, they would be what a resume and a rollback go back to, and in time push out the last good checkpoint. The
    price is one read of the trained weights.

    Raises:
        SaveError: a trained weight is infinite or not a number.
    """
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    if not trained:
        return
    # of the smallest and the largest number one is not finite where any is
    ends = [torch.stack(torch.aminmax(weight)).isfinite().all() for _, weight in trained]
    if bool(torch.stack(ends).all()):
        return
    sick = [name for (name, _), is_finite in zip(trained, ends, strict=True) if not is_finite]
    raise SaveError(
        f"The checkpoint `{target}` was not saved: `{sick[0]}` is not finite ({len(sick)} of {len(trained)} trained "
        "weights are sick), so nothing could go on from it; earlier ones are untouched. Go on from one of them with a "
        "lower `optimizer.lr` or a longer warm-up."
    )


class _Background:
    """One save beside training: ``stage`` copies, then ``write`` writes."""

    def __init__(self, stage: Callable[[], None], write: Callable[[], None]) -> None:
        self.staged = threading.Event()
        self._stage, self._write = stage, write
        self._failure: BaseException | None = None
        # a daemon, so that a second Ctrl-C does not wait for it; what it leaves is removed at the next start
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._stage()
            self.staged.set()
            self._write()
        except BaseException as error:  # handed to the thread that trains
            self._failure = error
        finally:
            self.staged.set()

    def result(self) -> None:
        self._thread.join()
        if self._failure is not None:
            raise self._failure


def _write_files(staged: Path, snapshot: Snapshot, config: CheckpointingConfig) -> None:
    write_file(staged / INCOMPLETE_MARKER, b"")
    (staged / MODEL_DIR).mkdir()
    if config.model_save_format == "torch_save":
        snapshot.model_files.write_from(staged / MODEL_DIR, None)
        write_model(staged, snapshot.weights)
    else:
        snapshot.model_files.write_from(staged / MODEL_DIR, snapshot.weights)
    snapshot.write_state(staged / OPTIM_DIR, snapshot.state)
    for name, content in snapshot.files.items():
        write_file(staged / name, content)
    write_manifest(staged)


def _changed_settings(checkpoint: Path, config_yaml: Mapping[str, Any]) -> set[str]:
    """Return the keys of the ``optimizer`` section that the user changed since the checkpoint was saved."""
    found = changes_since(checkpoint, config_yaml)
    return {key.split(".")[1] for key, _, _ in found if key.startswith("optimizer.")}


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
