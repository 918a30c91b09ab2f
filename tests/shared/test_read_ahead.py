"""Weight files read into the system's cache before anything heavy is imported."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import yaml
from support.recipes import lora_section, recipe_config
from support.tiny import make_model_dir

from nemo_automodel.cli.app import main
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes import weights_ahead
from nemo_automodel.shared import read_ahead
from nemo_automodel.shared.memory import Memory

TARGET = "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"


def driver(directory: Path, *models: str) -> Path:
    """Return a folder as the driver's, with these GPUs."""
    for number, model in enumerate(models):
        (directory / f"{number}").mkdir(parents=True)
        (directory / f"{number}" / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 41\n")
    return directory


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int, int]]:
    """File, first byte and count of what is read; pieces are of 64 bytes."""
    found: list[tuple[str, int, int]] = []
    real = os.preadv

    def preadv(file: int, buffers: list[bytearray], offset: int) -> int:
        count = real(file, buffers, offset)
        found.append((Path(os.readlink(f"/proc/self/fd/{file}")).name, offset, count))
        return count

    monkeypatch.setattr(read_ahead.os, "preadv", preadv)
    monkeypatch.setattr(read_ahead, "_PIECE_BYTES", 64)
    yield found
    read_ahead.stop()


def finish() -> None:
    for thread in list(read_ahead._threads):
        thread.join()


def test_every_byte_is_read_once(tmp_path, reads):
    files = [tmp_path / name for name in ("b", "a")]
    for file, size in zip(files, (200, 64), strict=True):
        file.write_bytes(bytes(size))
    assert read_ahead.start(files, driver(tmp_path / "gpus", "NVIDIA H100 80GB HBM3"))
    finish()
    assert sorted(reads) == [("a", 0, 64), ("b", 0, 64), ("b", 64, 64), ("b", 128, 64), ("b", 192, 8)]


@pytest.mark.parametrize("models", [(), ("NVIDIA GB10",), ("NVIDIA H100 80GB HBM3", "NVIDIA GB10")])
def test_nothing_is_read_without_a_gpu_or_where_it_shares_the_memory(tmp_path, reads, models):
    (tmp_path / "a").write_bytes(bytes(64))
    assert not read_ahead.start([tmp_path / "a"], driver(tmp_path / "gpus", *models))
    finish()
    assert reads == []


def test_half_of_the_memory_is_the_most(tmp_path, reads, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(1000))
    monkeypatch.setattr(read_ahead, "read_memory", lambda: Memory(999, 300, 300, 0))
    read_ahead.start([tmp_path / "a"], driver(tmp_path / "gpus", "NVIDIA L40S"))
    finish()
    assert sorted(reads) == [("a", 0, 64), ("a", 64, 64)]


def test_stop_ends_it_between_two_pieces(tmp_path, reads, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(64 * 1000))
    begun, go_on = threading.Event(), threading.Event()
    real = os.preadv

    def waiting(*args):
        begun.set()
        go_on.wait()
        return real(*args)

    monkeypatch.setattr(read_ahead.os, "preadv", waiting)
    read_ahead.start([tmp_path / "a"], driver(tmp_path / "gpus", "NVIDIA L40S"))
    begun.wait()
    read_ahead._is_over.set()
    go_on.set()
    read_ahead.stop()
    assert 1 <= len(reads) <= read_ahead._NUM_THREADS
    assert not any(thread.name == "read ahead" for thread in threading.enumerate())


def test_a_file_that_goes_away_is_left_to_the_loader(tmp_path, reads):
    (tmp_path / "a").write_bytes(bytes(64))
    work = read_ahead._Work([tmp_path / "a"], 10**6)
    (tmp_path / "a").unlink()
    work.run()
    assert reads == []


def test_which_files_a_section_names(tmp_path, monkeypatch):
    def files(**keys):
        return weights_ahead.weight_files(ConfigNode({"_target_": TARGET, **keys}))

    path = make_model_dir(tmp_path / "m")
    assert files(pretrained_model_name_or_path=str(path)) == [path / "model.safetensors"]
    assert files(pretrained_model_name_or_path=str(tmp_path), subfolder="m") == [path / "model.safetensors"]
    random = {"_target_": TARGET.replace("from_pretrained", "from_config"), "pretrained_model_name_or_path": str(path)}
    assert files(**random) == []
    assert files(**random, load_base_model=True) == [path / "model.safetensors"]
    assert files(pretrained_model_name_or_path=str(tmp_path / "none")) == []
    assert files(pretrained_model_name_or_path="not a name/of/the Hub") == []
    index = path / "model.safetensors.index.json"
    for text in ("", "[]", '{"weight_map": 3}', '{"other": 1}', "\xff"):
        index.write_text(text, encoding="latin-1")
        assert files(pretrained_model_name_or_path=str(path)) == []
    index.write_text(json.dumps({"weight_map": {"x": "2.safetensors", "y": "1.safetensors", "z": "gone.safetensors"}}))
    for name in ("1.safetensors", "2.safetensors"):
        (path / name).write_bytes(b"")
    assert files(pretrained_model_name_or_path=str(path)) == [path / "1.safetensors", path / "2.safetensors"]


def test_files_of_the_hub_are_found_in_its_cache(tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors").write_bytes(b"")
    section = {"_target_": TARGET, "pretrained_model_name_or_path": "some/model", "cache_dir": str(tmp_path)}
    assert weights_ahead.weight_files(ConfigNode(section)) == [snapshot / "model.safetensors"]
    assert weights_ahead.weight_files(ConfigNode({**section, "revision": "other"})) == []


@pytest.mark.parametrize(("floor", "is_read"), [(None, True), (0.001, False)])
def test_a_command_begins_it_and_the_loader_ends_it(tmp_path, squad_dir, monkeypatch, floor, is_read):
    path = make_model_dir(tmp_path / "m")
    config = recipe_config(path, squad_dir, tmp_path / "run", peft=lora_section())
    config["step_scheduler"]["max_steps"] = 1
    config["unified_memory"] = {"floor_gib": floor}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    events: list[object] = []
    monkeypatch.setattr(read_ahead, "has_gpu_memory", lambda: True)
    monkeypatch.setattr(read_ahead, "start", lambda paths: events.append(list(paths)))
    monkeypatch.setattr(read_ahead, "stop", lambda: events.append("stop"))
    assert main([str(tmp_path / "run.yaml")]) == 0
    assert events == [*([[path / "model.safetensors"]] if is_read else []), "stop"]
