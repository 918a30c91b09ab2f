"""Settings of the schedule. Free of torch, so that a bad value is refused before anything heavy is imported."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from nemo_automodel.shared.errors import ConfigError


@dataclass(frozen=True)
class StepSchedulerConfig:
    """The ``step_scheduler:`` section."""

    global_batch_size: int = 32
    """Rows of one optimizer step."""
    local_batch_size: int = 1
    """Rows of one micro-batch on one device."""
    num_epochs: int | None = 10
    """Passes over the data; ``null`` derives it from ``max_steps``."""
    max_steps: int | None = None
    """Optimizer steps of the whole run; ``null`` means ``num_epochs`` decides."""
    ckpt_every_steps: int | None = 100
    """``null``: once per epoch."""
    save_checkpoint_every_epoch: bool = True
    val_every_steps: int | None = None
    """``null``: only where a checkpoint is written."""
    log_remote_every_steps: int = 1
    loss_average_window_steps: int = 50
    gc_every_steps: int | None = None
    """Collect Python garbage every N steps instead of whenever Python likes."""
    start_step: int = 0
    start_epoch: int = 0
    preemption_signal: str | int | list[str | int] | None = "SIGTERM"
    """Signal names or numbers that mean: save a checkpoint and stop."""

    def __post_init__(self) -> None:
        for key in ("global_batch_size", "local_batch_size", "log_remote_every_steps", "loss_average_window_steps"):
            _require_positive(key, getattr(self, key))
        for key in ("num_epochs", "max_steps", "ckpt_every_steps", "val_every_steps", "gc_every_steps"):
            value = getattr(self, key)
            if value is not None:
                _require_positive(key, value)
        if self.global_batch_size % self.local_batch_size:
            multiple = self.local_batch_size
            near = max(multiple, round(self.global_batch_size / multiple) * multiple)
            raise ConfigError(
                f"`step_scheduler.global_batch_size` is {self.global_batch_size}, but it must be a multiple of "
                f"`step_scheduler.local_batch_size` = {multiple}. Set it to {near}, or change `local_batch_size`."
            )
        self.preemption_signals()

    def preemption_signals(self) -> list[signal.Signals]:
        """Return the signals that stop the run after a checkpoint.

        Raises:
            ConfigError: a name or number is not a signal of this system.
        """
        value = self.preemption_signal
        found = []
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            try:
                found.append(signal.Signals(item) if isinstance(item, int) else signal.Signals[str(item)])
            except (KeyError, ValueError):
                raise ConfigError(
                    f"`step_scheduler.preemption_signal: {item}` is not a signal of this system. "
                    "Use a name such as SIGTERM or SIGUSR1, a number, a list of them, or null."
                ) from None
        return found


def _require_positive(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"`step_scheduler.{key}` is {value}, but it must be at least 1.")
