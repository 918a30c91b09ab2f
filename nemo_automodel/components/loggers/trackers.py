"""Experiment trackers behind one small protocol; each package is imported only when its section is configured.

A tracker is a copy of the run's record for other people's screens. The record itself is ``training.jsonl``, so a
tracker that fails while training goes on is a warning, but one that cannot start is an error: its user is still at the
keyboard.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import yaml

from nemo_automodel.components.loggers.config import MLflowConfig, TensorBoardConfig, WandbConfig
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.imports import require

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where the numbers of a run are sent."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the numbers of one step."""

    def close(self, succeeded: bool) -> None:
        """Send what is left and end the run as finished or failed."""


class TensorBoardTracker:
    """Writes event files, by default to ``<run directory>/tensorboard``."""

    def __init__(self, settings: TensorBoardConfig, run_dir: Path, config: Mapping[str, Any]) -> None:
        require("tensorboard", "The `tensorboard:` section")
        self._log_dir = settings.log_dir or str(run_dir / "tensorboard")
        self._config = config
        self._writer: Any = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one scalar a metric; the first step logged hides what an interrupted process wrote after it."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._log_dir, purge_step=step)
            config_yaml = yaml.safe_dump(dict(self._config), sort_keys=False)
            self._writer.add_text("config", "\n".join("    " + line for line in config_yaml.splitlines()), step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, succeeded: bool) -> None:
        """Write out the event file."""
        if self._writer is not None:
            self._writer.close()


class WandbTracker:
    """Weights & Biases; ``wandb.mode: offline`` or WANDB_MODE=offline needs no account and no network.

    Raises:
        UserError: wandb refuses to start (no login, no network, a wrong argument).
    """

    def __init__(self, settings: WandbConfig, run_dir: Path, config: Mapping[str, Any], run_name: str) -> None:
        wandb = require("wandb", "The `wandb:` section")
        arguments = {
            "project": settings.project,
            "entity": settings.entity,
            "name": settings.name or run_name,
            "group": settings.group,
            "tags": settings.tags,
            "notes": settings.notes,
            "config": dict(config),
            "dir": str(run_dir),
            **settings.init_kwargs,
        }
        try:
            self._run = wandb.init(**arguments)
        except (wandb.errors.Error, TypeError) as error:
            raise UserError(
                f"wandb does not start: {_first_line(error)} Run `wandb login`, set WANDB_API_KEY, or set "
                "`wandb.mode: offline`."
            ) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand the numbers to wandb's own process, which sends them when it can."""
        self._run.log(dict(metrics), step=step)

    def close(self, succeeded: bool) -> None:
        """End the run; an offline run can be sent later with ``wandb sync``."""
        self._run.finish(exit_code=0 if succeeded else 1)


class MLflowTracker:
    """MLflow, by default in ``sqlite:///<run directory>/mlflow.db``: newer versions refuse the plain file store.

    The run's id is kept in ``<run directory>/mlflow_run_id``, so that a resumed training goes on in the same run.

    Raises:
        UserError: the tracking server or the store refuses.
    """

    _PARAMS_A_CALL = 100
    _PARAM_CHARACTERS = 500

    def __init__(self, settings: MLflowConfig, run_dir: Path, config: Mapping[str, Any], run_name: str) -> None:
        self._mlflow: ModuleType = require("mlflow", "The `mlflow:` section")
        self._is_broken = False
        uri = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = settings.artifact_location
        if uri is None:
            uri = f"sqlite:///{(run_dir / 'mlflow.db').resolve()}"
            artifacts = artifacts or str((run_dir / "mlflow_artifacts").resolve())
        id_file = run_dir / "mlflow_run_id"
        try:
            self._client = self._mlflow.MlflowClient(tracking_uri=uri)
            self._run_id = self._resume(id_file) if settings.resume else None
            if self._run_id is None:
                self._run_id = self._create(settings, artifacts, run_name, config)
                id_file.write_text(self._run_id + "\n")
        except self._mlflow.exceptions.MlflowException as error:
            raise UserError(
                f"mlflow does not start with `tracking_uri: {_without_password(uri)}`: {_first_line(error)} Name a "
                "running server or `sqlite:///<path>/mlflow.db`; `mlflow.resume: false` starts a new run."
            ) from error

    def _resume(self, id_file: Path) -> str | None:
        """Return the id of the run to go on with, or None when there is none."""
        run_id = os.environ.get("MLFLOW_RUN_ID") or (id_file.read_text().strip() if id_file.is_file() else None)
        if run_id:
            self._client.get_run(run_id)
            self._client.update_run(run_id, status="RUNNING")
        return run_id or None

    def _create(self, settings: MLflowConfig, artifacts: str | None, run_name: str, config: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(settings.experiment_name)
        if experiment is None:
            experiment_id = self._client.create_experiment(settings.experiment_name, artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        tags = {key: str(value) for key, value in settings.tags.items()}
        if settings.description:
            tags["mlflow.note.content"] = settings.description
        run = self._client.create_run(experiment_id, run_name=settings.run_name or run_name, tags=tags)
        params = [
            self._mlflow.entities.Param(key, str(value)[: self._PARAM_CHARACTERS])
            for key, value in flatten(config, settings.flatten_depth).items()
        ]
        for start in range(0, len(params), self._PARAMS_A_CALL):
            self._client.log_batch(run.info.run_id, params=params[start : start + self._PARAMS_A_CALL])
        return str(run.info.run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the numbers of one step; after a failure the run goes on without mlflow and says so once."""
        if self._is_broken:
            return
        now_ms = int(time.time() * 1000)
        entries = [self._mlflow.entities.Metric(name, value, now_ms, step) for name, value in metrics.items()]
        try:
            self._client.log_batch(self._run_id, metrics=entries)
        except self._mlflow.exceptions.MlflowException as error:
            self._give_up(error)

    def close(self, succeeded: bool) -> None:
        """Mark the run as finished or failed."""
        if self._is_broken:
            return
        try:
            self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")
        except self._mlflow.exceptions.MlflowException as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._is_broken = True
        logger.warning("mlflow no longer takes numbers (%s). training.jsonl has all of them.", _first_line(error))


def flatten(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Turn nested mappings into dotted keys down to ``depth`` levels below the top; deeper ones stay whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if depth > 0 and isinstance(value, Mapping) and value:
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value, depth - 1).items()})
        else:
            flat[str(key)] = value
    return flat


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", uri)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
