"""The benchmark recipe: what it times, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from nemo_automodel.cli.app import main
from nemo_automodel.components.config.loader import load_yaml_config
from nemo_automodel.components.training.flops import StepSize, count_work
from nemo_automodel.recipes.llm.benchmark import BenchmarkingRecipeForNextTokenPrediction
from nemo_automodel.shared.errors import ConfigError, UserError

SIZES = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def config_of(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    """Return a benchmark of six steps, two of them warm-up; ``a__b=value`` sets ``a.b``."""
    config: dict[str, Any] = {
        "recipe": "BenchmarkingRecipeForNextTokenPrediction",
        "step_scheduler": {"global_batch_size": 4, "local_batch_size": 2, "max_steps": 6},
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": {"_target_": "transformers.LlamaConfig", **SIZES},
            "torch_dtype": "float32",
            "load_base_model": False,
        },
        "peft": {"target_modules": "*_proj", "dim": 4, "alpha": 8},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset",
            "vocab_size": 448,
            "seq_len": 24,
            "num_samples": 1000,
            "batch_size": 2,
        },
        "dataloader": {"_target_": "torch.utils.data.DataLoader", "batch_size": None},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4},
        "benchmark": {"warmup_steps": 2, "num_nodes": 1, "nsys_start": -1, "nsys_end": -1, "nsys_ranks": []},
        "checkpoint": {"checkpoint_dir": str(tmp_path / "run")},
    }
    for key, value in overrides.items():
        node = config
        *path, last = key.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return config


def write(tmp_path: Path, **overrides: Any) -> Path:
    path = tmp_path / "benchmark.yaml"
    path.write_text(yaml.safe_dump(config_of(tmp_path, **overrides)))
    return path


def run(tmp_path: Path, **overrides: Any) -> BenchmarkingRecipeForNextTokenPrediction:
    recipe = BenchmarkingRecipeForNextTokenPrediction(load_yaml_config(write(tmp_path, **overrides)))
    recipe.setup()
    recipe.run_train_validation_loop()
    return recipe


def test_the_result_of_a_run(tmp_path: Path):
    recipe = run(tmp_path, peft__dropout=0.1)
    result = json.loads((tmp_path / "run/benchmark.json").read_text())
    assert list(result) == [
        "date", "model", "architecture", "device", "num_devices", "versions", "conditions", "window", "tokens_per_s",
        "tflops", "mfu_percent", "seconds_per_step", "peak_gib", "first_loss", "last_loss",
    ]  # fmt: skip
    window, rates = result["window"], result["tokens_per_s"]
    assert (window["warmup_steps"], window["steps"], window["micro_batches"]) == (2, 4, 8)
    seconds, num_tokens = window["seconds"], 8 * 2 * 24
    assert result["seconds_per_step"] == pytest.approx(seconds / 4)
    assert rates["processed"] == rates["real"] == pytest.approx(num_tokens / seconds)
    assert rates["supervised"] == pytest.approx(8 * 2 * 23 / seconds), "the last position of a row has no label"
    work = count_work(recipe.model)
    assert work.adapters == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    size = StepSize(num_tokens, num_tokens, 8 * 2 * 23, 16 * 24**2)
    tflops = result["tflops"]
    assert tflops["hardware"] == pytest.approx(work.hardware(size) / seconds / 1e12)
    assert tflops["model"] == pytest.approx(work.model(size) / seconds / 1e12)
    assert tflops["six_n_style"] == pytest.approx(work.six_n_style(size) / seconds / 1e12)
    assert tflops["peak"] is result["mfu_percent"] is None, "nobody knows the peak of a CPU"
    conditions = result["conditions"]
    assert conditions["adapters"] == {"dropout": 0.1, "target_modules": "*_proj", "dim": 4, "alpha": 8}
    assert (conditions["decoder_layers"], conditions["recompute"], conditions["dtype"]) == ("plain", "none", "float32")
    assert conditions["data"]["vocab_size"] == 448
    assert result["architecture"]["class"] == "LlamaForCausalLM"
    assert 5.5 < result["last_loss"] < 6.7, "about log(448) for tokens without sense"


def test_nothing_is_saved_or_validated_and_it_can_be_repeated(tmp_path: Path):
    validation = config_of(tmp_path)["dataset"]
    checkpoint = {"checkpoint_dir": str(tmp_path / "run"), "save_consolidated": "every"}
    for _ in range(2):
        run(tmp_path, validation_dataset=validation, checkpoint=checkpoint, step_scheduler__val_every_steps=1)
        files = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
        assert files == {"training.jsonl", "benchmark.json"}
    assert len((tmp_path / "run/training.jsonl").read_text().splitlines()) == 6


def test_utilisation_follows_from_the_given_peak(tmp_path: Path):
    run(tmp_path, benchmark__peak_tflops=1000, benchmark__json_output_path=str(tmp_path / "a/b.json"))
    result = json.loads((tmp_path / "a/b.json").read_text())
    assert result["tflops"]["peak"] == 1000
    assert result["mfu_percent"] == pytest.approx(100 * result["tflops"]["model"] / 1000)
    records = [json.loads(line) for line in (tmp_path / "run/training.jsonl").read_text().splitlines()]
    assert all(0 < record["mfu"] < 1e-2 for record in records)


def test_without_a_known_peak_there_is_no_utilisation(tmp_path: Path):
    run(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "run/training.jsonl").read_text().splitlines()]
    assert [record["mfu"] for record in records] == [None] * 6


def test_a_rate_above_the_peak_is_not_written(tmp_path: Path):
    with pytest.raises(UserError, match=r"above the 1e-09 that CPU .*: the count .* no rate is reported"):
        run(tmp_path, benchmark__peak_tflops=1e-9)
    assert not (tmp_path / "run/benchmark.json").exists()


def test_packed_rows_count_their_documents(tmp_path: Path):
    dataset = {"_target_": "nemo_automodel.components.datasets.llm.mock.build_packed_dataset", "num_blocks": 30}
    dataset |= {"block_size": 64, "vocab_size": 448}
    packed = {"packed_sequence_size": 64, "prepacked": True}
    run(tmp_path, dataset=dataset, dataloader={"shuffle": False}, packed_sequence=packed)
    result = json.loads((tmp_path / "run/benchmark.json").read_text())
    rates = result["tokens_per_s"]
    assert rates["processed"] * result["window"]["seconds"] == pytest.approx(4 * 4 * 64)
    assert rates["supervised"] == rates["real"] < rates["processed"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"benchmark__warmup_steps": 6}, r"`benchmark.warmup_steps` is 6, but it must be below .*max_steps` = 6"),
        ({"benchmark__warmup_steps": -1}, r"`benchmark.warmup_steps` is -1, but it cannot be negative"),
        ({"benchmark__peak_tflops": 0}, r"`benchmark.peak_tflops` is 0, but it must be positive"),
        ({"benchmark__nsys_start": 5, "benchmark__nsys_end": 3}, r"`benchmark.nsys_start` is 5"),
        ({"dataset__batch_size": 1}, r"`dataset.batch_size` is 1, but .* `step_scheduler.local_batch_size` = 2"),
        ({"benchmark__warmup": 3}, r"`benchmark.warmup`: unknown key `warmup`. Did you mean `warmup_steps`"),
    ],
)
def test_mistakes(overrides: dict, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **overrides)


def test_data_that_end_within_the_warm_up(tmp_path: Path):
    with pytest.raises(UserError, match="ended within its 10 warm-up steps"):
        run(tmp_path, step_scheduler__max_steps=None, step_scheduler__num_epochs=1, dataset__num_samples=8,
            benchmark__warmup_steps=10)  # fmt: skip


def test_mock_batches_are_micro_batches(tmp_path: Path):
    config = config_of(tmp_path)
    del config["dataset"]["batch_size"]
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    recipe = BenchmarkingRecipeForNextTokenPrediction(load_yaml_config(tmp_path / "benchmark.yaml"))
    recipe.setup()
    assert next(iter(recipe.train_loader))["input_ids"].shape == (2, 24)


@pytest.mark.parametrize("recipe", ["BenchmarkingRecipeForNextTokenPrediction", None, "Train"])
def test_from_the_command_line(recipe: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = "TrainFinetuneRecipeForNextTokenPrediction" if recipe == "Train" else recipe
    path = write(tmp_path, recipe=name)
    words = [str(path)] if recipe and recipe != "Train" else ["benchmark", "llm", "-c", str(path)]
    assert main([*words, "--benchmark.warmup_steps", "1"]) == 0
    printed = capsys.readouterr().err
    assert "Benchmark of " in printed
    assert "tokens/s " in printed
    assert "after 1 of warm-up" in printed
    assert json.loads((tmp_path / "run/benchmark.json").read_text())["window"]["steps"] == 5


# ------------------------------------------------------------------------------------------ models from a configuration


@pytest.mark.parametrize("form", ["object", "mapping", "file", "directory"])
def test_every_form_of_a_configuration_builds_the_same_model(form: str, tmp_path: Path):
    import torch

    from nemo_automodel import NeMoAutoModelForCausalLM

    config = transformers.LlamaConfig(**SIZES)
    config.save_pretrained(tmp_path)
    given: Any = {
        "object": config,
        "mapping": {"model_type": "llama", **SIZES},
        "file": str(tmp_path / "config.json"),
        "directory": str(tmp_path),
    }[form]
    models = []
    for source in (config, given):
        torch.manual_seed(3)
        models.append(NeMoAutoModelForCausalLM.from_config(source, torch_dtype="bfloat16", device="cpu"))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, second[name]) for name, value in first.items())
    deviation = first["model.layers.0.mlp.up_proj.weight"].float().std().item()
    assert deviation == pytest.approx(0.02, rel=0.1), "Transformers' initialisation"


@pytest.mark.parametrize(
    ("values", "message"),
    [({"hidden_size": 32}, "`model.config` has no `model_type`"), ({"model_type": "lama"}, "Did you mean `llama`")],
)
def test_mappings_that_are_no_configuration(values: dict, message: str):
    from nemo_automodel import NeMoAutoModelForCausalLM

    with pytest.raises(UserError, match=message):
        NeMoAutoModelForCausalLM.from_config(values, device="cpu")


def test_weights_are_made_on_the_device_in_their_dtype():
    import torch

    from nemo_automodel._transformers import assemble

    plan = assemble.AssemblyPlan(
        auto_class=transformers.AutoModelForCausalLM,
        config=transformers.LlamaConfig(**SIZES),
        source=None,
        device=torch.device("meta"),
        dtype=torch.bfloat16,
    )
    model = assemble._build(plan)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
