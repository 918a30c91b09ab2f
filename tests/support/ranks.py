"""Several processes of one run, forked from the test: what they import is there already."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file


def fork_ranks(size: int, work: Callable[[int], object], log_dir: Path) -> list[int]:
    """Start ``work(rank)`` in so many processes, as a command line would, and return their process ids.

    What a process writes to standard error is kept in ``log_dir/rank_<n>``.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os._exit(_as_rank(rank, size, port, work, log_dir / f"rank_{rank}"))
        pids.append(pid)
    return pids


def wait_for(pids: list[int]) -> list[int]:
    """Return the exit statuses, 128 plus the signal for a process that was killed."""
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [128 - status if status < 0 else status for status in statuses]


def run_ranks(size: int, work: Callable[[int], object], log_dir: Path) -> list[int]:
    """Do both."""
    return wait_for(fork_ranks(size, work, log_dir))


def _as_rank(rank: int, size: int, port: int, work: Callable[[int], object], log: Path) -> int:
    from nemo_automodel.components.config.run_safely import run_safely

    for stream, name in ((1, f"{log}_out"), (2, str(log))):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        return run_safely(lambda: work(rank))
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()


def records(config: dict, name: str = "training") -> list[dict]:
    """Return the lines of a run's log."""
    lines = (Path(config["checkpoint"]["checkpoint_dir"]) / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(config: dict) -> dict[str, torch.Tensor]:
    """Return the trained weights of a run's last checkpoint."""
    (path,) = (Path(config["checkpoint"]["checkpoint_dir"]) / "LATEST" / "model").glob("*.safetensors")
    return load_file(path)


def losses(config: dict) -> list[tuple[int, float, float, int]]:
    """Return what a run's log says of its steps."""
    return [(r["step"], r["loss"], r["grad_norm"], r["num_label_tokens"]) for r in records(config)]
