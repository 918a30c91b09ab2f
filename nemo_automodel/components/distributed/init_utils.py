"""Which device this process trains on, and how it meets the others."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nemo_automodel.components.distributed.config import DistEnvConfig
from nemo_automodel.components.distributed.ranks import ALONE, Ranks
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError, RankLostError, UserError
from nemo_automodel.shared.processes import num_processes, rank

_MEETING = timedelta(minutes=5)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistInfo:
    """This process among all processes of the run."""

    device: torch.device
    backend: str
    """The backend in effect: ``nccl`` on CUDA, ``gloo`` on the CPU."""
    ranks: Ranks = ALONE

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.ranks.size


def initialize_distributed(config: DistEnvConfig) -> DistInfo:
    """Choose the device from ``dist_env.backend``, and meet the other processes. One process needs no process group.

    ``nccl`` means CUDA; on a machine without a CUDA device the CPU takes its place and one line says so. ``gloo`` means
    the CPU. Of several processes each takes the GPU of its ``LOCAL_RANK``; numbers of the host go through gloo anyway.

    Raises:
        NotSupportedYetError: the processes are on several machines.
        ConfigError: a backend that is neither.
        UserError: there are more processes than GPUs.
    """
    world_size = num_processes()
    if world_size > 1 and os.environ.get("LOCAL_WORLD_SIZE", str(world_size)) != str(world_size):
        raise NotSupportedYetError(
            f"{os.environ['LOCAL_WORLD_SIZE']} of {world_size} processes are on this machine, but training on several "
            "machines is not supported yet. Start them on one."
        )
    logger.info("> initializing torch distributed with %d workers.", world_size)
    device, backend = _choose_device(config.backend)
    if world_size == 1:
        return DistInfo(device, backend)
    return DistInfo(device, backend, _meet(backend, rank(), world_size, timedelta(minutes=config.timeout_minutes)))


def _meet(backend: str, rank: int, world_size: int, timeout: timedelta) -> Ranks:
    """Find the other processes, which may take longer to start than `dist_env.timeout_minutes`.

    Raises:
        RankLostError: not all of them came.
    """
    if not dist.is_initialized():
        if sys.platform == "linux":
            # processes of one machine: gloo would ask for the host's name, which not every machine can resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backends = "gloo" if backend == "gloo" else f"cpu:gloo,cuda:{backend}"
        try:
            store, _, _ = next(rendezvous("env://", rank, world_size, timeout=max(_MEETING, timeout)))
            dist.init_process_group(backends, store=store, timeout=timeout, rank=rank, world_size=world_size)
        except dist.DistError as error:
            raise RankLostError(
                f"The {world_size} processes did not find each other at {os.environ.get('MASTER_ADDR')} port "
                f"{os.environ.get('MASTER_PORT')}: one did not start, or something else has that port. Start again, "
                "with `automodel <config.yaml> --nproc-per-node N`, or give torchrun a free --master-port."
            ) from error
    return Ranks(rank, world_size)


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
    num_devices = torch.cuda.device_count()
    if max(local_rank + 1, num_processes()) > num_devices:
        wanted = f"LOCAL_RANK is {local_rank}" if num_processes() == 1 else f"{num_processes()} processes were started"
        raise UserError(
            f"{wanted}, but this machine shows {num_devices} CUDA device(s). "
            "Start fewer processes, or check CUDA_VISIBLE_DEVICES."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device, "nccl"
