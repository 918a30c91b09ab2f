"""Loading and building models, and every mistake on the way as one line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.tiny import tiny_config

import nemo_automodel
from nemo_automodel import NeMoAutoModelForCausalLM, NeMoAutoModelForSequenceClassification
from nemo_automodel._transformers import model_source
from nemo_automodel._transformers.options import resolve_attention
from nemo_automodel.components._peft.lora import PeftConfig, lora_layers
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.quantization.config import CompileConfig
from nemo_automodel.shared.errors import NotSupportedYetError, UserError

IDS = torch.arange(4, 24).view(2, 10)


@pytest.fixture
def model_copy(model_dirs, tmp_path) -> Path:
    """A model directory that a test may break."""
    return Path(shutil.copytree(model_dirs("llama"), tmp_path / "model"))


def refused(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


def load(path, **kwargs):
    return NeMoAutoModelForCausalLM.from_pretrained(str(path), device="cpu", **kwargs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_loaded_model_equals_transformers(model_dirs, family):
    ours = load(model_dirs(family))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_dirs(family))
    assert type(ours) is type(theirs)
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_dtypes(model_copy, caplog):
    caplog.set_level("INFO")
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert load(model_copy).dtype == torch.float32
    assert "`torch_dtype: auto` on a CPU: float32 instead of the stored torch.bfloat16" in caplog.text
    for spelling in ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16):
        assert load(model_copy, torch_dtype=spelling).dtype == torch.bfloat16
    assert load(model_copy, dtype="float32", torch_dtype="bf16").dtype == torch.float32
    assert "is not a dtype" in refused(load, model_copy, torch_dtype="bf61")


def test_one_read_of_the_configuration(model_dirs, monkeypatch):
    reads = []
    real = transformers.PretrainedConfig._dict_from_json_file
    monkeypatch.setattr(
        transformers.PretrainedConfig,
        "_dict_from_json_file",
        classmethod(lambda cls, path: reads.append(Path(path).name) or real(path)),
    )
    load(model_dirs("llama"))
    assert reads.count("config.json") == 1


def test_configuration_can_be_overridden(model_dirs):
    model = load(model_dirs("llama"), rms_norm_eps=1e-3, attention_dropout=0.25)
    assert model.config.rms_norm_eps == 1e-3
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    message = refused(load, model_dirs("llama"), rms_norm_esp=1e-3)
    assert "`model.rms_norm_esp`" in message
    assert "Did you mean `rms_norm_eps`?" in message
    assert "another shape" in refused(load, model_dirs("llama"), intermediate_size=128)


def test_from_config_builds_the_same_weights_from_the_same_seed(model_dirs):
    models = []
    for config in (tiny_config("llama"), str(model_dirs("llama"))):
        torch.manual_seed(3)
        models.append(NeMoAutoModelForCausalLM.from_config(config, device="cpu", torch_dtype="float32"))
    assert torch.equal(models[0](input_ids=IDS).logits, models[1](input_ids=IDS).logits)
    loaded = NeMoAutoModelForCausalLM.from_config(str(model_dirs("llama")), device="cpu", load_base_model=True)
    assert torch.equal(loaded(input_ids=IDS).logits, load(model_dirs("llama"))(input_ids=IDS).logits)
    assert not torch.equal(loaded(input_ids=IDS).logits, models[0](input_ids=IDS).logits)
    smaller = NeMoAutoModelForCausalLM.from_config(tiny_config("llama"), device="cpu", num_hidden_layers=1)
    assert len(smaller.model.layers) == 1
    message = refused(NeMoAutoModelForCausalLM.from_config, tiny_config("llama"), load_base_model=True)
    assert "does not say where" in message


def test_from_config_takes_the_word_of_from_pretrained(model_dirs, tmp_path):
    build = NeMoAutoModelForCausalLM.from_config
    shutil.copy(model_dirs("llama") / "config.json", tmp_path)  # no weights, no tokenizer
    models = []
    for where in ({"config": str(tmp_path)}, {"pretrained_model_name_or_path": str(tmp_path)}):
        torch.manual_seed(3)
        models.append(build(**where, device="cpu", torch_dtype="float32"))
    assert torch.equal(models[0](input_ids=IDS).logits, models[1](input_ids=IDS).logits)
    rule = "takes `config` or `pretrained_model_name_or_path`, and"
    assert f"{rule} neither is given. Give one: a directory" in refused(build)
    assert f"{rule} both are given" in refused(build, "a", pretrained_model_name_or_path="b")


def test_a_new_task_head_is_made_and_said(model_dirs, caplog):
    caplog.set_level("INFO")
    model = NeMoAutoModelForSequenceClassification.from_pretrained(str(model_dirs("llama")), device="cpu", num_labels=3)
    assert model.score.out_features == 3
    assert "New weights, to be learned: score.weight" in caplog.text


def test_attention_implementations(model_dirs, caplog):
    caplog.set_level("INFO")
    assert load(model_dirs("llama"), attn_implementation="eager").config._attn_implementation == "eager"
    assert load(model_dirs("llama")).config._attn_implementation == "sdpa"
    assert load(model_dirs("llama"), attn_implementation="flash_attention_2").config._attn_implementation == "sdpa"
    assert "`attn_implementation: flash_attention_2` cannot run here; attention runs with sdpa" in caplog.text
    assert "Did you mean `sdpa`?" in refused(load, model_dirs("llama"), attn_implementation="sdap")
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    assert resolve_attention("sdpa", transformers.GptOssForCausalLM, cpu, bf16) == "eager"
    assert resolve_attention("flash_attention_2", transformers.GptOssForCausalLM, cpu, bf16) == "eager"


def test_adapter_freezing_recomputation_and_compile_are_assembled(model_dirs):
    model = load(
        model_dirs("llama"), peft_config=PeftConfig(target_modules="q_proj", dim=2), activation_checkpointing="full"
    ).train()
    assert len(lora_layers(model)) == 2
    assert {n.rpartition("lora_")[1] for n, p in model.named_parameters() if p.requires_grad} == {"lora_"}
    frozen = load(model_dirs("llama"), freeze_config={"freeze_embeddings": True})
    assert [n for n, p in frozen.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert "Did you mean `freeze_embeddings`?" in refused(
        load, model_dirs("llama"), freeze_config={"freeze_embed": True}
    )


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_recomputed_gradients_are_the_same(model_dirs, policy, has_adapter):
    def gradients(**kwargs):
        torch.manual_seed(0)
        cfg = PeftConfig(target_modules="*_proj", dim=2, dropout=0.3) if has_adapter else None
        model = load(model_dirs("llama"), peft_config=cfg, **kwargs).train()
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        return len(calls), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    num_plain, expected = gradients()
    num_calls, found = gradients(activation_checkpointing=policy)
    assert (num_plain, num_calls) == (1, 2)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"compile_config": CompileConfig(enabled=True, backend="eager")},
        {"compile_config": CompileConfig(backend="eager"), "compile_layers": True},
    ],
)
def test_compiled_model_has_the_same_names_and_numbers(model_dirs, settings):
    from support.packed import make_documents, pad

    from nemo_automodel._transformers.forward import LabelledForward
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    plain, compiled = load(model_dirs("llama")), load(model_dirs("llama"), **settings)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for lengths in ([[9, 4]], [[7, 5, 3]]):
        batch = pad(make_documents(lengths)[0])
        losses = [LabelledForward(m).loss(batch, MaskedCrossEntropy(), 5) for m in (plain, compiled)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_keys_without_effect(model_dirs, caplog):
    caplog.set_level("INFO")
    load(model_dirs("llama"), force_hf=True, output_hidden_states=True, has_packed_sequence=True)
    assert "No effect" not in caplog.text
    load(model_dirs("llama"), use_liger_kernel=True, sdpa_method=["math"], backend=BackendConfig(attn="te"))
    assert "No effect on this model: backend.attn, use_liger_kernel, sdpa_method." in caplog.text
    from nemo_automodel.components.models.common.utils import BackendConfig as second
    from nemo_automodel.components.moe.utils import BackendConfig as third

    assert second is third is BackendConfig


def test_what_is_not_there_yet(model_dirs):
    for key in ("device_mesh", "distributed_setup"):
        with pytest.raises(NotSupportedYetError, match=key):
            load(model_dirs("llama"), **{key: object()})
    with pytest.raises(UserError, match="but the model is on the cpu"):
        load(model_dirs("llama"), fp8_config={"enabled": True})
    assert load(model_dirs("llama"), fp8_config={"enabled": False}).dtype == torch.float32


def test_public_names_load():
    for name in nemo_automodel.__all__:
        assert getattr(nemo_automodel, name) is not None


# mistakes


def test_missing_directories_and_files(model_copy, tmp_path):
    assert "does not exist" in refused(load, tmp_path / "nothing")
    assert "does not exist" in refused(load, "./nothing")
    assert "is a file" in refused(load, model_copy / "config.json")
    (model_copy / "model.safetensors").rename(tmp_path / "weights")
    assert "no weights (model.safetensors)" in refused(load, model_copy)
    (model_copy / "config.json").unlink()
    assert "has no config.json. Copy or download" in refused(load, model_copy)
    (model_copy / "adapter_config.json").write_text("{}")
    assert "It holds an adapter" in refused(load, model_copy)
    checkpoint = tmp_path / "epoch_0_step_9"
    (checkpoint / "model").mkdir(parents=True)
    assert f"use `{checkpoint / 'model'}`" in refused(load, checkpoint)


def test_cut_off_and_incomplete_files(model_copy):
    weights = model_copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged or only partly there" in refused(load, model_copy)
    weights.write_bytes(b"")
    assert "damaged or only partly there" in refused(load, model_copy)
    weights.write_bytes(whole)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names 2 weight files, 2 are missing, the first is model-00001-of-00002" in refused(load, model_copy)
    (model_copy / "model.safetensors.index.json").write_text("{")
    assert "is not valid JSON" in refused(load, model_copy)
    (model_copy / "model.safetensors.index.json").unlink()
    (model_copy / "config.json").write_text("{")
    assert "cannot be loaded" in refused(load, model_copy)


class _Evil:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), "w")


@pytest.mark.parametrize("damage", ["evil", "cut off", "empty", "no pickle"])
def test_pickled_weights_run_nothing_and_are_one_line(model_copy, tmp_path, damage):
    (model_copy / "model.safetensors").unlink()
    buffer = io.BytesIO()
    torch.save({"weight": _Evil(tmp_path / "proof")}, buffer)
    contents = {"evil": buffer.getvalue(), "cut off": buffer.getvalue()[:200], "empty": b"", "no pickle": b"<html>"}
    (model_copy / "pytorch_model.bin").write_bytes(contents[damage])
    message = refused(load, model_copy)
    assert message.startswith(
        f"A weight file of `{model_copy}` is damaged, or holds objects that loading would have to"
    )
    assert not (tmp_path / "proof").exists()


def test_missing_weights_never_stay_random(model_copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model_copy / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights of LlamaForCausalLM are missing, the first is `model.layers.1.mlp.up_proj" in refused(
        load, model_copy
    )


def test_unknown_architectures_and_tasks(model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    for values, words in (
        ({**config, "model_type": "lama"}, "Did you mean `llama`?"),
        ({k: v for k, v in config.items() if k != "model_type"}, "has no `model_type`"),
        ({**config, "model_type": "vit"}, "cannot be loaded with NeMoAutoModelForCausalLM"),
    ):
        (model_copy / "config.json").write_text(json.dumps(values))
        assert words in refused(load, model_copy)


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_remote_code_runs_only_when_asked_and_is_announced(model_copy, caplog, tmp_path, monkeypatch):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "odd.py").write_text(REMOTE_CODE)
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    (model_copy / "config.json").write_text(json.dumps({**config, "model_type": "odd", "auto_map": auto_map}))
    message = refused(load, model_copy)
    assert f"needs code of `{model_copy}`" in message
    assert "trust_remote_code: true" in message
    model = load(model_copy, trust_remote_code=True)
    assert type(model).__name__ == "OddForCausalLM"
    assert f"running Python code of `{model_copy}`" in caplog.text

    from nemo_automodel._transformers.model_files import ModelFiles

    ModelFiles(model, None).write(tmp_path / "out")
    assert (tmp_path / "out" / "odd.py").is_file()
    again = load(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert model_source.code_owner("x", {"AutoConfig": "who/where--odd.OddConfig"}) == "`who/where`"


def test_hub_names_without_a_network():
    assert "HF_HUB_OFFLINE" in refused(load, "nobody/nothing-here")
    assert "neither a directory here nor a possible Hub name" in refused(load, "no body")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "nor a model on the Hugging Face Hub"),
        ("RevisionNotFoundError", "has no such revision"),
        ("HfHubHTTPError", "refuses `a/b` (403 Forbidden): the token may not read it"),
    ],
)
def test_what_the_hub_answers_is_told_by_its_type(kind, words):
    import huggingface_hub.errors

    response = SimpleNamespace(headers={}, request=None, status_code=403)
    cause = getattr(huggingface_hub.errors, kind)("text that nobody reads", response=response)
    with pytest.raises(UserError) as error, model_source.readable_errors("a/b"):
        raise OSError("wrapped") from cause
    assert words in str(error.value)
    assert error.value.__cause__.__cause__ is cause


def test_devices(model_dirs):
    name = str(model_dirs("llama"))
    for device, words in (("cuda:99", "usable GPUs"), ("gpu", "is not a device"), ("meta", "not supported")):
        assert words in refused(NeMoAutoModelForCausalLM.from_pretrained, name, device=device)
    known = "Use none, fp8_gate_up, selective, sac2, sac1, full, full_offload."
    assert known in refused(load, name, activation_checkpointing="some")
