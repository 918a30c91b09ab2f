"""The fine-tuning recipe from a YAML file to a checkpoint, on a tiny model and a handful of rows."""

from __future__ import annotations

import gc
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from support.recipes import lora_section, recipe_config, set_up_recipe

from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from nemo_automodel.shared.errors import UserError

TRAIN_FT = Path(sys.modules[TrainFinetuneRecipeForNextTokenPrediction.__module__].__file__)


@pytest.fixture
def make_config(tmp_path, model_dirs, squad_dir):
    """Return a function that writes out a small run; ``validates`` adds a validation set."""

    def make(run="run", validates=False, **overrides):
        config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / run, **overrides)
        if validates:
            config["validation_dataset"] = {**config["dataset"], "split": "validation"}
        return config

    return make


@pytest.fixture
def set_up(tmp_path):
    return lambda config: set_up_recipe(config, tmp_path / "config.yaml")


def records(run_dir, name="training"):
    return [json.loads(line) for line in (Path(run_dir) / f"{name}.jsonl").read_text().splitlines()]


def losses_of(config):
    return [record["loss"] for record in records(config["checkpoint"]["checkpoint_dir"])]


# --- truth -----------------------------------------------------------------------------------------------------------


def hand_written_rows(model_dir, path):
    """Return (ids, labels) of every row as Transformers wants them: not shifted, the prompt -100."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = f"Context: {row['context']} Question: {row['question']} Answer: "
        encoded = tokenizer(prompt + row["answers"]["text"][0], return_offsets_mapping=True)
        ids = torch.tensor([*encoded["input_ids"], tokenizer.eos_token_id])
        is_answer = torch.tensor([end > len(prompt) for _, end in encoded["offset_mapping"]] + [True])
        rows.append((ids, ids.where(is_answer, -100)))
    return rows


def hand_written_loss(model, rows):
    """Return Transformers' own shifted loss over the label tokens of all rows."""
    num_labels = sum(int((labels != -100).sum()) for _, labels in rows)
    losses = [
        model(input_ids=ids[None], labels=labels[None], num_items_in_batch=torch.tensor(num_labels)).loss
        for ids, labels in rows
    ]
    return sum(losses)


@pytest.mark.parametrize("is_lora", [False, True], ids=["sft", "lora"])
def test_ten_steps_and_their_validation_equal_transformers_own_loss(
    make_config, set_up, model_dirs, squad_dir, is_lora
):
    config = make_config(
        validates=True,
        step_scheduler__max_steps=10,
        step_scheduler__val_every_steps=5,
        clip_grad_norm={"max_norm": None},
        lr_scheduler={"lr_decay_style": "constant", "lr_warmup_steps": 0},
        **({"peft": lora_section()} if is_lora else {}),
    )
    recipe = set_up(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs("llama"), dtype=torch.float32)
    if is_lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=r".*_proj"))
        ours = dict(recipe.model.named_parameters())
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data.copy_(ours[name.removeprefix("base_model.model.").replace(".default", "")])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
    train, validation = (
        hand_written_rows(model_dirs("llama"), squad_dir / f"{n}.jsonl") for n in ("train", "validation")
    )
    expected, norms, val_losses = [], [], []
    for step in range(10):
        loss = hand_written_loss(model, train[4 * step : 4 * step + 4])
        loss.backward()
        expected.append(loss.item())
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            with torch.no_grad():
                val_losses.append(hand_written_loss(model, validation).item())
    recipe.run_train_validation_loop()
    run_dir = config["checkpoint"]["checkpoint_dir"]
    assert losses_of(config) == pytest.approx(expected, abs=1e-5)
    assert [record["grad_norm"] for record in records(run_dir)] == pytest.approx(norms, rel=1e-4)
    assert [record["val_loss"] for record in records(run_dir, "validation")] == pytest.approx(val_losses, abs=1e-5)
    saved = json.loads((Path(run_dir) / "LATEST" / "losses.json").read_text())
    assert saved == {"train_loss": pytest.approx(expected[-1]), "val_loss": pytest.approx(val_losses[-1])}


def test_records_count_tokens_and_name_the_rate_of_the_next_step(make_config, set_up, model_dirs, squad_dir):
    config = make_config(step_scheduler__max_steps=3)
    set_up(config).run_train_validation_loop()
    rows = hand_written_rows(model_dirs("llama"), squad_dir / "train.jsonl")[:12]
    found = records(config["checkpoint"]["checkpoint_dir"])
    for step in range(3):
        group = rows[4 * step : 4 * step + 4]
        assert found[step]["num_tokens_per_step"] == sum(len(ids) - 1 for ids, _ in group)
        assert found[step]["num_label_tokens"] == sum(int((labels != -100).sum()) for _, labels in group)
        assert found[step]["mem"] == 0.0
    assert [record["lr"] for record in found] == pytest.approx([2e-4, 4e-4, 6e-4])  # warm-up over 5 steps from 0


# --- stopping and going on -------------------------------------------------------------------------------------------


class StopsAt(TrainFinetuneRecipeForNextTokenPrediction):
    """Gets SIGTERM while it trains the step ``stop``."""

    stop = -1

    def train_step(self, batches):
        if self.schedule.step - 1 == self.stop:
            signal.raise_signal(signal.SIGTERM)
        return super().train_step(batches)


@pytest.mark.parametrize(
    ("stop", "num_workers", "overrides"),
    [
        (3, 0, {}),
        (4, 0, {}),
        (7, 0, {}),
        (7, 2, {}),
        (3, 0, {"model__fast_layers": "on"}),
        (7, 0, {"model__fast_layers": "on", "peft__dropout_position": "pre"}),
    ],
    ids=["mid-epoch", "short last step of an epoch", "second epoch", "second epoch, two workers", "fast", "fast, pre"],
)
def test_a_stopped_run_goes_on_with_exactly_the_same_losses(
    make_config, set_up, tmp_path, stop, num_workers, overrides
):
    """18 rows in micro-batches of 2 make 9, so the fifth step of an epoch has one micro-batch instead of two."""

    def config(run):
        return make_config(
            run,
            validates=True,
            step_scheduler__max_steps=12,
            step_scheduler__val_every_steps=4,
            dataset__limit_dataset_samples=18,
            dataloader={"shuffle": True, "num_workers": num_workers},
            peft={**lora_section(), "dropout": 0.3, "rank_pattern": {"down_proj": 6, "*.layers.0.self_attn.*": 2}},
            **overrides,
        )

    set_up(config("whole")).run_train_validation_loop()
    first = set_up(config("cut"))
    first.__class__ = StopsAt
    first.stop = stop
    first.run_train_validation_loop()
    run_dir = tmp_path / "cut"
    assert [record["step"] for record in records(run_dir)] == list(range(stop + 1))
    assert (run_dir / "LATEST").resolve().name == f"epoch_{stop // 5}_step_{stop}"
    second = set_up(config("cut"))
    assert second.schedule.step == stop + 1
    second.run_train_validation_loop()
    assert losses_of(config("cut")) == losses_of(config("whole"))
    whole, cut = (records(tmp_path / run, "validation") for run in ("whole", "cut"))
    assert [r["val_loss"] for r in cut if r["step"] > stop] == [r["val_loss"] for r in whole if r["step"] > stop]


def test_sigterm_leaves_a_checkpoint_and_exit_status_0(make_config, tmp_path):
    config = make_config(step_scheduler__max_steps=100_000, step_scheduler__num_epochs=100_000)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    log = tmp_path / "run" / "training.jsonl"
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen([sys.executable, TRAIN_FT, "-c", path], stdout=output, stderr=output)
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    last = records(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "LATEST").resolve().name == f"epoch_{last['epoch']}_step_{last['step']}"
    assert "SIGTERM received" in (tmp_path / "output").read_text()


def test_a_finished_run_says_so_and_loads_nothing(make_config, set_up, monkeypatch, caplog):
    config = make_config(step_scheduler__max_steps=2)
    set_up(config).run_train_validation_loop()
    before = records(config["checkpoint"]["checkpoint_dir"])
    monkeypatch.setattr(TrainFinetuneRecipeForNextTokenPrediction, "build_model", pytest.fail)
    with caplog.at_level("INFO"):
        set_up(config).run_train_validation_loop()
    assert "This run is finished" in caplog.text
    assert records(config["checkpoint"]["checkpoint_dir"]) == before


def test_a_longer_run_goes_on_and_plans_its_decay_anew(make_config, set_up, caplog):
    schedule = {"lr_decay_style": "linear", "lr_warmup_steps": 0, "min_lr": 0.0}
    set_up(make_config(step_scheduler__max_steps=4, lr_scheduler=schedule)).run_train_validation_loop()
    config = make_config(step_scheduler__max_steps=8, lr_scheduler=schedule)
    with caplog.at_level("INFO"):
        set_up(config).run_train_validation_loop()
    found = records(config["checkpoint"]["checkpoint_dir"])
    assert [record["step"] for record in found] == list(range(8))
    ratios = [3 / 4, 2 / 4, 1 / 4, 0, 3 / 8, 2 / 8, 1 / 8, 0]
    assert [record["lr"] for record in found] == pytest.approx([1e-3 * ratio for ratio in ratios])
    assert "planned anew" in caplog.text


# --- what must not disturb -------------------------------------------------------------------------------------------


def test_validating_changes_nothing_of_the_training(make_config, set_up):
    peft = {**lora_section(), "dropout": 0.3}
    without = make_config("without", step_scheduler__max_steps=6, peft=peft)
    often = make_config(
        "often", validates=True, step_scheduler__max_steps=6, step_scheduler__val_every_steps=1, peft=peft
    )
    for config in (without, often):
        recipe = set_up(config)
        recipe.run_train_validation_loop()
        assert recipe.model.training
    assert losses_of(often) == losses_of(without)
    assert len(records(often["checkpoint"]["checkpoint_dir"], "validation")) == 6


def test_validation_sets_have_their_names_everywhere(make_config, set_up, tmp_path):
    config = make_config(validates=True, step_scheduler__max_steps=2)
    config["validation_dataset_towers"] = {**config["validation_dataset"], "limit_dataset_samples": 4}
    recipe = set_up(config)
    recipe.run_train_validation_loop()
    saved = json.loads((tmp_path / "run" / "LATEST" / "losses.json").read_text())
    assert list(saved) == ["train_loss", "val_loss", "towers"]
    assert saved["towers"] == records(tmp_path / "run", "validation_towers")[0]["val_loss"]
    assert recipe.validate("towers").num_label_tokens < recipe.validate("default").num_label_tokens


def test_a_step_without_labels_changes_no_weight_and_is_counted(make_config, set_up, caplog):
    recipe = set_up(make_config())
    batches = [next(iter(recipe.train_loader))]
    batches[0]["labels"] = torch.full_like(batches[0]["labels"], -100)
    before = [p.detach().clone() for p in recipe.model.parameters()]
    metrics = recipe.train_step(batches)
    assert (metrics.loss, metrics.grad_norm, metrics.num_label_tokens) == (0.0, 0.0, 0)
    assert recipe.lr_scheduler.num_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(recipe.model.parameters(), before, strict=True))
    assert "has no label to learn" in caplog.text


def test_a_step_that_is_not_finite_stops_the_run_and_spares_the_weights(make_config, set_up, tmp_path):
    recipe = set_up(make_config(step_scheduler__max_steps=3, step_scheduler__ckpt_every_steps=1))
    steps = iter(recipe.schedule)
    _, batches = next(steps)
    with torch.no_grad():
        recipe.model.model.norm.weight[0] = math.nan
    before = [p.detach().clone() for p in recipe.model.parameters()]
    with pytest.raises(UserError, match=r"Step 0 is not finite .*update was not applied"):
        recipe.train_step(batches)
    for p, q in zip(recipe.model.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "overrides",
    [
        {"peft": lora_section()},
        {},
        {"optimizer__in_backward": True, "step_scheduler__local_batch_size": 4, "clip_grad_norm__max_norm": None},
    ],
    ids=["adapters", "all weights", "in backward"],
)
@pytest.mark.parametrize("fast", ["on", "off"])
def test_nothing_of_a_run_stays_in_memory(make_config, set_up, overrides, fast):
    config = make_config(validates=True, step_scheduler__max_steps=2, model__fast_layers=fast, **overrides)
    recipe = set_up(config)
    recipe.run_train_validation_loop()
    states = recipe.optimizer.state.values()
    tensors = [*recipe.model.parameters(), *(value for state in states for value in state.values())]
    found = [weakref.ref(tensor) for tensor in tensors]
    assert len(found) >= 4 * len(states), "weights, and step and two moments of those trained"
    del recipe, states, tensors
    gc.collect()
    assert sum(ref() is not None for ref in found) == 0


# --- other shapes of a run -------------------------------------------------------------------------------------------


def test_pretraining_from_a_configuration_on_a_stream_of_batches(make_config, set_up, model_dirs):
    config = make_config(step_scheduler__max_steps=3, dataloader={"batch_size": None})
    config["model"] = {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
        "config": {
            "_target_": "transformers.AutoConfig.from_pretrained",
            "pretrained_model_name_or_path": str(model_dirs("llama")),
        },
        "torch_dtype": "float32",
    }
    target = "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset"
    config["dataset"] = {"_target_": target, "vocab_size": 400, "seq_len": 16, "num_samples": 100, "batch_size": 2}
    recipe = set_up(config)
    recipe.run_train_validation_loop()
    found = records(config["checkpoint"]["checkpoint_dir"])
    assert [record["num_label_tokens"] for record in found] == [2 * 2 * 15] * 3
    assert found[0]["loss"] == pytest.approx(math.log(448), abs=0.3)


@pytest.mark.parametrize("bits", [4, 32])
def test_a_recipe_trains_random_weights_by_its_target_alone(make_config, set_up, model_dirs, tmp_path, bits):
    bare = tmp_path / "bare"
    shutil.copytree(model_dirs("llama"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    more = {"quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}} if bits == 4 else {}
    config = make_config(peft=lora_section(), step_scheduler__max_steps=2, **more)
    config["model"]["pretrained_model_name_or_path"] = str(bare)
    with pytest.raises(UserError, match="no weights"):
        set_up(config)
    config["model"]["_target_"] = "nemo_automodel.NeMoAutoModelForCausalLM.from_config"
    set_up(config).run_train_validation_loop()
    assert losses_of(config)[0] == pytest.approx(math.log(448), abs=0.3)
    saved = Path(config["checkpoint"]["checkpoint_dir"], "LATEST", "model")
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bare)


def test_a_model_of_another_callable_is_taken_as_it_is(make_config, set_up, model_dirs, tmp_path):
    config = make_config(step_scheduler__max_steps=3)
    set_up(config).run_train_validation_loop()
    plain = make_config("plain", step_scheduler__max_steps=3)
    plain["model"] = {
        "_target_": "transformers.AutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": str(model_dirs("llama")),
        "dtype": "float32",
    }
    set_up(plain).run_train_validation_loop()
    assert losses_of(plain) == losses_of(config)
    with pytest.raises(UserError, match=r"taken as it is, so peft_config cannot be applied"):
        set_up({**plain, "peft": lora_section(), "checkpoint": {"checkpoint_dir": str(tmp_path / "third")}})


def test_packing_takes_the_packed_collater_and_says_so(make_config, set_up, caplog):
    config = make_config(
        step_scheduler__max_steps=2,
        packed_sequence__packed_sequence_size=160,
        dataloader={"collate_fn": "nemo_automodel.components.datasets.utils.default_collater", "shuffle": False},
    )
    with caplog.at_level("INFO"):
        recipe = set_up(config)
    assert "packed_sequence_thd_collater takes the place of `collate_fn`" in caplog.text
    batch = next(iter(recipe.train_loader))
    assert batch["input_ids"].shape == (2, 160)
    assert batch["seq_lens"].shape[1] > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dataset__dataset_name": "no/such/place.jsonl"}, r"no/such/place"),
        ({"dataset__split": "tset"}, r"tset"),
        ({"optimizer__weight_decy": 0.1}, r"weight_decy.*weight_decay"),
        ({"optimizer__param_group_overrides": [{"pattern": "("}]}, r"is not a regular expression"),
        ({"loss_fn__reductoin": "sum"}, r"reductoin"),
        ({"dataloader__collate_fn": "nemo_automodel.components.datasets.utils.default_colater"}, r"default_colater"),
        ({"dist_env__backend": "smoke"}, r"smoke"),
        ({"distributed__tp_size": 2}, r"tp_size"),
        ({"step_scheduler__global_batch_size": 5}, r"global_batch_size.* is 5"),
        ({"checkpoint__restore_from": "epoch_0_step_77"}, r"epoch_0_step_77"),
        ({"lr_scheduler__min_lr": 1.0}, r"min_lr"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(make_config, set_up, monkeypatch, overrides, message):
    monkeypatch.setattr(TrainFinetuneRecipeForNextTokenPrediction, "build_model", pytest.fail)
    with pytest.raises(UserError, match=message) as caught:
        set_up(make_config(**overrides))
    assert "\n" not in str(caught.value)


def test_the_start_says_who_runs_what_and_in_which_dtype(make_config, set_up, caplog, capfd):
    with caplog.at_level("INFO"):
        set_up(make_config(peft=lora_section()))
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["optimizer"]["lr"] == 1e-3
    for words in ("Experiment_details:", "Model name:", "torch 2.", "LlamaForCausalLM("):
        assert words in caplog.text
    adapter = 2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))  # layers x rank x (in + out)
    assert f"Parameters by dtype: trainable float32 {adapter:,} | frozen float32 47,264" in caplog.text
