"""``memory: auto``: before the model is built, the planner picks the fastest policy that fits this GPU.

What is free counts, not what the card has: another process, a desktop or a second run takes its share. A resumed run
keeps the policy it began with, on the same machine. The price is the model's outline, a second for each policy at most.

What ``full_offload`` keeps in the host's memory is looked at beforehand too: it is page-locked, and a machine that
locks more than it has does not come back.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from typing import Any

import torch

from nemo_automodel.components.datasets.label_check import LabelStatistics
from nemo_automodel.components.plan.machines import GIB, MACHINES, Machine
from nemo_automodel.components.plan.memory import offloaded
from nemo_automodel.recipes.memory_record import MemoryRecord, machine_name
from nemo_automodel.recipes.plan import Plan, offloaded_bytes, plan_policies
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.memory import gib, lockable_bytes, read_memory

_GAPS_GIB = 0.7
"""What libraries load later, and the gaps between allocations."""

logger = logging.getLogger(__name__)


def choose_policy(
    settings: RunSettings, device: torch.device, record: MemoryRecord, statistics: LabelStatistics | None
) -> RunSettings:
    """Return the settings with the policy chosen and noted in ``record``; without ``memory: auto`` as they are.

    ``statistics`` tell how long unpacked rows are; None: the planner assumes a length.

    Raises:
        UserError: nothing fits, or the model cannot be planned; or the host cannot hold what ``full_offload`` asks for.
    """
    if settings.memory.policy != "auto":
        if device.type == "cuda" and settings.distributed.recompute_policy() == "full_offload":
            _check_host(settings, statistics)
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


def _check_host(settings: RunSettings, statistics: LabelStatistics | None) -> None:
    """Refuse rows whose inputs the host cannot hold; of a micro-batch one row where it may be split.

    Raises:
        UserError: that is so, or the model cannot be planned.
    """
    num_bytes, load = offloaded_bytes(settings, None if statistics is None else statistics.longest)
    num_rows, row_len = load.rows, load.seq_len
    if settings.memory.rescue and settings.step_scheduler.local_batch_tokens is None:
        num_rows, num_bytes = 1, num_bytes // load.rows
    free = lockable_bytes(read_memory())
    if num_bytes > free:
        raise UserError(
            f"`distributed.activation_checkpointing: full_offload` keeps {gib(num_bytes)} of layer inputs in the "
            f"host's memory for {num_rows} × {row_len:,} tokens, and {gib(free)} can be page-locked. Use full, sac1 or "
            "selective, shorter rows, or a machine with more memory."
        )


def pick(plans: list[Plan]) -> Plan:
    """Return the first plan that fits.

    Raises:
        UserError: none does; with the largest terms of the one that needs least, and the nearest settings that fit.
    """
    fitting = next((plan for plan in plans if plan.fits), None)
    if fitting is not None:
        return fitting
    least = min(plans, key=lambda plan: (not plan.fits_host, plan.needed_bytes))
    found = next((plan.alternative[0] for plan in plans if plan.alternative is not None), None)
    if found is None:
        remedy = "Nothing nearby fits. Take a smaller model, shorter rows, or a larger GPU."
    else:
        remedy = f"This fits: {' '.join(f'--{key} {_as_word(value)}' for key, value in found.items())}"
    raise UserError(
        f"`memory: auto` finds no policy under which micro-batches of {least.load.rows} × {least.load.seq_len:,} "
        f"tokens fit: the least is {least.needed_bytes / GIB:.2f} GiB (recomputed: {least.load.recompute}), and "
        f"{least.machine.name} has {least.machine.usable_bytes / GIB:.2f} free. Most is taken by "
        f"{least.memory.largest()}. {_host_sentence(plans)}{remedy}"
    )


def _host_sentence(plans: list[Plan]) -> str:
    """Return which policy is out because of the host's memory, nothing where none is."""
    plan = next((plan for plan in plans if not plan.fits_host), None)
    if plan is None or plan.machine.host_gib is None:
        return ""
    return (
        f"{plan.load.recompute} would keep {offloaded(plan.load) / GIB:.2f} GiB in the host's memory, where "
        f"{plan.machine.host_gib:.2f} can be page-locked. "
    )


def _as_word(value: Any) -> str:
    """Return a value as a word of the command line."""
    return shlex.quote(str(value)) if isinstance(value, dict) else str(value).lower()


def reason_of(chosen: Plan, plans: list[Plan]) -> str:
    """Return what was chosen and why, in one line."""
    usable = chosen.machine.usable_bytes / GIB
    faster = plans[: plans.index(chosen)]
    not_fitting = ", ".join(f"{plan.load.recompute} {_need(plan)}" for plan in faster)
    why = f"; faster ones need more: {not_fitting}" if faster else ", and it is the fastest"
    return (
        f"recomputed: {chosen.load.recompute}, which needs {chosen.needed_bytes / GIB:.2f} of {usable:.2f} GiB free "
        f"for micro-batches of {chosen.load.rows} × {chosen.load.seq_len:,} tokens by the plan{why}."
    )


def _need(plan: Plan) -> str:
    if not plan.fits_host:
        return f"{offloaded(plan.load) / GIB:.2f} on the host"
    return f"{plan.needed_bytes / GIB:.2f}"


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
        host_gib=lockable_bytes(read_memory()) / GIB,
    )


def _with_policy(settings: RunSettings, policy: str) -> RunSettings:
    return replace(settings, distributed=replace(settings.distributed, activation_checkpointing=policy))
