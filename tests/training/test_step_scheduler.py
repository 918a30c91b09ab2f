"""The schedule against a brute-force model that writes out every step of a run in a flat list."""

from __future__ import annotations

import math
import signal
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_automodel.components.training.config import StepSchedulerConfig
from nemo_automodel.components.training.step_scheduler import StepScheduler
from nemo_automodel.shared.errors import ConfigError, UserError


class CountingLoader:
    """Micro-batches numbered through the epoch; remembers its position like a stateful loader."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self.position = 0
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self):
        while self.position < self.num_batches:
            self.position += 1
            yield {"input_ids": torch.tensor([self.epochs[-1], self.position - 1])}
        self.position = 0


class SizedLoader(CountingLoader):
    def __len__(self) -> int:
        return self.num_batches


def brute_force(num_batches: int, accum: int, config: StepSchedulerConfig):
    """Write out the whole run: (step, epoch, ids of the micro-batches, last, epoch end, validates, saves)."""
    epoch_len = math.ceil(num_batches / accum)
    num_epochs = config.num_epochs
    if num_epochs is None:
        num_epochs = 10 if config.max_steps is None else math.ceil(config.max_steps / epoch_len)
    every = epoch_len if config.ckpt_every_steps is None else config.ckpt_every_steps
    run = []
    for epoch in range(num_epochs):
        ids = list(range(num_batches))
        groups = [ids[i : i + accum] for i in range(0, num_batches, accum)]
        for i, group in enumerate(groups):
            run.append([len(run), epoch, group, False, i == len(groups) - 1])
    if config.max_steps is not None:
        run = run[: config.max_steps]
    run[-1][3] = True
    plan = []
    for step, epoch, group, last, end in run:
        saves = (step + 1) % every == 0 or last or (end and config.save_checkpoint_every_epoch)
        validates = saves or bool(config.val_every_steps and (step + 1) % config.val_every_steps == 0)
        plan.append((step, epoch, group, last, end, validates, saves))
    return plan


def observe(scheduler: StepScheduler):
    return [
        (s.index, s.epoch, [int(b["input_ids"][1]) for b in batches], s.is_last, s.is_epoch_end, s.validates, s.saves)
        for s, batches in scheduler
    ]


maybe = lambda low, high: st.none() | st.integers(low, high)  # noqa: E731
configs = st.builds(
    lambda local, accum, **rest: StepSchedulerConfig(local_batch_size=local, global_batch_size=local * accum, **rest),
    local=st.integers(1, 3),
    accum=st.integers(1, 5),
    num_epochs=maybe(1, 4),
    max_steps=maybe(1, 30),
    ckpt_every_steps=maybe(1, 9),
    val_every_steps=maybe(1, 9),
    save_checkpoint_every_epoch=st.booleans(),
    preemption_signal=st.none(),
)


@given(config=configs, num_batches=st.integers(1, 17))
@settings(deadline=None, max_examples=200)
def test_every_step_equals_the_brute_force_model(config, num_batches):
    accum = config.global_batch_size // config.local_batch_size
    scheduler = StepScheduler(config, SizedLoader(num_batches))
    expected = brute_force(num_batches, accum, config)
    assert scheduler.total_steps == len(expected)
    assert observe(scheduler) == expected
    assert scheduler.is_finished
    assert observe(scheduler) == []


@given(config=configs, num_batches=st.integers(1, 17), data=st.data())
@settings(deadline=None, max_examples=200)
def test_a_run_cut_anywhere_goes_on_as_if_never_cut(config, num_batches, data):
    accum = config.global_batch_size // config.local_batch_size
    expected = brute_force(num_batches, accum, config)
    cut = data.draw(st.integers(1, len(expected)))
    first = StepScheduler(config, SizedLoader(num_batches))
    for step, _ in first:
        if step.index + 1 == cut:
            state, position = first.state_dict(), first.loader.position
            break
    assert state == {"step": cut, "epoch": expected[cut - 1][1]}
    second = StepScheduler(config, SizedLoader(num_batches))
    second.load_state_dict(state)
    second.loader.position = position
    assert observe(second) == expected[cut:]


class ListLoader(SizedLoader):
    """A loader whose items are lists of one to three micro-batches: all of a step."""

    def __iter__(self):
        for batch in super().__iter__():
            number = int(batch["input_ids"][1])
            yield [{"input_ids": torch.tensor([number, part])} for part in range(1 + number % 3)]


@given(config=configs, num_steps=st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_with_a_budget_of_tokens_an_item_of_the_loader_is_a_step(config, num_steps):
    config = replace(config, local_batch_tokens=100)
    scheduler = StepScheduler(config, ListLoader(num_steps))
    expected = brute_force(num_steps, 1, config)
    assert (scheduler.grad_accum, scheduler.epoch_len) == (1, num_steps)
    seen = []
    for step, batches in scheduler:
        pairs = [batch["input_ids"].tolist() for batch in batches]
        (number,) = {number for number, _ in pairs}
        assert [part for _, part in pairs] == list(range(1 + number % 3))
        seen.append((step.index, step.epoch, [number], step.is_last, step.is_epoch_end, step.validates, step.saves))
    assert seen == expected


def test_a_budget_of_tokens_still_shares_rows_out_evenly():
    config = StepSchedulerConfig(global_batch_size=10, local_batch_size=3, local_batch_tokens=100)
    assert config.num_step_rows(5) == 2
    with pytest.raises(ConfigError, match=r"is 10, but it must be a multiple of the data-parallel size 4. Set it to 8"):
        StepScheduler(config, ListLoader(3), dp_size=4)


def test_data_parallel_size_divides_the_accumulation():
    config = StepSchedulerConfig(global_batch_size=48, local_batch_size=4)
    assert StepScheduler(config, SizedLoader(10), dp_size=6).grad_accum == 2
    with pytest.raises(ConfigError, match=r"multiple of .* = 4 x 5 = 20.*Set it to 40 or 60"):
        StepScheduler(config, SizedLoader(10), dp_size=5)
    with pytest.raises(ConfigError, match="Set it to 64"):
        StepScheduler(config, SizedLoader(10), dp_size=16)


def test_a_loader_without_a_length_ends_when_it_ends():
    config = StepSchedulerConfig(global_batch_size=2, num_epochs=2, ckpt_every_steps=None, preemption_signal=None)
    scheduler = StepScheduler(config, CountingLoader(5))
    assert (scheduler.total_steps, scheduler.epoch_len, scheduler.ckpt_every_steps) == (None, None, None)
    run = observe(scheduler)
    assert [(index, epoch, ids) for index, epoch, ids, *_ in run] == [
        (0, 0, [0, 1]), (1, 0, [2, 3]), (2, 0, [4]), (3, 1, [0, 1]), (4, 1, [2, 3]), (5, 1, [4]),
    ]  # fmt: skip
    assert [(last, end, saves) for *_, last, end, _, saves in run] == [
        (False, False, False), (False, False, False), (False, True, True),
        (False, False, False), (False, False, False), (True, True, True),
    ]  # fmt: skip


def test_a_loader_without_a_length_checkpoints_at_half_of_max_steps():
    config = StepSchedulerConfig(global_batch_size=1, max_steps=7, ckpt_every_steps=None, num_epochs=None)
    scheduler = StepScheduler(config, CountingLoader(100))
    assert (scheduler.num_epochs, scheduler.total_steps) == (10, 7)
    assert [index for index, *_, saves in observe(scheduler) if saves] == [2, 5, 6]


@pytest.mark.parametrize("loader", [SizedLoader(0), CountingLoader(0)])
def test_no_data_is_an_error_and_not_an_empty_run(loader):
    with pytest.raises(UserError, match="yields no batch"):
        list(StepScheduler(StepSchedulerConfig(global_batch_size=1, preemption_signal=None), loader))


def test_each_epoch_gets_its_own_order():
    loader = SizedLoader(3)
    list(StepScheduler(StepSchedulerConfig(global_batch_size=1, num_epochs=3), loader))
    assert loader.epochs == [0, 1, 2]


def test_a_signal_ends_the_session_after_a_step_that_is_saved_and_not_validated():
    before = signal.getsignal(signal.SIGTERM)
    config = StepSchedulerConfig(global_batch_size=1, num_epochs=1, val_every_steps=1, ckpt_every_steps=100)
    scheduler = StepScheduler(config, SizedLoader(10))
    seen = []
    for planned, _ in scheduler:
        if planned.index == 2:
            signal.raise_signal(signal.SIGTERM)
        step = scheduler.poll(planned)
        seen.append((step.index, step.is_preempted, step.is_last, step.validates, step.saves))
        state = scheduler.state_dict()
    assert seen == [(0, False, False, True, False), (1, False, False, True, False), (2, True, False, False, True)]
    assert state == {"step": 3, "epoch": 0}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_after_the_poll_counts_for_the_next_step():
    config = StepSchedulerConfig(global_batch_size=1, num_epochs=1, ckpt_every_steps=100)
    scheduler = StepScheduler(config, SizedLoader(10))
    seen = []
    for planned, _ in scheduler:
        step = scheduler.poll(planned)
        seen.append((step.index, step.saves))
        if step.index == 1:  # while the step is validated, say
            signal.raise_signal(signal.SIGTERM)
    assert seen == [(0, False), (1, False), (2, True)]


@pytest.fixture
def pythons_own_ctrl_c():
    """Somebody before may have left another handler, which a loop puts back as it found it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_own_ctrl_c")
def test_a_second_ctrl_c_stops_at_once():
    config = StepSchedulerConfig(global_batch_size=1, num_epochs=1, preemption_signal="SIGINT")
    scheduler = StepScheduler(config, SizedLoader(10))
    steps = iter(scheduler)
    next(steps)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    steps.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_are_put_back_when_the_loop_is_left_early():
    before = signal.getsignal(signal.SIGUSR1)
    config = StepSchedulerConfig(global_batch_size=1, preemption_signal=["SIGUSR1", int(signal.SIGTERM)])
    steps = iter(StepScheduler(config, SizedLoader(10)))
    next(steps)
    assert signal.getsignal(signal.SIGUSR1) is not before
    steps.close()
    assert signal.getsignal(signal.SIGUSR1) is before
