"""Whether two configurations mean the same run. Free of torch.

A run is what it trains and on what: model, adaptation, data, optimizer, batch sizes, seed. How long it goes on, how
often it saves and speaks, and where to, may change from one start to the next without making it another run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

LEFT_OUT = {
    "step_scheduler.num_epochs": "how long; a longer run is the same run extended",
    "step_scheduler.max_steps": "how long",
    "step_scheduler.start_step": "where to go on",
    "step_scheduler.start_epoch": "where to go on",
    "lr_scheduler.lr_decay_steps": "how long",
    "lr_scheduler.wd_incr_steps": "how long",
    "lr_scheduler.use_checkpoint_opt_param_scheduler": "how to go on",
    "lr_scheduler.override_opt_param_scheduler": "how to go on",
    "step_scheduler.ckpt_every_steps": "how often",
    "step_scheduler.save_checkpoint_every_epoch": "how often",
    "step_scheduler.val_every_steps": "how often",
    "step_scheduler.log_remote_every_steps": "how often",
    "step_scheduler.loss_average_window_steps": "how it is reported",
    "step_scheduler.gc_every_steps": "how often",
    "step_scheduler.preemption_signal": "how it is stopped",
    "checkpoint": "where and how it is saved",
    "wandb": "where it is reported",
    "mlflow": "where it is reported",
    "comet": "where it is reported",
    "tensorboard": "where it is reported",
    "nvtx": "what is measured",
    "mfu": "what is measured",
    "benchmark": "what is measured",
    "moe_metrics": "what is measured",
    "dist_env": "how processes find each other",
    "distributed.strategy": "how it is spread over devices; the updates are the same",
    "distributed.dp_size": "over how many",
    "distributed.dp_replicate_size": "over how many",
    "distributed.bucket_cap_mb": "in which portions gradients are added up",
    "slurm": "where it is started",
    "skypilot": "where it is started",
    "nemo_run": "where it is started",
    "k8s": "where it is started",
    "loss_guard": "what happens to sick steps; a run that stopped at one may go on without it",
    "memory": "how it is made to fit; the updates are the same",
    "unified_memory": "when it is stopped for the machine's sake",
    "data_check": "what is looked at before it starts",
    "recipe": "the command line needs it, the example scripts do not",
    "ci": "never read",
}
"""Keys and sections that are no part of a run's identity, and why. ``checkpoint.enabled: false`` is the one exception:
a run that saves nothing must not write into the records of one that does."""

_ABSENT = "absent"
_NUM_LISTED = 3


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of every leaf; list elements are numbered, empty containers are leaves."""
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        items = list(enumerate(tree))
    if not items:
        yield prefix, _plain(tree)
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold and that is equal for 1 and 1.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {} if value == {} else [] if value in ([], ()) else str(value)


def run_identity(effective: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of an effective configuration that decide what is trained, by dotted key."""
    identity = {key: value for key, value in flatten(effective) if not _is_left_out(key)}
    if (effective.get("checkpoint") or {}).get("enabled") is False:
        identity["checkpoint.enabled"] = False
    return identity


def _is_left_out(key: str) -> bool:
    parts = key.split(".")
    return parts[0].startswith("_") or any(".".join(parts[: n + 1]) in LEFT_OUT for n in range(len(parts)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return ``(key, old value, new value)`` where two identities differ, the model first.

    A key that is not there is ``absent``.
    """
    keys = sorted({*old, *new}, key=lambda key: (not key.startswith("model."), key))
    found = [(key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys]
    return [item for item in found if item[1] != item[2]]


def describe(found: list[tuple[str, Any, Any]]) -> str:
    """Return differences as one line, ``optimizer.lr (1e-05 → 2e-05), …``; of many the first few."""
    listed = [f"`{key}` ({old} → {new})" for key, old, new in found[:_NUM_LISTED]]
    more = len(found) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")


def run_name(identity: Mapping[str, Any]) -> str:
    """Return a directory name such as ``llama-3.1-8b-qlora-1a2b3c4d``: model, method, and a hash of the identity."""
    keys = ("model.pretrained_model_name_or_path", "model.config.pretrained_model_name_or_path", "model.config")
    named = [str(identity[key]) for key in keys if identity.get(key)]
    target = str(identity.get("model._target_", "model"))
    model = (named[0] if named else target).rstrip("/").rpartition("/")[2]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-.")
    return f"{readable or 'model'}-{_method(identity, target)}-{digest}"


def _method(identity: Mapping[str, Any], model_target: str) -> str:
    if any(key.startswith("peft.") for key in identity):
        is_quantized = identity.get("quantization.load_in_4bit") or identity.get("quantization.load_in_8bit")
        return ("q" if is_quantized else "") + ("dora" if identity.get("peft.use_dora") else "lora")
    return "pretrain" if model_target.endswith("from_config") else "sft"
