"""Optimizers of other packages by their short names: they learn, follow the schedule, and resume bit for bit."""

from __future__ import annotations

import sys

import pytest
import torch
from checkpoint.tiny_run import Run, assert_same

from nemo_automodel.components.config import targets
from nemo_automodel.components.optim.config import LRSchedulerConfig, optimizer_path
from nemo_automodel.components.optim.optimizer import build_optimizer, prepare_kwargs
from nemo_automodel.components.optim.rounding import immovable_share
from nemo_automodel.components.optim.scheduler import OptimizerParamScheduler, plan_schedule
from nemo_automodel.shared.errors import ConfigError

ON_CPU = {
    "adamw8bit": ("bitsandbytes", {}),
    "adamw_sr": ("torchao", {}),
    "adamw8bit_sr": ("torchao", {}),
    "torchao.optim.AdamW4bit": ("torchao", {}),
    "flash_adamw": ("flashoptim", {"quantize": False, "master_weight_bits": None, "fused": False}),
}


@pytest.fixture(autouse=True)
def any_distutils_will_do(monkeypatch):
    """torchao compiles its step, which imports setuptools; that insists on being there before Python's own distutils,
    and in a process of many tests it may not be."""
    if sys.version_info < (3, 12):
        monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")


def target_of(name: str):
    pytest.importorskip(ON_CPU[name][0])
    return targets.resolve(optimizer_path(name), "optimizer._target_")


class Wide(torch.nn.Linear):
    """Large enough for moments in 8 bits: libraries keep those of small tensors as they are."""

    def __init__(self) -> None:
        super().__init__(64, 128, bias=False, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:master_weight_bits")
@pytest.mark.parametrize("name", ON_CPU)
def test_a_resumed_run_gives_the_same_numbers_bit_for_bit(tmp_path, name):
    target, kwargs = target_of(name), ON_CPU[name][1]

    def make(groups):
        return target(groups, lr=1e-2, **kwargs)

    def run() -> Run:
        return Run(tmp_path, make, torch.bfloat16, width=1024)

    undisturbed = run()
    undisturbed.train(4)
    path = undisturbed.save()
    expected = undisturbed.train(4)
    resumed = run()
    resumed.train(1)
    resumed.load(path)
    assert resumed.train(4) == expected
    assert_same(dict(undisturbed.model.state_dict()), dict(resumed.model.state_dict()))


@pytest.mark.filterwarnings("ignore:master_weight_bits")
@pytest.mark.parametrize("name", ["adamw8bit", "adamw_sr", "flash_adamw"])
def test_the_schedule_reaches_the_step(name):
    """The first update of Adam is the learning rate; a rate of zero moves nothing."""
    torch.manual_seed(0)
    model = Wide()
    model.weight.data.fill_(0.001953125)
    optimizer = build_optimizer(model, target_of(name), {"lr": 1e-3, "weight_decay": 0.0, **ON_CPU[name][1]})
    config = LRSchedulerConfig(lr_warmup_steps=2, init_lr=0.0, min_lr=1e-3)
    schedule = OptimizerParamScheduler(optimizer, plan_schedule(config, optimizer, 4))
    moved = []
    for _ in range(3):
        before = model.weight.detach().clone()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        schedule.step()
        moved.append(float((before - model.weight.detach()).float().mean()))
    assert moved[0] == 0
    assert moved[1:] == pytest.approx([5e-4, 1e-3], rel=0.03)


@pytest.mark.parametrize("name", ["adamw_sr", "adamw8bit_sr"])
def test_small_updates_add_up_where_rounding_to_the_nearest_loses_them(name):
    """A hundred updates of a twentieth of the step to the next number are five such steps, on the mean."""
    torch.manual_seed(0)
    means = []
    for target in (target_of(name), torch.optim.AdamW):
        model = Wide()
        model.weight.data.fill_(1.0)
        optimizer = build_optimizer(model, target, {"lr": 2**-8 / 20, "weight_decay": 0.0})
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        means.append(float(1 - model.weight.detach().float().mean()))
    assert means[0] == pytest.approx(100 * 2**-8 / 20, rel=0.03)
    assert means[1] == 0


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 5e-5, 1e-4, 1e-3])
def test_the_share_that_cannot_move_is_the_share_that_does_not(lr):
    torch.manual_seed(0)
    weight = torch.nn.Parameter((torch.randn(200, 80) * 0.02).bfloat16())
    before = weight.detach().clone()
    predicted = immovable_share([weight], lr)
    weight.grad = before.sign()
    torch.optim.AdamW([weight], lr=lr, weight_decay=0.0, eps=1e-20).step()
    assert predicted == pytest.approx(float((weight == before).float().mean()), abs=0.01)


def test_the_warning_counts(caplog):
    torch.manual_seed(0)
    model = Wide()
    torch.nn.init.normal_(model.weight, std=0.02)
    build_optimizer(model, torch.optim.Adam, {"lr": 1e-3})
    assert caplog.text == ""
    build_optimizer(model, torch.optim.Adam, {"lr": 1e-5})
    (message,) = caplog.messages
    assert message.endswith(
        "% of the bfloat16 weights that learn are so large that an update of the learning rate, 1e-05, is less than "
        "half of the step to the next number and is rounded away, and Adam keeps no finer copy. Set "
        "`optimizer._target_: flash_adamw` (24-bit copy) or adamw_sr (stochastic rounding); for LoRA "
        "`peft.lora_dtype: float32`."
    )
    assert 75 <= int(message.split()[0]) <= 95


def test_an_optimizer_with_weights_of_its_own_is_refused():
    torchao = pytest.importorskip("torchao.optim")
    with pytest.raises(ConfigError) as refused:
        prepare_kwargs(torchao.CPUOffloadOptimizer, {"lr": 1e-3})
    assert str(refused.value) == (
        "`optimizer._target_`: CPUOffloadOptimizer keeps copies of weights and gradients of its own, which clipping "
        "and checkpoints do not see. Use `paged_adamw8bit`, whose state moves to host memory when the GPU is full."
    )
