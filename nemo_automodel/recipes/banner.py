"""What a run says about itself before the first step: who, where, with what, and what is trained in which dtype."""

from __future__ import annotations

import getpass
import importlib.metadata
import logging
import platform
import socket
import sys
from collections import Counter
from datetime import datetime
from typing import Any

import torch
import yaml

from nemo_automodel.components.distributed.init_utils import DistInfo
from nemo_automodel.components.optim.scheduler import SchedulePlan
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.components.training.step_scheduler import StepScheduler
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.dtypes import dtype_name

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "datasets", "safetensors", "torchdata", "bitsandbytes")
_NUM_REPR_LINES = 40


def log_experiment(recipe: str, model_name: str, info: DistInfo, effective: dict[str, Any]) -> None:
    """Say who runs what where, write the configuration to standard output, and list the libraries."""
    details = {
        "Timestamp": datetime.now().isoformat(timespec="seconds"),
        "User": _user_name(),
        "Host": socket.gethostname(),
        "World size": info.world_size,
        "Backend": info.backend,
        "Device": _device_name(info.device),
        "Recipe": recipe,
        "Model name": model_name,
    }
    logger.info("Experiment_details:\n%s", yaml.safe_dump(details, sort_keys=False).rstrip())
    if info.rank == 0:
        sys.stdout.write(yaml.safe_dump(effective, sort_keys=False))
        sys.stdout.flush()
    found = [f"{name} {version}" for name in _LIBRARIES if (version := _version(name))]
    logger.info("Library versions: python %s, %s", platform.python_version(), ", ".join(found))


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container that runs under a number without a name
        return "unknown"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def log_model(model: torch.nn.Module) -> None:
    """Show the head of the model's tree, its parameters, their norm and their dtypes."""
    lines = str(model).splitlines()
    more = [f"... {len(lines) - _NUM_REPR_LINES} more lines"] if len(lines) > _NUM_REPR_LINES else []
    logger.info("Model:\n%s", "\n".join([*lines[:_NUM_REPR_LINES], *more]))
    trainable, frozen = _sizes_by_dtype(model, is_trainable=True), _sizes_by_dtype(model, is_trainable=False)
    num_trainable = sum(trainable.values())
    num_all = num_trainable + sum(frozen.values())
    logger.info(
        "Model summary: trainable parameters %s of %s (%.4f %%), L2 norm of the trainable ones %.4f",
        f"{num_trainable:,}",
        f"{num_all:,}",
        100 * num_trainable / num_all,
        _trainable_norm(model),
    )
    logger.info("Parameters by dtype: trainable %s | frozen %s", _table(trainable), _table(frozen))


def log_plan(
    settings: RunSettings, optimizer: torch.optim.Optimizer, rates: SchedulePlan, schedule: StepScheduler
) -> None:
    """Say how the model will be updated: the optimizer, its learning rates, the steps."""
    logger.info("Optimizer: %s", str(optimizer))  # a record may be kept, and the weights with the optimizer in it
    logger.info("LR scheduler: %s", rates)
    max_tokens = settings.step_scheduler.local_batch_tokens
    logger.info(
        "Step scheduler: %s, %s a step, starting at step %d of epoch %d",
        schedule.describe(),
        f"{schedule.grad_accum} micro-batches"
        if max_tokens is None
        else f"micro-batches of at most {max_tokens:,} tokens",
        schedule.step,
        schedule.epoch,
    )


def _sizes_by_dtype(model: torch.nn.Module, is_trainable: bool) -> Counter[str]:
    """Return how many parameters there are of each dtype; 4-bit weights lie two in a byte or more in a word."""
    sizes: Counter[str] = Counter()
    packed = {id(m.weight) for m in model.modules() if isinstance(m, Linear4bit)}
    for p in model.parameters():
        if p.requires_grad != is_trainable:
            continue
        if id(p) in packed or type(p).__name__ == "Params4bit":  # by name: bitsandbytes is optional
            sizes["4-bit"] += p.numel() * p.element_size() * 2
        else:
            sizes[dtype_name(p.dtype)] += p.numel()
    return sizes


def _table(sizes: Counter[str]) -> str:
    return ", ".join(f"{name} {size:,}" for name, size in sizes.most_common()) or "none"


def _trainable_norm(model: torch.nn.Module) -> float:
    trainable = [p.detach() for p in model.parameters() if p.requires_grad]
    if not trainable:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(trainable, 2, dtype=torch.float32))))
