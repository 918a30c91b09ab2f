"""The label gate inside a run: it looks at the rows of step 0, before the model, and the run never notices."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from support.recipes import recipe_config, set_up_recipe
from support.tiny import make_model_dir

from nemo_automodel.components.datasets.config import DataCheckConfig
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from nemo_automodel.shared.errors import ConfigError, UserError

PACKED = {"packed_sequence": {"packed_sequence_size": 128}}


@pytest.fixture
def make_config(tmp_path: Path, model_dirs, squad_dir: Path):
    def make(run: str = "run", **overrides: Any) -> dict[str, Any]:
        return recipe_config(model_dirs("llama"), squad_dir, tmp_path / run, **overrides)

    return make


@pytest.fixture
def set_up(tmp_path: Path):
    return lambda config: set_up_recipe(config, tmp_path / "config.yaml")


@pytest.fixture
def write_rows(tmp_path: Path):
    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


def gate_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("Data check")]


def bad_squad(tmp_path: Path, squad_dir: Path, line: int) -> Path:
    """Copy the rows; the answer of one of them is empty."""
    rows = [json.loads(text) for text in (squad_dir / "train.jsonl").read_text().splitlines()]
    rows[line - 1]["answers"]["text"] = [" "]
    path = tmp_path / "bad" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_statistics_are_logged(make_config, set_up, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        recipe = set_up(make_config())
    statistics = recipe.data_check.statistics
    assert gate_lines(caplog) == [str(statistics)]
    samples = [recipe.train_loader.dataset[i] for i in range(64)]
    num_labels = sum(label != -100 for sample in samples for label in sample["labels"])
    assert (statistics.num_rows, statistics.num_looked_at, statistics.num_learned) == (64, 64, num_labels)
    assert statistics.num_tokens == sum(len(sample["input_ids"]) + 1 for sample in samples)
    assert statistics.longest == max(len(sample["input_ids"]) + 1 for sample in samples)


def test_a_sample_is_looked_at_beside_the_first_step(make_config, set_up):
    config = make_config(data_check={"sample_rows": 5}, dataloader__shuffle=True)
    statistics = set_up(config).data_check.statistics
    assert statistics.num_rows == 64
    assert 5 <= statistics.num_looked_at <= 4 + 5, "four rows of step 0 and five others, some of which may be the same"
    assert set_up(make_config("none", data_check={"sample_rows": 0})).data_check.statistics.num_looked_at == 4


@pytest.mark.parametrize(
    "more", [{}, PACKED, {"dataloader": {"shuffle": True, "num_workers": 1}}], ids=["rows", "packs", "workers"]
)
def test_looking_changes_nothing_of_the_training(make_config, set_up, more: dict[str, Any]):
    losses = []
    for run, gate in (("with", True), ("without", False)):
        config = make_config(run, step_scheduler__max_steps=3, data_check=gate, **more)
        recipe = set_up(config)
        state = json.dumps(recipe.train_loader.state_dict(), default=str)
        assert '"num_rows_done": 0' in state
        recipe.run_train_validation_loop()
        records = (Path(config["checkpoint"]["checkpoint_dir"]) / "training.jsonl").read_text().splitlines()
        losses.append([(json.loads(r)["loss"], json.loads(r)["grad_norm"]) for r in records])
        assert len(losses[-1]) == 3
    assert losses[0] == losses[1]


def test_the_rows_of_step_0_are_among_those_looked_at(make_config, set_up, tmp_path: Path, squad_dir: Path):
    path = bad_squad(tmp_path, squad_dir, line=3)
    config = make_config(dataset__dataset_name=str(path), data_check={"sample_rows": 0})
    with pytest.raises(UserError, match=r"train.jsonl line 3: the answer is empty"):
        set_up(config)
    path.parent.rename(tmp_path / "other")
    other = bad_squad(tmp_path, squad_dir, line=60)
    config = make_config("other", dataset__dataset_name=str(other), data_check={"sample_rows": 0})
    set_up(config)  # line 60 is not among the four rows of step 0
    config = make_config("sampled", dataset__dataset_name=str(other), data_check={"sample_rows": 64})
    with pytest.raises(UserError, match=r"train.jsonl line 60: the answer is empty"):
        set_up(config)


def test_the_model_is_not_loaded_for_bad_data(make_config, set_up, tmp_path: Path, squad_dir: Path, monkeypatch):
    def never(self: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(TrainFinetuneRecipeForNextTokenPrediction, "build_model", never)
    with pytest.raises(UserError, match="line 3"):
        set_up(make_config(dataset__dataset_name=str(bad_squad(tmp_path, squad_dir, line=3))))


@pytest.mark.parametrize("value", [False, "off"])
def test_off_skips(make_config, set_up, caplog: pytest.LogCaptureFixture, value: Any):
    with caplog.at_level(logging.INFO):
        recipe = set_up(make_config(data_check=value, dataset__seq_length=8, dataset__truncation=True))
    assert recipe.data_check is None
    assert gate_lines(caplog) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_cut_off_whole_ends_the_run_even_without_the_gate(make_config, set_up, streaming: bool):
    """The gate is off, so the row of step 0 is found when it is tokenised; a share to bear lets the run go on."""
    cut = {"dataset__seq_length": 8, "dataset__truncation": True, "dataset__streaming": streaming}
    run = set_up(make_config("off", data_check="off", step_scheduler__max_steps=2, **cut))
    with pytest.raises(UserError) as caught:
        run.run_train_validation_loop()
    assert re.fullmatch(
        r"\S+train\.jsonl line \d+ has \d+ tokens, and `dataset\.seq_length: 8` cuts off all \d+ learned ones, so it "
        r"teaches nothing\. Raise `dataset\.seq_length`, shorten or remove the row, or bear such rows with "
        r"`data_check\.max_unlearned_share`\.",
        str(caught.value),
    )
    lenient = {"max_unlearned_share": 1.0, "max_truncated_share": 1.0, "require_end_token": False}
    run = set_up(make_config("borne", data_check=lenient, step_scheduler__max_steps=2, **cut))
    run.run_train_validation_loop()
    assert run.schedule.step == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("maybe", "`data_check` is `maybe`, but it must be on, off or a mapping such as"),
        ({"max_dropped": 1}, "`data_check.max_dropped`: unknown key `max_dropped`. Did you mean `max_dropped_share`?"),
        ({"max_dropped_share": 2}, "`data_check.max_dropped_share` is 2, but a share lies between 0 and 1."),
        ({"sample_rows": -1}, "`data_check.sample_rows` is -1, but it cannot be negative."),
    ],
)
def test_bad_settings(make_config, set_up, value: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        set_up(make_config(data_check=value))
    assert str(caught.value).startswith(message)


def test_settings(make_config, set_up):
    assert set_up(make_config("a", data_check="on")).settings.data_check == DataCheckConfig()
    assert set_up(make_config("b")).settings.data_check == DataCheckConfig()
    assert set_up(make_config("c", data_check={"enable": False})).settings.data_check is None
    found = set_up(make_config("d", data_check={"sample_rows": 3})).settings.data_check
    assert found == DataCheckConfig(sample_rows=3)


def test_packs_are_named_by_file_and_line(make_config, set_up, tmp_path: Path, squad_dir: Path):
    config = make_config(dataset__seq_length=60, dataset__truncation=True, **PACKED)
    recipe = set_up(config)
    statistics = recipe.data_check.statistics
    assert statistics.num_rows == statistics.num_looked_at == 64, "a document of a pack is not counted twice"
    assert statistics.num_duplicates == 0
    path = bad_squad(tmp_path, squad_dir, line=2)
    with pytest.raises(UserError, match=r"train.jsonl line 2: the answer is empty"):
        set_up(make_config("bad", dataset__dataset_name=str(path), **PACKED))


def test_rows_of_a_mixture_are_named_by_their_file(make_config, set_up, tmp_path: Path, squad_dir: Path):
    config = make_config()
    good, bad = (
        dict(config["dataset"]),
        {**config["dataset"], "dataset_name": str(bad_squad(tmp_path, squad_dir, line=9))},
    )
    with pytest.raises(UserError, match=r"bad/train.jsonl line 9: the answer is empty"):
        set_up({**config, "dataset": {"mix": [{"dataset": good, "weight": 1.0}, {"dataset": bad, "weight": 1.0}]}})
    both = [{"dataset": {**good, "split": split}, "weight": 1.0} for split in ("train[:30]", "train[30:60]")]
    statistics = set_up({**make_config("good"), "dataset": {"mix": both}}).data_check.statistics
    assert (statistics.num_rows, statistics.num_looked_at, statistics.num_duplicates) == (60, 60, 0)


def test_micro_batches_by_tokens(make_config, set_up):
    config = make_config()
    config["step_scheduler"] = {"global_batch_size": 4, "local_batch_tokens": 128, "max_steps": 2}
    assert set_up(config).data_check.statistics.num_looked_at == 64


def test_a_stream_of_numbered_rows(make_config, set_up, tmp_path: Path, write_rows):
    target = (
        "nemo_automodel.components.datasets.llm.column_mapped_text_instruction_iterable_dataset."
        "ColumnMappedTextInstructionIterableDataset"
    )
    dataset = {"_target_": target, "column_mapping": {"question": "q", "answer": "a"}}
    rows = [{"q": f"What is {n}?", "a": "even" if n % 2 == 0 else "odd"} for n in range(20)]
    path = write_rows("good.jsonl", rows)
    config = {**make_config(), "dataset": {**dataset, "path_or_dataset_id": str(path)}, "dataloader": {}}
    statistics = set_up(config).data_check.statistics
    assert (statistics.num_looked_at, statistics.num_duplicates) == (20, 0)
    path = write_rows("bad.jsonl", [*rows, {"q": "What?", "a": ""}])
    config = {**make_config("bad"), "dataset": {**dataset, "path_or_dataset_id": str(path)}, "dataloader": {}}
    with pytest.raises(UserError, match=r"bad.jsonl line 21: the answer is empty"):
        set_up(config)


def test_a_stream_without_numbers_is_looked_at_before_its_first_step(
    make_config, set_up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("NEMO_ENABLE_USER_MODULES", "1")
    (tmp_path / "stream.py").write_text(
        "from torch.utils.data import IterableDataset\n"
        "class Rows(IterableDataset):\n"
        "    def __init__(self, tokenizer, learns=True):\n"
        "        ids = tokenizer('Where? Paris')['input_ids'] + [tokenizer.eos_token_id]\n"
        "        labels = ids[1:] if learns else [-100] * len(ids[1:])\n"
        "        self.sample = {'input_ids': ids[:-1], 'labels': labels}\n"
        "    def __iter__(self):\n"
        "        for _ in range(40): yield dict(self.sample)\n"
    )
    dataset = {"_target_": f"{tmp_path}/stream.py:Rows"}
    config = {**make_config(step_scheduler__max_steps=2), "dataset": dataset, "dataloader": {}}
    with caplog.at_level(logging.INFO):
        recipe = set_up(config)
        assert gate_lines(caplog) == []
        recipe.run_train_validation_loop()
    (line,) = gate_lines(caplog)
    assert line.startswith("Data check, 4 rows of a stream: ")
    config = {**make_config("bad"), "dataset": {**dataset, "learns": False}, "dataloader": {}}
    recipe = set_up(config)
    with pytest.raises(
        UserError, match=r"^Nothing is learned: none of the 4 rows looked at has a label \(Micro-batch 1 of"
    ):
        recipe.run_train_validation_loop()


def test_random_tokens_pass(make_config, set_up):
    dataset = {
        "_target_": "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset",
        "vocab_size": 400,
        "seq_len": 16,
        "batch_size": 2,
    }
    statistics = set_up({**make_config(), "dataset": dataset, "dataloader": {"batch_size": None}}).data_check.statistics
    assert statistics.num_learned == statistics.num_looked_at * 15


def test_the_limits_of_the_model(make_config, set_up, tmp_path: Path):
    model = make_model_dir(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(UserError, match="but the model reads at most 16"):
        set_up(make_config(model__pretrained_model_name_or_path=str(model)))
