"""Saving beside training writes what saving in front of it writes, and its failures are told."""

from __future__ import annotations

import json
import logging
import resource
import signal
import threading

import pytest
import torch
from checkpoint.test_checkpointer import OPTIMIZERS
from checkpoint.tiny_run import Run, assert_same, contents, in_child

from nemo_automodel.components.checkpoint.checkpointing import SaveError
from nemo_automodel.components.checkpoint.layout import complete_checkpoints


class SlowFiles:
    """Waits before it writes, so that training goes on meanwhile."""

    def __init__(self, files) -> None:
        self.files = files
        self.may_write = threading.Event()

    def weights(self):
        return self.files.weights()

    def write_from(self, directory, weights):
        assert self.may_write.wait(30)
        self.files.write_from(directory, weights)


def slow_save(run: Run) -> SlowFiles:
    """Begin a save that writes nothing before it is told to."""
    parts = run.parts()
    parts.model_files = SlowFiles(parts.model_files)
    run.checkpointer.save(run.steps.step - 1, 0, parts, {"train_loss": 1.0})
    return parts.model_files


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_files_are_those_of_the_moment_of_the_save(tmp_path, name):
    """Training goes on for three updates before anything is written; every byte is that of an ordinary save."""
    plain = Run(tmp_path / "a", OPTIMIZERS[name])
    plain.train(4)
    expected = contents(plain.save())
    background = Run(tmp_path / "b", OPTIMIZERS[name], is_async=True)
    background.train(4)
    files = slow_save(background)
    background.checkpointer.wait_for_staging()
    background.train(3)
    assert complete_checkpoints(tmp_path / "b") == []
    files.may_write.set()
    background.checkpointer.finish()
    found = contents(tmp_path / "b" / "epoch_0_step_3")
    metadata = {key for key in expected if key.endswith((".metadata", "manifest.json"))}  # hold an id of the save
    assert {key: value for key, value in found.items() if key not in metadata} == {
        key: value for key, value in expected.items() if key not in metadata
    }
    losses = []
    for directory in (tmp_path / "a", tmp_path / "b"):
        resumed = Run(directory, OPTIMIZERS[name])
        resumed.load(directory / "epoch_0_step_3")
        losses.append(resumed.train(3))
    assert losses[0] == losses[1]


def test_the_losses_are_those_without_saving(tmp_path):
    undisturbed, saving = Run(tmp_path / "a").train(12), []
    run = Run(tmp_path / "b", is_async=True)
    for _ in range(6):
        saving += run.train(2)
        run.save()
        run.checkpointer.wait_for_staging()
    run.checkpointer.finish()
    assert saving == undisturbed
    assert len(complete_checkpoints(tmp_path / "b")) == 6


def test_one_save_at_a_time(tmp_path):
    run = Run(tmp_path, is_async=True)
    run.train(1)
    files = slow_save(run)
    run.checkpointer.wait_for_staging()
    run.train(1)
    timer = threading.Timer(0.2, files.may_write.set)
    timer.start()
    run.save()  # waits for the one before
    assert (tmp_path / "epoch_0_step_0").is_dir()
    assert not timer.is_alive()
    run.checkpointer.finish()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["epoch_0_step_0", "epoch_0_step_1"]


def test_waiting_for_staging_on_request(tmp_path):
    run = Run(tmp_path, is_async=True, wait_for_staging=True)
    run.train(1)
    slow_save(run).may_write.set()
    assert run.checkpointer._background.staged.is_set()
    run.checkpointer.finish()


def test_tied_weights_stay_one_tensor(tmp_path):
    from nemo_automodel.components.checkpoint.parts import Snapshot

    weight = torch.randn(3, 4)
    snapshot = Snapshot(None, {"a": weight, "b": weight.detach(), "c": weight[:2]}, {}, {})
    snapshot.stage()
    assert snapshot.weights["a"].data_ptr() == snapshot.weights["b"].data_ptr() != weight.data_ptr()
    assert torch.equal(snapshot.weights["c"], weight[:2])


def limited_run(directory, limit):
    """Run in a child that cannot write files larger than ``limit``; return what it says."""
    messages: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record):
            messages.append(f"{record.levelname} {record.getMessage()}")

    def work():
        logging.getLogger("nemo_automodel").addHandler(Notes())
        run = Run(directory, width=64, is_async=True)
        run.train(1)
        run.save()
        run.checkpointer.finish()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        run.train(1)
        run.save()
        run.train(1)
        run.save()  # tells of the one before, and fails as well
        failures = []
        try:
            run.checkpointer.finish()
        except SaveError as error:
            failures.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run.train(1)
        run.save()
        run.checkpointer.finish()
        return {"logged": messages, "raised": failures}

    return in_child(work)


@pytest.mark.parametrize("limit", [200, 2_000, 20_000])
def test_a_failure_is_told_by_the_next_save_and_at_the_end(tmp_path, limit):
    status, said = limited_run(tmp_path, limit)
    assert status == 0
    (told,) = [line for line in said["logged"] if line.startswith("ERROR")]
    assert "epoch_0_step_1` was not saved; earlier ones are untouched." in told
    assert told.endswith("This save tries again.")
    assert "File too large" in told
    (raised,) = said["raised"]
    assert "epoch_0_step_2` was not saved" in raised
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["epoch_0_step_0", "epoch_0_step_3"]
    assert not list(tmp_path.glob("*.reserving-*"))
    Run(tmp_path, width=64).load(tmp_path / "LATEST")


def test_leaving_by_an_error_finishes_the_save(tmp_path):
    run = Run(tmp_path, is_async=True)
    run.train(1)

    def fails():
        with run.checkpointer:
            run.save()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (tmp_path / "LATEST").resolve() == tmp_path / "epoch_0_step_0"


def test_a_defect_in_the_background_is_not_swallowed(tmp_path):
    run = Run(tmp_path, is_async=True)
    run.train(1)
    parts = run.parts()

    def fails(directory, weights):
        raise RuntimeError("a defect")

    parts.model_files.write_from = fails
    run.checkpointer.save(0, 0, parts, {"train_loss": 1.0})
    with pytest.raises(RuntimeError, match="a defect"), run.checkpointer:
        pass


# --- torch's own format ----------------------------------------------------------------------------------------------


def test_torch_save_goes_on_bit_for_bit(tmp_path):
    undisturbed = Run(tmp_path, model_save_format="torch_save")
    undisturbed.train(3)
    path = undisturbed.save()
    expected = undisturbed.train(4)
    assert not list((path / "model").glob("*.safetensors"))
    assert "../model_dcp/" in (path / "model" / "README.md").read_text()
    for options in ({}, {"model_save_format": "torch_save"}):  # how it was saved decides, not what is set now
        resumed = Run(tmp_path, **options)
        resumed.load(path)
        assert resumed.train(4) == expected


def test_torch_itself_reads_the_weights(tmp_path):
    from torch.distributed.checkpoint.state_dict_loader import load

    run = Run(tmp_path, model_save_format="torch_save")
    run.train(2)
    path = run.save()
    found = {name: torch.zeros_like(tensor) for name, tensor in run.model.state_dict().items()}
    load({"model": found}, checkpoint_id=path / "model_dcp", no_dist=True)
    assert_same(found, dict(run.model.state_dict()))


def test_weights_of_another_model_are_named(tmp_path):
    from nemo_automodel.components.checkpoint.model_dcp import read_model

    run = Run(tmp_path, model_save_format="torch_save")
    run.train(1)
    path = run.save()
    live = dict(Run(tmp_path, width=16).model.state_dict())
    with pytest.raises(
        ValueError, match=r"not those of this model: frozen.bias, frozen.weight, head.weight and 2 more"
    ):
        read_model(path, live)
    bf16 = {name: torch.zeros_like(tensor, dtype=torch.bfloat16) for name, tensor in run.model.state_dict().items()}
    read_model(path, bf16)
    assert_same(bf16, {name: tensor.bfloat16() for name, tensor in run.model.state_dict().items()})


def test_a_language_model_in_torchs_format_resumes_and_generates(model_dirs, tmp_path):
    from checkpoint.test_real_model import ModelRun

    from nemo_automodel._transformers.inference import load_for_inference
    from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig

    run = ModelRun(model_dirs("llama"), tmp_path, has_adapter=False)
    run.checkpointer = Checkpointer(
        CheckpointingConfig(checkpoint_dir=str(tmp_path), model_save_format="torch_save"), tmp_path
    )
    run.train(2)
    path = run.checkpointer.save(1, 0, run.parts, {"train_loss": 1.0})
    saved = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    expected = run.train(3)
    resumed = ModelRun(model_dirs("llama"), tmp_path, has_adapter=False)
    resumed.checkpointer.load(path, resumed.parts)
    assert resumed.train(3) == expected
    model, tokenizer = load_for_inference(tmp_path, device="cpu")
    assert_same(dict(model.state_dict()), saved)
    assert tokenizer.eos_token == "<|im_end|>"
    assert json.loads((path / "model" / "config.json").read_text())["hidden_size"] == 32
