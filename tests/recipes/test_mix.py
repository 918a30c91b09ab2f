"""Mixtures and streams from a file: what is mixed, what is refused, and a run that goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.recipes import recipe_config, set_up_recipe

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.datasets.llm.sample_stream import SampleStream
from nemo_automodel.components.datasets.mix import MixedRows
from nemo_automodel.recipes.settings import load_settings
from nemo_automodel.shared.errors import ConfigError, UserError

SQUAD = "nemo_automodel.components.datasets.llm.squad.make_squad_dataset"
TABLE = (
    "nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset.ColumnMappedTextInstructionDataset"
)


@pytest.fixture
def parts(squad_dir, tmp_path) -> list[dict]:
    """Return two sets as `mix` wants them: 64 rows of SQuAD with weight 3, and a table of 30 rows with weight 1."""
    table = tmp_path / "table.csv"
    table.write_text("q,a\n" + "".join(f"question {i},answer {i}\n" for i in range(30)))
    squad = {"_target_": SQUAD, "dataset_name": str(squad_dir), "split": "train"}
    mapped = {
        "_target_": TABLE,
        "path_or_dataset_id": str(table),
        "column_mapping": {"question": "q", "answer": "a"},
    }
    return [{"dataset": squad, "weight": 3.0}, {"dataset": mapped}]


@pytest.fixture
def config(tmp_path, model_dirs, squad_dir, parts):
    """Return a function that writes out a run over the mixture."""

    def make(name: str = "run", **overrides):
        made = recipe_config(model_dirs("llama"), squad_dir, tmp_path / name, dataloader={}, **overrides)
        made["dataset"] = {"mix": parts}
        return made

    return make


@pytest.fixture
def set_up(tmp_path):
    return lambda config: set_up_recipe(config, tmp_path / "config.yaml")


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "training.jsonl").read_text().splitlines()]


def test_a_mixture_from_a_file(config, set_up, caplog):
    made = config(seed=9)
    made["validation_dataset_all"] = {"mix": made["dataset"]["mix"], "stopping": "all_exhausted", "seed": 2}
    recipe = set_up(made)
    dataset = recipe.train_loader.dataset
    assert isinstance(dataset, MixedRows)
    assert (dataset.seed, dataset.stopping) == (9, "first_exhausted")
    assert dataset.num_drawn == [64, pytest.approx(64 / 3, abs=1)]
    assert [len(part.dataset) for part in dataset.sets] == [64, 30]
    assert dataset.sets[1].name.endswith("table.csv`")
    whole = recipe.val_loaders["all"].dataset
    assert (whole.seed, whole.stopping) == (2, "all_exhausted")
    assert whole.num_drawn == [pytest.approx(90, abs=1), 30]
    assert "Mixed 2 sets into " in caplog.text
    recipe.train_loader.set_epoch(0)
    assert len(list(recipe.train_loader)) == -(-len(dataset) // 2)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"packed_sequence": {"packed_sequence_size": 128}},
        {"step_scheduler__local_batch_tokens": 90},
        {"dataloader__group_by_length": True},
    ],
    ids=["plain", "packed", "token budget", "by length"],
)
def test_a_run_over_a_mixture_goes_on_where_it_stopped(config, set_up, tmp_path, extra):
    for name, stops in (("whole", (9,)), ("cut", (4, 9))):
        for stop in stops:
            options = {"lr_scheduler": None, "step_scheduler__num_epochs": 3, **extra}
            set_up(config(name, step_scheduler__max_steps=stop, **options)).run_train_validation_loop()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 9


def test_a_stream_in_a_mixture(config, set_up, tmp_path):
    for name, stops in (("whole", (9,)), ("cut", (4, 9))):
        for stop in stops:
            made = config(name, step_scheduler__max_steps=stop, lr_scheduler=None)
            made["dataset"]["mix"][0]["dataset"]["streaming"] = True
            recipe = set_up(made)
            assert isinstance(recipe.train_loader.dataset, SampleStream)
            recipe.run_train_validation_loop()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("extra", [{}, {"step_scheduler__local_batch_tokens": 90}], ids=["rows", "tokens"])
def test_a_stream_trains_and_goes_on(config, set_up, tmp_path, squad_dir, extra):
    for name, stops in (("whole", (20,)), ("cut", (15, 16, 20))):
        for stop in stops:
            made = config(name, step_scheduler__max_steps=stop, lr_scheduler=None, **extra)
            made["dataset"] = {"_target_": SQUAD, "dataset_name": str(squad_dir), "streaming": True}
            recipe = set_up(made)
            assert recipe.schedule.epoch_len == 16
            recipe.run_train_validation_loop()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 20


def test_a_row_of_a_mixture_is_named_in_messages(config, set_up, tmp_path):
    made = config()
    Path(made["dataset"]["mix"][1]["dataset"]["path_or_dataset_id"]).write_text("q,a\n" + "x,\n" * 30)
    with pytest.raises(UserError, match=r"table.csv row \d+: the answer is empty"):
        set_up(made).run_train_validation_loop()


def test_sets_of_a_mixture_may_have_tokenizers_of_their_own(config, set_up, model_dirs):
    made = config()
    made["dataset"]["mix"][1]["dataset"]["tokenizer"] = {"pretrained_model_name_or_path": str(model_dirs("llama"))}
    recipe = set_up(made)
    assert recipe.tokenizer is not None
    assert isinstance(recipe.train_loader.dataset, MixedRows)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"mix": []}, "`dataset.mix` is empty. Write a list of sets, each with `dataset` and `weight`."),
        ({"mix": 3}, "`dataset.mix` is 3, but it must be a list."),
        ({"mix": [3]}, "`dataset.mix.0` is 3, but it must be a mapping of keys."),
        ({"mix": [{"weight": 1}]}, "`dataset.mix.0` lacks `dataset`. Add dataset.mix.0.dataset with `_target_`."),
        ({"mix": [{"dataset": 3}]}, "`dataset.mix.0.dataset` is 3, but it must be a mapping of keys."),
        (
            {"mix": [{"dataset": {"_target_": SQUAD}, "wieght": 1}]},
            "`dataset.mix.0.wieght`: unknown key `wieght`. Did you mean `weight`?",
        ),
        (
            {"mix": [{"dataset": {"_target_": SQUAD}, "weight": 0}]},
            "`dataset.mix.0.weight` is 0, but a weight must be positive. Use 1.0.",
        ),
        (
            {"mix": [{"dataset": {"_target_": SQUAD}, "weight": "much"}]},
            "`dataset.mix.0.weight` is `much`, but it must be a number.",
        ),
        (
            {"mix": [{"dataset": {"_target_": SQUAD, "splitt": "train"}}]},
            f"`dataset.mix.0.dataset.splitt`: {SQUAD} takes no `splitt`. Did you mean `split`?",
        ),
        (
            {"mix": [{"dataset": {"_target_": SQUAD}}], "stoping": "all_exhausted"},
            "`dataset.stoping`: unknown key `stoping`. Did you mean `stopping`?",
        ),
        (
            {"mix": [{"dataset": {"_target_": SQUAD}}], "_target_": SQUAD},
            "`dataset._target_`: unknown key `_target_`.",
        ),
        (
            {"mix": [{"dataset": {"_target_": SQUAD}}], "stopping": "all_exhaust"},
            "`stopping: all_exhaust` of a mixture is not known. Did you mean `all_exhausted`?",
        ),
        (
            {"mix": [{"dataset": {"mix": [{"dataset": {"_target_": SQUAD, "unshifted": True}}]}}]},
            "`dataset.mix.0.dataset.mix.0.dataset.unshifted",
        ),
    ],
)
def test_mistakes_in_a_mixture(config, dataset, message):
    made = config()
    made["dataset"] = dataset
    with pytest.raises(UserError) as caught:
        load_settings(ConfigNode(made))
    assert message in str(caught.value)


def test_overrides_reach_into_a_mixture(config):
    cfg = ConfigNode(config())
    cfg.set_by_dotted("dataset.mix.1.weight", 0.5)
    cfg.set_by_dotted("dataset.mix.0.dataset.limit_dataset_samples", 10)
    settings = load_settings(cfg)
    assert settings.config.to_yaml_dict()["dataset"]["mix"][1]["weight"] == 0.5
    assert settings.dataset.get("mix.0.dataset.limit_dataset_samples") == 10
    cfg.set_by_dotted("dataset.mix.0.dataset.limit_dataset_samples", "many")
    with pytest.raises(ConfigError, match=r"`dataset.mix.0.dataset.limit_dataset_samples` is `many`"):
        load_settings(cfg)
