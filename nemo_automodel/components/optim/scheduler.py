"""Learning rate and weight decay as functions of the number of completed steps.

``SchedulePlan`` is the pure function: with n completed steps, W warm-up steps, D decay steps and r = (n - W) / (D - W)

* n <= W, W > 0: ``init + (max - init) * n / W``, so the first step trains with ``init_lr``;
* constant: max; otherwise n > D: min;
* linear, cosine, WSD: ``min + coeff * (max - min)``; linear coeff = 1 - r, cosine (1 + cos(pi r)) / 2, WSD 1 until
  D - ``wsd_decay_steps`` and then, with q the share of those steps that is done, linear 1 - q, cosine
  (1 + cos(pi q)) / 2, exponential 2 * 0.5^q - 1, minus_sqrt 1 - sqrt(q);
* inverse-square-root: ``max(min, max * sqrt(max(W, 1)) / sqrt(max(n, 1)))``.

Weight decay goes from ``start_wd`` to ``end_wd`` over ``wd_incr_steps``. The formulas are those of Megatron-LM's
scheduler, which the recipes' YAML files were written for.

``OptimizerParamScheduler`` counts the steps and writes the values into the optimizer's groups, times each group's
``lr_mult`` and ``wd_mult``.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nemo_automodel.components.optim.config import LRSchedulerConfig
from nemo_automodel.shared.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SchedulePlan:
    """Every number of a schedule; see the module's docstring for the formulas."""

    init_lr: float
    max_lr: float
    min_lr: float
    lr_warmup_steps: int
    lr_decay_steps: int
    lr_decay_style: str
    start_wd: float
    end_wd: float
    wd_incr_steps: int
    wd_incr_style: str
    wsd_decay_steps: int = 0
    lr_wsd_decay_style: str = "exponential"

    def lr(self, num_steps: int) -> float:
        """Return the learning rate that trains the step after ``num_steps`` completed ones."""
        if self.lr_warmup_steps > 0 and num_steps <= self.lr_warmup_steps:
            return self.init_lr + (self.max_lr - self.init_lr) * num_steps / self.lr_warmup_steps
        if self.lr_decay_style == "constant":
            return self.max_lr
        if num_steps > self.lr_decay_steps:
            return self.min_lr
        if self.lr_decay_style == "inverse-square-root":
            decayed = self.max_lr * math.sqrt(max(self.lr_warmup_steps, 1)) / math.sqrt(max(num_steps, 1))
            return max(self.min_lr, decayed)
        return self.min_lr + self._lr_coeff(num_steps) * (self.max_lr - self.min_lr)

    def _lr_coeff(self, num_steps: int) -> float:
        if self.lr_decay_style == "WSD":
            since_decay_began = num_steps - (self.lr_decay_steps - self.wsd_decay_steps)
            if since_decay_began <= 0:
                return 1.0
            return _wsd_coeff(self.lr_wsd_decay_style, since_decay_began / self.wsd_decay_steps)
        ratio = (num_steps - self.lr_warmup_steps) / (self.lr_decay_steps - self.lr_warmup_steps)
        return 1.0 - ratio if self.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * ratio))

    def weight_decay(self, num_steps: int) -> float:
        """Return the weight decay that trains the step after ``num_steps`` completed ones."""
        if self.wd_incr_style == "constant" or num_steps >= self.wd_incr_steps:
            return self.end_wd
        ratio = num_steps / self.wd_incr_steps
        coeff = ratio if self.wd_incr_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * (1.0 - ratio)))
        return self.start_wd + coeff * (self.end_wd - self.start_wd)


def _wsd_coeff(style: str, share: float) -> float:
    if style == "linear":
        return 1.0 - share
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    if style == "exponential":
        return float(2.0 * 0.5**share - 1.0)
    return 1.0 - math.sqrt(share)


def plan_schedule(
    config: LRSchedulerConfig | None, optimizer: torch.optim.Optimizer, total_steps: int | None
) -> SchedulePlan:
    """Fill what the ``lr_scheduler:`` section leaves open from the optimizer and the length of the run.

    Without a section the learning rate and the weight decay stay what the optimizer was given.

    Raises:
        ConfigError: a number contradicts another, or the length is needed and unknown.
    """
    if optimizer.defaults.get("lr") is None:
        raise ConfigError(
            "`optimizer.lr` is not set, but the schedule is planned from it. Set it, for example to 1e-5."
        )
    lr = float(optimizer.defaults["lr"])
    weight_decay = float(optimizer.defaults.get("weight_decay", 0.0))
    if config is None:
        config = LRSchedulerConfig(lr_decay_style="constant", lr_warmup_steps=0, lr_decay_steps=1, wd_incr_steps=0)
    decay_steps = _given(config.lr_decay_steps, total_steps)
    if decay_steps is None:
        raise ConfigError(
            "`lr_scheduler.lr_decay_steps` is not set, but the data has no length to derive it from. "
            "Set `step_scheduler.max_steps` or `lr_scheduler.lr_decay_steps`."
        )
    length = _given(total_steps, decay_steps)
    plan = SchedulePlan(
        init_lr=_given(config.init_lr, 0.1 * lr),
        max_lr=_given(config.max_lr, lr),
        min_lr=_given(config.min_lr, 0.01 * lr),
        lr_warmup_steps=_given(config.lr_warmup_steps, min(1000, length // 10)),
        lr_decay_steps=decay_steps,
        lr_decay_style=config.lr_decay_style,
        start_wd=_given(config.start_wd, weight_decay),
        end_wd=_given(config.end_wd, weight_decay),
        wd_incr_steps=_given(config.wd_incr_steps, length),
        wd_incr_style=config.wd_incr_style,
        wsd_decay_steps=_given(config.wsd_decay_steps, 0),
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )
    _check(plan)
    return plan


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _check(plan: SchedulePlan) -> None:
    for key in ("min_lr", "init_lr"):
        if getattr(plan, key) > plan.max_lr:
            raise ConfigError(
                f"`lr_scheduler.{key}` is {getattr(plan, key):g}, but it must not be larger than the learning rate it "
                f"belongs to, {plan.max_lr:g}. Lower it, or raise `optimizer.lr` (or `lr_scheduler.max_lr`)."
            )
    if plan.wd_incr_style == "constant" and plan.start_wd != plan.end_wd:
        raise ConfigError(
            f"`lr_scheduler.start_wd` is {plan.start_wd:g} and `end_wd` is {plan.end_wd:g}, but a constant weight "
            "decay has one value. Set `lr_scheduler.wd_incr_style: linear`, or make them equal."
        )
    if plan.lr_decay_style != "constant" and plan.lr_warmup_steps >= plan.lr_decay_steps:
        logger.warning(
            "The warm-up takes %d steps and the run %d: the learning rate never decays, and stays below its maximum if "
            "the run is shorter. Lower `lr_scheduler.lr_warmup_steps` if that is not wanted.",
            plan.lr_warmup_steps,
            plan.lr_decay_steps,
        )


_SAVED = (
    "max_lr",
    "lr_warmup_steps",
    "lr_decay_style",
    "lr_decay_steps",
    "min_lr",
    "start_wd",
    "end_wd",
    "wd_incr_style",
    "wd_incr_steps",
)


class OptimizerParamScheduler:
    """Writes the planned learning rate and weight decay into the optimizer, step by step.

    ``keeps_saved_plan`` decides what happens when a checkpoint was made with other numbers, as after a change of
    ``max_steps``: true goes on with the checkpoint's plan, false with this run's. Either way the log says which.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, plan: SchedulePlan, keeps_saved_plan: bool = False) -> None:
        self.optimizer = optimizer
        self.plan = plan
        self.keeps_saved_plan = keeps_saved_plan
        self.num_steps = 0
        self._apply()

    @property
    def lr(self) -> float:
        """The learning rate of the coming step, without any group's multiplier."""
        return self.plan.lr(self.num_steps)

    def step(self, increment: int = 1) -> None:
        """Count ``increment`` completed steps and set the values of the next."""
        self.num_steps += increment
        self._apply()

    def replan(self, plan: SchedulePlan) -> None:
        """Follow another plan from the next step on, unless the checkpoint's is to be kept."""
        if not self.keeps_saved_plan:
            self.plan = plan
            self._apply()

    def _apply(self) -> None:
        lr, weight_decay = self.plan.lr(self.num_steps), self.plan.weight_decay(self.num_steps)
        for group in self.optimizer.param_groups:
            group_lr = lr * group.get("lr_mult", 1.0)
            if isinstance(group["lr"], torch.Tensor):  # compiled optimizers read it where it lies
                group["lr"].fill_(group_lr)
            else:
                group["lr"] = group_lr
            if "weight_decay" in group:
                group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the count and the plan; ``init_lr`` belongs to the first steps only and is not kept."""
        plan = asdict(self.plan)
        return {"num_steps": self.num_steps, **{key: plan[key] for key in _SAVED}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the saved steps, by the saved plan or by this run's."""
        self.num_steps = int(state["num_steps"])
        ours = asdict(self.plan)
        changed = [f"{key} {state[key]} -> {ours[key]}" for key in _SAVED if state[key] != ours[key]]
        if changed and self.keeps_saved_plan:
            self.plan = replace(self.plan, **{key: state[key] for key in _SAVED})
            logger.info(
                "The checkpoint's schedule goes on, as `use_checkpoint_opt_param_scheduler: true` asks; not used: %s.",
                ", ".join(changed),
            )
        elif changed:
            logger.info(
                "The schedule is planned anew from this configuration: %s. To keep the checkpoint's, set "
                "`lr_scheduler.use_checkpoint_opt_param_scheduler: true`.",
                ", ".join(changed),
            )
        self._apply()
