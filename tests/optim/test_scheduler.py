"""Schedules against tables worked out by hand, and what a resumed run does with a changed plan."""

from __future__ import annotations

import logging
from math import cos, pi, sqrt

import pytest
import torch

from nemo_automodel.components.optim.config import LRSchedulerConfig
from nemo_automodel.components.optim.scheduler import OptimizerParamScheduler, plan_schedule
from nemo_automodel.shared.errors import ConfigError


def make_optimizer(lr=1.0, weight_decay=0.0, groups=({},)):
    params = [{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in groups]
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


def plan(total_steps=20, lr=1.0, weight_decay=0.0, **config):
    return plan_schedule(LRSchedulerConfig(**config), make_optimizer(lr, weight_decay), total_steps)


# init 0.2, max 1, min 0.1, 4 warm-up steps, 20 decay steps; n → learning rate, worked out on paper
BASE = {"lr_warmup_steps": 4, "lr_decay_steps": 20, "init_lr": 0.2, "min_lr": 0.1}
WARM_UP = {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1.0}
TABLE = [
    ("constant", {}, {12: 1.0, 20: 1.0, 21: 1.0, 500: 1.0}),
    ("linear", {}, {8: 0.775, 12: 0.55, 16: 0.325, 20: 0.1, 21: 0.1, 500: 0.1}),
    (
        "cosine",
        {},
        {8: 0.1 + 0.9 * (2 + sqrt(2)) / 4, 12: 0.55, 16: 0.1 + 0.9 * (2 - sqrt(2)) / 4, 20: 0.1, 21: 0.1},
    ),
    ("WSD", {"lr_wsd_decay_style": "linear"}, {5: 1.0, 12: 1.0, 14: 0.775, 16: 0.55, 18: 0.325, 20: 0.1, 21: 0.1}),
    ("WSD", {"lr_wsd_decay_style": "cosine"}, {12: 1.0, 14: 0.1 + 0.9 * (2 + sqrt(2)) / 4, 16: 0.55, 20: 0.1}),
    (
        "WSD",
        {"lr_wsd_decay_style": "exponential"},
        {12: 1.0, 16: 0.1 + 0.9 * (sqrt(2) - 1), 20: 0.1, 21: 0.1},
    ),
    ("WSD", {"lr_wsd_decay_style": "minus_sqrt"}, {12: 1.0, 14: 0.55, 20: 0.1}),
    ("inverse-square-root", {}, {5: 2 / sqrt(5), 9: 2 / 3, 16: 0.5, 20: 2 / sqrt(20), 21: 0.1}),
]


@pytest.mark.parametrize(("style", "extra", "expected"), TABLE, ids=lambda value: str(value)[:30])
def test_learning_rates_equal_the_table(style, extra, expected):
    extra = {"wsd_decay_steps": 8, **extra} if style == "WSD" else extra
    schedule = plan(lr_decay_style=style, **BASE, **extra)
    for num_steps, lr in {**WARM_UP, **expected}.items():
        assert schedule.lr(num_steps) == pytest.approx(lr, rel=1e-12), num_steps


def test_inverse_square_root_does_not_fall_below_min_lr():
    schedule = plan(lr_decay_style="inverse-square-root", lr_decay_steps=10_000, lr_warmup_steps=1, min_lr=0.1)
    assert schedule.lr(400) == 0.1
    assert schedule.lr(64) == pytest.approx(1 / 8)


def test_without_warm_up_the_first_step_has_the_full_rate():
    schedule = plan(lr_warmup_steps=0, lr_decay_steps=10, min_lr=0.0)
    assert [schedule.lr(n) for n in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


def test_open_fields_are_filled_from_the_optimizer_and_the_run():
    schedule = plan(total_steps=100, lr=2e-5, weight_decay=0.3)
    assert (schedule.init_lr, schedule.max_lr, schedule.min_lr) == pytest.approx((2e-6, 2e-5, 2e-7))
    assert (schedule.lr_warmup_steps, schedule.lr_decay_steps, schedule.wd_incr_steps) == (10, 100, 100)
    assert (schedule.start_wd, schedule.end_wd) == (0.3, 0.3)
    assert plan(total_steps=50_000).lr_warmup_steps == 1000
    assert plan(total_steps=9).lr_warmup_steps == 0


def test_the_playbooks_lora_run():
    """Contract section 1: warm-up over 10 steps from 1e-6 to 1e-5, then cosine to 1e-6 over 100 steps."""
    schedule = plan(total_steps=100, lr=1e-5, lr_decay_style="cosine", min_lr=1e-6)
    assert schedule.lr(0) == pytest.approx(1e-6)
    assert schedule.lr(5) == pytest.approx(5.5e-6)
    assert schedule.lr(10) == pytest.approx(1e-5)
    assert schedule.lr(55) == pytest.approx(5.5e-6)
    assert schedule.lr(99) == pytest.approx(1e-6 + 9e-6 * 0.5 * (1 + cos(pi * 89 / 90)))
    assert schedule.lr(100) == pytest.approx(1e-6)


def test_weight_decay_equals_the_table():
    grow = {"start_wd": 0.1, "end_wd": 0.5, "wd_incr_steps": 8}
    linear, cosine = plan(wd_incr_style="linear", **grow), plan(wd_incr_style="cosine", **grow)
    assert [linear.weight_decay(n) for n in (0, 2, 4, 8, 9)] == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.5])
    assert cosine.weight_decay(2) == pytest.approx(0.1 + 0.4 * (2 - sqrt(2)) / 4)
    assert [cosine.weight_decay(n) for n in (0, 4, 8, 9)] == pytest.approx([0.1, 0.3, 0.5, 0.5])


def test_groups_are_multiplied_and_the_optimizer_sees_every_step():
    optimizer = make_optimizer(1.0, 0.1, groups=({}, {"lr_mult": 0.5, "wd_mult": 0.0}))
    schedule = plan_schedule(LRSchedulerConfig(lr_decay_style="linear", **BASE), optimizer, 20)
    scheduler = OptimizerParamScheduler(optimizer, schedule)
    seen = []
    for _ in range(5):
        seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        scheduler.step()
    assert [first for first, _ in seen] == [(pytest.approx(lr), 0.1) for lr in WARM_UP.values()]
    assert [second for _, second in seen] == [(pytest.approx(lr / 2), 0.0) for lr in WARM_UP.values()]


def test_without_a_section_nothing_changes():
    optimizer = make_optimizer(3e-4, 0.05)
    scheduler = OptimizerParamScheduler(optimizer, plan_schedule(None, optimizer, None))
    for _ in range(30):
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (3e-4, 0.05)
        scheduler.step()


def resume(saved_steps, new_steps, keeps=False, done=60):
    first = make_optimizer(1e-3)
    scheduler = OptimizerParamScheduler(first, plan_schedule(LRSchedulerConfig(), first, saved_steps))
    scheduler.step(done)
    second = make_optimizer(1e-3)
    resumed = OptimizerParamScheduler(second, plan_schedule(LRSchedulerConfig(), second, new_steps), keeps)
    resumed.load_state_dict(scheduler.state_dict())
    return scheduler, resumed


def test_state_has_the_contracts_names_and_goes_on_exactly():
    scheduler, resumed = resume(100, 100)
    assert set(scheduler.state_dict()) == {
        "max_lr", "lr_warmup_steps", "num_steps", "lr_decay_style", "lr_decay_steps", "min_lr", "start_wd", "end_wd",
        "wd_incr_style", "wd_incr_steps",
    }  # fmt: skip
    assert resumed.optimizer.param_groups[0]["lr"] == scheduler.optimizer.param_groups[0]["lr"]
    assert resumed.state_dict() == scheduler.state_dict()


def test_a_longer_run_is_planned_anew_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        _, resumed = resume(100, 200)
    # 60 done of 200, 20 of them warm-up
    assert resumed.lr == pytest.approx(1e-5 + 0.5 * (1 + cos(pi * 40 / 180)) * (1e-3 - 1e-5))
    assert "planned anew" in caplog.text
    assert "lr_decay_steps 100 -> 200" in caplog.text


def test_a_longer_run_keeps_the_saved_plan_when_asked_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        scheduler, resumed = resume(100, 200, keeps=True)
    assert resumed.lr == scheduler.lr
    resumed.step(41)
    assert resumed.lr == 1e-5
    assert "checkpoint's schedule goes on" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"min_lr": 2.0}, "`lr_scheduler.min_lr` is 2, but it must not be larger"),
        ({"init_lr": 2.0}, "`lr_scheduler.init_lr` is 2"),
        ({"start_wd": 0.1, "end_wd": 0.2}, "constant weight decay has one value"),
        ({"lr_warmup_steps": 0.1}, "is 0.1, but a number of steps is a whole number"),
        ({"lr_decay_steps": 0}, "must be at least 1"),
        ({"lr_decay_style": "cosin"}, "Did you mean `cosine`"),
        ({"lr_decay_style": "WSD"}, "needs `lr_scheduler.wsd_decay_steps`"),
    ],
)
def test_contradictions_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        plan(**config)


def test_a_length_that_nobody_knows_is_asked_for():
    with pytest.raises(ConfigError, match=r"Set `step_scheduler.max_steps`"):
        plan(total_steps=None)


def test_a_warm_up_longer_than_the_run_is_said(caplog):
    schedule = plan(total_steps=5, lr_warmup_steps=10)
    assert schedule.lr(5) == pytest.approx(0.55)
    assert "warm-up takes 10 steps and the run 5" in caplog.text
