"""Start the fine-tuning recipe on given data with a tiny model, and say when its first step was done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from nemo_automodel.components.config.loader import load_yaml_config
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from nemo_automodel.shared.types import Batch, StepMetrics


class StartTimes(NamedTuple):
    """Seconds of a run's beginning."""

    setup_s: float
    """From the start of the recipe to the loaded model: data, label gate, model."""
    first_step_s: float
    """From the loaded model to the end of step 0: isolation proof, optimizer, waiting for rows, the step."""
    waiting_s: float
    """Of these, waiting for the rows of step 0."""


class _TimedRecipe(TrainFinetuneRecipeForNextTokenPrediction):
    model_ready_s = setup_done_s = rows_there_s = step_0_done_s = 0.0

    def build_model(self) -> None:
        super().build_model()
        self.model_ready_s = time.perf_counter()

    def run_train_validation_loop(self) -> None:
        self.setup_done_s = time.perf_counter()
        super().run_train_validation_loop()

    def train_step(self, batches: Sequence[Batch]) -> StepMetrics:
        self.rows_there_s = self.rows_there_s or time.perf_counter()
        metrics = super().train_step(batches)
        self.step_0_done_s = self.step_0_done_s or time.perf_counter()
        return metrics


def tiny_model(directory: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write a model of two small layers with the tokenizer's vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def time_of_step_0(
    model: Path, data: Path, run: Path, dataset: dict[str, Any], packed_sequence: dict[str, Any]
) -> StartTimes:
    """Run two steps of the recipe over a file of SQuAD-shaped rows, with the keys given for the data."""
    config = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "step_scheduler": {"global_batch_size": 1, "local_batch_size": 1, "max_steps": 2},
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(model),
            "torch_dtype": "float32",
        },
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.squad.make_squad_dataset",
            "dataset_name": str(data),
            **dataset,
        },
        "packed_sequence": packed_sequence,
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4},
        "checkpoint": {"enabled": False, "checkpoint_dir": str(run / "checkpoints")},
    }
    run.mkdir(parents=True)
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    start = time.perf_counter()
    recipe = _TimedRecipe(load_yaml_config(path))
    recipe.setup()
    recipe.run_train_validation_loop()
    ready_s = recipe.model_ready_s
    return StartTimes(ready_s - start, recipe.step_0_done_s - ready_s, recipe.rows_there_s - recipe.setup_done_s)
