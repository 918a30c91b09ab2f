"""The schedule of a run: which micro-batches make a step, and what happens after it.

A *micro-batch* is one batch of the loader, ``local_batch_size`` rows. A *step* is one update of the weights, made from
``global_batch_size / (local_batch_size * data-parallel size)`` micro-batches per process, so that the global batch
stays the same on any number of devices. An *epoch* is one pass over the loader; its last step takes whatever
micro-batches are left. Steps and epochs count from 0.

What follows a step is known before it is trained, with one exception: a preemption signal. It is read once a step, by
``poll``, after training, and makes that step one that is saved and not validated, after which the run stops.

The loader keeps its own position inside the epoch; the state here is only ``{"step", "epoch"}``. The schedule therefore
never draws a micro-batch ahead of the step it belongs to. The price: a loader without a length reveals its end only by
ending, so the last step of its epoch knows what it is only when it comes out short.
"""

from __future__ import annotations

import itertools
import logging
import math
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Protocol

from nemo_automodel.components.training.config import StepSchedulerConfig
from nemo_automodel.shared.errors import ConfigError, UserError
from nemo_automodel.shared.types import Batch

logger = logging.getLogger(__name__)

_NUM_EPOCHS_OF_UNKNOWN_LENGTH = 10
_EMPTY = (
    "The training data yields no batch, but a step needs at least one. Check `dataset` (split, filters, limits), or "
    "set `dataloader.drop_last: false`."
)


class TrainLoader(Protocol):
    """What the schedule asks of a loader. A loader that knows how many micro-batches an epoch has also has ``len``."""

    def __iter__(self) -> Iterator[Batch]:
        """Begin an epoch, or go on with one that was restored."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the rows of the coming epoch."""


@dataclass(frozen=True)
class Step:
    """One update of the weights and what follows it."""

    index: int
    """Counts from 0 over the whole run."""
    epoch: int
    is_last: bool
    """Nothing is left to train after this step."""
    is_epoch_end: bool
    validates: bool
    saves: bool
    is_preempted: bool = False
    """A signal asked to stop: save, do not validate, and go on another time."""


class StepScheduler:
    """Iterating yields ``(Step, micro-batches)`` until the run ends; it can be resumed from its state.

    Raises:
        ConfigError: the global batch cannot be split evenly over the micro-batches of ``dp_size`` processes.
        UserError: the loader is empty.
    """

    def __init__(self, config: StepSchedulerConfig, loader: TrainLoader, dp_size: int = 1) -> None:
        self.config = config
        self.loader = loader
        self.grad_accum = _grad_accum(config, dp_size)
        num_micro_batches = _length(loader)
        if num_micro_batches == 0:
            raise UserError(_EMPTY)
        self._num_micro_batches = num_micro_batches
        self.epoch_len = None if num_micro_batches is None else math.ceil(num_micro_batches / self.grad_accum)
        """Steps of an epoch, ``None`` where the loader has no length."""
        self.max_steps = config.max_steps
        self.num_epochs = _num_epochs(config, self.epoch_len)
        self.ckpt_every_steps = _ckpt_every_steps(config, self.epoch_len)
        self.step = config.start_step
        """The next step to train."""
        self.epoch = config.start_epoch
        self._signal: signal.Signals | None = None
        self._is_stopping = False

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, ``None`` when neither the length of the data nor ``max_steps`` is known."""
        if self.epoch_len is None:
            return self.max_steps
        total = self.num_epochs * self.epoch_len
        return total if self.max_steps is None else min(total, self.max_steps)

    @property
    def is_finished(self) -> bool:
        """Tell whether there is nothing left to train."""
        return self.total_steps is not None and self.step >= self.total_steps

    def __iter__(self) -> Generator[tuple[Step, list[Batch]]]:
        self._signal, self._is_stopping = None, False
        with _SignalWatch(self.config.preemption_signals(), self._note_signal):
            while self.epoch < self.num_epochs and not self.is_finished:
                yield from self._epoch()
                if self._is_stopping or self.is_finished:
                    return
                self.epoch += 1
        if self.step == self.config.start_step:
            raise UserError(_EMPTY)

    def _epoch(self) -> Iterator[tuple[Step, list[Batch]]]:
        self.loader.set_epoch(self.epoch)
        micro_batches = iter(self.loader)
        while batches := list(itertools.islice(micro_batches, self._num_in_step())):
            step = self._plan(is_short=len(batches) < self.grad_accum)
            self.step += 1
            yield step, batches
            if step.is_last or self._is_stopping:
                return

    def _num_in_step(self) -> int:
        """Return how many micro-batches the coming step takes.

        Asking the loader for one more than it has would mark its epoch as done, and a checkpoint of the last, short
        step would then resume by repeating the epoch.
        """
        if self._num_micro_batches is None or self.epoch_len is None:
            return self.grad_accum
        done = self.step % self.epoch_len * self.grad_accum
        return min(self.grad_accum, self._num_micro_batches - done)

    def _plan(self, is_short: bool) -> Step:
        done = self.step + 1
        is_epoch_end = is_short if self.epoch_len is None else done % self.epoch_len == 0
        is_last = (self.max_steps is not None and done >= self.max_steps) or (
            is_epoch_end and self.epoch + 1 >= self.num_epochs
        )
        saves = (
            is_last
            or (self.ckpt_every_steps is not None and done % self.ckpt_every_steps == 0)
            or (is_epoch_end and self.config.save_checkpoint_every_epoch)
        )
        validates = saves or (self.config.val_every_steps is not None and done % self.config.val_every_steps == 0)
        return Step(self.step, self.epoch, is_last, is_epoch_end, validates, saves)

    def poll(self, step: Step) -> Step:
        """Return the step as it turned out: unchanged, or saved and the end of this session when a signal has arrived.

        Call it once a step, after training and before validating and saving. A signal that arrives later counts for the
        next step.
        """
        if self._signal is None:
            return step
        self._is_stopping = True
        logger.warning("%s received: this step is the last one of this session.", self._signal.name)
        return replace(step, is_preempted=True, validates=False, saves=True)

    def _note_signal(self, number: signal.Signals) -> None:
        self._signal = number

    def state_dict(self) -> dict[str, Any]:
        """Return the next step and the epoch it was reached in."""
        step = self.step if self.max_steps is None else min(self.max_steps, self.step)
        return {"step": step, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the saved step; the loader must be restored along with it."""
        self.step, self.epoch = int(state["step"]), int(state["epoch"])


class _SignalWatch:
    """Notes signals while the run is on and puts back the handlers that were there before."""

    def __init__(self, signals: Iterable[signal.Signals], note: Callable[[signal.Signals], None]) -> None:
        self._signals = list(signals)
        self._note = note
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if self._signals and threading.current_thread() is not threading.main_thread():
            logger.info("Preemption signals are not watched: Python delivers signals to the main thread only.")
            return
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(signal.Signals(number))
        if number == signal.SIGINT:  # a person who presses Ctrl-C twice does not want to wait for a checkpoint
            signal.signal(number, self._previous[number])


def _length(loader: TrainLoader) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # what `len` raises for a loader over an iterable dataset
        return None


def _grad_accum(config: StepSchedulerConfig, dp_size: int) -> int:
    rows = config.local_batch_size * dp_size
    if config.global_batch_size % rows:
        below = config.global_batch_size // rows * rows
        remedy = " or ".join(str(size) for size in (below, below + rows) if size)
        raise ConfigError(
            f"`step_scheduler.global_batch_size` is {config.global_batch_size}, but it must be a multiple of "
            f"`local_batch_size` x data-parallel size = {config.local_batch_size} x {dp_size} = {rows}. "
            f"Set it to {remedy}, or change the number of devices."
        )
    return config.global_batch_size // rows


def _num_epochs(config: StepSchedulerConfig, epoch_len: int | None) -> int:
    if config.num_epochs is not None:
        return config.num_epochs
    if config.max_steps is None or epoch_len is None:
        return _NUM_EPOCHS_OF_UNKNOWN_LENGTH
    return math.ceil(config.max_steps / epoch_len)


def _ckpt_every_steps(config: StepSchedulerConfig, epoch_len: int | None) -> int | None:
    if config.ckpt_every_steps is not None:
        return config.ckpt_every_steps
    if epoch_len is not None:
        return epoch_len
    return None if config.max_steps is None else max(1, config.max_steps // 2)
