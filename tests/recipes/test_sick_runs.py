"""A step that goes wrong names its rows, stays on disk, comes out the same when redone, and costs no more than it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from checkpoint.tiny_run import assert_same, contents
from support.recipes import lora_section, recipe_config, set_up_recipe
from support.tiny import write_squad

from nemo_automodel.cli.app import main
from nemo_automodel.components.checkpoint.layout import complete_checkpoints
from nemo_automodel.components.training.step_dump import read_dump
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from nemo_automodel.recipes.replay import replay
from nemo_automodel.recipes.sick_runs import default_places, pieces
from nemo_automodel.shared.errors import UserError

SICK_TOKEN = "Zanzibar"
"""The place in the answer of the poisoned row."""


def poisoned_squad(path, num_rows: int, index: int):
    """Write rows of which one has an answer that no other row has."""
    write_squad(path, num_train=num_rows)
    rows = [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()]
    rows[index]["answers"]["text"] = [f"{SICK_TOKEN} {'Z' * 60}"]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def squad(tmp_path):
    """64 rows of which number 25 is poisoned: line 26 of the file, in step 6 where a step takes four."""
    return poisoned_squad(tmp_path / "squad", 64, 25)


@pytest.fixture
def make_config(tmp_path, model_dirs, squad):
    def make(run="run", **overrides):
        return recipe_config(model_dirs("llama"), squad, tmp_path / run, **overrides)

    return make


@pytest.fixture
def set_up(tmp_path):
    return lambda config: set_up_recipe(config, tmp_path / "config.yaml")


def records(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "training.jsonl").read_text().splitlines()]


class Poisoned(TrainFinetuneRecipeForNextTokenPrediction):
    """The loss of a row with a certain token is not finite, as with a defect in a kernel."""

    def poison(self, poisoned_ids: list[int]) -> None:
        real, wanted = self.loss_fn, torch.tensor(poisoned_ids)

        def loss_fn(*, logits, labels, num_label_tokens):
            loss = real(logits=logits, labels=labels, num_label_tokens=num_label_tokens)
            is_sick = all((labels == token).any() for token in wanted)
            return loss * math.nan if is_sick else loss

        self.engine.loss_fn = loss_fn


def poisoned(recipe):
    """Make every step fail that holds the row with SICK_TOKEN."""
    recipe.__class__ = Poisoned
    recipe.poison(
        recipe.tokenizer(SICK_TOKEN, add_special_tokens=False)["input_ids"][:1] + recipe.tokenizer("ZZ")["input_ids"]
    )
    return recipe


def on_logits(recipe):
    """Compute the loss as the poisoned one is, from logits: joined with the head it may differ in its last digit."""
    real = recipe.loss_fn
    recipe.engine.loss_fn = lambda **values: real(**values)
    return recipe


def test_a_sick_step_stops_the_run_names_its_row_and_is_on_disk(make_config, set_up, tmp_path, squad):
    recipe = poisoned(set_up(make_config(step_scheduler__max_steps=9, step_scheduler__ckpt_every_steps=3)))
    with pytest.raises(UserError) as caught:
        recipe.run_train_validation_loop()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("Step 6 is not finite (loss nan, grad_norm nan); its update was not applied. ")
    place = f"{squad / 'train.jsonl'} line 26 (id train-25)"
    assert f"Rows whose loss is not finite: {place}. " in message
    assert f"redo it with: automodel replay {tmp_path / 'run' / 'debug' / 'step_6'}" in message
    assert message.endswith("--loss_guard.on_nonfinite skip")
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(6))
    assert complete_checkpoints(tmp_path / "run")[-1].name == "epoch_0_step_5"
    dump = read_dump(tmp_path / "run" / "debug" / "step_6")
    assert dump.facts.rows[0].where == place
    assert [batch["input_ids"].shape[0] for batch in dump.batches] == [2, 2]
    assert all(file.suffix in (".safetensors", ".json", ".yaml") for file in dump.config_path.parent.iterdir())


def test_skipping_leaves_out_that_step_alone(make_config, set_up, tmp_path):
    """The run without the sick step is one whose optimizer never saw its rows."""
    config = make_config(step_scheduler__max_steps=9, loss_guard={"on_nonfinite": "skip"})
    recipe = poisoned(set_up(config))
    recipe.run_train_validation_loop()
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(9))
    assert [record["step"] for record in found if record["loss"] is None] == [6]

    class WithoutUpdate(TrainFinetuneRecipeForNextTokenPrediction):
        def train_step(self, batches):
            step = self.optimizer.step
            if self.schedule.step - 1 == 6:
                self.optimizer.step = lambda: None
            try:
                return super().train_step(batches)
            finally:
                self.optimizer.step = step

    other = on_logits(set_up(make_config("other", step_scheduler__max_steps=9)))
    other.__class__ = WithoutUpdate
    other.run_train_validation_loop()
    assert_same(dict(recipe.model.state_dict()), dict(other.model.state_dict()))
    healthy = [record["loss"] for record in found if record["step"] != 6]
    assert healthy == [record["loss"] for record in records(tmp_path / "other") if record["step"] != 6]


def test_a_stopped_run_goes_on_without_the_step_when_told_to(make_config, set_up, tmp_path):
    schedule = {"step_scheduler__max_steps": 9, "step_scheduler__ckpt_every_steps": 3}
    with pytest.raises(UserError):
        poisoned(set_up(make_config("cut", **schedule))).run_train_validation_loop()
    skip = {"loss_guard": {"on_nonfinite": "skip"}}
    resumed = poisoned(set_up(make_config("cut", **schedule, **skip)))
    assert resumed.schedule.step == 6
    resumed.run_train_validation_loop()
    poisoned(set_up(make_config("whole", **schedule, **skip))).run_train_validation_loop()
    cut, whole = ([record["loss"] for record in records(tmp_path / run)] for run in ("cut", "whole"))
    assert cut == whole
    assert (tmp_path / "cut" / "LATEST" / "loss_guard.json").read_bytes() == (
        tmp_path / "whole" / "LATEST" / "loss_guard.json"
    ).read_bytes()


def test_rolling_back_takes_weights_and_optimizer_and_leaves_the_data(make_config, set_up, tmp_path, caplog):
    schedule = {"step_scheduler__max_steps": 9, "step_scheduler__ckpt_every_steps": 4}
    recipe = poisoned(set_up(make_config(**schedule, loss_guard={"on_nonfinite": "rollback"})))
    recipe.run_train_validation_loop()
    assert f"Weights and optimizer are those of {tmp_path / 'run' / 'epoch_0_step_3'} again" in caplog.text

    class Back(TrainFinetuneRecipeForNextTokenPrediction):
        """Trains steps 0 to 3, then 7 and 8, as if 4, 5 and 6 had not been."""

        def train_step(self, batches):
            index, step = self.schedule.step - 1, self.optimizer.step
            if 4 <= index <= 6:
                self.optimizer.step = lambda: None
            try:
                return super().train_step(batches)
            finally:
                self.optimizer.step = step

    other = on_logits(set_up(make_config("other", **schedule)))
    other.__class__ = Back
    other.run_train_validation_loop()
    assert_same(dict(recipe.model.state_dict()), dict(other.model.state_dict()))
    assert [r["loss"] for r in records(tmp_path / "run")[7:]] == [r["loss"] for r in records(tmp_path / "other")[7:]]
    assert recipe.schedule.step == 9


class Overflows(TrainFinetuneRecipeForNextTokenPrediction):
    """The update of step 2 leaves a weight that is not a number, once."""

    has_happened = False

    def _update(self) -> None:
        super()._update()
        if self.schedule.step - 1 == 2 and not self.has_happened:
            self.has_happened = True
            with torch.no_grad():
                self.model.model.norm.weight[0] = math.nan


def test_rolling_back_never_meets_the_sick_weights_again(make_config, set_up, tmp_path, caplog):
    """A save falls between the update that spoils the weights and the step that shows it; one checkpoint is kept."""
    schedule = {"step_scheduler__max_steps": 6, "step_scheduler__ckpt_every_steps": 1}
    keeps = {"checkpoint__max_recent_checkpoints": 1}
    recipe = set_up(make_config(**schedule, **keeps, loss_guard={"on_nonfinite": "rollback"}))
    recipe.__class__ = Overflows
    recipe.run_train_validation_loop()
    assert (
        f"The checkpoint `{tmp_path / 'run' / 'epoch_0_step_2'}` was not saved: `model.norm.weight` is" in caplog.text
    )
    assert f"Weights and optimizer are those of {tmp_path / 'run' / 'epoch_0_step_1'} again" in caplog.text
    assert [math.isfinite(record["loss"]) for record in records(tmp_path / "run") if record["loss"] is not None] == [
        True
    ] * 5
    assert complete_checkpoints(tmp_path / "run")[-1].name == "epoch_0_step_5"


def test_too_many_sick_steps_stop_every_run(make_config, set_up, tmp_path):
    config = make_config(step_scheduler__max_steps=9, loss_guard={"on_nonfinite": "skip", "max_nonfinite": 2})
    recipe = set_up(config)
    with torch.no_grad():
        recipe.model.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match=r"Step 2 .*weights are at fault.*the 3th such step.*max_nonfinite` is 2"):
        recipe.run_train_validation_loop()
    assert sorted(path.name for path in (tmp_path / "run" / "debug").iterdir()) == ["step_0", "step_1", "step_2"]


def test_no_more_dumps_than_asked_for(make_config, set_up, tmp_path, caplog):
    guard = {"on_nonfinite": "skip", "max_nonfinite": 5, "max_dumps": 1}
    recipe = set_up(make_config(step_scheduler__max_steps=3, loss_guard=guard))
    with torch.no_grad():
        recipe.model.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match=r"was not saved: `model\.norm\.weight` is not finite"):
        recipe.run_train_validation_loop()
    assert [path.name for path in (tmp_path / "run" / "debug").iterdir()] == ["step_0"]
    assert caplog.text.count("It is not dumped: `loss_guard.max_dumps` is 1.") == 2


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "adapter", "packed"])
def test_a_spike_is_named_and_its_step_comes_out_the_same(make_config, set_up, tmp_path, caplog, capsys, kind):
    squad = poisoned_squad(tmp_path / "long", 400, 350)
    overrides = {
        "dataset__dataset_name": str(squad),
        "loss_guard": {"dump_spikes": True},
        "step_scheduler": {"global_batch_size": 2, "local_batch_size": 1, "num_epochs": 1, "ckpt_every_steps": 1000},
        "optimizer__lr": 1e-2,
        "lr_scheduler": {"lr_decay_style": "constant", "lr_warmup_steps": 0},
    }
    if kind == "adapter":
        # a frozen random model learns nothing, so that no loss stands out
        clean = {"dataset__dataset_name": str(write_squad(tmp_path / "clean", num_train=200)), "optimizer__lr": 1e-2}
        set_up(make_config("base", step_scheduler__max_steps=50, **clean)).run_train_validation_loop()
        overrides["model__pretrained_model_name_or_path"] = str(tmp_path / "base" / "LATEST" / "model")
        overrides["peft"] = {**lora_section(), "dropout": 0.2}
    if kind == "packed":
        overrides["packed_sequence__packed_sequence_size"] = 160
    set_up(make_config(**overrides)).run_train_validation_loop()
    told = re.findall(r"Step (\d+): the loss ([\d.]+) is a spike .*Largest shares: \d+% (.*?) \(loss", caplog.text)
    place = f"{squad / 'train.jsonl'} line 351"
    step = next(int(step) for step, _, where in told if where.startswith(place))
    dump = tmp_path / "run" / "debug" / f"step_{step}"
    recorded = next(record for record in records(tmp_path / "run") if record["step"] == step)
    found = replay(dump)
    assert (found.loss, found.grad_norm) == (recorded["loss"], recorded["grad_norm"])
    assert found.is_same
    before = contents(tmp_path)
    capsys.readouterr()
    assert main(["replay", str(dump)]) == 0
    output = capsys.readouterr().out
    assert "the same, bit for bit" in output
    assert place in output
    assert contents(tmp_path) == before


def test_losses_and_gradients_of_rows_add_up_to_the_steps(make_config, set_up, tmp_path):
    """The gradient of a step is the sum of its rows', so for one row a step they are equal; losses always add up."""
    recipe = poisoned(set_up(make_config(step_scheduler__max_steps=9)))
    with pytest.raises(UserError):
        recipe.run_train_validation_loop()
    found = replay(tmp_path / "run" / "debug" / "step_6")  # the poison is no part of the configuration
    assert math.isnan(found.facts.loss)
    assert not found.is_same
    total = sum(row.loss * row.num_label_tokens for row in found.rows)
    assert total / found.facts.num_label_tokens == pytest.approx(found.loss, rel=1e-5)
    assert found.grad_norm <= sum(row.grad_norm for row in found.rows) * (1 + 1e-5)
    worst = max(found.rows, key=lambda row: row.num_label_tokens)
    assert worst.where.endswith("line 26 (id train-25)")


def test_a_replay_under_other_settings(make_config, set_up, tmp_path, capsys):
    recipe = poisoned(set_up(make_config(step_scheduler__max_steps=9)))
    with pytest.raises(UserError):
        recipe.run_train_validation_loop()
    dump = str(tmp_path / "run" / "debug" / "step_6")
    assert main(["replay", dump, "--rows", "1", "--loss_fn._target_",
                 "nemo_automodel.components.loss.chunked_ce.ChunkedCrossEntropy"]) == 0  # fmt: skip
    output = capsys.readouterr().out
    assert "not the same: the configuration was changed" in output
    assert "and 3 more (--rows 4)" in output
    assert main(["replay", dump, "--model.torch_dtyp", "float32"]) in (0, 2)


@pytest.mark.parametrize(
    "damage", ["none", "step.json", "batches.safetensors", "weights.safetensors", "random.safetensors"]
)
def test_no_dump_or_a_damaged_one_is_one_line(make_config, set_up, tmp_path, capsys, damage):
    dump = tmp_path / "run" / "debug" / "step_0"
    if damage != "none":
        recipe = set_up(make_config(step_scheduler__max_steps=9))
        with torch.no_grad():
            recipe.model.model.norm.weight[0] = math.nan
        with pytest.raises(UserError):
            recipe.run_train_validation_loop()
        (dump / damage).write_bytes((dump / damage).read_bytes()[:30])
    capsys.readouterr()
    assert main(["replay", str(dump)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("is no dump of a step" if damage == "none" else "is damaged") in error


def test_weights_stay_out_where_the_disk_has_no_room(make_config, set_up, tmp_path, monkeypatch, capsys):
    recipe = poisoned(set_up(make_config(step_scheduler__max_steps=9)))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**19})())
    with pytest.raises(UserError, match=r"without its weights .*, for which the disk has no room"):
        recipe.run_train_validation_loop()
    monkeypatch.undo()
    dump = tmp_path / "run" / "debug" / "step_6"
    assert not (dump / "weights.safetensors").exists()
    assert main(["replay", str(dump)]) == 0
    assert "the run's first ones were used" in capsys.readouterr().out


# --- rows ------------------------------------------------------------------------------------------------------------


def test_places_survive_shuffling_epochs_workers_and_a_resume(make_config, set_up, tmp_path, squad):
    """Every place named is the row the step really held, whatever made the order."""
    config = make_config(
        step_scheduler__max_steps=40,
        step_scheduler__ckpt_every_steps=9,
        dataloader={"shuffle": True, "num_workers": 0},
    )
    rows = (squad / "train.jsonl").read_text().splitlines()

    class Looks(TrainFinetuneRecipeForNextTokenPrediction):
        def train_step(self, batches):
            metrics = super().train_step(batches)
            for piece, place in zip(pieces(batches), self.sick_runs._places(), strict=True):
                number = int(re.fullmatch(r".*train\.jsonl line (\d+) \(id .*\)", place)[1])
                text = self.tokenizer.decode(piece.batch["input_ids"][0])
                assert json.loads(rows[number - 1])["question"] in text
            if self.schedule.step == self.stop:
                raise KeyboardInterrupt
            return metrics

    for stop in (23, -1):
        recipe = set_up(config)
        recipe.__class__, recipe.stop = Looks, stop
        try:
            recipe.run_train_validation_loop()
        except KeyboardInterrupt:
            assert stop == 23
    assert len(records(tmp_path / "run")) == 40


def test_pieces_of_packed_rows_are_their_documents():
    ids = torch.arange(24).reshape(2, 12)
    batch = {
        "input_ids": ids,
        "labels": ids + 1,
        "position_ids": ids % 5,
        "seq_lens": torch.tensor([[5, 4, -1000], [3, 3, 5]]),
    }
    found = list(pieces([batch]))
    assert [piece.batch["input_ids"].tolist()[0] for piece in found] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8],
        [12, 13, 14],
        [15, 16, 17],
        [18, 19, 20, 21, 22],
    ]
    assert [(piece.row, piece.document) for piece in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert default_places([batch])[3] == "micro-batch 1, row 2, document 2"
    assert [piece.batch["seq_lens"].item() for piece in found] == [5, 4, 3, 3, 5]
