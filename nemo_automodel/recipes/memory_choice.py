"""``memory: auto``: before the model is built, the planner picks the fastest policy that fits this GPU.

What is free counts, not what the card has: another process, a desktop or a second run takes its share. A resumed run
keeps the policy it began with, on the same machine. The price is the model's outline, a second for each policy at most.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from typing import Any

import torch

from nemo_automodel.components.datasets.label_check import LabelStatistics
from nemo_automodel.components.plan.machines import GIB, MACHINES, Machine
from nemo_automodel.recipes.memory_record import MemoryRecord, machine_name
from nemo_automodel.recipes.plan import Plan, plan_policies
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.errors import UserError

_GAPS_GIB = 0.7
"""What libraries load later, and the gaps between allocations."""

logger = logging.getLogger(__name__)


def choose_policy(
    settings: RunSettings, device: torch.device, record: MemoryRecord, statistics: LabelStatistics | None
) -> RunSettings:
    """Return the settings with the policy chosen and noted in ``record``; without ``memory: auto`` as they are.

    ``statistics`` tell how long unpacked rows are; None: the planner assumes a length.

    Raises:
        UserError: nothing fits, or the model cannot be planned.
    """
    if settings.memory.policy != "auto":
        return settings
    if device.type != "cuda":
        policy = settings.distributed.recompute_policy()
        logger.info("Memory: `memory: auto` has nothing to choose on the %s; recomputed: %s.", device.type, policy)
        return settings
    if record.policy is not None:
        logger.info("Memory: recomputed: %s, as %s says.", record.policy, record.path)
        return _with_policy(settings, record.policy)
    plans = plan_policies(settings, this_machine(device), None if statistics is None else statistics.longest)
    chosen = pick(plans)
    record.policy = chosen.load.recompute
    record.needed_gib = {plan.load.recompute: round(plan.needed_bytes / GIB, 2) for plan in plans}
    record.write()
    logger.info("Memory: %s", reason_of(chosen, plans))
    return _with_policy(settings, record.policy)


def pick(plans: list[Plan]) -> Plan:
    """Return the first plan that fits.

    Raises:
        UserError: none does; with the largest terms of the one that needs least, and the nearest settings that fit.
    """
    fitting = next((plan for plan in plans if plan.fits), None)
    if fitting is not None:
        return fitting
    least = min(plans, key=lambda plan: plan.needed_bytes)
    found = next((plan.alternative[0] for plan in plans if plan.alternative is not None), None)
    if found is None:
        remedy = "Nothing nearby fits. Take a smaller model, shorter rows, or a larger GPU."
    else:
        remedy = f"This fits: {' '.join(f'--{key} {_as_word(value)}' for key, value in found.items())}"
    raise UserError(
        f"`memory: auto` finds no policy under which micro-batches of {least.load.rows} × {least.load.seq_len:,} "
        f"tokens fit: the least is {least.needed_bytes / GIB:.2f} GiB (recomputed: {least.load.recompute}), and "
        f"{least.machine.name} has {least.machine.usable_bytes / GIB:.2f} free. Most is taken by "
        f"{least.memory.largest()}. {remedy}"
    )


def _as_word(value: Any) -> str:
    """Return a value as a word of the command line."""
    return shlex.quote(str(value)) if isinstance(value, dict) else str(value).lower()


def reason_of(chosen: Plan, plans: list[Plan]) -> str:
    """Return what was chosen and why, in one line."""
    usable = chosen.machine.usable_bytes / GIB
    faster = plans[: plans.index(chosen)]
    not_fitting = ", ".join(f"{plan.load.recompute} {plan.needed_bytes / GIB:.2f}" for plan in faster)
    why = f"; faster ones need more: {not_fitting}" if faster else ", and it is the fastest"
    return (
        f"recomputed: {chosen.load.recompute}, which needs {chosen.needed_bytes / GIB:.2f} of {usable:.2f} GiB free "
        f"for micro-batches of {chosen.load.rows} × {chosen.load.seq_len:,} tokens by the plan{why}."
    )


def this_machine(device: torch.device) -> Machine:
    """Return the GPU with what is free on it now; the rates are those of the H100, which only order the policies."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return replace(
        MACHINES["h100"],
        name=machine_name(device),
        memory_gib=free / GIB,
        reserve_gib=_GAPS_GIB,
        is_unified=bool(torch.cuda.get_device_properties(device).is_integrated),
    )


def _with_policy(settings: RunSettings, policy: str) -> RunSettings:
    return replace(settings, distributed=replace(settings.distributed, activation_checkpointing=policy))
