"""A run over packed rows: cache and processes change nothing, and it begins before all rows are tokenised."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from pathlib import Path

import pytest
from support.recipes import recipe_config, set_up_recipe

from nemo_automodel.components.datasets import tokenize_workers
from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.packed_stream import PackedStream

TABLE = (
    "nemo_automodel.components.datasets.llm.column_mapped_text_instruction_iterable_dataset."
    "ColumnMappedTextInstructionIterableDataset"
)
PACKED = {"packed_sequence__packed_sequence_size": 96, "packed_sequence__prove_isolation": False, "data_check": False}


@pytest.fixture(autouse=True)
def small_pieces(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenize_workers, "_FIRST_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(tokenize_workers, "_ROWS_AT_ONCE", 6)
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path, model_dirs, squad_dir):
    """Return a function that trains and returns the records of every step."""

    def go(name: str, **overrides):
        overrides = {"dataloader": {}, "step_scheduler__max_steps": 6, **PACKED, **overrides}
        config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / name, **overrides)
        recipe = set_up_recipe(config, tmp_path / "config.yaml")
        recipe.run_train_validation_loop()
        return records(tmp_path / name)

    return go


def records(run_dir: Path) -> list[tuple[float, float, int]]:
    lines = [json.loads(line) for line in (run_dir / "training.jsonl").read_text().splitlines()]
    return [(line["loss"], line["lr"], line["num_label_tokens"]) for line in lines]


@pytest.mark.parametrize("strategy", ["thd", "best_fit", "neat"])
def test_cache_and_processes_change_nothing(run, strategy: str):
    options = {"packed_sequence__packing_strategy": strategy, "step_scheduler__max_steps": None}
    options["step_scheduler__num_epochs"] = 2
    cold = run("cold", **options, packed_sequence__num_proc=2)
    assert run("warm", **options) == cold
    assert run("one", **options, packed_sequence__num_proc=1, packed_sequence__cache=False) == cold
    assert len({lr for _, lr, _ in cold}) > 5, "the learning rate follows the number of steps of the whole run"


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_goes_on_where_it_stopped(run, cache: bool, epochs: int):
    options = {"packed_sequence__cache": cache, "lr_scheduler": None, "step_scheduler__num_epochs": epochs}
    whole = run("whole", step_scheduler__max_steps=4 * epochs, **options)
    for stop in (2, 3, 4 * epochs):
        cut = run("cut", step_scheduler__max_steps=stop, **options)
    assert cut == whole


def test_a_packed_stream_goes_on_where_it_stopped(run, tmp_path, write_table):
    dataset = {
        "_target_": TABLE,
        "path_or_dataset_id": str(write_table),
        "column_mapping": {"question": "q", "answer": "a"},
    }
    options = {"dataset": dataset, "lr_scheduler": None}
    whole = run("whole", step_scheduler__max_steps=7, **options)
    for stop in (2, 3, 7):
        cut = run("cut", step_scheduler__max_steps=stop, **options)
    assert cut == whole
    assert len(whole) == 7


@pytest.fixture
def write_table(tmp_path) -> Path:
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps({"q": f"question {i} " * (i % 5 + 1), "a": f"{i}"}) + "\n" for i in range(60)))
    return path


def test_a_stream_is_packed(tmp_path, model_dirs, squad_dir, write_table):
    dataset = {
        "_target_": TABLE,
        "path_or_dataset_id": str(write_table),
        "column_mapping": {"question": "q", "answer": "a"},
    }
    config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / "run", dataset=dataset, **PACKED)
    recipe = set_up_recipe(config, tmp_path / "config.yaml")
    assert isinstance(recipe.train_loader.dataset, PackedStream)


@pytest.mark.parametrize("has_schedule", [False, True])
def test_training_begins_while_rows_are_tokenised(
    run, tmp_path, model_dirs, squad_dir, monkeypatch, has_schedule, caplog
):
    """Rows after the first ones are held back until two steps are done."""
    caplog.set_level(logging.INFO)
    encode, gate = TokenizedRows.encode, tmp_path / "gate"

    def held_back(self, rows):
        while min(rows) >= 24 and not gate.exists():
            time.sleep(0.01)
        return encode(self, rows)

    monkeypatch.setattr(TokenizedRows, "encode", held_back)
    options = {} if has_schedule else {"lr_scheduler": None}
    overrides = {
        "dataloader": {"shuffle": False},
        "step_scheduler__max_steps": 2 if has_schedule else None,
        "step_scheduler__num_epochs": 1,
        "step_scheduler__global_batch_size": 2,
        "step_scheduler__val_every_steps": None,
        **PACKED,
        **options,
    }
    config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / "run", **overrides)
    recipe = set_up_recipe(config, tmp_path / "config.yaml")
    assert recipe.train_loader.grows
    assert len(multiprocessing.active_children()) > 0
    assert "rows are still being made" in caplog.text
    steps = iter(recipe.schedule)
    for _ in range(2):
        _, batches = next(steps)
        recipe.train_step(batches)
    assert recipe.train_loader.grows
    gate.touch()
    if has_schedule:
        assert next(steps, None) is None
    else:
        assert sum(1 for _ in steps) + 2 == len(recipe.train_loader)
    len(recipe.train_loader)
