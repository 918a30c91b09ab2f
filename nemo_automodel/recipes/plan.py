"""What a run would need, before anything is downloaded but the model's config.json.

The configuration is read as the recipe reads it, the model is outlined without weights, and `components/plan` turns
both into memory and time. Where a run does not fit, the first that does of what `plan_alternatives` offers is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nemo_automodel._transformers import auto_model, outline
from nemo_automodel._transformers.fast_layers import check_plain_memory
from nemo_automodel._transformers.outline import Outline, logits_copies, run_plain, shape_of
from nemo_automodel._transformers.recompute import known_policies
from nemo_automodel.components.config import targets
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.fast.config import parse_cuda_graphs
from nemo_automodel.components.plan import memory, speed
from nemo_automodel.components.plan.machines import GIB, Machine
from nemo_automodel.components.plan.optimizers import OptimizerBytes, bytes_of
from nemo_automodel.components.plan.workload import Workload
from nemo_automodel.recipes.llm.text_data import model_path_of
from nemo_automodel.recipes.model_wishes import model_wishes
from nemo_automodel.recipes.plan_alternatives import alternatives
from nemo_automodel.recipes.settings import RunSettings, load_settings
from nemo_automodel.shared.dtypes import parse_dtype
from nemo_automodel.shared.errors import UserError

_ASSUMED_SEQ_LEN = 1024
_PROCESS_GIB = 4.0
"""Host memory of a training process beside its tensors."""
_SHARD_GIB = 5.0
"""Weight files are seldom larger."""
_BUFFER_GIB = 1 / 16
"""What the host holds of a file that is read in a stream, as all are on unified memory."""


@dataclass(frozen=True)
class Plan:
    """The answer: what the run needs on ``machine``, and what would fit instead."""

    machine: Machine
    load: Workload
    memory: memory.Memory
    speed: speed.Speed
    load_host_gib: float
    load_device_gib: float
    checkpoint_gib: float
    """One checkpoint on disk."""
    num_steps: int | None
    notes: tuple[str, ...]
    alternative: tuple[dict[str, Any], Workload] | None = None
    """Overrides that make it fit, and what they lead to; None where it fits or nothing does."""

    @property
    def needed_bytes(self) -> int:
        """Memory that counts against the machine's: on unified memory the host's as well, in a step and in loading."""
        if not self.machine.is_unified:
            return self.memory.total
        in_step = self.memory.total + int(self.step_host_gib * GIB)
        return max(in_step, int((self.load_host_gib + self.load_device_gib) * GIB))

    @property
    def fits(self) -> bool:
        """Whether the run fits."""
        return self.needed_bytes <= self.machine.usable_bytes and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether activations that wait on the host fit there, as far as its memory is known."""
        host_gib = self.machine.host_gib
        return host_gib is None or memory.offloaded(self.load) <= host_gib * GIB

    @property
    def step_host_gib(self) -> float:
        """What a step needs of the host's memory, in GiB."""
        return _host_gib(self.load) + memory.offloaded(self.load) / GIB


def plan_run(config: ConfigNode, machine: Machine, seq_len: int | None = None) -> Plan:
    """Return the plan of the run that ``config`` describes; ``seq_len`` is the longest row of unpacked data.

    Raises:
        UserError: the configuration is wrong, or its model is not one that can be outlined.
    """
    settings = load_settings(config)
    found = _outline(settings)
    load, notes = _workload(settings, found, seq_len)
    plan = _plan_of(settings, found, load, notes, machine)
    return plan if plan.fits else _with_alternative(plan, settings, found, seq_len)


def plan_policies(settings: RunSettings, machine: Machine, seq_len: int | None = None) -> list[Plan]:
    """Return the plan of a run under every policy that its layers know, the fastest first.

    Where none fits, the one that needs least holds the nearest settings that do.

    Raises:
        UserError: as `plan_run`.
    """
    found = _outline(settings)
    load, notes = _workload(settings, found, seq_len)
    policies = known_policies(is_fast=found.why_plain is None, shares_memory=machine.is_unified)
    plans = [_plan_of(settings, found, load.changed(recompute=policy), notes, machine) for policy in policies]
    plans.sort(key=lambda plan: -plan.speed.tokens_per_s)
    if not any(plan.fits for plan in plans):
        # activations that the host cannot hold are no way out
        least = min(range(len(plans)), key=lambda n: (not plans[n].fits_host, plans[n].needed_bytes))
        plans[least] = _with_alternative(plans[least], settings, found, seq_len)
    return plans


def predict(settings: RunSettings, rows: int, seq_len: int, policy: str) -> memory.Memory:
    """Return the memory at the peak of a micro-batch of that size.

    Raises:
        UserError: as `plan_run`.
    """
    found = _outline(settings)
    load, _ = _workload(settings, found, seq_len)
    with torch.enable_grad():  # the layers of the outline run backward, whoever asks
        return memory.peak(_with_plain_run(load.changed(rows=rows, seq_len=seq_len, recompute=policy), found))


def offloaded_bytes(settings: RunSettings, seq_len: int | None = None) -> tuple[int, Workload]:
    """Return how much of a micro-batch waits in the host's memory, and the micro-batch.

    Raises:
        UserError: as `plan_run`.
    """
    load, _ = _workload(settings, _outline(settings), seq_len)
    return memory.offloaded(load), load


def _plan_of(settings: RunSettings, found: Outline, load: Workload, notes: list[str], machine: Machine) -> Plan:
    _check_products_in_fp8(settings, load, machine)
    load = _with_plain_run(load, found)
    needed, fast = memory.peak(load), found.why_plain is None
    if memory.offloaded(load):
        notes = [*notes, f"The host holds {memory.offloaded(load) / GIB:.1f} GiB of activations, page-locked."]
    notes = [f"Decoder layers: {'fast' if fast else f'plain Transformers: {found.why_plain}'}.", *notes]
    if not machine.is_measured:
        notes.append("Rates of this GPU are scaled from a measured one by the datasheets.")
    return Plan(
        machine,
        load,
        needed,
        speed.estimate(load, machine),
        *_loading(load, needed, machine),
        checkpoint_gib=_checkpoint_gib(load),
        num_steps=settings.step_scheduler.max_steps,
        notes=tuple(notes),
    )


def _check_products_in_fp8(settings: RunSettings, load: Workload, machine: Machine) -> None:
    """Refuse a run that the GPU would refuse.

    Raises:
        UserError: it has no products in 8 bits, and they are asked for.
    """
    emulates = settings.fp8 is not None and settings.fp8.emulate
    if machine.fp8_tflops is not None or emulates or not (load.store == "fp8" or load.computes_in_fp8):
        return
    key = "quantization.compute_in_fp8" if load.computes_in_fp8 else "fp8.enabled"
    raise UserError(
        f"`{key}: true` needs compute capability 8.9, and {machine.name} has less. Set it to false, or plan for "
        "another GPU."
    )


def _with_alternative(plan: Plan, settings: RunSettings, found: Outline, seq_len: int | None) -> Plan:
    """Return the plan with the nearest settings that fit, if there are any, planned anew as they stand."""
    for overrides, other in alternatives(plan.load, settings):
        other = _with_plain_run(other, found)
        needed = memory.peak(other)
        host_gib, device_gib = _loading(other, needed, plan.machine)
        at_load = {"load_host_gib": host_gib, "load_device_gib": device_gib}
        candidate = Plan(**{**vars(plan), "load": other, "memory": needed, **at_load})
        if candidate.fits and _fits_anew(settings.config, overrides, plan.machine, seq_len, other.recompute):
            return Plan(**{**vars(plan), "alternative": (overrides, other)})
    return plan


def _fits_anew(
    config: ConfigNode, overrides: dict[str, Any], machine: Machine, seq_len: int | None, recompute: str
) -> bool:
    """Tell whether a configuration with ``overrides`` is one that could be started, and fits under a policy.

    Packages may be missing, options may not go together, and the layers that compute may be others.
    """
    changed = config.copy()
    for key, value in overrides.items():
        changed.set_by_dotted(key, value)
    try:
        settings = load_settings(changed)
        found = _outline(settings)
        load, notes = _workload(settings, found, seq_len)
        return _plan_of(settings, found, load.changed(recompute=recompute), notes, machine).fits
    except UserError:
        return False


def _outline(settings: RunSettings) -> Outline:
    target = targets.resolve(settings.model.get("_target_"), "model._target_")
    if target.__module__ != auto_model.__name__ or "ForCausalLM" not in str(settings.model.get("_target_")):
        raise UserError(
            f"`model._target_: {settings.model.get('_target_')}` cannot be planned. "
            "Use nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained or from_config."
        )
    peft = None if settings.peft is None else settings.peft.instantiate()
    wishes = model_wishes(settings, peft)
    node = settings.model.copy()
    node["_target_"] = f"{outline.__name__}.{target.__name__}"
    found: Outline = node.instantiate(**wishes, autocast_dtype=settings.distributed.autocast_dtype)
    return found


def _workload(settings: RunSettings, found: Outline, seq_len: int | None) -> tuple[Workload, list[str]]:
    notes = []
    schedule, packed = settings.step_scheduler, settings.packed_sequence.packed_sequence_size
    rows = schedule.local_batch_size
    length = packed or _row_length(settings, seq_len)
    if schedule.local_batch_tokens is not None:
        rows, length = 1, schedule.local_batch_tokens
    if length is None:
        length = _ASSUMED_SEQ_LEN
        notes.append(f"The longest row is taken to have {length:,} tokens; --seq-len says otherwise.")
    notes.append("Every token is taken to be learned: the worst case for the loss.")
    lora_dtype = "float32" if settings.peft is None else settings.peft.get("lora_dtype") or "float32"
    trainable_bytes = found.dtype.itemsize if settings.peft is None else parse_dtype(lora_dtype).itemsize
    optimizer = _optimizer_bytes(settings, trainable_bytes, notes)
    return Workload(
        shape=shape_of(found, model_path_of(settings.model) or type(found.model).__name__),
        rows=rows,
        seq_len=int(length),
        grad_accum=max(1, schedule.global_batch_size // max(1, schedule.local_batch_size)),
        store=_store(settings, found),
        computes_in_fp8=settings.quantization is not None and settings.quantization.compute_in_fp8,
        embeddings_on_host=found.options.embeddings_on_host,
        fp8_copies=2 if settings.fp8 is None else settings.fp8.num_copies(settings.peft is None),
        weight_bytes=found.dtype.itemsize,
        trainable_bytes=trainable_bytes,
        state_bytes=optimizer.state,
        step_bytes=optimizer.step,
        fp8_weight_grads=settings.fp8 is not None and settings.fp8.has_weight_grads,
        is_full=settings.peft is None,
        steps_in_backward=bool(settings.optimizer.get("in_backward")),
        recompute=settings.distributed.recompute_policy(),
        mlp_tile_tokens=settings.distributed.mlp_tile_tokens,
        dropout=0.0 if settings.peft is None else float(settings.peft.get("dropout") or 0.0),
        dropout_position="post" if settings.peft is None else str(settings.peft.get("dropout_position") or "post"),
        may_record=_may_record(settings),
        logits_copies=logits_copies(found),
    ), notes


def _row_length(settings: RunSettings, seq_len: int | None) -> int | None:
    """Return the length of the longest row, where something says it.

    Raises:
        UserError: it is less than a token.
    """
    named = {"--seq-len": seq_len, **{f"dataset.{key}": settings.dataset.get(key) for key in ("seq_length", "seq_len")}}
    for name, length in named.items():
        if length is not None:
            if length < 1:
                raise UserError(f"`{name}` is {length}, but a row has at least one token. Use a length such as 1024.")
            return int(length)
    return None


def _may_record(settings: RunSettings) -> bool:
    """Tell whether layers can be recorded: in rows of one length, as eight shapes of batches are recorded at most."""
    has_one_length = bool(settings.packed_sequence.packed_sequence_size) or "mock" in str(settings.dataset["_target_"])
    has_dora = settings.peft is not None and bool(settings.peft.get("use_dora"))
    return has_one_length and not has_dora and parse_cuda_graphs(settings.model.get("cuda_graphs", "auto")) != "off"


def _with_plain_run(load: Workload, found: Outline) -> Workload:
    if found.why_plain is None:
        return load
    check_plain_memory(load.recompute, load.mlp_tile_tokens, found.why_plain)
    return load.changed(plain=run_plain(found, load.rows, load.seq_len, load.recompute))


def _store(settings: RunSettings, found: Outline) -> str:
    if found.quantization is not None:
        return "nf4" if found.quantization.load_in_4bit else "int8"
    return "dense" if settings.fp8 is None else "fp8"


def _optimizer_bytes(settings: RunSettings, weight_bytes: int, notes: list[str]) -> OptimizerBytes:
    options = settings.optimizer.to_dict()
    target = str(options.pop("_target_"))
    found = bytes_of(target, options, weight_bytes)
    if not found.is_known:
        name = target.rpartition(".")[2]
        notes.append(f"The optimizer {name} is taken to keep two numbers for a weight, as Adam does.")
    return found


def _host_gib(load: Workload) -> float:
    """Return what a process needs of the host's memory beside activations, in GiB."""
    return _PROCESS_GIB + (load.shape.num_embedding * load.weight_bytes / GIB if load.embeddings_on_host else 0)


def _loading(load: Workload, needed: memory.Memory, machine: Machine) -> tuple[float, float]:
    """Return the peaks of host and device memory while weights are read, in GiB."""
    weights = (needed.weights + needed.embeddings) / GIB
    largest = max(linear.num_in * linear.num_out for linear in load.shape.linears) * load.weight_bytes / GIB
    shard = _BUFFER_GIB if machine.is_unified else min(_SHARD_GIB, load.shape.num_weights * load.weight_bytes / GIB)
    return _host_gib(load) + shard, weights + 3 * largest


def _checkpoint_gib(load: Workload) -> float:
    weights = load.shape.num_weights * load.trainable_bytes if load.is_full else load.num_trainable * 4
    return (weights + load.num_trainable * load.state_bytes) / GIB
