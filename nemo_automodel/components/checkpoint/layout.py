"""Names inside a checkpoint directory. Free of torch.

    checkpoints/                         the checkpoint directory; also the directory of the run that came first
      epoch_0_step_99/                   a published checkpoint, never written again
        config.yaml                      the effective configuration
        losses.json  progress.json       readable without torch; so is loss_guard.json
        manifest.json                    size and checksum of every other file
        dataloader/  rng/  optim/  model/
        resume/                          the batch that comes next and its loss, to be compared at the resume
        step_scheduler.pt
      epoch_0_step_99.reserving-<uuid>/  a checkpoint being written; holds `.incomplete`
      LATEST  LOWEST_VAL                 relative links to checkpoints
      training.jsonl  validation.jsonl
      <run name>/                        a later run with another configuration: the same again

A directory that carries a checkpoint's name is complete or foreign, because a checkpoint gets its name by one rename
after everything in it is on the disk. Whatever a crash leaves behind can be told by its name and is removed by the next
run that owns the directory.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from pathlib import Path

CONFIG_FILE = "config.yaml"
LOSSES_FILE = "losses.json"
PROGRESS_FILE = "progress.json"
SCHEDULE_FILE = "step_scheduler.pt"
DATALOADER_FILE = "dataloader/dataloader_dp_rank_0.pt"
"""Of the first process; every process has one."""
RNG_FILE = "rng/rng_global_rank_0.pt"
"""Likewise."""
LEGACY_RNG_FILE = "rng/rng_dp_rank_0.pt"
LOSS_GUARD_FILE = "loss_guard.json"
WITNESS_FILE = "resume/witness.json"
WITNESS_BATCH_FILE = "resume/batch.safetensors"
MODEL_DIR = "model"
MODEL_DCP_DIR = "model_dcp"
"""Weights in torch's distributed format, where they are not in `model/`."""
OPTIM_DIR = "optim"

INCOMPLETE_MARKER = ".incomplete"
RUN_CONFIG_FILE = ".run.yaml"
"""The configuration of the run that owns a directory, until a checkpoint carries it."""

_CHECKPOINT_NAME = re.compile(r"(?:.*_)?step_(\d+)")
_STAGED_NAME = re.compile(r".*step_\d+\.reserving-[0-9a-f-]+")
_TEMPORARY_NAME = re.compile(r"\.automodel-[0-9a-f]{32}\.tmp")

logger = logging.getLogger(__name__)


def dataloader_file(rank: int) -> str:
    """Return the name of a process's place in the data."""
    return DATALOADER_FILE.replace("_0.pt", f"_{rank}.pt")


def rng_file(rank: int) -> str:
    """Return the name of a process's random numbers."""
    return RNG_FILE.replace("_0.pt", f"_{rank}.pt")


def num_ranks(checkpoint: Path) -> int:
    """Return how many processes saved a checkpoint."""
    return max(1, len(list((checkpoint / RNG_FILE).parent.glob("rng_global_rank_*.pt"))))


def checkpoint_name(epoch: int, step_index: int) -> str:
    """Return ``epoch_0_step_99``; steps count from 0."""
    return f"epoch_{epoch}_step_{step_index}"


def step_of(path: Path) -> int | None:
    """Return the step index in the name of a checkpoint, or None where the name is not a checkpoint's."""
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def missing_parts(path: Path) -> list[str]:
    """Return what keeps ``path`` from being a complete checkpoint; an empty list means that it is one."""
    if not path.is_dir():
        return ["the directory"]
    if (path / INCOMPLETE_MARKER).exists() or _STAGED_NAME.fullmatch(path.name):
        return ["the end of its save, which was interrupted"]
    wanted = (f"{MODEL_DIR}/", f"{OPTIM_DIR}/.metadata", SCHEDULE_FILE)
    return [name for name in wanted if not (path / name).exists()]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints directly in ``run_dir``, lowest step first."""
    if not run_dir.is_dir():
        return []
    found = [(step, path) for path in run_dir.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found) if not path.is_symlink() and not missing_parts(path)]


def staging_path(target: Path) -> Path:
    """Return a new name beside ``target``, which a checkpoint has while it is written."""
    return target.with_name(f"{target.name}.reserving-{uuid.uuid4()}")


def temporary_path(directory: Path) -> Path:
    """Return a new name in ``directory`` for a file that will be renamed."""
    return directory / f".automodel-{uuid.uuid4().hex}.tmp"


def remove_leftovers(run_dir: Path) -> None:
    """Remove what interrupted saves left in ``run_dir``; complete checkpoints and foreign files stay."""
    for path in sorted(run_dir.iterdir()):
        if path.is_symlink() or path.is_file():
            if _TEMPORARY_NAME.fullmatch(path.name):
                path.unlink()
        elif _STAGED_NAME.fullmatch(path.name) or (step_of(path) is not None and (path / INCOMPLETE_MARKER).exists()):
            logger.info("Removing %s, which an interrupted save left behind", path)
            shutil.rmtree(path)


def delete_checkpoint(path: Path) -> None:
    """Delete a published checkpoint so that a crash half-way leaves no half of it under its name."""
    doomed = staging_path(path)
    path.rename(doomed)
    shutil.rmtree(doomed)
