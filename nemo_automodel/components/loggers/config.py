"""Settings of experiment trackers. Free of torch; every tracker is off unless its section is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WandbConfig:
    """The ``wandb:`` section; every key not named here goes to ``wandb.init``."""

    project: str = "automodel"
    entity: str | None = None
    name: str | None = None
    """``null``: the model's name."""
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    init_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MLflowConfig:
    """The ``mlflow:`` section."""

    experiment_name: str = "automodel-experiment"
    run_name: str | None = None
    tracking_uri: str | None = None
    artifact_location: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    resume: bool = True
    """Go on with the run named in ``<checkpoint_dir>/mlflow_run_id`` or in MLFLOW_RUN_ID."""
    description: str | None = None
    flatten_depth: int = 1


@dataclass(frozen=True)
class TensorBoardConfig:
    """The ``tensorboard:`` section."""

    log_dir: str | None = None
    """``null``: ``<run directory>/tensorboard``."""
