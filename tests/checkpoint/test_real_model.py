"""A real language model, whole and with an adapter, through the real files."""

from __future__ import annotations

import pytest
import torch
import transformers
from checkpoint.tiny_run import CONFIG, Halving, Rows, Steps, assert_same, contents
from support.tiny import make_tokenizer

from nemo_automodel._transformers.model_files import ModelFiles
from nemo_automodel.components._peft.lora import PeftConfig, apply_lora
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.checkpoint.parts import Parts
from nemo_automodel.components.training.rng import StatefulRNG
from nemo_automodel.shared.errors import UserError


class ModelRun:
    def __init__(self, model_dir, run_dir, has_adapter: bool) -> None:
        self.rng = StatefulRNG(5)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
        if has_adapter:
            apply_lora(self.model, PeftConfig(target_modules=["*_proj"], dim=4, dropout=0.1))
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.schedule = Halving(self.optimizer)
        self.steps = Steps()
        self.rows = Rows(torch.randint(0, 400, (10, 12), generator=torch.Generator().manual_seed(1)))
        self.checkpointer = Checkpointer(CheckpointingConfig(checkpoint_dir=str(run_dir)), run_dir)
        self.parts = Parts(
            model_files=ModelFiles(self.model, make_tokenizer()),
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
            schedule=self.steps,
            train_loader=self.rows,
            rng=self.rng,
            config_yaml=CONFIG,
        )

    def train(self, num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            batch = self.rows.next_batch()
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.steps.step += 1
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_language_model_goes_on_bit_for_bit(model_dirs, tmp_path, family, has_adapter):
    undisturbed = ModelRun(model_dirs(family), tmp_path, has_adapter)
    undisturbed.train(2)
    path = undisturbed.checkpointer.save(1, 0, undisturbed.parts, {"train_loss": 1.0})
    expected = undisturbed.train(4)
    resumed = ModelRun(model_dirs(family), tmp_path, has_adapter)
    resumed.checkpointer.load(path, resumed.parts)
    assert resumed.train(4) == expected
    assert_same(dict(undisturbed.model.state_dict()), dict(resumed.model.state_dict()))
    assert (path / "model" / ("adapter_model.safetensors" if has_adapter else "model.safetensors")).is_file()


@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_weights_are_one_line(model_dirs, tmp_path, has_adapter, damage):
    run = ModelRun(model_dirs("llama"), tmp_path, has_adapter)
    run.train(1)
    path = run.checkpointer.save(0, 0, run.parts, {"train_loss": 1.0})
    weights = next((path / "model").glob("*.safetensors"))
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        run.checkpointer.load(path, run.parts)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
