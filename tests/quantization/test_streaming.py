"""Loading in 4 bits: how much memory it takes, that it reads what Transformers reads, and what it leaves to others."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny import make_model_dir, tiny_config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.shard_reader import read_index, read_tensors
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.kernels import nf4
from nemo_automodel.shared.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(4, 400, (2, 12), generator=torch.Generator().manual_seed(0))
NF4 = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
PEFT = PeftConfig(target_modules=["q_proj"], dim=1)
MIB = 2**20


def load(path, caplog=None, **keywords):
    settings = {"device": "cpu", "quantization_config": NF4, "peft_config": PeftConfig(target_modules="*_proj", dim=2)}
    if caplog is not None:
        caplog.set_level(logging.INFO, logger="nemo_automodel")
    return NeMoAutoModelForCausalLM.from_pretrained(str(path), **{**settings, **keywords})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def with_packed_numbers(path) -> transformers.PreTrainedModel:
    """Return the model of a directory by Transformers, each weight exchanged for what 4 bits make of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            nf4.dequantize(nf4.quantize(module.weight.data), module.weight.data)
    return model


def peak_of_load(directory: Path, small: Path, *words: str, **environment: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back at once: the peak is what is in use
    command = [sys.executable, str(ROOT / "tests/quantization/peak_memory.py"), str(directory), str(small), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


needs_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of the memory cannot be reset"
)


def save_shards(directory: Path, config: transformers.PretrainedConfig, state: dict[str, torch.Tensor]) -> list[int]:
    """Write a model as a Hugging Face directory with a file a layer and one for the rest; return their sizes."""
    directory.mkdir()
    config.save_pretrained(directory)
    weight_map: dict[str, str] = {}
    for number in range(config.num_hidden_layers + 1):
        part = f"layers.{number}." if number < config.num_hidden_layers else ""
        names = [name for name in state if part in name and name not in weight_map]
        weight_map |= dict.fromkeys(names, f"model-{number}.safetensors")
        save_file({name: state[name] for name in names}, directory / f"model-{number}.safetensors", {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [path.stat().st_size for path in directory.glob("*.safetensors")]


@needs_peak
def test_packed_files_need_no_memory_beside_the_model(tmp_path):
    """Files of 66 MiB, packed with double quantisation, the largest of them 16 MiB, with a margin of 12 MiB."""
    config = tiny_config("llama", hidden_size=2048, intermediate_size=3584, num_hidden_layers=4, head_dim=128)
    config.num_attention_heads, config.num_key_value_heads = 16, 8
    packed = NeMoAutoModelForCausalLM.from_config(config, device="cpu", quantization_config=NF4, peft_config=PEFT)
    state = {name: value.clone() for name, value in packed.state_dict().items() if "lora_" not in name}
    assert "model.layers.0.mlp.up_proj.weight.nested_absmax" in state
    sizes = save_shards(tmp_path / "packed", config, state)
    grown = peak_of_load(tmp_path / "packed", make_model_dir(tmp_path / "small", **SIZES))
    margin = 12 * MIB
    assert sum(sizes) > 5 * margin
    assert grown < sum(sizes) + margin, f"{grown / MIB:.0f} MiB, files {sum(sizes) / MIB:.0f}"


@needs_peak
def test_plain_weights_need_no_memory_beside_the_model(tmp_path):
    """Files of 100 MiB in bf16, the largest of them 24 MiB, with a margin of 15 MiB."""
    config = tiny_config("llama", hidden_size=1536, intermediate_size=3584, num_hidden_layers=4, head_dim=128)
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    state = {name: torch.empty(t.shape, dtype=torch.bfloat16).uniform_(-1, 1) for name, t in meta.items()}
    sizes = save_shards(tmp_path / "plain", config, state)
    grown = peak_of_load(tmp_path / "plain", make_model_dir(tmp_path / "small", **SIZES), "plain")
    margin = 15 * MIB
    assert sum(sizes) > 5 * margin
    assert max(sizes) > margin
    assert grown < sum(sizes) + margin, f"{grown / MIB:.0f} MiB, files {sum(sizes) / MIB:.0f}"


@needs_peak
def test_memory_stays_at_the_packed_model_and_a_margin(tmp_path):
    """A file of 112 MiB, in fp32, becomes a model of 17 MiB; the largest tensor has 7 MiB, the margin is 20 MiB."""
    config = tiny_config("llama", hidden_size=1024, intermediate_size=1792, num_hidden_layers=4, head_dim=128)
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    directory = tmp_path / "large"
    state = {name: torch.empty(t.shape).uniform_(-1, 1) for name, t in meta.items()}
    file_bytes = sum(save_shards(directory, config, state))
    packed_bytes = sum(t.numel() * (0.516 if t.ndim == 2 and "layers" in name else 4) for name, t in meta.items())
    grown = peak_of_load(directory, make_model_dir(tmp_path / "small", **SIZES))
    margin = 20 * MIB
    assert file_bytes > 5 * margin
    assert grown < packed_bytes + margin, f"{grown / MIB:.0f} MiB, packed {packed_bytes / MIB:.0f}"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_reads_what_transformers_reads(tmp_path, family, is_tied):
    path = make_model_dir(tmp_path / family, family, **SIZES, tie_word_embeddings=is_tied)
    transformers.GenerationConfig(max_new_tokens=7, eos_token_id=9).save_pretrained(path)
    model, wanted = load(path), with_packed_numbers(path)
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 14
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    assert model.generation_config.max_new_tokens == 7
    assert not model.training
    torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-5, atol=1e-5)


def test_file_in_bf16_and_dtypes(tmp_path):
    path = make_model_dir(tmp_path / "m", **SIZES)
    state = load_file(path / "model.safetensors")
    save_file({name: value.bfloat16() for name, value in state.items()}, path / "model.safetensors")
    model = load(path, torch_dtype="bfloat16", quantization_config={**NF4, "bnb_4bit_quant_storage": "uint8"})
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight.shape) == (torch.uint8, (64 * 128 // 2, 1))
    assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    packed = nf4.quantize(state["model.layers.0.mlp.up_proj.weight"].bfloat16())
    assert torch.equal(layer.packed.codes, packed.codes)


def test_reader_returns_every_tensor_and_says_when_a_file_is_short(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "empty": torch.empty(0, 4), "c": torch.randn(9).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    index = read_index([tmp_path / "x.safetensors"])
    found = dict(read_tensors(index, ["c", "a", "empty", "b"], torch.device("cpu")))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    os.truncate(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").stat().st_size - 30)
    with pytest.raises(EOFError, match="before its data do"):
        dict(read_tensors(index, list(tensors), torch.device("cpu")))


def test_packed_files_are_read_as_they_are(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    path = make_model_dir(tmp_path / "plain", **SIZES)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage="bfloat16",
        ),
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "packed")
    for module in theirs.modules():
        module.support_avx512bf16_for_cpu = False
    for quantization in (None, NF4):  # the file says fp4
        model = load(tmp_path / "packed", quantization_config=quantization, fast_layers="on")
        layer = model.model.layers[1].mlp.down_proj
        assert isinstance(layer, Linear4bit)
        assert layer.packed.quant_type == "fp4"
        state = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
        wanted = theirs.state_dict()
        assert state.keys() == wanted.keys()
        for name, value in wanted.items():
            if "quant_state" in name:
                assert json.loads(bytes(state[name].tolist())) == json.loads(bytes(value.tolist()))
            else:
                same = (value.contiguous().view(torch.uint8), state[name].contiguous().view(torch.uint8))
                assert torch.equal(*same), name
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_tables_of_its_own_are_refused(tmp_path):
    path = make_model_dir(tmp_path / "m", **SIZES)
    model = load(path)
    state = {n: v.clone() for n, v in model.state_dict().items() if "lora_" not in n}
    state["model.layers.0.mlp.up_proj.weight.quant_map"][3] += 0.01
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="with values or blocks of its own"):
        load(path)
    del state["model.layers.0.mlp.up_proj.weight.absmax"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.weight\.absmax` or"):
        load(path)


def test_what_is_left_to_transformers(tmp_path, caplog, monkeypatch):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    path = make_model_dir(tmp_path / "m", **SIZES)
    monkeypatch.setenv("AUTOMODEL_BNB_STREAMING", "0")
    model = load(path, caplog)
    assert "Weights: packed by Transformers and bitsandbytes: AUTOMODEL_BNB_STREAMING is 0." in caplog.messages
    assert type(model.model.layers[0].mlp.up_proj).__mro__[2].__module__.startswith("bitsandbytes")
    monkeypatch.delenv("AUTOMODEL_BNB_STREAMING")
    state = load_file(path / "model.safetensors")
    save_file({n.removeprefix("model."): v for n, v in state.items()}, path / "model.safetensors", {"format": "pt"})
    caplog.clear()
    again = load(path, caplog)
    (line,) = [m for m in caplog.messages if m.startswith("Weights: ")]
    assert line.endswith("the files do not have `model.embed_tokens.weight` (20 such weights).")
    assert torch.equal(logits(again), logits(model))


def test_a_weight_of_another_shape(tmp_path):
    path = make_model_dir(tmp_path / "m", **SIZES)
    with pytest.raises(UserError, match="has another shape"):
        load(path, intermediate_size=192)
