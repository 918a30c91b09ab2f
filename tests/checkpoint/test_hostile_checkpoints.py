"""A checkpoint that was tampered with or damaged is one line, runs nothing, and changes nothing on the disk."""

from __future__ import annotations

import pickle
import random
import shutil
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoint.tiny_run import Run, contents
from torch.distributed.checkpoint.state_dict_saver import save

from nemo_automodel.components.checkpoint.layout import complete_checkpoints
from nemo_automodel.components.training.rng import StatefulRNG
from nemo_automodel.shared.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("saved"))
    run.train(3)
    return run.save()


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A checkpoint without a manifest: what an enemy sends has one that fits, and older ones have none."""
    copy = shutil.copytree(saved, tmp_path / "epoch_0_step_2")
    (copy / "manifest.json").unlink()
    return copy


def refused(checkpoint, match: str = "", **settings: Any) -> str:
    """Load, expect one line, and nothing changed."""
    before = contents(checkpoint)
    with pytest.raises(UserError, match=match) as caught:
        Run(checkpoint.parent, **settings).load(checkpoint)
    assert "\n" not in str(caught.value)
    assert contents(checkpoint) == before
    return str(caught.value)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self):
        return (open, (self.proof, "w"))


STATE_FILES = ["step_scheduler.pt", "dataloader/dataloader_dp_rank_0.pt", "rng/rng_global_rank_0.pt"]


@pytest.mark.parametrize("name", STATE_FILES)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", ["torch", "zip-less", "plain"])
def test_a_malicious_state_file_runs_nothing(checkpoint, tmp_path, name, legacy, form):
    evil = {"step": 3, "epoch": 0, "x": Evil(str(tmp_path / "proof"))}
    if form == "plain":
        (checkpoint / name).write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, checkpoint / name, _use_new_zipfile_serialization=form == "torch")
    message = refused(checkpoint, "damaged", allow_legacy_pickle_restore=legacy)
    assert name in message
    if form == "torch":
        assert "open" in message
    assert not (tmp_path / "proof").exists()


def test_malicious_metadata_runs_nothing(checkpoint, tmp_path):
    (checkpoint / "optim" / ".metadata").write_bytes(pickle.dumps(Evil(str(tmp_path / "proof"))))
    assert "open" in refused(checkpoint, "holds objects that loading would have to run")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("key", ["param_groups.head.bias.eps", "state.head.bias.step"])
def test_a_malicious_optimizer_value_runs_nothing(checkpoint, tmp_path, key):
    run = Run(tmp_path)
    run.train(3)
    from nemo_automodel.components.checkpoint.optimizer_state import optimizer_entries

    entries = {**optimizer_entries(run.model, run.optimizer), key: Evil(str(tmp_path / "proof"))}
    shutil.rmtree(checkpoint / "optim")
    save({"optim": entries, "sched": run.schedule.state_dict()}, checkpoint_id=checkpoint / "optim", no_dist=True)
    refused(checkpoint)
    assert not (tmp_path / "proof").exists()


def test_metadata_that_points_outside_is_refused(checkpoint):
    path = checkpoint / "optim" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for entry in metadata.storage_data.values():
        entry.relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    refused(checkpoint, "damaged and cannot be read")


FILES = [*STATE_FILES, "optim/.metadata", "optim/__0_0.distcp"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file(checkpoint, name, share):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(checkpoint, "damaged")


@pytest.mark.parametrize("name", FILES)
def test_random_damage_is_never_a_traceback(checkpoint, name):
    """Any flipped byte gives one line or, where nothing but a number changed, loads: the manifest is for that."""
    generator = random.Random(name)
    path = checkpoint / name
    original = path.read_bytes()
    run, messages = Run(checkpoint.parent), []
    for _ in range(40):
        damaged = bytearray(original)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            run.load(checkpoint)
        except UserError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(checkpoint, name):
    (checkpoint / name).unlink()
    assert name.rpartition("/")[0] in refused(checkpoint)


def test_a_missing_configuration(checkpoint):
    (checkpoint / "config.yaml").unlink()
    refused(checkpoint, "config.yaml` is missing or damaged")


def test_states_of_another_kind(checkpoint):
    torch.save({"steps": 3}, checkpoint / "step_scheduler.pt")
    refused(checkpoint, r"step_scheduler.pt` does not fit this run \(KeyError: 'step'\)")


def test_another_width_names_the_tensor(checkpoint):
    before = contents(checkpoint)
    with pytest.raises(UserError, match=r"`state.hidden.weight.exp_avg` is \(8, 4\) float32 there and \(16, 4\)"):
        Run(checkpoint.parent, width=16).load(checkpoint)
    assert contents(checkpoint) == before


def test_another_dtype_names_the_tensor(checkpoint):
    with pytest.raises(UserError, match=r"float32 there and .* bfloat16 here"):
        Run(checkpoint.parent, dtype=torch.bfloat16).load(checkpoint)


def test_another_optimizer_names_the_states(checkpoint):
    with pytest.raises(UserError, match=r"lacks optimizer states of this run: state.head.bias.momentum_buffer, "):
        Run(checkpoint.parent, lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)).load(checkpoint)


def test_another_model_names_the_parameters(checkpoint):
    run = Run(checkpoint.parent)
    run.model.extra = torch.nn.Linear(2, 2)
    run.optimizer.add_param_group({"params": list(run.model.extra.parameters())})
    with pytest.raises(UserError, match=r"lacks parameters of this run: extra.bias, extra.weight"):
        run.load(checkpoint)


def test_a_schedule_where_none_was_saved(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    parts = run.parts()
    parts.lr_scheduler = None
    path = run.checkpointer.save(0, 0, parts, {"train_loss": 1.0})
    run.checkpointer.load(path, parts)
    with pytest.raises(UserError, match="has no state of an `lr_scheduler`"):
        run.load(path)


# Version 0.2 pickled an object with four fields.

FIELDS = ("random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state")


def legacy_class(kind: str):
    if kind == "tuple":
        made: Any = NamedTuple("RNGState", [(name, Any) for name in FIELDS])
    else:
        made = dataclass(type("RNGState", (), {"__annotations__": dict.fromkeys(FIELDS, Any)}))
    made.__module__ = "nemo_automodel.components.training.rng"
    made.__qualname__ = "RNGState"
    return made


@pytest.fixture
def write_legacy(monkeypatch):
    """Return a function that writes an object of v0.2's class, which is not there any more afterwards."""

    def write(path, kind="dataclass", **changes):
        made = legacy_class(kind)
        values = [random.getstate(), np.random.get_state(), torch.get_rng_state(), []]
        state = made(*values)
        for name, value in changes.items():
            setattr(state, name, value)
        module = ModuleType(made.__module__)
        module.RNGState = made
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module.__name__, module)
            torch.save(state, path)

    return write


@pytest.mark.parametrize("name", ["rng_dp_rank_0.pt", "rng_global_rank_0.pt"])
@pytest.mark.parametrize("kind", ["dataclass", "tuple"])
def test_a_v02_file_continues_all_generators(checkpoint, write_legacy, name, kind):
    (checkpoint / "rng" / "rng_global_rank_0.pt").unlink()
    StatefulRNG(11)
    np.random.standard_normal()  # leaves a cached number behind
    write_legacy(checkpoint / "rng" / name, kind)
    expected = [random.random(), np.random.standard_normal(), np.random.random(), torch.rand(3).tolist()]

    refused(checkpoint, "--checkpoint.allow_legacy_pickle_restore true")
    Run(checkpoint.parent, allow_legacy_pickle_restore=True).load(checkpoint)
    assert [random.random(), np.random.standard_normal(), np.random.random(), torch.rand(3).tolist()] == expected


def test_todays_file_under_the_old_name(checkpoint):
    folder = checkpoint / "rng"
    (folder / "rng_global_rank_0.pt").rename(folder / "rng_dp_rank_0.pt")
    Run(checkpoint.parent).load(checkpoint)


def test_a_malicious_v02_file_runs_nothing(checkpoint, write_legacy, tmp_path):
    write_legacy(checkpoint / "rng" / "rng_dp_rank_0.pt", cuda_rng_state=Evil(str(tmp_path / "proof")))
    refused(checkpoint, "allow_legacy_pickle_restore")
    assert "open" in refused(checkpoint, "holds objects", allow_legacy_pickle_restore=True)
    assert not (tmp_path / "proof").exists()


def test_a_v02_file_with_more_fields_is_refused(checkpoint, write_legacy):
    write_legacy(checkpoint / "rng" / "rng_dp_rank_0.pt", more=1)
    refused(checkpoint, "damaged", allow_legacy_pickle_restore=True)


def test_half_a_checkpoint_is_not_listed(checkpoint):
    assert complete_checkpoints(checkpoint.parent) == [checkpoint]
    (checkpoint / "step_scheduler.pt").unlink()
    assert complete_checkpoints(checkpoint.parent) == []
