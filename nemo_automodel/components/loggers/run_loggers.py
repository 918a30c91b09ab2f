"""All that a run says about its numbers: console line, progress bar, JSONL and trackers, from one call a step."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nemo_automodel.components.loggers.config import MLflowConfig, TensorBoardConfig, WandbConfig
from nemo_automodel.components.loggers.console import Bar, train_line, val_line
from nemo_automodel.components.loggers.metric_logger import (
    TRAINING_FILE,
    MetricLogger,
    utc_timestamp,
    validation_file,
)
from nemo_automodel.components.loggers.trackers import MLflowTracker, TensorBoardTracker, Tracker, WandbTracker
from nemo_automodel.shared.errors import UserError

if TYPE_CHECKING:
    from nemo_automodel.shared.types import StepMetrics

logger = logging.getLogger(__name__)


class RunLoggers:
    """The loggers of one run, closed on every way out when used with ``with``.

    Of several processes only the first one writes; in the others every method does nothing.

    Args:
        run_dir: where ``training.jsonl`` and ``validation*.jsonl`` are kept.
        total_steps: length of the progress bar, None when unknown.
        wandb: settings of the tracker, None for none; likewise ``mlflow`` and ``tensorboard``.
        mlflow: see ``wandb``.
        tensorboard: see ``wandb``.
        log_remote_every_steps: trackers get every n-th training step, and every validation.
        config: the effective configuration for the trackers, secrets masked.
        run_name: the trackers' name of the run unless their section has one.

    Raises:
        UserError: a file cannot be written or a tracker cannot start.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        total_steps: int | None,
        wandb: WandbConfig | None = None,
        mlflow: MLflowConfig | None = None,
        tensorboard: TensorBoardConfig | None = None,
        log_remote_every_steps: int = 1,
        config: Mapping[str, Any] | None = None,
        run_name: str = "run",
    ) -> None:
        self.run_dir = Path(run_dir)
        self._is_first_process = os.environ.get("RANK", "0") == "0"
        self._num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        self._log_remote_every_steps = log_remote_every_steps
        self._total_steps = total_steps
        self._bar: Bar | None = None
        self._files: dict[str, MetricLogger] = {}
        self._trackers: list[Tracker] = []
        if not self._is_first_process:
            return
        self._file(TRAINING_FILE)
        config = config or {}
        if tensorboard is not None:
            self._trackers.append(TensorBoardTracker(tensorboard, self.run_dir, config))
        if mlflow is not None:
            self._trackers.append(MLflowTracker(mlflow, self.run_dir, config, run_name))
        if wandb is not None:
            self._trackers.append(WandbTracker(wandb, self.run_dir, config, run_name))

    def truncate_after(self, step: int) -> None:
        """Drop the records of steps later than ``step``, the last one the run has done (-1 for a fresh start)."""
        if self._is_first_process:
            for path in [self.run_dir / TRAINING_FILE, *sorted(self.run_dir.glob("validation*.jsonl"))]:
                self._file(path.name).truncate_after(step)

    def train(self, step: int, epoch: int, metrics: StepMetrics) -> None:
        """Report optimizer step ``step`` (counted from 0)."""
        if not self._is_first_process:
            return
        numbers = {
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "lr": metrics.lr,
            "mem": metrics.mem_gib,
            "tps": metrics.tps,
            "tps_per_gpu": metrics.tps / self._num_processes,
            "num_tokens_per_step": metrics.num_tokens,
            "num_label_tokens": metrics.num_label_tokens,
        }
        self._record(TRAINING_FILE, step, epoch, {**numbers, "mfu": metrics.mfu})
        logger.info(train_line(step, epoch, metrics, self._num_processes))
        if self._bar is None:
            self._bar = Bar("Training", self._total_steps)
        self._bar.move_to(step + 1, f"loss {metrics.loss:.4f}  {metrics.tps:,.0f} tok/s")
        if step % self._log_remote_every_steps == 0:
            self._track({"epoch": epoch, **numbers}, step)

    def val(
        self, name: str, step: int, epoch: int, loss: float, lr: float, num_label_tokens: int, mem_gib: float = 0.0
    ) -> None:
        """Report a validation pass over the set ``name`` after step ``step``."""
        if not self._is_first_process:
            return
        numbers = {"val_loss": loss, "lr": lr, "num_label_tokens": num_label_tokens, "mem": mem_gib}
        self._record(validation_file(name), step, epoch, numbers)
        logger.info(val_line(name, step, epoch, loss, lr, num_label_tokens))
        self._track({"val_loss" if name == "default" else f"val_loss/{name}": loss}, step)

    def sync(self) -> None:
        """Bring all records to the disk; a checkpoint is of no use without the records of its steps."""
        for file in self._files.values():
            file.sync()

    def close(self, succeeded: bool = True) -> None:
        """Take the bar down, close the files and end the trackers' runs; a second call does nothing.

        Raises:
            UserError: the run succeeded, but its last records could not be written.
        """
        if self._bar is not None:
            self._bar.close()
        failures = []
        for file in self._files.values():
            try:
                file.close()
            except UserError as error:
                failures.append(error)
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close(succeeded)
        if failures and succeeded:
            raise failures[0]
        for failure in failures:
            logger.error("%s", failure)

    def __enter__(self) -> RunLoggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(succeeded=kind is None)

    def _file(self, name: str) -> MetricLogger:
        if name not in self._files:
            self._files[name] = MetricLogger(self.run_dir / name)
        return self._files[name]

    def _record(self, file_name: str, step: int, epoch: int, numbers: Mapping[str, Any]) -> None:
        self._file(file_name).log({"step": step, "epoch": epoch, "timestamp": utc_timestamp(), **numbers})

    def _track(self, numbers: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(numbers, step)
