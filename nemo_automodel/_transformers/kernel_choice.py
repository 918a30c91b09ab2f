"""The ways in which a model's fast decoder layers are computed: chosen once, before the first step, and logged.

`components/fast/dispatch` says how a choice is made, `kernel_trial` measures. Where nothing is measured, on the CPU
above all, the defaults of `components/fast/choices` hold and the log says why.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel._transformers.kernel_trial import LayerTrial, measure
from nemo_automodel.components._peft.lora import LinearLoRA
from nemo_automodel.components.fast.choices import DEFAULT, DETERMINISTIC, Choices
from nemo_automodel.components.fast.config import KernelWishes
from nemo_automodel.components.fast.dispatch import (
    Dispatcher,
    Entry,
    KernelCache,
    Table,
    default_table,
)
from nemo_automodel.components.fast.weight_store import DenseStore, WeightStore
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.kernels.assembler import HOPPER, find_assembler, version_of
from nemo_automodel.kernels.jit import HAS_TRITON
from nemo_automodel.shared.cache import cache_directory
from nemo_automodel.shared.determinism import is_deterministic
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

ROW_SHAPE = (2, 4096)
"""Rows and positions of a micro-batch where nobody knows better."""
_MOST_TOKENS = 8192
_BY_RULE = "fixed, `deterministic: true`"
"""Measurements differ from start to start: where the same bits are wanted every time, a rule decides."""


@dataclass(frozen=True)
class KernelRequest:
    """What is known before anything is measured."""

    wishes: KernelWishes = field(default_factory=KernelWishes)
    saved: Mapping[str, Any] | None = None
    """The table that the run began with, as `Table.to_json` gave it."""
    row_shape: tuple[int, int] | None = None
    """Rows and positions of the micro-batches to come, where all are alike."""


def choose_kernels(
    model: PreTrainedModel, layer: nn.Module, request: KernelRequest, store: type[WeightStore] = DenseStore
) -> Table:
    """Return the ways to compute the fast decoder layers of ``model``, of which ``layer`` is one, and log them.

    Raises:
        UserError: what was asked for cannot run here or computes something else.
    """
    if is_deterministic() and request.wishes.asked.get("attention") == "cudnn":
        raise UserError(
            "`kernels: {attention: cudnn}` adds in no fixed order, and deterministic algorithms are asked for. Use "
            "flash, or leave it out."
        )
    reason = _obstacle(model, layer)
    if reason is None and is_deterministic() and not request.wishes.asked:
        reason = _BY_RULE
    if reason is None:
        return measured_table(model, layer, request, store)
    shape = _row_shape(model, request.row_shape)
    subject = describe_layer(layer, model.dtype, store, shape)
    table = _without_measuring(describe_machine(model.device), subject, request.wishes, reason)
    logger.info("Kernels: %s (%s).", ", ".join(f"{k} {v}" for k, v in table.names().items()), reason)
    return table


def measured_table(
    model: PreTrainedModel, layer: nn.Module, request: KernelRequest, store: type[WeightStore] = DenseStore
) -> Table:
    """Do what `choose_kernels` says on any device."""
    machine, wishes = describe_machine(model.device), request.wishes
    saved = _usable(request.saved, machine)
    shape = _row_shape(model, request.row_shape)
    subject = describe_layer(layer, model.dtype, store, shape)
    started = time.perf_counter()
    trial = LayerTrial(model, layer, store, shape)
    cache = KernelCache(cache_directory("kernels") / _file_name(machine), machine)
    dispatcher = Dispatcher(wishes, partial(measure, device=model.device), cache, saved)
    try:
        with trial.leaving_no_trace():
            entries = _ask(dispatcher, trial, subject)
    except torch.OutOfMemoryError:
        logger.warning("There is not enough memory to measure kernels beside the model, so the defaults are taken.")
        return _without_measuring(machine, subject, wishes, "default, no memory to measure")
    if dispatcher.measured:
        cache.add(dispatcher.measured)
    table = Table(machine, tuple(entries))
    heading = f"Kernels ({machine['gpu']}, {shape[0]} x {shape[1]} tokens, {time.perf_counter() - started:.1f} s):"
    logger.info("\n".join([heading, *table.lines()]))
    return table


def _usable(record: Mapping[str, Any] | None, machine: Mapping[str, str]) -> Table | None:
    """Return the table that a run began with if it can go on with it; say so if not."""
    if record is None:
        return None
    try:
        table = Table.from_json(record)
    except ValueError as error:
        logger.warning("The kernels that this run began with cannot be read (%s), so they are chosen anew.", error)
        return None
    if table.machine == machine:
        return table
    changed = sorted(k for k in {*table.machine, *machine} if table.machine.get(k) != machine.get(k))
    logger.warning(
        "This run began on another machine (%s), so its kernels are chosen anew; numbers may differ in their last "
        "digits.",
        ", ".join(f"{key} {table.machine.get(key)}, now {machine.get(key)}" for key in changed),
    )
    return None


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return what measurements depend on: the GPU and the versions of what runs on it."""
    found = {"gpu": device.type, "torch": torch.__version__}
    if HAS_TRITON:
        import triton

        found["triton"] = triton.__version__
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"gpu": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
        if HAS_TRITON and major == HOPPER and (ptxas := find_assembler(os.environ, torch.version.cuda)) is not None:
            found["ptxas"] = ".".join(map(str, version_of(ptxas) or ("unknown",)))
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    return found


def describe_layer(layer: nn.Module, dtype: torch.dtype, store: type[WeightStore], shape: tuple[int, int]) -> str:
    """Return class, dtype, weight store, shapes, adapter ranks and rows in one line."""
    linears = [
        (n.rpartition(".")[2], m) for n, m in layer.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n
    ]
    sizes = " ".join(
        f"{name} {m.in_features}x{m.out_features}" + (f"r{m.lora_A.out_features}" if isinstance(m, LinearLoRA) else "")
        for name, m in linears
    )
    kind = str(dtype).removeprefix("torch.")
    head_dim = layer.self_attn.head_dim  # type: ignore[union-attr]
    return f"{type(layer).__name__} {kind} {store.__name__} heads of {head_dim} {sizes} rows {shape[0]}x{shape[1]}"


def _row_shape(model: PreTrainedModel, known: tuple[int, int] | None) -> tuple[int, int]:
    rows, seq_len = known or ROW_SHAPE
    seq_len = min(seq_len, model.config.max_position_embeddings, _MOST_TOKENS)
    return max(1, min(rows, _MOST_TOKENS // seq_len)), seq_len


def _obstacle(model: PreTrainedModel, layer: nn.Module) -> str | None:
    """Return why nothing is measured."""
    if model.device.type != "cuda":
        return f"default, the model is on the {model.device.type}"
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear) and not isinstance(m, Linear4bit)]
    packed = [m for m in linears if not m.weight.is_floating_point()]
    return "default, packed weights are not measured" if packed else None


def _without_measuring(machine: dict[str, str], subject: str, wishes: KernelWishes, reason: str) -> Table:
    attention = wishes.asked.get("attention")
    if attention is not None and machine["gpu"] == "cpu":
        raise UserError(
            f"`model.kernels.attention: {attention}` cannot be: the model is on the cpu. Leave it out, or use a GPU."
        )
    table = default_table(machine, subject, _defaults().names(), reason)
    entries = (
        Entry(e.operation, subject, wishes.asked[e.operation], "asked for") if e.operation in wishes.asked else e
        for e in table.entries
    )
    return Table(machine, tuple(entries))


def _defaults() -> Choices:
    return DETERMINISTIC if is_deterministic() else DEFAULT


def _file_name(machine: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(machine.items())).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', machine['gpu'])}-{digest}.json"


def _ask(dispatcher: Dispatcher, trial: LayerTrial, subject: str) -> list[Entry]:
    """Answer one question after the other; what was answered holds in the next."""
    entries: list[Entry] = []
    for operation in ("attention", "swiglu_products", "down_in_depth"):
        if is_deterministic() and operation not in dispatcher.wishes.asked:
            entries.append(Entry(operation, subject, _defaults().names()[operation], _BY_RULE))
            continue
        if not trial.matters(operation) and operation not in dispatcher.wishes.asked:
            entries.append(Entry(operation, subject, DEFAULT.names()[operation], "changes nothing in this model"))
            continue
        chosen = Choices.from_names({entry.operation: entry.implementation for entry in entries})
        entries.append(dispatcher.answer(trial.question(operation, chosen, subject)))
    return entries
