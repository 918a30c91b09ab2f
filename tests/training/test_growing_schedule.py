"""The schedule over a loader whose rows are still being made: the same steps, and no more waiting than they need."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_automodel.components.training.config import StepSchedulerConfig
from nemo_automodel.components.training.step_scheduler import GrowingLoader, StepScheduler


class Growing:
    """Micro-batches that are made when they are asked for; remembers how many were."""

    def __init__(self, num_batches: int, num_made: int = 0) -> None:
        self.num_batches, self.num_made, self.knows_end = num_batches, num_made, False
        self.position, self.epoch = 0, 0

    @property
    def grows(self) -> bool:
        return not self.knows_end

    def at_least(self, num_batches: int) -> bool:
        self.num_made = max(self.num_made, min(num_batches, self.num_batches))
        self.knows_end |= num_batches > self.num_batches
        return num_batches <= self.num_batches

    def __len__(self) -> int:
        self.at_least(self.num_batches + 1)
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        while self.at_least(self.position + 1):
            self.position += 1
            yield {"input_ids": torch.tensor([self.epoch, self.position - 1])}
        self.position = 0


class Sized(Growing):
    """The same, with everything made before."""

    grows = False

    def at_least(self, num_batches: int) -> bool:
        return num_batches <= self.num_batches

    def __len__(self) -> int:
        return self.num_batches


def observe(scheduler: StepScheduler) -> list:
    return [
        (s.index, s.epoch, [b["input_ids"].tolist() for b in batches], s.is_last, s.is_epoch_end, s.validates, s.saves)
        for s, batches in scheduler
    ]


maybe = lambda low, high: st.none() | st.integers(low, high)  # noqa: E731
configs = st.builds(
    StepSchedulerConfig,
    global_batch_size=st.integers(1, 5),
    num_epochs=maybe(1, 4),
    max_steps=maybe(1, 30),
    ckpt_every_steps=maybe(1, 9),
    val_every_steps=maybe(1, 9),
    save_checkpoint_every_epoch=st.booleans(),
    preemption_signal=st.none(),
)


@given(config=configs, num_batches=st.integers(1, 17), asks_total=st.booleans())
@settings(deadline=None, max_examples=300)
def test_steps_are_those_of_a_loader_that_knows_its_length(config, num_batches: int, asks_total: bool):
    assert isinstance(Growing(1), GrowingLoader)
    growing, sized = StepScheduler(config, Growing(num_batches)), StepScheduler(config, Sized(num_batches))
    if asks_total:
        assert growing.total_steps == sized.total_steps
    assert observe(growing) == observe(sized)
    assert growing.state_dict() == sized.state_dict()
    assert growing.is_finished
    assert sized.is_finished
    for name in ("total_steps", "epoch_len", "num_epochs", "ckpt_every_steps"):
        assert getattr(growing, name) == getattr(sized, name), name


@given(config=configs, num_batches=st.integers(1, 17), num_made=st.integers(0, 20))
@settings(deadline=None, max_examples=200)
def test_the_total_is_the_same_cold_and_warm(config, num_batches: int, num_made: int):
    """The learning rate is planned from it, so it must not depend on what a cache holds."""
    growing = StepScheduler(config, Growing(num_batches, num_made)).total_steps
    assert growing == StepScheduler(config, Sized(num_batches)).total_steps


@given(config=configs, num_batches=st.integers(1, 17), data=st.data())
@settings(deadline=None, max_examples=200)
def test_a_run_cut_anywhere_goes_on_as_if_never_cut(config, num_batches: int, data):
    expected = observe(StepScheduler(config, Sized(num_batches)))
    cut = data.draw(st.integers(1, len(expected)))
    first = StepScheduler(config, Growing(num_batches))
    for step, _ in first:
        if step.index + 1 == cut:
            state, position = first.state_dict(), first.loader.position
            break
    second = StepScheduler(config, Growing(num_batches))
    second.load_state_dict(state)
    second.loader.position = position
    assert observe(second) == expected[cut:]


@given(accum=st.integers(1, 4), max_steps=st.integers(1, 20), num_batches=st.integers(100, 200))
@settings(deadline=None, max_examples=50)
def test_max_steps_waits_for_its_own_batches(accum: int, max_steps: int, num_batches: int):
    loader = Growing(num_batches)
    scheduler = StepScheduler(StepSchedulerConfig(global_batch_size=accum, max_steps=max_steps), loader)
    assert loader.num_made == 0
    assert scheduler.total_steps == max_steps
    assert loader.num_made == (max_steps - 1) * accum + 1
    assert len(observe(scheduler)) == max_steps
    assert loader.num_made == max_steps * accum + 1, "one more, to know whether the epoch ends there"
    assert loader.grows


@pytest.mark.parametrize("num_epochs", [None, 1, 3])
@pytest.mark.parametrize("max_steps", [None, 40])
def test_without_a_question_for_the_total_nobody_waits(num_epochs: int | None, max_steps: int | None):
    config = StepSchedulerConfig(global_batch_size=2, num_epochs=num_epochs, max_steps=max_steps, ckpt_every_steps=None)
    loader = Growing(200)
    scheduler = StepScheduler(config, loader)
    assert scheduler.most_steps == max_steps
    assert not scheduler.is_finished
    assert scheduler.describe() == f"{max_steps or 'unknown'} steps at most, rows are still being made"
    made = []
    for step, batches in scheduler:
        made.append(loader.num_made)
        assert len(batches) == 2
        if step.index == 10:
            break
    assert made == [2 * (step + 1) + 1 for step in range(11)]


def test_known_numbers_are_told():
    config = StepSchedulerConfig(global_batch_size=2, num_epochs=3, max_steps=None)
    scheduler = StepScheduler(config, Growing(5))
    assert scheduler.total_steps == 3 * math.ceil(5 / 2)
    assert scheduler.most_steps == 9
    assert scheduler.describe() == "9 steps in all, 3 an epoch"
