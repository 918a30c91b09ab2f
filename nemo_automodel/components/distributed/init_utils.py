"""Which device this process trains on."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from nemo_automodel.components.distributed.config import DistEnvConfig
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistInfo:
    """This process among all processes of the run."""

    device: torch.device
    backend: str
    """The backend in effect: ``nccl`` on CUDA, ``gloo`` on the CPU."""
    rank: int = 0
    world_size: int = 1


def initialize_distributed(config: DistEnvConfig) -> DistInfo:
    """Choose the device from ``dist_env.backend``. One process needs no process group.

    ``nccl`` means CUDA; on a machine without a CUDA device the CPU takes its place and one line says so. ``gloo`` means
    the CPU.

    Raises:
        NotSupportedYetError: started as one of several processes.
        ConfigError: a backend that is neither.
        UserError: ``LOCAL_RANK`` names a GPU that is not there.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise NotSupportedYetError(
            f"This run was started as {world_size} processes, but training on more than one device is not supported "
            "yet. Start it with `--nproc-per-node 1`."
        )
    logger.info("> initializing torch distributed with %d workers.", world_size)
    return DistInfo(*_choose_device(config.backend))


def _choose_device(backend: str) -> tuple[torch.device, str]:
    names = {part.rpartition(":")[2] for part in backend.lower().split(",")}  # also `cpu:gloo,cuda:nccl`
    if not names <= {"nccl", "gloo"}:
        raise ConfigError(f"`dist_env.backend: {backend}` is not supported. Use nccl (CUDA) or gloo (CPU).")
    if "nccl" not in names:
        if torch.cuda.is_available():
            logger.info("`dist_env.backend: gloo`: training on the CPU although a CUDA device is here.")
        return torch.device("cpu"), "gloo"
    if not torch.cuda.is_available():
        logger.info("`dist_env.backend: nccl`, but no CUDA device is usable here: training on the CPU with gloo.")
        return torch.device("cpu"), "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this machine shows {torch.cuda.device_count()} CUDA device(s). "
            "Start fewer processes, or check CUDA_VISIBLE_DEVICES."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device, "nccl"
