"""Weights read in a stream under a floor: the same model, no file left in the cache, and a stop in time."""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from checkpoint.tiny_run import in_child
from safetensors.torch import load_file, save_file
from support.other_models import OTHERS, base_model
from support.recipes import lora_section, recipe_config
from support.tiny import make_model_dir

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import streamed_load
from nemo_automodel.cli.app import main
from nemo_automodel.components.checkpoint.layout import complete_checkpoints, step_of
from nemo_automodel.components.training.memory_watch import MemoryFloor
from nemo_automodel.recipes import memory_watch as recipe_watch
from nemo_automodel.recipes import run_setup
from nemo_automodel.shared.errors import LowMemoryStop, UserError
from nemo_automodel.shared.memory import GIB, Memory

IDS = torch.randint(4, 400, (2, 12), generator=torch.Generator().manual_seed(0))
FLOOR = 0.001


def sharded(path: Path, family: str = "llama", num_shards: int = 3, **sizes: object) -> Path:
    """Return a model directory whose weights lie in several files."""
    make_model_dir(path, family, **sizes)
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate(list(state)[first::num_shards] for first in range(num_shards)):
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        save_file({name: state[name] for name in names}, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def load(path: Path, **keywords: object) -> transformers.PreTrainedModel:
    return NeMoAutoModelForCausalLM.from_pretrained(str(path), device="cpu", **keywords)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_transformers_own(tmp_path, family, is_tied, dtype, monkeypatch):
    path = sharded(tmp_path / family, family, tie_word_embeddings=is_tied)
    transformers.GenerationConfig(max_new_tokens=7, eos_token_id=9).save_pretrained(path)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    monkeypatch.delattr("nemo_automodel._transformers.assemble._load_with_transformers")
    model = load(path, torch_dtype=dtype, memory_floor_gib=FLOOR, fast_layers="off")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert not model.training
    found, tensors = model.state_dict(), wanted.state_dict()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    for (name, buffer), (_, other) in zip(model.named_buffers(), wanted.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wanted(input_ids=IDS).logits)


def test_without_a_floor_transformers_reads(tmp_path, monkeypatch):
    path = sharded(tmp_path / "m")
    monkeypatch.setattr(streamed_load, "fill", None)
    assert load(path).config.model_type == "llama"


def resident_pages(path: Path) -> int:
    """Return how many pages of a file the system keeps."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_ubyte)]
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(pages)
        assert libc.mincore(ctypes.addressof(start), size, flags) == 0
        del start
        return sum(flag & 1 for flag in flags)


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_other_families_are_transformers_own_in_a_stream_or_not(tmp_path, family):
    base_model(family, torch.bfloat16).save_pretrained(tmp_path / "m")
    model = load(tmp_path / "m", memory_floor_gib=FLOOR, torch_dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    found, wanted = model.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_a_damaged_file_of_the_hubs_cache_is_one_line(tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    make_model_dir(snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    keywords = {"device": "cpu", "cache_dir": str(tmp_path), "memory_floor_gib": FLOOR}
    NeMoAutoModelForCausalLM.from_pretrained("some/model", **keywords)
    file = snapshot / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(UserError, match=r"model.safetensors` is damaged or only partly there .* Copy or download"):
        NeMoAutoModelForCausalLM.from_pretrained("some/model", **keywords)


@pytest.mark.parametrize("names_fit", [True, False], ids=["in a stream", "by Transformers"])
def test_no_page_of_the_files_stays_in_the_cache(tmp_path, names_fit, caplog):
    path = sharded(tmp_path / "m", hidden_size=256, intermediate_size=512, head_dim=64)
    files = sorted(path.glob("*.safetensors"))
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(2**20))
    with probe.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(probe):
        pytest.skip("this file system keeps its pages: it lies in memory, or drops none")
    if not names_fit:
        for file in files:
            state = load_file(file)
            save_file({n.removeprefix("model."): v.clone() for n, v in state.items()}, file, {"format": "pt"})
        index = json.loads((path / "model.safetensors.index.json").read_text())
        index["weight_map"] = {n.removeprefix("model."): f for n, f in index["weight_map"].items()}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(resident_pages(file) for file in files)  # written just now, and not on the disk yet
    caplog.set_level(logging.INFO, logger="nemo_automodel")
    load(path, memory_floor_gib=FLOOR, torch_dtype="bfloat16")  # in fp32 Transformers' model lies in the mapped files
    reason = "Weights: read by Transformers, in no stream: the files do not have `model.embed_tokens.weight`"
    assert any(line.startswith(reason) for line in caplog.messages) != names_fit
    assert [resident_pages(file) for file in files] == [0, 0, 0]


def test_the_stream_stops_before_the_tensor_that_does_not_fit(tmp_path):
    """A machine that has 40 kB above the floor when reading begins, and loses what is read."""
    path = sharded(tmp_path / "m")
    files = streamed_load.find_files(str(path), {})
    blueprint = streamed_load.Blueprint(
        transformers.AutoModelForCausalLM, transformers.AutoConfig.from_pretrained(path),
        torch.float32, torch.device("cpu"), "sdpa",
    )  # fmt: skip
    taken: dict[str, int] = {}

    def put(module: torch.nn.Module, name: str, tensor: torch.Tensor, state: object) -> None:
        taken[name] = tensor.nbytes

    floor = MemoryFloor(GIB, read=lambda: Memory(2 * GIB, GIB + 40_000 - sum(taken.values()), 0, 0))
    model = streamed_load.build_empty(blueprint)
    with pytest.raises(LowMemoryStop) as stop:
        streamed_load.fill(model, files, blueprint, streamed_load.Filling(put, 0, floor))
    order = list(files.weights)
    assert list(taken) == order[: len(taken)]
    following = order[len(taken)]
    assert sum(taken.values()) <= 40_000 < sum(taken.values()) + files.weights[following].num_bytes
    assert f"1.0 GiB of memory are left and `{following}` takes 0.0 GiB more" in str(stop.value)
    with pytest.raises(LowMemoryStop, match=r"and the model takes 0\.0 GiB more"):
        streamed_load.load_plain(model, files, blueprint, floor)


@pytest.mark.parametrize("peft", [None, "lora"])
def test_a_floor_above_the_memory_stops_a_real_command(tmp_path, squad_dir, peft):
    """More is to stay free than the machine has: the command ends while it loads, within seconds, with status 3."""
    config = recipe_config(sharded(tmp_path / "m"), squad_dir, tmp_path / "run")
    if peft:
        config["peft"] = lora_section()
    status, output, seconds = command(tmp_path, config, "--unified_memory.floor_gib", "100000")
    assert status == 3
    assert seconds < 5
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: Stopped while loading the model, before the machine swaps: ")
    assert "the floor is 100000.0 GiB (`unified_memory.floor_gib`)." in lines[0]
    assert "`sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'`" in lines[0]
    assert "Traceback" not in output


def command(tmp_path: Path, config: dict, *words: str) -> tuple[int, str, float]:
    """Run ``automodel`` in a process of its own; return its status, what it printed, and seconds after the data."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def work() -> tuple[int, float]:
        output = os.open(tmp_path / "output", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        logging.getLogger().handlers = [logging.StreamHandler(sys.stderr)]
        begun = [time.monotonic()]
        real = recipe_watch.watch_set_up

        def noted(*args: object):
            begun[0] = time.monotonic()
            return real(*args)

        run_setup.watch_set_up = noted
        status = main([str(tmp_path / "run.yaml"), *words])
        return status, time.monotonic() - begun[0]

    code, result = in_child(work)
    status, seconds = result or (code, 0.0)  # the watch may end the process itself
    return status, (tmp_path / "output").read_text(), seconds


def test_a_run_that_is_stopped_goes_on_from_its_checkpoint(tmp_path, squad_dir, monkeypatch):
    run = tmp_path / "run"
    config = recipe_config(make_model_dir(tmp_path / "m"), squad_dir, run, step_scheduler__ckpt_every_steps=2)
    config["step_scheduler"]["max_steps"] = 1000
    falls = recipe_watch.floor_for

    def floor_for(device: torch.device, floor_gib: float | None) -> MemoryFloor:
        """The floor that was asked for, on a machine whose memory falls below it once there is a checkpoint."""
        floor = falls(device, floor_gib)
        return MemoryFloor(
            floor.num_bytes, read=lambda: Memory(9, 9 * GIB if not complete_checkpoints(run) else GIB, 0, 0)
        )

    monkeypatch.setattr(recipe_watch, "floor_for", floor_for)
    status, output, _ = command(tmp_path, config, "--unified_memory.floor_gib", "1.5")
    assert status == 3, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: Stopped while training, before the machine swaps: 1.0 GiB of memory are left, and the floor is 1.5 GiB"
    )
    state = f"Nothing more was saved, since that takes memory; a checkpoint that is in `{run}` is whole, and the same "
    assert f"{state}command goes on from it. Free cached files" in line
    records = [json.loads(text) for text in (run / "training.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(len(records)))
    monkeypatch.undo()
    step = step_of(complete_checkpoints(run)[-1])
    status, output, _ = command(tmp_path, config, "--step_scheduler.max_steps", str(step + 3))
    assert status == 0, output
    assert f"starting at step {step + 1}" in output
