"""What a checkpoint holds of a run, and a picture of it that training cannot change any more.

Saving takes two steps. First a `Snapshot` is taken: numbers, positions and random states become bytes at once, because
the very next batch changes them; weights and optimizer states, which only the next update changes, are referred to.
Then the snapshot is written. A save in the background has to copy the tensors before that update (*staging*), which
costs their size in host memory; a save that training waits for copies nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import nn
from torch.optim import Optimizer

from nemo_automodel.components.checkpoint import dcp
from nemo_automodel.components.checkpoint.layout import (
    CONFIG_FILE,
    LOSS_GUARD_FILE,
    SCHEDULE_FILE,
    dataloader_file,
    rng_file,
)
from nemo_automodel.components.checkpoint.optimizer_state import GROUP_PREFIX, OPTIM_KEY, optimizer_entries
from nemo_automodel.components.checkpoint.state import to_bytes
from nemo_automodel.components.checkpoint.witness import Witness, to_files
from nemo_automodel.shared.types import Stateful

SCHED_KEY = "sched"


class ModelFiles(Protocol):
    """How a model's weights become files: a Hugging Face directory, or adapter files."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the live tensors that belong into a checkpoint, by name."""

    def write_from(self, directory: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Write configuration, tokenizer and these weights, or copies, into an empty directory; None: no weights."""

    def read(self, directory: Path) -> None:
        """Read weights that ``write_from`` wrote into the live model.

        Raises:
            UserError: files are missing or damaged, or the weights do not fit.
        """


@dataclass
class Parts:
    """Everything of a run that a checkpoint holds, by name."""

    model_files: ModelFiles
    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: Stateful | None
    """None: the learning rate is constant."""
    schedule: Stateful
    train_loader: Stateful
    rng: Stateful
    config_yaml: dict[str, Any]
    """The effective configuration, as it reproduces the run."""
    loss_guard: Stateful | None = None
    """What the run remembers of its losses, as plain JSON values."""
    witness: Witness | None = None
    """What a resume of this moment compares itself with; it is only written, never loaded into the run."""
    rank: int = 0
    """Number of this process among those of the run."""
    num_ranks: int = 1
    is_share: bool = False
    """The optimizer has only this process's share of the trained parameters."""
    write_state: Callable[[Path, Mapping[str, Any]], None] = dcp.write
    """Writes the state of optimizer and schedule; where every process has a share, with all of them."""
    files_of_others: dict[str, bytes] = field(default_factory=dict)
    """What `files_of_rank` returns in the other processes, where the first one writes for all."""


@dataclass
class Snapshot:
    """A run at one moment."""

    model_files: ModelFiles
    weights: dict[str, torch.Tensor]
    state: dict[str, dict[str, Any]]
    """Optimizer and learning rate schedule, nested as DCP wants them."""
    files: dict[str, bytes]
    """Small files by name."""
    write_state: Callable[[Path, Mapping[str, Any]], None] = dcp.write
    _moment: torch.cuda.Event | None = field(default=None, repr=False)

    def stage(self) -> None:
        """Replace all tensors by copies on the CPU; call it before anything changes the live ones."""
        copies: dict[tuple[Any, ...], torch.Tensor] = {}
        if self._moment is None:
            self._copy(copies)
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_event(self._moment)  # what the device still had to do when the snapshot was taken
        with torch.cuda.stream(stream):
            self._copy(copies)
        stream.synchronize()

    def _copy(self, copies: dict[tuple[Any, ...], torch.Tensor]) -> None:
        self.weights = {name: _copied(tensor, copies) for name, tensor in self.weights.items()}
        self.state = {
            section: {
                name: _copied(value, copies) if isinstance(value, torch.Tensor) else value
                for name, value in entries.items()
            }
            for section, entries in self.state.items()
        }


def files_of_rank(rank: int, train_loader: Stateful, rng: Stateful) -> dict[str, bytes]:
    """Return the files that every process has for itself, by name."""
    return {
        dataloader_file(rank): to_bytes(train_loader.state_dict()),
        rng_file(rank): to_bytes(rng.state_dict()),
    }


def take_snapshot(parts: Parts) -> Snapshot:
    """Return the run as it is now; its tensors are the live ones until ``stage`` is called."""
    # the settings of groups, a learning rate kept as a tensor for example, change apart from the optimizer's steps
    entries = {
        name: value.detach().clone() if name.startswith(GROUP_PREFIX) and isinstance(value, torch.Tensor) else value
        for name, value in optimizer_entries(parts.model, parts.optimizer).items()
    }
    state: dict[str, dict[str, Any]] = {OPTIM_KEY: entries}
    if parts.lr_scheduler is not None:
        state[SCHED_KEY] = copy.deepcopy(parts.lr_scheduler.state_dict())
    files = {
        **files_of_rank(parts.rank, parts.train_loader, parts.rng),
        **parts.files_of_others,
        SCHEDULE_FILE: to_bytes(parts.schedule.state_dict()),
        CONFIG_FILE: yaml.safe_dump(parts.config_yaml, sort_keys=False, allow_unicode=True).encode(),
    }
    if parts.loss_guard is not None:
        files[LOSS_GUARD_FILE] = json.dumps(parts.loss_guard.state_dict()).encode() + b"\n"
    if parts.witness is not None:
        files |= to_files(parts.witness)
    weights = parts.model_files.weights()
    moment = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        moment = torch.cuda.Event()  # type: ignore[no-untyped-call]
        moment.record()
    return Snapshot(parts.model_files, weights, state, files, parts.write_state, moment)


def _copied(tensor: torch.Tensor, copies: dict[tuple[Any, ...], torch.Tensor]) -> torch.Tensor:
    """Return a copy on the CPU; tensors that are one in memory, as tied weights are, stay one."""
    if tensor.numel() == 0:
        return tensor.detach().clone()
    key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
    if key not in copies:
        copies[key] = tensor.detach().to("cpu", copy=True)
    return copies[key]
