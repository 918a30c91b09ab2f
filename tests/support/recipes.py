"""A small recipe as a mapping, and a way to set it up."""

from __future__ import annotations

from pathlib import Path

import yaml


def recipe_config(model_dir: Path, squad_dir: Path, run_dir: Path, **overrides: object) -> dict:
    """Return a fine-tuning configuration for a tiny model; ``a__b=value`` sets ``a.b``."""
    config: dict = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": 7,
        "step_scheduler": {
            "global_batch_size": 4,
            "local_batch_size": 2,
            "num_epochs": 10,
            "max_steps": 50,
            "ckpt_every_steps": 1000,
            "save_checkpoint_every_epoch": False,
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(model_dir),
            "torch_dtype": "float32",
        },
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.squad.make_squad_dataset",
            "dataset_name": str(squad_dir),
            "split": "train",
        },
        "dataloader": {"shuffle": False},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6},
        "lr_scheduler": {"lr_decay_style": "cosine", "lr_warmup_steps": 5, "min_lr": 1e-4, "init_lr": 0.0},
        "checkpoint": {"checkpoint_dir": str(run_dir)},
    }
    for key, value in overrides.items():
        node = config
        *path, last = key.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return config


def lora_section() -> dict:
    """Return a ``peft:`` section over every projection."""
    return {
        "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
        "target_modules": "*_proj",
        "dim": 4,
        "alpha": 16,
    }


def set_up_recipe(config: dict, path: Path):
    """Write ``config`` to ``path``, load it as a user's file and return the recipe after ``setup()``."""
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    recipe = TrainFinetuneRecipeForNextTokenPrediction(load_yaml_config(path))
    recipe.setup()
    return recipe
