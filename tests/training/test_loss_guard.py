"""Which steps are sick, and that a resumed run remembers what the undisturbed one does."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from nemo_automodel.components.training.config import LossGuardConfig
from nemo_automodel.components.training.loss_guard import Finding, LossGuard
from nemo_automodel.shared.errors import ConfigError

HEALTHY, SPIKE, NONFINITE = Finding.HEALTHY, Finding.SPIKE, Finding.NONFINITE


def falling(num_steps: int, seed: int = 0) -> list[float]:
    """Return losses that fall as those of a fine-tune do, with noise."""
    generator = random.Random(seed)
    return [3.0 * math.exp(-step / 80) + 1.0 + generator.gauss(0, 0.1) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_what_is_not_finite_is_sick_from_the_first_step(loss, grad_norm):
    guard = LossGuard(LossGuardConfig())
    assert guard.judge(loss, grad_norm) is NONFINITE
    assert guard.judge(1.0, 1.0) is HEALTHY
    assert guard.num_nonfinite == 1


@pytest.mark.parametrize("seed", range(20))
def test_an_ordinary_run_has_no_spike_and_a_planted_one_is_found(seed):
    losses = falling(400, seed)
    guard = LossGuard(LossGuardConfig())
    assert [guard.judge(loss, 1.0) for loss in losses] == [HEALTHY] * 400
    for position in (30, 150, 399):
        planted = [*losses]
        planted[position] += 4.0
        guard = LossGuard(LossGuardConfig())
        found = [guard.judge(loss, 1.0) for loss in planted]
        assert [step for step, finding in enumerate(found) if finding is SPIKE] == [position]


def test_the_border_is_the_documented_one():
    losses = falling(50)
    median = statistics.median(losses)
    spread = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    for factor, expected in ((5.99, HEALTHY), (6.01, SPIKE)):
        guard = LossGuard(LossGuardConfig(spike_threshold=6.0))
        for loss in losses:
            guard.judge(loss, 1.0)
        assert guard.judge(median + factor * spread, 1.0) is expected


def test_losses_that_are_almost_equal_and_the_first_ones_are_no_spikes():
    guard = LossGuard(LossGuardConfig())
    assert [guard.judge(loss, 1.0) for loss in (*[2.0] * 19, 9.0)] == [HEALTHY] * 20
    for _ in range(50):
        guard.judge(2.0, 1.0)
    assert guard.judge(2.05, 1.0) is HEALTHY
    assert guard.judge(2.2, 1.0) is SPIKE


def test_null_looks_for_no_spikes():
    guard = LossGuard(LossGuardConfig(spike_threshold=None))
    assert {guard.judge(loss, 1.0) for loss in (*falling(100), 1e9)} == {HEALTHY}


def test_state_goes_through_json_and_the_judgement_is_the_same():
    losses = [*falling(150), math.nan, 1.2, 9.0]
    undisturbed, first = LossGuard(LossGuardConfig()), LossGuard(LossGuardConfig())
    expected = [undisturbed.judge(loss, 1.0) for loss in losses]
    for loss in losses[:140]:
        first.judge(loss, 1.0)
    second = LossGuard(LossGuardConfig())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.judge(loss, 1.0) for loss in losses[140:]] == expected[140:]
    assert second.state_dict() == undisturbed.state_dict()


def test_the_limit():
    guard = LossGuard(LossGuardConfig(max_nonfinite=2))
    over = []
    for _ in range(3):
        guard.judge(math.nan, 1.0)
        over.append(guard.is_over_limit)
    assert over == [False, False, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_nonfinite": "skp"}, r"`loss_guard.on_nonfinite: skp` is not known. Did you mean `skip`\?"),
        ({"max_nonfinite": -1}, r"`loss_guard.max_nonfinite` is -1"),
        ({"max_dumps": -1}, r"`loss_guard.max_dumps` is -1"),
        ({"spike_threshold": 0.0}, r"`loss_guard.spike_threshold` is 0"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        LossGuardConfig(**values)
