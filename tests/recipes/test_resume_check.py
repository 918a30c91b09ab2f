"""A resume proves itself: same next batch, same loss; what differs is named, and changed settings say what still holds.

The oracle of the recorded loss is Transformers' own over the rows that the data file holds.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint.tiny_run import contents
from support.recipes import lora_section, recipe_config, set_up_recipe
from support.tiny import make_model_dir, write_squad

from nemo_automodel.components.checkpoint.witness import read_witness
from nemo_automodel.components.datasets.epoch_order import EpochBatchSampler
from nemo_automodel.shared.errors import ConfigError, UserError

NUM_ROWS = 18
STREAM = (
    "nemo_automodel.components.datasets.llm.column_mapped_text_instruction_iterable_dataset."
    "ColumnMappedTextInstructionIterableDataset"
)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_squad(tmp_path / "squad", num_train=NUM_ROWS)


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model_dir(tmp_path / "model", attention_dropout=0.1)


@pytest.fixture
def run(tmp_path, data, model):
    """Return a function that trains up to ``max_steps`` and returns the losses of all steps."""

    def go(max_steps: int | None, name: str = "run", **overrides):
        overrides = {"step_scheduler__num_epochs": 3, "lr_scheduler": None, "dataloader": {}, **overrides}
        config = recipe_config(model, data, tmp_path / name, step_scheduler__max_steps=max_steps, **overrides)
        recipe = set_up_recipe(config, tmp_path / "config.yaml")
        recipe.run_train_validation_loop()
        return losses(tmp_path / name)

    return go


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "training.jsonl").read_text().splitlines()]


def checked(caplog) -> str:
    """Return what the last start said of its check."""
    return [record.getMessage() for record in caplog.records if "Checked before" in record.getMessage()][-1]


LORA = {"peft": {**lora_section(), "dropout": 0.3}}
STREAMED = {
    "dataset": {"_target_": STREAM, "column_mapping": {"question": "question", "answer": "title"}},
    "dataloader": {"num_workers": 2},
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        LORA,
        {"dataloader": {"num_workers": 2}},
        {"packed_sequence__packed_sequence_size": 96},
        {"step_scheduler__local_batch_tokens": 128},
        STREAMED,
    ],
    ids=["all weights", "lora", "workers", "packed", "token budget", "stream"],
)
@pytest.mark.parametrize("stop", [3, 5])
def test_a_good_resume_says_so_and_changes_nothing(run, tmp_path, data, caplog, options, stop):
    """Three steps end in mid-epoch; five end the epoch of 18 rows where they are not packed."""
    if "dataset" in options:
        options = {**options, "dataset": {**options["dataset"], "path_or_dataset_id": str(data / "train.jsonl")}}
    whole = run(9, "whole", **options, checkpoint__resume_check=False)
    caplog.set_level(logging.INFO)
    run(stop, "cut", **options)
    assert run(9, "cut", **options) == whole
    (checkpoint,) = (tmp_path / "cut").glob(f"epoch_*_step_{stop - 1}")
    witness = read_witness(checkpoint)
    said = checked(caplog)
    if witness.is_next:
        assert f"the next batch is the recorded one ({witness.digest[:12]}, " in said
    else:
        assert (stop, "dataset" in options) == (5, True), "only the end of a stream is not told"
        assert "What comes next could not be told at the save (of a stream, at the end of an epoch" in said
    assert f"The loss of the recorded batch is {witness.loss:.6f}, bit for bit as at the save." in said
    assert not (tmp_path / "whole" / "LATEST" / "resume").exists()


def test_what_is_recorded_is_the_next_batch_and_transformers_loss_of_it(run, tmp_path, data):
    run(2, dataloader={"shuffle": False})
    checkpoint = tmp_path / "run" / "epoch_0_step_1"
    witness = read_witness(checkpoint)
    assert witness.is_next
    assert witness.row_numbers == [8, 9]
    assert witness.surroundings["torch"] == torch.__version__
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint / "model")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()][8:10]
    loss_sum, num_labels = 0.0, 0
    for place, row in enumerate(rows):
        answer = row["answers"]["text"][0]
        text = f"Context: {row['context']} Question: {row['question']} Answer: {answer}"
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        kept = witness.batch["attention_mask"][place].bool()
        assert witness.batch["input_ids"][place][kept].tolist() == ids[:-1].tolist()
        num_learned = int((witness.batch["labels"][place] != -100).sum())
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        tail = torch.nn.functional.cross_entropy(logits[-num_learned:], ids[1:][-num_learned:], reduction="sum")
        loss_sum, num_labels = loss_sum + tail.item(), num_labels + num_learned
    assert witness.loss == pytest.approx(loss_sum / num_labels, rel=1e-5)


def _change_row(data: Path, number: int) -> None:
    path = data / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[number] = lines[number].replace("The tower", "A tower")
    path.write_text("\n".join(lines) + "\n")


def test_a_row_that_changed_is_named_and_nothing_on_the_disk_is(run, tmp_path, data, caplog):
    unshuffled = {"dataloader": {"shuffle": False}}
    run(2, **unshuffled)
    before = contents(tmp_path / "run")
    _change_row(data, 9)
    message = (
        r"The run does not go on as it was saved in `.*epoch_0_step_1`\. The data changed: the next batch has the same "
        r"rows with other tokens or labels, the first that differs is row 9\. Restore the data, the tokenizer and the "
        r"template\. Or go on all the same: --checkpoint\.resume_check warn"
    )
    with pytest.raises(UserError, match=message):
        run(4, **unshuffled)
    assert contents(tmp_path / "run") == before
    assert len(run(4, **unshuffled, checkpoint__resume_check="warn")) == 4
    assert "The data changed" in caplog.text


def test_a_row_that_does_not_come_next_is_not_seen(run, data):
    """The check looks at one batch; whoever wants all of the data checked compares the files."""
    run(2, dataloader={"shuffle": False})
    _change_row(data, 17)
    assert len(run(4, dataloader={"shuffle": False})) == 4


def test_another_order_is_called_that(run, monkeypatch):
    run(2)
    shuffled = EpochBatchSampler._shuffled
    monkeypatch.setattr(EpochBatchSampler, "_shuffled", lambda self, rng: shuffled(self, rng)[::-1])
    with pytest.raises(UserError, match=r"The order of the rows changed: row \d+ comes next, row \d+ was to come\."):
        run(4)


def test_other_weights_below_an_adapter(run, tmp_path, model):
    """The checkpoint holds the adapter alone, so only its loss can tell that it stands on another model."""
    run(2, **LORA)
    transformers.set_seed(1)
    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model))
    other.save_pretrained(model)
    with pytest.raises(UserError, match=r"The loss of the recorded batch is [\d.]+, at the save it was [\d.]+, more"):
        run(4, **LORA)


def test_other_surroundings_are_named_and_have_a_tolerance(run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(2)
    path = tmp_path / "run" / "epoch_0_step_1" / "resume" / "witness.json"
    content = json.loads(path.read_text())
    loss = float(content["loss"])
    (tmp_path / "run" / "epoch_0_step_1" / "manifest.json").unlink()
    content |= {"loss": str(loss * (1 + 5e-5)), "surroundings": {**content["surroundings"], "torch": "2.10.0"}}
    path.write_text(json.dumps(content))
    run(3)
    assert f"The loss of the recorded batch is {loss:.6f}, at the save it was {loss * (1 + 5e-5):.6f}: within " in (
        checked(caplog)
    )
    assert f"not bit for bit (torch 2.10.0 → {torch.__version__})." in checked(caplog)


@pytest.mark.parametrize("damage", ["cut", "no labels", "unknown tokens", "no format"])
def test_a_damaged_record_is_one_line(run, tmp_path, damage):
    """Without a manifest nothing else says so."""
    run(2)
    checkpoint = tmp_path / "run" / "epoch_0_step_1"
    (checkpoint / "manifest.json").unlink()
    batch, facts = checkpoint / "resume" / "batch.safetensors", checkpoint / "resume" / "witness.json"
    if damage == "cut":
        batch.write_bytes(batch.read_bytes()[:-9])
    elif damage == "no format":
        facts.write_text("[]")
    else:
        import safetensors.torch

        tensors = safetensors.torch.load(batch.read_bytes())
        if damage == "no labels":
            del tensors["labels"]
        else:
            tensors["input_ids"][0, 0] = 10**9
        batch.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(UserError, match=re.escape("--checkpoint.resume_check off")):
        run(4)
    assert len(run(4, checkpoint__resume_check=False)) == 4


def test_a_checkpoint_without_a_record_goes_on(run, caplog):
    caplog.set_level(logging.INFO)
    run(2, checkpoint__resume_check=False)
    run(4)
    assert "does not say which batch comes next, so that is not checked." in caplog.text


def test_an_unknown_policy():
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig

    with pytest.raises(ConfigError, match=re.escape("`checkpoint.resume_check: warning` is not known. Did you mean")):
        CheckpointingConfig(resume_check="warning")


# --- settings that changed -------------------------------------------------------------------------------------------


def rows_of(monkeypatch) -> list[list[int]]:
    """Return a list that gets the row numbers of every batch that a loader makes from now on."""
    seen: list[list[int]] = []
    iterate = EpochBatchSampler.__iter__

    def watched(self):
        for batch in iterate(self):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(EpochBatchSampler, "__iter__", watched)
    return seen


def test_another_local_batch_keeps_the_rows_of_every_step(run, caplog):
    whole = run(8, "whole", model__attn_implementation="eager")
    run(3, "cut", model__attn_implementation="eager")
    caplog.set_level(logging.INFO)
    options = {"step_scheduler__local_batch_size": 4, "checkpoint__restore_from": "LATEST"}
    cut = run(8, "cut", model__attn_implementation="eager", **options)
    assert cut[:3] == whole[:3]
    assert cut[3:] != whole[3:], "dropout draws other numbers"
    assert cut[3:] == pytest.approx(whole[3:], rel=0.02)
    assert "the next 2 rows are the recorded ones, in batches of another shape." in checked(caplog)
    assert (
        "Changed since epoch_0_step_2 was saved: `step_scheduler.local_batch_size` (2 → 4): every step has the same "
        "rows, none is skipped or comes twice."
    ) in caplog.text


@pytest.mark.parametrize(("old", "new"), [(4, 10), (10, 4), (4, 6), (6, 4), (2, 16)])
def test_another_global_batch_ends_the_epoch_where_its_rows_end(run, tmp_path, caplog, old, new):
    """18 rows, two steps of the old size, the rest and a second epoch in steps of the new one."""
    schedule = {"step_scheduler__num_epochs": 2, "dataloader": {"shuffle": False}}
    options = {**schedule, "lr_scheduler": {"lr_decay_style": "linear", "lr_warmup_steps": 0, "min_lr": 0.0}}
    run(2, step_scheduler__global_batch_size=old, **options)
    caplog.set_level(logging.INFO)
    later = {"step_scheduler__global_batch_size": new, "checkpoint__restore_from": "LATEST"}
    run(None, **later, **options)
    num_left = NUM_ROWS - 2 * old
    num_steps = 2 + -(-num_left // new) + -(-NUM_ROWS // new)
    records = [json.loads(line) for line in (tmp_path / "run" / "training.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(num_steps))
    assert [record["epoch"] for record in records].count(1) == -(-NUM_ROWS // new)
    by_epoch = [sum(r["num_label_tokens"] for r in records if r["epoch"] == epoch) for epoch in (0, 1)]
    assert by_epoch[0] == by_epoch[1], "no row is skipped and none comes twice"
    assert records[-1]["lr"] == 0.0, "the decay ends with the run"
    assert (tmp_path / "run" / "LATEST").resolve().name == f"epoch_1_step_{num_steps - 1}"
    assert f"`step_scheduler.global_batch_size` ({old} → {new}): no row of this epoch is skipped" in caplog.text
    with caplog.at_level(logging.INFO):
        run(None, **{**later, "checkpoint__restore_from": None}, **options)
    assert "This run is finished" in caplog.text


def test_a_run_that_is_cut_again_after_the_change(run, tmp_path):
    options = {"step_scheduler__num_epochs": 2, "dataloader": {"shuffle": False}}
    new = {**options, "step_scheduler__global_batch_size": 10}
    for name in ("once", "twice"):
        run(2, name, **options)
    run(None, "once", **new, checkpoint__restore_from="LATEST")
    run(3, "twice", **new, checkpoint__restore_from="LATEST")
    for stop in (4, None):
        run(stop, "twice", **new)
    assert losses(tmp_path / "twice") == losses(tmp_path / "once")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 8}, "`seed` (7 → 8): weights, optimizer and schedule are exact. The place in the epoch is a number"),
        ({"dataset__seq_length": 40}, "until the epoch ends some rows may come twice and others not at all."),
        ({"optimizer__lr": 5e-4}, "Updates follow the new value from here on."),
    ],
)
def test_what_stays_exact_is_said(run, caplog, changed, said):
    run(2)
    caplog.set_level(logging.INFO)
    assert len(run(3, **changed, checkpoint__restore_from="LATEST")) == 3
    assert said in caplog.text


def test_a_stream_refuses_another_number_of_workers(run, data):
    dataset = {**STREAMED["dataset"], "path_or_dataset_id": str(data / "train.jsonl")}
    run(2, dataset=dataset, dataloader={"num_workers": 2})
    message = (
        "`dataloader.num_workers` is 1, but each of 2 workers kept its own place in the stream. Go on with "
        "--dataloader.num_workers 2"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(3, dataset=dataset, dataloader={"num_workers": 1}, checkpoint__restore_from="LATEST")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_number_of_workers_changes_nothing_for_rows(run, num_workers):
    whole = run(5, "whole")
    run(2, "cut", dataloader={"num_workers": 1})
    options = {"dataloader": {"num_workers": num_workers}, "checkpoint__restore_from": "LATEST"}
    assert run(5, "cut", **options) == whole


def test_another_loss_that_the_user_asked_for_is_a_warning(run, caplog):
    run(2, **LORA)
    assert len(run(3, peft={**LORA["peft"], "alpha": 4000}, checkpoint__restore_from="LATEST")) == 3
    assert "Not as before, as the changed settings want it: The loss of the recorded batch is" in caplog.text
    assert "`peft.alpha` (16 → 4000): the place in the data is exact. The same weights give another" in caplog.text
