"""Saving and loading a whole run.

A save happens beside the checkpoints: everything is written into a staging directory, brought to the disk, and renamed
in one step; then the pointers move. Whatever goes wrong before the rename leaves the last good checkpoint and the
pointers as they were. A load checks what it can before it changes anything, and writes nothing.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from nemo_automodel.components.checkpoint import dcp
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.checkpoint.disk import explain_write_failure, sync_tree, write_file
from nemo_automodel.components.checkpoint.identity import differences, run_identity
from nemo_automodel.components.checkpoint.layout import (
    CONFIG_FILE,
    DATALOADER_FILE,
    INCOMPLETE_MARKER,
    LOSSES_FILE,
    MODEL_DIR,
    OPTIM_DIR,
    PROGRESS_FILE,
    RNG_FILE,
    SCHEDULE_FILE,
    checkpoint_name,
    staging_path,
)
from nemo_automodel.components.checkpoint.optimizer_state import OPTIM_KEY, OptimizerRestore, optimizer_entries
from nemo_automodel.components.checkpoint.publish import keep_recent, pointer_directories, publish
from nemo_automodel.components.checkpoint.restore import find_restore
from nemo_automodel.components.checkpoint.state import hand_over, read_rng_state, read_state, to_bytes
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import Stateful

_SCHED_KEY = "sched"
_ADAM_NUM_STATES = 2

logger = logging.getLogger(__name__)


class SaveError(UserError):
    """A checkpoint could not be written; what was there before is untouched."""


class ModelFiles(Protocol):
    """How a model's weights become files: a Hugging Face directory, or adapter files."""

    def write(self, directory: Path) -> None:
        """Write weights, configuration and tokenizer into an empty directory."""

    def read(self, directory: Path) -> None:
        """Read weights that ``write`` wrote into the live model.

        Raises:
            UserError: files are missing or damaged, or the weights do not fit.
        """


@dataclass
class Parts:
    """Everything of a run that a checkpoint holds, by name."""

    model_files: ModelFiles
    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: Stateful | None
    """None: the learning rate is constant."""
    schedule: Stateful
    train_loader: Stateful
    rng: Stateful
    config_yaml: dict[str, Any]
    """The effective configuration, as it reproduces the run."""


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

        Raises:
            SaveError: no space, no permission, or the name is taken.
        """
        target = self.run_dir / checkpoint_name(epoch, step_index)
        logger.info("Saving checkpoint to %s", target)
        if target.exists():
            raise SaveError(f"`{target}` is there already, and a checkpoint is never overwritten. Move it away.")
        staged = staging_path(target)
        try:
            _write(staged, parts)
            write_file(staged / LOSSES_FILE, _to_json({name: _finite(loss) for name, loss in losses.items()}))
            write_file(
                staged / PROGRESS_FILE, _to_json({"step": step_index, "epoch": epoch, "is_last_step": is_last_step})
            )
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
        return target

    def load(self, path: Path, parts: Parts) -> None:
        """Bring the run back to where ``path`` was saved: data position, random numbers and everything else.

        Raises:
            UserError: a file is missing or damaged, holds objects that loading would have to run, or does not fit the
                run; nothing on the disk has changed.
        """
        logger.info("Loading checkpoint from %s", path)
        schedule = read_state(path / SCHEDULE_FILE)
        data_position = read_state(path / DATALOADER_FILE)
        random_state = read_rng_state(path, self.config.allow_legacy_pickle_restore)
        archive = dcp.Archive(path / OPTIM_DIR)
        restore = OptimizerRestore(archive, parts.model, parts.optimizer)
        nested = archive.read(restore.prepare())
        restore.apply(nested[OPTIM_KEY], _changed_settings(path, parts.config_yaml))
        parts.model_files.read(path / MODEL_DIR)
        if parts.lr_scheduler is not None:
            if _SCHED_KEY not in nested:
                raise UserError(
                    f"`{archive.directory}` has no state of an `lr_scheduler`: the run was saved with a constant "
                    "learning rate. Remove `lr_scheduler`, or start a new run."
                )
            hand_over(archive.directory, parts.lr_scheduler, nested[_SCHED_KEY])
        hand_over(path / SCHEDULE_FILE, parts.schedule, schedule)
        hand_over(path / DATALOADER_FILE, parts.train_loader, data_position)
        hand_over(path / RNG_FILE, parts.rng, random_state)  # last: everything above may draw random numbers

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


def _write(staged: Path, parts: Parts) -> None:
    write_file(staged / INCOMPLETE_MARKER, b"")
    (staged / MODEL_DIR).mkdir()
    parts.model_files.write(staged / MODEL_DIR)
    state: dict[str, Any] = {OPTIM_KEY: optimizer_entries(parts.model, parts.optimizer)}
    if parts.lr_scheduler is not None:
        state[_SCHED_KEY] = parts.lr_scheduler.state_dict()
    dcp.write(staged / OPTIM_DIR, state)
    write_file(staged / DATALOADER_FILE, to_bytes(parts.train_loader.state_dict()))
    write_file(staged / RNG_FILE, to_bytes(parts.rng.state_dict()))
    write_file(staged / SCHEDULE_FILE, to_bytes(parts.schedule.state_dict()))
    write_file(staged / CONFIG_FILE, yaml.safe_dump(parts.config_yaml, sort_keys=False, allow_unicode=True).encode())


def _changed_settings(checkpoint: Path, config_yaml: Mapping[str, Any]) -> set[str]:
    """Return the keys of the ``optimizer`` section that the user changed since the checkpoint was saved."""
    try:
        saved = yaml.safe_load((checkpoint / CONFIG_FILE).read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"`{checkpoint / CONFIG_FILE}` is missing or damaged ({type(error).__name__}). Mend it."
        ) from error
    found = differences(run_identity(saved), run_identity(config_yaml))
    return {key.split(".")[1] for key, _, _ in found if key.startswith("optimizer.")}


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
