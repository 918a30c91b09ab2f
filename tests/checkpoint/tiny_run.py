"""A run of a few hundred parameters with everything a checkpoint holds: dropout, shuffled data, parameter groups."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.checkpoint.parts import Parts
from nemo_automodel.components.training.rng import StatefulRNG

CONFIG: dict[str, Any] = {
    "step_scheduler": {"global_batch_size": 4, "local_batch_size": 4, "max_steps": 100},
    "model": {"pretrained_model_name_or_path": "models/Tiny-Net"},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-2, "betas": [0.9, 0.999]},
    "dataset": {"_target_": "nemo_automodel.components.datasets.llm.squad.make_squad_dataset"},
}


class Net(nn.Module):
    """Trains `hidden` and `head`; `frozen` never, and `unused` is trained but never gets a gradient."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, width, dtype=dtype)
        self.frozen = nn.Linear(width, width, dtype=dtype).requires_grad_(False)
        self.unused = nn.Linear(2, 2, dtype=dtype)
        self.head = nn.Linear(width, 1, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(torch.tanh(self.frozen(self.hidden(x))), 0.2)
        return self.head(x).squeeze(-1)


class SafetensorsFiles:
    """The simplest way to write a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def write_from(self, directory: Path, weights: dict[str, torch.Tensor] | None) -> None:
        if weights is not None:
            save_file(weights, directory / "model.safetensors")

    def read(self, directory: Path) -> None:
        self.model.load_state_dict(load_file(directory / "model.safetensors"))


class Steps:
    """Counts steps as a step scheduler does."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Rows:
    """Batches of four rows in another order each epoch; the last batch of an epoch is short."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.epoch, self.position = 0, 0

    def next_batch(self) -> torch.Tensor:
        if self.position >= len(self.rows):
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch))
        self.position += 4
        return self.rows[order[self.position - 4 : self.position]]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Halving:
    """A schedule with state of its own: halves the rate of every group every three steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.num_steps = 0

    def step(self) -> None:
        self.num_steps += 1
        if self.num_steps % 3 == 0:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "style": "halving"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]


MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2)


class Run:
    """A run that trains on ``run_dir``; the same arguments give the same numbers, bit for bit."""

    def __init__(
        self,
        run_dir: Path,
        make_optimizer: MakeOptimizer = adamw,
        dtype: torch.dtype = torch.float32,
        width: int = 8,
        checkpoint_dir: Path | None = None,
        **settings: Any,
    ) -> None:
        self.rng = StatefulRNG(7)
        self.model = Net(width, dtype)
        self.optimizer = make_optimizer(
            [
                {"params": list(self.model.hidden.parameters()), "lr": 2e-2},
                {"params": [*self.model.unused.parameters(), *self.model.head.parameters()], "weight_decay": 0.1},
            ]
        )
        rows = torch.randn(22, 5).to(dtype)
        self.loader = Rows(rows)
        self.steps = Steps()
        self.schedule = Halving(self.optimizer)
        self.config = CheckpointingConfig(checkpoint_dir=str(checkpoint_dir or run_dir), **settings)
        self.checkpointer = Checkpointer(self.config, run_dir)

    def parts(self) -> Parts:
        return Parts(
            model_files=SafetensorsFiles(self.model),
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
            schedule=self.steps,
            train_loader=self.loader,
            rng=self.rng,
            config_yaml=CONFIG,
        )

    def train(self, num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            batch = self.loader.next_batch()
            loss = (self.model(batch[:, :4]) - batch[:, 4]).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.steps.step += 1
            losses.append(loss.item())
        return losses

    def save(self, val_loss: float | None = None, **options: Any) -> Path:
        losses = {"train_loss": 1.0} if val_loss is None else {"train_loss": 1.0, "val_loss": val_loss}
        return self.checkpointer.save(self.steps.step - 1, 0, self.parts(), losses, **options)

    def load(self, path: Path) -> None:
        self.checkpointer.load(path, self.parts())

    def state(self) -> dict[str, Any]:
        """Return everything that training changes, as plain comparable values."""
        optimizer = self.optimizer.state_dict()
        return copy.deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "state": optimizer["state"],
                "groups": optimizer["param_groups"],
                "steps": self.steps.step,
                "schedule": self.schedule.num_steps,
            }
        )


def assert_same(left: Any, right: Any, place: str = "") -> None:
    """Compare nested values bit for bit, dtypes included."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, place
        assert torch.equal(left, right), place
    elif isinstance(left, list):
        assert len(left) == len(right), place
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{place}.{i}")
    else:
        assert left == right, place


def contents(root: Path) -> dict[str, str]:
    """Return a digest of every file and the target of every link below ``root``; the lock file is not contents."""
    found = {}
    for directory, folders, names in os.walk(root):
        for name in [*names, *folders]:
            path = Path(directory, name)
            key = str(path.relative_to(root))
            if path.is_symlink():
                found[key] = f"-> {path.readlink()}"
            elif path.is_file() and name != ".lock":
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run ``work`` in a forked process; return its exit status (negative: the signal) and its JSON result."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            result = work()
            os.write(writer, json.dumps(result).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, json.loads(text) if text else None


def fake_checkpoint(
    run_dir: Path, step: int, config: dict[str, Any] | None = None, epoch: int = 0, **progress: Any
) -> Path:
    """Write a directory that looks like a complete checkpoint from outside."""
    import yaml

    path = run_dir / f"epoch_{epoch}_step_{step}"
    (path / "model").mkdir(parents=True)
    (path / "optim").mkdir()
    (path / "optim" / ".metadata").touch()
    (path / "step_scheduler.pt").touch()
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    if progress:
        (path / "progress.json").write_text(json.dumps(progress))
    return path
