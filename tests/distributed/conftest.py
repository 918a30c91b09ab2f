"""A small run that several processes train, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ranks import fork_ranks, wait_for
from support.recipes import recipe_config, set_up_recipe


@pytest.fixture
def make_config(tmp_path, model_dirs, squad_dir):
    """Return a function that writes out a run of two micro-batches a step."""

    def make(run, **overrides):
        settings = {
            "step_scheduler__global_batch_size": 8,
            "step_scheduler__local_batch_size": 2,
            "step_scheduler__max_steps": 5,
            "dataloader": {"shuffle": True},
            "distributed": {"strategy": "ddp"},
            "lr_scheduler": {"lr_decay_style": "constant", "lr_warmup_steps": 0},
            "clip_grad_norm": {"max_norm": 0.5},
            "data_check": False,
            **overrides,
        }
        return recipe_config(model_dirs("llama"), squad_dir, tmp_path / run, **settings)

    return make


class Training:
    """Trains with several processes; ``said`` is what one of them wrote to standard error."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, config, size, before_loop=lambda recipe, rank: None) -> list[int]:
        return wait_for(self.start(config, size, before_loop))

    def start(self, config, size, before_loop=lambda recipe, rank: None) -> list[int]:
        name = Path(config["checkpoint"]["checkpoint_dir"]).name

        def work(rank):
            recipe = set_up_recipe(config, self.root / f"{name}_{rank}.yaml")
            before_loop(recipe, rank)
            recipe.run_train_validation_loop()

        return fork_ranks(size, work, self.root / f"{name}_logs")

    def said(self, run: str, rank: int = 0) -> str:
        path = self.root / f"{run}_logs" / f"rank_{rank}"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def train(tmp_path):
    return Training(tmp_path)
