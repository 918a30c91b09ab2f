"""Settings near a run's own that need less memory, the nearest first.

First come those under which the weights, the optimizer and the global batch stay as they are: no copies in 8 bits of
weights that learn, recomputing some activations, fewer rows at once, recomputing all. Then, for adapters, a base in 4
bits. For full training, where weights, gradients and moments are most of the memory: steps in the backward pass, which
free each gradient at once and want a single micro-batch a step without clipping; moments in 8 bits; and both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_automodel.components.plan.optimizers import bytes_of
from nemo_automodel.components.plan.workload import Workload
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.memory_policies import EXACT_POLICIES, PLAIN_POLICIES, RECOMPUTE_POLICIES

_EIGHT_BIT = "adamw8bit"
_KEPT_OPTIONS = ("lr", "betas", "eps", "weight_decay", "in_backward")
"""What an Adam of 8 bits understands of another's section."""


@dataclass(frozen=True)
class _Start:
    """Where a search begins: changes that were made already."""

    overrides: dict[str, Any]
    load: Workload
    has_one_micro_batch: bool = False
    """Rows cannot be fewer: they are the global batch."""


def alternatives(load: Workload, settings: RunSettings) -> Iterator[tuple[dict[str, Any], Workload]]:
    """Yield changes from the nearest to the farthest, as overrides of the configuration and as workloads."""
    has_rows = settings.step_scheduler.local_batch_tokens is None
    known = EXACT_POLICIES if load.plain is None else PLAIN_POLICIES
    further = RECOMPUTE_POLICIES[RECOMPUTE_POLICIES.index(load.recompute) + 1 :]
    policies = [load.recompute, *(name for name in further if name in known)]
    if load.is_full and load.store == "fp8" and load.fp8_copies > 0:
        yield {"fp8.weight_copies": 0}, load.changed(fp8_copies=0)
    for start in _starts(load, settings):
        can_split = has_rows and not start.has_one_micro_batch
        for rows in _halves(start.load.rows) if can_split else (start.load.rows,):
            for policy in policies:
                overrides = dict(start.overrides)
                if rows != load.rows:
                    overrides["step_scheduler.local_batch_size"] = rows
                if policy != load.recompute:
                    overrides["distributed.activation_checkpointing"] = policy
                if overrides:
                    grad_accum = start.load.grad_accum * start.load.rows // rows
                    yield overrides, start.load.changed(rows=rows, recompute=policy, grad_accum=grad_accum)


def _starts(load: Workload, settings: RunSettings) -> Iterator[_Start]:
    yield _Start({}, load, load.steps_in_backward)
    if not load.is_full:
        if load.store == "dense":
            yield _Start({"quantization.load_in_4bit": True}, load.changed(store="nf4"))
        return
    small = bytes_of(_EIGHT_BIT, {}, load.trainable_bytes)
    in_8_bits = load.changed(state_bytes=small.state, step_bytes=small.step)
    options = settings.optimizer.to_dict()
    section = {"_target_": _EIGHT_BIT, **{key: options[key] for key in _KEPT_OPTIONS if key in options}}
    has_adam = "adam" in str(options["_target_"]).lower() and load.state_bytes > small.state
    if not load.steps_in_backward:
        yield from _in_backward({}, load, settings)
    if has_adam:
        yield _Start({"optimizer": section}, in_8_bits, load.steps_in_backward)
    if has_adam and not load.steps_in_backward:
        yield from _in_backward({"optimizer": section}, in_8_bits, settings)


def _in_backward(overrides: dict[str, Any], load: Workload, settings: RunSettings) -> Iterator[_Start]:
    """Yield steps in the backward pass; a step is a single micro-batch then, so that the global batch stays."""
    if settings.step_scheduler.local_batch_tokens is not None:
        return
    changed = load.changed(rows=load.rows * load.grad_accum, grad_accum=1, steps_in_backward=True)
    if "optimizer" in overrides:
        overrides = {"optimizer": {**overrides["optimizer"], "in_backward": True}}
    else:
        overrides = {"optimizer.in_backward": True}
    yield _Start({**overrides, "clip_grad_norm.max_norm": None}, changed, has_one_micro_batch=True)


def _halves(rows: int) -> Iterator[int]:
    yield rows
    while rows > 1:
        rows //= 2
        yield rows
