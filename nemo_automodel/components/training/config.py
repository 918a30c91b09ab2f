"""Settings of the schedule, and of what is watched or timed in it.

Free of torch, so that a bad value is refused before anything heavy is imported.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from nemo_automodel.shared.errors import ConfigError, did_you_mean

_STOP_SIGNALS: tuple[str | int, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")
_ON_NONFINITE = ("stop", "skip", "rollback")


@dataclass(frozen=True)
class StepSchedulerConfig:
    """The ``step_scheduler:`` section."""

    global_batch_size: int = 32
    """Rows of one optimizer step."""
    local_batch_size: int = 1
    """Rows of one micro-batch on one device."""
    local_batch_tokens: int | None = None
    """Instead of ``local_batch_size``: rows times longest row of one micro-batch, padding included."""
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
    preemption_signal: str | int | list[str | int] | None = field(default_factory=lambda: list(_STOP_SIGNALS))
    """Signal names or numbers that mean: save a checkpoint and stop. SIGINT is Ctrl-C; a second one stops at once."""

    def __post_init__(self) -> None:
        for key in ("global_batch_size", "local_batch_size", "log_remote_every_steps", "loss_average_window_steps"):
            _require_positive(key, getattr(self, key))
        optional = ("num_epochs", "max_steps", "ckpt_every_steps", "val_every_steps", "gc_every_steps")
        for key in (*optional, "local_batch_tokens"):
            value = getattr(self, key)
            if value is not None:
                _require_positive(key, value)
        if self.local_batch_tokens is None and self.global_batch_size % self.local_batch_size:
            multiple = self.local_batch_size
            near = max(multiple, round(self.global_batch_size / multiple) * multiple)
            raise ConfigError(
                f"`step_scheduler.global_batch_size` is {self.global_batch_size}, but it must be a multiple of "
                f"`step_scheduler.local_batch_size` = {multiple}. Set it to {near}, or change `local_batch_size`."
            )
        self.preemption_signals()

    def num_step_rows(self, dp_size: int) -> int:
        """Return how many rows of a global batch one of ``dp_size`` processes takes.

        Raises:
            ConfigError: the rows cannot be shared out evenly.
        """
        if self.global_batch_size % dp_size:
            below = self.global_batch_size // dp_size * dp_size
            remedy = " or ".join(str(size) for size in (below, below + dp_size) if size)
            raise ConfigError(
                f"`step_scheduler.global_batch_size` is {self.global_batch_size}, but it must be a multiple of the "
                f"data-parallel size {dp_size}. Set it to {remedy}, or change the number of devices."
            )
        return self.global_batch_size // dp_size

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


@dataclass(frozen=True)
class LossGuardConfig:
    """The ``loss_guard:`` section: what happens to a step whose numbers are sick."""

    on_nonfinite: str = "stop"
    """A step whose loss or gradient is not finite is never applied. ``stop`` ends the run there, ``skip`` leaves the
    step out, ``rollback`` also takes weights and optimizer back to the last checkpoint; the data goes on after it."""
    max_nonfinite: int = 10
    """More such steps than this in a run end it, whatever ``on_nonfinite`` says."""
    spike_threshold: float | None = 6.0
    """A loss so many robust standard deviations above the median of the last 50 is a spike; ``null``: no search."""
    dump_spikes: bool = False
    """Write spikes to ``debug/`` as well, so that ``automodel replay`` can redo them."""
    max_dumps: int = 3
    """Most steps that one session writes to ``debug/``; each takes the size of the trained weights."""

    def __post_init__(self) -> None:
        if self.on_nonfinite not in _ON_NONFINITE:
            raise ConfigError(
                f"`loss_guard.on_nonfinite: {self.on_nonfinite}` is not known."
                f"{did_you_mean(self.on_nonfinite, _ON_NONFINITE)} Use {', '.join(_ON_NONFINITE)}."
            )
        for key in ("max_nonfinite", "max_dumps"):
            value = getattr(self, key)
            if value < 0:
                raise ConfigError(f"`loss_guard.{key}` is {value}, but it cannot be negative. Use 0 or more.")
        if self.spike_threshold is not None and self.spike_threshold <= 0:
            raise ConfigError(
                f"`loss_guard.spike_threshold` is {self.spike_threshold:g}, but it must be positive. Use 6, or null "
                "for no search."
            )


@dataclass(frozen=True)
class NeftuneConfig:
    """The ``neftune:`` section: noise on the input embeddings."""

    noise_alpha: float | None = 5.0
    """Strength; 5 to 15 in the paper. 0 or ``null``: none."""

    def __post_init__(self) -> None:
        if self.noise_alpha is not None and self.noise_alpha < 0:
            raise ConfigError(
                f"`neftune.noise_alpha` is {self.noise_alpha:g}, but it cannot be negative. Use 5, or 0 for no noise."
            )


@dataclass(frozen=True)
class UnifiedMemoryConfig:
    """The ``unified_memory:`` section: how much memory of the host is left alone."""

    floor_gib: float | None = None
    """The run is stopped when less is available. ``null``: 4 GiB, at most a twentieth of the memory, where GPU and host
    share it, and no floor elsewhere; 0: no floor anywhere."""

    def __post_init__(self) -> None:
        if self.floor_gib is not None and self.floor_gib < 0:
            raise ConfigError(
                f"`unified_memory.floor_gib` is {self.floor_gib:g}, but memory is not negative. Use 4, or 0 for no "
                "floor."
            )


@dataclass(frozen=True)
class BenchmarkConfig:
    """The ``benchmark:`` section: which steps are timed, and where the result goes."""

    warmup_steps: int = 10
    """Steps before the clock starts: compilation, memory that grows, clocks that rise."""
    peak_tflops: float | None = None
    """What the device can do, in dense TFLOP/s; ``null``: by its name. A measured rate above it is refused."""
    nsys_start: int = -1
    """Step before which CUDA's profiler starts; -1: never."""
    nsys_end: int = -1
    """Step after which it stops."""
    nsys_ranks: list[int] = field(default_factory=list)
    """Processes that are profiled; empty: the first."""
    json_output_path: str | None = None
    """``null``: ``benchmark.json`` in the run's directory."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(
                f"`benchmark.warmup_steps` is {self.warmup_steps}, but it cannot be negative. Use 0 or more."
            )
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ConfigError(
                f"`benchmark.peak_tflops` is {self.peak_tflops:g}, but it must be positive. Use 989 for an H100, or "
                "leave it out."
            )
        if self.nsys_end >= 0 and self.nsys_start > self.nsys_end:
            raise ConfigError(
                f"`benchmark.nsys_start` is {self.nsys_start}, but it must not be above `nsys_end` = {self.nsys_end}. "
                "Set both to -1 for no profile."
            )
