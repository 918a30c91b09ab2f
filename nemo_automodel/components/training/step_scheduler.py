"""The schedule of a run: which micro-batches make a step, and what happens after it.

A *micro-batch* is one batch of the loader, ``local_batch_size`` rows. A *step* is one update of the weights, made from
``global_batch_size / (local_batch_size * data-parallel size)`` micro-batches per process, so that the global batch
stays the same on any number of devices. With ``local_batch_tokens`` the loader's items are lists: all micro-batches of
a step, as many as its rows need. An *epoch* is one pass over the loader; its last step takes whatever
micro-batches are left. Steps and epochs count from 0.

What follows a step is known before it is trained, with one exception: a preemption signal. It is read once a step, by
``poll``, after training, and makes that step one that is saved and not validated, after which the run stops.

The loader keeps its own position inside the epoch; the state here is only ``{"step", "epoch"}``. The schedule therefore
never draws a micro-batch ahead of the step it belongs to. The price: a loader without a length reveals its end only by
ending, so the last step of its epoch knows what it is only when it comes out short.

A loader may have a length and not know it yet, because its rows are still being made. Such a loader is asked whether an
epoch has *at least* so many micro-batches, which waits no longer than it must. The answers, and so the schedule, are
those of a loader whose rows are all there: ``total_steps`` waits until it is certain, for the learning rate depends on
it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Protocol, cast, runtime_checkable

from nemo_automodel.components.training.config import StepSchedulerConfig
from nemo_automodel.shared.errors import ConfigError, UserError
from nemo_automodel.shared.types import Batch

logger = logging.getLogger(__name__)

_NUM_EPOCHS_OF_UNKNOWN_LENGTH = 10
_CTRL_C_NOTE = b"\nCtrl-C: a checkpoint is saved after this step. Press Ctrl-C again to stop at once without it.\n"
_EMPTY = (
    "The training data yields no batch, but a step needs at least one. Check `dataset` (split, filters, limits), or "
    "set `dataloader.drop_last: false`."
)


class TrainLoader(Protocol):
    """What the schedule asks of a loader. A loader that knows how many micro-batches an epoch has also has ``len``."""

    def __iter__(self) -> Iterator[Any]:
        """Begin an epoch, or go on with one that was restored; items are micro-batches, or a step's list of them."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the rows of the coming epoch."""


@runtime_checkable
class GrowingLoader(Protocol):
    """A loader that may not know its length yet; ``len`` waits for it."""

    @property
    def grows(self) -> bool:
        """Tell whether rows are still being made."""

    def at_least(self, num_batches: int) -> bool:
        """Tell whether an epoch has so many items, waiting no longer than that takes."""

    def __len__(self) -> int:
        """Return how many items an epoch has."""


@runtime_checkable
class PlacedLoader(Protocol):
    """A loader that can tell where in an epoch it stands."""

    def num_items_done(self) -> int | None:
        """Return how many items of the epoch were handed out, None where that cannot be told as a whole number."""

    def num_items_left(self) -> int | None:
        """Return how many will come, waiting until that is certain; None where it cannot be told."""


class _EpochLength:
    """How many items of the loader an epoch has, asked for no more than is needed."""

    def __init__(self, loader: TrainLoader) -> None:
        self._growing = loader if isinstance(loader, GrowingLoader) and loader.grows else None
        self._known = _length(loader) if self._growing is None else None
        self.has_end = self._growing is not None or self._known is not None
        """False where nobody can tell."""

    @property
    def is_known(self) -> bool:
        """Tell whether ``exact`` answers without waiting."""
        return self._known is not None or (self._growing is not None and not self._growing.grows)

    def exact(self) -> int:
        """Return the length, waiting for it."""
        if self._known is None:
            assert self._growing is not None
            self._known = len(self._growing)
        return self._known

    def at_least(self, num: int) -> bool:
        """Tell whether there are so many, waiting no longer than that takes."""
        if self._known is None and self._growing is not None:
            return self._growing.at_least(num)
        return num <= self.exact()


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

    def __init__(
        self,
        config: StepSchedulerConfig,
        loader: TrainLoader,
        dp_size: int = 1,
        agree: Callable[[int], int] = lambda number: number,
    ) -> None:
        """``agree`` returns the largest number that one of the processes passes, in all of them: they stop together."""
        self.config = config
        self._agree = agree
        self.loader = loader
        self.grad_accum = _grad_accum(config, dp_size)
        """Items of the loader in a step: micro-batches, or one list of them."""
        self._epoch_length = _EpochLength(loader)
        if self._epoch_length.is_known and self._epoch_length.exact() == 0:
            raise UserError(_EMPTY)
        self.max_steps = config.max_steps
        self.step = config.start_step
        """The next step to train."""
        self.epoch = config.start_epoch
        self._num_extra_steps = 0
        """How many steps the run has made beyond those of today's size that its epochs hold; see ``realign``."""
        self._num_extra_items = 0
        """The same for the items of this epoch: fewer than a step has."""
        self._signal: signal.Signals | None = None
        self._is_stopping = False

    @property
    def epoch_len(self) -> int | None:
        """Steps of an epoch, ``None`` where the loader has no length; waits for rows that are still being made."""
        if not self._epoch_length.has_end:
            return None
        return math.ceil(self._epoch_length.exact() / self.grad_accum)

    def _is_longer_than(self, num_steps: int) -> bool:
        """Tell whether an epoch has more steps than that, waiting no longer than that takes."""
        return self._epoch_length.has_end and self._epoch_length.at_least(num_steps * self.grad_accum + 1)

    def _step_in_epoch(self, step: int) -> int:
        """Return ``step`` modulo the steps of an epoch, which must have a length."""
        step -= self._num_extra_steps
        return step if step >= 0 and self._is_longer_than(step) else step % cast("int", self.epoch_len)

    @property
    def num_epochs(self) -> int:
        """Passes over the data."""
        if self.config.num_epochs is not None:
            return self.config.num_epochs
        if self.max_steps is None or not self._epoch_length.has_end:
            return _NUM_EPOCHS_OF_UNKNOWN_LENGTH
        if self._is_longer_than(self.max_steps - self._num_extra_steps - 1):
            return 1
        return math.ceil((self.max_steps - self._num_extra_steps) / cast("int", self.epoch_len))

    @property
    def ckpt_every_steps(self) -> int | None:
        """Steps between checkpoints, ``None`` where only the epochs' ends count."""
        if self.config.ckpt_every_steps is not None:
            return self.config.ckpt_every_steps
        if self._epoch_length.has_end:
            return self.epoch_len
        return None if self.max_steps is None else max(1, self.max_steps // 2)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, ``None`` when neither the length of the data nor ``max_steps`` is known.

        Waits for rows that are still being made until the number is certain.
        """
        if not self._epoch_length.has_end:
            return self.max_steps
        if self.max_steps is not None and self._is_longer_than(self.max_steps - self._num_extra_steps - 1):
            return self.max_steps
        total = self.num_epochs * cast("int", self.epoch_len) + self._num_extra_steps
        return total if self.max_steps is None else min(total, self.max_steps)

    @property
    def most_steps(self) -> int | None:
        """What is known of ``total_steps`` without waiting: it, or a bound of it, or nothing."""
        return self.total_steps if self._epoch_length.is_known else self.max_steps

    def describe(self) -> str:
        """Return steps of the run and of an epoch, as far as they are known without waiting."""
        if self._epoch_length.has_end and not self._epoch_length.is_known:
            return f"{self.max_steps or 'unknown'} steps at most, rows are still being made"
        return f"{self.total_steps or 'unknown'} steps in all, {self.epoch_len or 'unknown'} an epoch"

    @property
    def is_finished(self) -> bool:
        """Tell whether there is nothing left to train."""
        if self.max_steps is not None and self.step >= self.max_steps:
            return True
        done = self.step - self._num_extra_steps
        if not self._epoch_length.has_end or self._is_longer_than(done):
            return False
        return done >= self.num_epochs * cast("int", self.epoch_len)

    def __iter__(self) -> Generator[tuple[Step, list[Batch]]]:
        self._signal, self._is_stopping = None, False
        with _SignalWatch(self.config.preemption_signals(), self._note_signal):
            while (self.epoch == 0 or self.epoch < self.num_epochs) and not self.is_finished:
                yield from self._epoch()
                if self._is_stopping or self.is_finished:
                    return
                self.epoch += 1
                self._num_extra_items = 0
        if self.step == self.config.start_step:
            raise UserError(_EMPTY)

    def _epoch(self) -> Iterator[tuple[Step, list[Batch]]]:
        self.loader.set_epoch(self.epoch)
        micro_batches = iter(self.loader)
        while batches := list(itertools.islice(micro_batches, self._num_in_step())):
            step = self._plan(is_short=len(batches) < self.grad_accum)
            self.step += 1
            yield step, batches if self.config.local_batch_tokens is None else list(itertools.chain(*batches))
            if step.is_last or self._is_stopping:
                return

    def _num_in_step(self) -> int:
        """Return how many micro-batches the coming step takes.

        Asking the loader for one more than it has would mark its epoch as done, and a checkpoint of the last, short
        step would then resume by repeating the epoch.
        """
        if not self._epoch_length.has_end:
            return self.grad_accum
        done = self._step_in_epoch(self.step) * self.grad_accum - self._num_extra_items
        if self._epoch_length.at_least(done + self.grad_accum):
            return self.grad_accum
        return self._epoch_length.exact() - done

    def _plan(self, is_short: bool) -> Step:
        done = self.step + 1
        is_epoch_end = self._step_in_epoch(done) == 0 if self._epoch_length.has_end else is_short
        is_last = (self.max_steps is not None and done >= self.max_steps) or (
            is_epoch_end and self.epoch + 1 >= self.num_epochs
        )
        saves = (
            is_last
            or self._is_checkpoint_due(done, is_epoch_end)
            or (is_epoch_end and self.config.save_checkpoint_every_epoch)
        )
        validates = saves or (self.config.val_every_steps is not None and done % self.config.val_every_steps == 0)
        return Step(self.step, self.epoch, is_last, is_epoch_end, validates, saves)

    def _is_checkpoint_due(self, done: int, is_epoch_end: bool) -> bool:
        if self.config.ckpt_every_steps is None and self._epoch_length.has_end:
            return is_epoch_end  # every `epoch_len` steps
        return self.ckpt_every_steps is not None and done % self.ckpt_every_steps == 0

    def poll(self, step: Step) -> Step:
        """Return the step as it turned out: unchanged, or saved and the end of this session when a signal has arrived.

        Call it once a step, after training and before validating and saving. A signal that arrives later counts for the
        next step.
        """
        number = self._agree(0 if self._signal is None else self._signal.value)
        if number == 0:
            return step
        self._signal = signal.Signals(number)
        self._is_stopping = True
        logger.warning("%s received: this step is the last one of this session.", self._signal.name)
        return replace(step, is_preempted=True, validates=False, saves=True)

    @property
    def is_signalled(self) -> bool:
        """Tell whether a signal to stop has arrived at this process, before ``poll`` acts on it."""
        return self._signal is not None

    def _note_signal(self, number: signal.Signals) -> None:
        self._signal = number

    def state_dict(self) -> dict[str, Any]:
        """Return the next step and the epoch it was reached in."""
        step = self.step if self.max_steps is None else min(self.max_steps, self.step)
        return {"step": step, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the saved step; the loader must be restored along with it, and ``realign`` called then."""
        self.step, self.epoch = int(state["step"]), int(state["epoch"])
        self._num_extra_steps = self._num_extra_items = 0

    def realign(self) -> bool:
        """Ask the restored loader where in the epoch the run stands; return whether the length of the run changed.

        That follows from the number of steps as long as all had the same size. After a change of the global batch it
        does not: 10 steps of 4 rows are 4 steps of 10, so the epoch ends elsewhere, and 6 steps more than before.
        """
        loader = self.loader
        if not isinstance(loader, PlacedLoader) or not self._epoch_length.has_end:
            return False
        if loader.num_items_done() == self._step_in_epoch(self.step) * self.grad_accum:
            return False
        num_left = loader.num_items_left()
        if num_left is None:
            return False
        num_done = cast("int", self.epoch_len) - math.ceil(num_left / self.grad_accum)
        self._num_extra_steps = self.step - self.epoch * cast("int", self.epoch_len) - num_done
        self._num_extra_items = num_done * self.grad_accum - (self._epoch_length.exact() - num_left)
        return self._num_extra_steps != 0


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
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(2, _CTRL_C_NOTE)  # at once, and safe inside of a signal handler


def _length(loader: TrainLoader) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # what `len` raises for a loader over an iterable dataset
        return None


def _grad_accum(config: StepSchedulerConfig, dp_size: int) -> int:
    if config.local_batch_tokens is not None:
        config.num_step_rows(dp_size)
        return 1
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
