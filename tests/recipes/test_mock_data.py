"""Training on data that is made up: whole batches, sentences, and rows that come packed."""

from __future__ import annotations

import json

import pytest
from support.recipes import recipe_config, set_up_recipe

_MOCK = "nemo_automodel.components.datasets.llm.mock"


@pytest.mark.parametrize(
    "sections",
    [
        {
            "dataset": {
                "_target_": "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset",
                "vocab_size": 300,
                "seq_len": 24,
                "num_samples": 40,
                "batch_size": 2,
            },
            "dataloader": {"_target_": "torch.utils.data.DataLoader", "batch_size": None},
        },
        {"dataset": {"_target_": f"{_MOCK}.build_unpacked_dataset", "num_sentences": 40, "vocab_size": 300}},
        {
            "dataset": {"_target_": f"{_MOCK}.build_unpacked_dataset", "num_sentences": 80, "vocab_size": 300},
            "packed_sequence": {"packed_sequence_size": 64},
        },
        {
            "dataset": {"_target_": f"{_MOCK}.build_packed_dataset", "num_blocks": 12, "block_size": 64},
            "packed_sequence": {"packed_sequence_size": 64, "prepacked": True},
        },
        {
            "dataset": {
                "mix": [
                    {"dataset": {"_target_": f"{_MOCK}.build_unpacked_dataset", "num_sentences": 40}, "weight": 2},
                    {"dataset": {"_target_": f"{_MOCK}.build_unpacked_dataset", "num_sentences": 40, "seed": 1}},
                ]
            },
            "step_scheduler__local_batch_tokens": 64,
        },
    ],
    ids=["batches", "sentences", "packed here", "packed before", "mixed by tokens"],
)
def test_three_steps(tmp_path, model_dirs, squad_dir, sections):
    flat = {key: value for key, value in sections.items() if "__" in key}
    config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / "run", step_scheduler__max_steps=3, **flat)
    config |= {key: value for key, value in sections.items() if "__" not in key}
    recipe = set_up_recipe(config, tmp_path / "config.yaml")
    recipe.run_train_validation_loop()
    lines = (tmp_path / "run" / "training.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 3
    assert all(5 < record["loss"] < 7 for record in records), "about log(448) for tokens without sense"
    assert all(record["num_label_tokens"] > 40 for record in records)
