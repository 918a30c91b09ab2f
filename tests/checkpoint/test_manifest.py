"""Whatever happened to a file since it was saved is one line that names it, before anything is changed."""

from __future__ import annotations

import json
import logging
import random
import shutil

import pytest
import xxhash
from checkpoint.tiny_run import Run, assert_same, contents

from nemo_automodel._transformers.inference import load_for_inference
from nemo_automodel.components.checkpoint import manifest
from nemo_automodel.components.checkpoint.manifest import verify
from nemo_automodel.shared.errors import UserError

FILES = [
    "config.yaml",
    "dataloader/dataloader_dp_rank_0.pt",
    "losses.json",
    "model/model.safetensors",
    "optim/.metadata",
    "optim/__0_0.distcp",
    "progress.json",
    "rng/rng_global_rank_0.pt",
    "step_scheduler.pt",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("saved"))
    run.train(3)
    return run.save()


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "epoch_0_step_2")


def refused(checkpoint, match: str) -> None:
    """Resume, expect one line, and nothing changed: not on the disk, not in memory."""
    before, run = contents(checkpoint.parent), Run(checkpoint.parent)
    run.train(1)
    live = run.state()
    with pytest.raises(UserError, match=match) as caught:
        run.load(checkpoint)
    assert "\n" not in str(caught.value)
    assert contents(checkpoint.parent) == before
    assert_same(run.state(), live)


def flip(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)


def test_the_manifest_names_every_file_with_its_size_and_checksum(saved):
    content = json.loads((saved / "manifest.json").read_text())
    assert list(content["files"]) == FILES
    for name, record in content["files"].items():
        data = (saved / name).read_bytes()
        assert record == {"num_bytes": len(data), "checksum": xxhash.xxh3_128_hexdigest(data)}


def test_a_whole_checkpoint_is_said_to_be_whole(checkpoint, caplog):
    with caplog.at_level(logging.INFO):
        Run(checkpoint.parent).load(checkpoint)
    assert f"Checked 9 files of {checkpoint} against its manifest" in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_of_any_file(checkpoint, name):
    size = (checkpoint / name).stat().st_size
    original = (checkpoint / name).read_bytes()
    for position in {0, size - 1, *random.Random(name).sample(range(size), min(size, 5))}:
        flip(checkpoint / name, position)
        with pytest.raises(UserError, match=rf"the bytes of `{name}` are not those that were saved"):
            verify(checkpoint)
        (checkpoint / name).write_bytes(original)
    flip(checkpoint / name, size // 2)
    refused(checkpoint, rf"epoch_0_step_2` is damaged: the bytes of `{name}` are not those that were saved")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_longer_file(checkpoint, name):
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[:-1])
    refused(checkpoint, rf"`{name}` has {len(data) - 1:,} bytes, but {len(data):,} were saved")
    (checkpoint / name).write_bytes(data + b"\0")
    refused(checkpoint, rf"`{name}` has {len(data) + 1:,} bytes, but {len(data):,} were saved")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(checkpoint, name):
    (checkpoint / name).unlink()
    refused(checkpoint, rf"is damaged: `{name}` is missing")


@pytest.mark.parametrize("name", ["model/model-00002-of-00002.safetensors", "model/modeling_evil.py", "extra.pt"])
def test_a_file_that_was_added(checkpoint, name):
    (checkpoint / name).write_bytes(b"x")
    refused(checkpoint, rf"`{name}` was added after it was saved. Move that file out of the checkpoint")


def test_documents_may_be_added(checkpoint):
    for name in ("model/README.md", "model/.gitattributes", ".DS_Store"):
        (checkpoint / name).write_text("x")
    Run(checkpoint.parent).load(checkpoint)


def test_several_problems_are_counted(checkpoint):
    for name in FILES[3:6]:
        (checkpoint / name).unlink()
    refused(checkpoint, r"`model/model.safetensors` is missing \(2 more of its files differ\)")


def test_the_remedy_names_the_checkpoint_before(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.save()
    run.train(1)
    damaged = run.save()
    flip(damaged / "model/model.safetensors", 200)
    with pytest.raises(UserError) as caught:
        run.load(damaged)
    command = f"mv {damaged} {damaged}-damaged"
    assert f"or move it away ({command}) and go on from `{tmp_path / 'epoch_0_step_1'}`" in str(caught.value)
    damaged.rename(f"{damaged}-damaged")
    resumed = Run(tmp_path)
    assert resumed.checkpointer.find_restore() == tmp_path / "epoch_0_step_1"


def test_any_damage_of_the_manifest_itself(checkpoint):
    path = checkpoint / "manifest.json"
    original = path.read_bytes()
    generator = random.Random(0)
    for _ in range(60):
        flip(path, generator.randrange(len(original)))
        if path.read_bytes().split() != original.split():  # another kind of space means the same
            with pytest.raises(UserError) as caught:
                verify(checkpoint)
            assert "\n" not in str(caught.value)
        path.write_bytes(original)
    for damage in (b"", b"[]", b"{}", original[:-100]):
        path.write_bytes(damage)
        refused(checkpoint, "manifest.json` is damaged")


def test_names_outside_of_the_checkpoint_are_refused(checkpoint):
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    content["files"]["../../secret"] = content["files"].pop("losses.json")
    content["checksum"] = manifest._checksum_of(content["files"])
    path.write_text(json.dumps(content))
    refused(checkpoint, "manifest.json` is damaged")


def test_a_later_format_says_so(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    refused(checkpoint, "is of format 2 with xxh3_128, but this version knows format 1")


def test_a_checkpoint_without_a_manifest_loads_and_says_so(checkpoint, saved, caplog):
    (checkpoint / "manifest.json").unlink()
    run, whole = Run(checkpoint.parent), Run(saved.parent)
    with caplog.at_level(logging.INFO):
        run.load(checkpoint)
    assert f"{checkpoint} has no manifest.json, so its files cannot be checked for damage" in caplog.text
    whole.load(saved)
    assert_same(run.state(), whole.state())


def test_only_the_model_is_read_where_only_the_model_is_used(checkpoint):
    flip(checkpoint / "optim" / "__0_0.distcp", 100)
    assert verify(checkpoint, ("model/",))
    (checkpoint / "model" / "more.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="was added"):
        verify(checkpoint, ("model/",))


@pytest.mark.parametrize("has_adapter", [False, True])
def test_generating_from_damaged_weights_is_refused(model_dirs, tmp_path, has_adapter):
    from checkpoint.test_real_model import ModelRun

    run = ModelRun(model_dirs("llama"), tmp_path, has_adapter)
    run.train(1)
    path = run.checkpointer.save(0, 0, run.parts, {"train_loss": 1.0})
    model, _ = load_for_inference(tmp_path, device="cpu")
    assert model.config.hidden_size == 32
    weights = next((path / "model").glob("*.safetensors"))
    flip(weights, weights.stat().st_size - 10)  # a number, which the format itself does not guard
    for place in (tmp_path, path, path / "model", tmp_path / "LATEST"):
        with pytest.raises(UserError, match=rf"the bytes of `model/{weights.name}` are not those that were saved"):
            load_for_inference(place, device="cpu")
    (path / "manifest.json").unlink()
    load_for_inference(path, device="cpu")
