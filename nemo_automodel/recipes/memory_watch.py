"""When a recipe watches the machine's memory, and what it says of itself if it has to stop."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from nemo_automodel.components.training.memory_watch import MemoryWatch, floor_for
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.memory import gib

logger = logging.getLogger(__name__)


def watch_set_up(settings: RunSettings, device: torch.device) -> MemoryWatch:
    """Return the watch over everything between the data and the first step: model, optimizer, checkpoint.

    Raises:
        UserError: a floor is set where memory cannot be read.
    """
    floor = floor_for(device, settings.unified_memory.floor_gib)
    if floor is not None:
        logger.info("Memory: the run is stopped when less than %s are available.", gib(floor.num_bytes))
    return MemoryWatch(floor, "loading the model", "Training had not begun.")


def watch_training(settings: RunSettings, device: torch.device, run_directory: Path) -> MemoryWatch:
    """Return the watch over the loop."""
    state = (
        f"Nothing more was saved, since that takes memory; a checkpoint that is in `{run_directory}` is whole, and the "
        "same command goes on from it."
    )
    return MemoryWatch(floor_for(device, settings.unified_memory.floor_gib), "training", state)
