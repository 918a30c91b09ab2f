"""Weights that are whole files and not this model's: one line names a tensor, nothing changes on the disk.

The manifest is taken away, as in a checkpoint that another program wrote: with it the files would not even be read.
"""

from __future__ import annotations

import re

import pytest
import torch
from checkpoint.test_real_model import ModelRun
from checkpoint.tiny_run import contents
from safetensors.torch import load_file, save_file

from nemo_automodel.shared.errors import UserError


def _drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _add(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name.replace(".0.", ".7.")] = tensors[name].clone()


def _widen(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name]])


@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize("damage", [_drop, _add, _widen])
def test_foreign_tensors_are_named(model_dirs, tmp_path, has_adapter, damage):
    run = ModelRun(model_dirs("llama"), tmp_path, has_adapter)
    run.train(1)
    checkpoint = run.checkpointer.save(0, 0, run.parts, {"train_loss": 1.0})
    (checkpoint / "manifest.json").unlink()
    (weights,) = (checkpoint / "model").glob("*.safetensors")
    tensors = load_file(weights)
    name = next(key for key in sorted(tensors) if ".0." in key and "q_proj" in key)
    damage(tensors, name)
    save_file(tensors, weights, metadata={"format": "pt"})
    before, other = contents(tmp_path), ModelRun(model_dirs("llama"), tmp_path, has_adapter)
    with pytest.raises(UserError) as caught:
        other.checkpointer.load(checkpoint, other.parts)
    shown = name if damage is not _add else name.replace(".0.", ".7.")
    assert re.search(re.escape(shown.removeprefix("base_model.model.")), str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
