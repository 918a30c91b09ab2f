"""A run that packs proves first that its documents are apart, and trains on shared prefixes as on separate rows."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from support.recipes import recipe_config, set_up_recipe
from support.tiny import make_model_dir, write_squad

from nemo_automodel._transformers import forward
from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.recipes.packing_proof import pack_documents
from nemo_automodel.shared.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    root = tmp_path_factory.mktemp("assets")
    return make_model_dir(root / "model"), write_squad(root / "squad")


def recipe(assets, tmp_path, **overrides):
    packing = {f"packed_sequence__{key}": value for key, value in overrides.pop("packing", {}).items()}
    config = recipe_config(*assets, tmp_path / "run", step_scheduler__max_steps=3, **packing, **overrides)
    return set_up_recipe(config, tmp_path / "config.yaml")


def proof_lines(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.message.startswith("Packed documents")]


def test_a_packed_run_says_that_its_documents_are_isolated(assets, tmp_path, caplog):
    caplog.set_level("INFO")
    recipe(assets, tmp_path, packing={"packed_sequence_size": 256})
    (line,) = proof_lines(caplog)
    assert line.startswith("Packed documents are isolated: proven on 6 documents in ")
    assert "Attention of packed rows: dense (the model is on the cpu)." in caplog.text


@pytest.mark.parametrize("packing", [{}, {"packed_sequence_size": 256, "prove_isolation": False}])
def test_nothing_is_proven_without_packing_or_when_it_is_off(assets, tmp_path, caplog, packing):
    caplog.set_level("INFO")
    recipe(assets, tmp_path, packing=packing)
    assert not proof_lines(caplog)


def test_a_leak_stops_the_run_before_its_first_step(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "build_packed_masks", lambda _, batch, __: torch.ones_like(batch["input_ids"]))
    with pytest.raises(UserError, match="see each other"):
        recipe(assets, tmp_path, packing={"packed_sequence_size": 256})


def test_a_kernel_that_cannot_run_stops_the_run(assets, tmp_path):
    with pytest.raises(UserError, match=r"`packed_sequence.attention: varlen` cannot run: the model is on the cpu"):
        recipe(assets, tmp_path, packing={"packed_sequence_size": 256, "attention": "varlen"})


def losses(path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "training.jsonl").read_text().splitlines()]


def test_the_proof_changes_nothing_of_the_run(assets, tmp_path):
    found = []
    for number, is_proven in enumerate((True, False)):
        packing = {"packed_sequence_size": 128, "prove_isolation": is_proven}
        run = recipe(assets, tmp_path / str(number), packing=packing, dataloader__shuffle=True)
        run.run_train_validation_loop()
        found.append(losses(tmp_path / str(number) / "run"))
    assert found[0] == found[1]
    assert len(found[0]) == 3


@pytest.mark.parametrize("strategy", ["thd", "neat"])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_documents_of_the_proof_are_packed_as_the_run_packs(strategy, share_prefix):
    prefix = list(range(100, 120))
    documents = [([*prefix, n, n + 1], [-100] * 20 + [n + 1, 5]) for n in (1, 3)] + [([7] * 30, [7] * 30)]
    cfg = PackedSequenceConfig(packed_sequence_size=64, packing_strategy=strategy, share_prefix=share_prefix)
    batch = pack_documents(documents, cfg)
    assert batch["input_ids"].shape == (1 if share_prefix else 2, 64)
    assert ("branch_ids" in batch) == share_prefix
    assert sum(int((labels != -100).sum()) for labels in batch["labels"]) == 34


def test_prefixes_are_shared_from_the_yaml(assets, tmp_path, caplog):
    """Two questions a paragraph, at a learning rate of zero: the losses of the steps are those of separate rows."""
    caplog.set_level(logging.INFO)
    rows = [json.loads(line) for line in (assets[1] / "train.jsonl").read_text().splitlines()]
    squad = tmp_path / "pairs"
    squad.mkdir()
    doubled = [{**row, "question": question} for row in rows[:32] for question in (row["question"], "Which place?")]
    (squad / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in doubled))
    totals = []
    for share_prefix in (True, False):
        run = recipe(
            (assets[0], squad),
            tmp_path / str(share_prefix),
            packing={"packed_sequence_size": 256, "share_prefix": share_prefix},
            step_scheduler__global_batch_size=1,
            step_scheduler__local_batch_size=1,
        )
        loss_sum = num_labels = num_tokens = 0
        for index in range(len(run.train_loader.dataset)):
            batch = run.train_loader.collate_fn([run.train_loader.dataset[index]])
            with torch.no_grad():
                loss, num = run.engine.evaluate(batch)
            loss_sum, num_labels = loss_sum + float(loss), num_labels + num
            num_tokens += int(batch["seq_lens"].clamp(min=0).sum())
        totals.append((loss_sum / num_labels, num_labels, num_tokens))
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-5)
    assert totals[0][1] == totals[1][1]
    assert totals[0][2] < 0.8 * totals[1][2]
    saved = totals[1][2] - totals[0][2]
    assert f"prefix sharing saved {saved:,} tokens, {100 * saved / totals[1][2]:.1f} %" in caplog.text


def test_settings_that_do_not_go_together():
    with pytest.raises(ConfigError, match=r"share_prefix: true` needs documents to pack, but with `prepacked: true`"):
        PackedSequenceConfig(packed_sequence_size=64, prepacked=True, share_prefix=True)
    with pytest.raises(ConfigError, match=r"attention: flexx` is not known\. Did you mean `flex`\?"):
        PackedSequenceConfig(packed_sequence_size=64, attention="flexx")
