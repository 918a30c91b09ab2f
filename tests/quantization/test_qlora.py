"""A packed base with adapters against Transformers' own bitsandbytes loading with PEFT, on the CPU."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from support.tiny import make_model_dir

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.model_files import ModelFiles
from nemo_automodel.components._peft.adapter_state import adapter_state_dict, load_adapter_state_dict
from nemo_automodel.components._peft.lora import PeftConfig, lora_layers
from nemo_automodel.components.quantization.config import QuantizationConfig
from nemo_automodel.shared.errors import ConfigError, UserError

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

IDS = torch.randint(4, 400, (2, 12), generator=torch.Generator().manual_seed(0))
# dtype: computed the same way on both sides, so only the order of a few additions may differ
RTOL = 1e-5
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"},
    "nf4_single": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": False},
    "fp4_uint8": {
        "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_quant_storage": "uint8",
    },
    "int8": {"load_in_8bit": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    """Return a model whose rows are whole blocks: bitsandbytes' CPU path misreads others."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    path = make_model_dir(tmp_path_factory.mktemp("packed") / "llama", **sizes)
    return lambda family: path


def load_ours(path, settings, fast_layers="auto", **peft_settings):
    return NeMoAutoModelForCausalLM.from_pretrained(
        str(path),
        device="cpu",
        quantization_config=QuantizationConfig(**settings),
        fast_layers=fast_layers,
        peft_config=PeftConfig(target_modules="*_proj", dim=4, alpha=8, **peft_settings),
    )


def load_theirs(path, settings):
    names = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(**{**names, **settings}),
    )  # fmt: skip
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # else bitsandbytes fails on small layers where the CPU has it
    return model


def with_adapters(model):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))


def run(model):
    loss = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[..., 7].mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("fast_layers", ["on", "off"])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_equal_transformers_with_peft(model_dirs, name, fast_layers):
    if name == "int8" and fast_layers == "on":
        pytest.skip("8 bits are not on the fast path")
    ours, theirs = (
        load_ours(model_dirs("llama"), SETTINGS[name], fast_layers),
        load_theirs(model_dirs("llama"), SETTINGS[name]),
    )
    if name != "int8":  # the same bytes on both sides: magnitudes that bitsandbytes rounds its own way included
        assert not ours.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys
    theirs = with_adapters(theirs)
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in adapter_state_dict(ours).items()}
    load_adapter_state_dict(ours, tensors)
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    torch.testing.assert_close(run(ours), run(theirs), rtol=RTOL, atol=0)
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = {f"base_model.model.{n}": p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert len(found) == 28
    for key, grad in found.items():
        torch.testing.assert_close(grad, gradients[key], rtol=1e-3, atol=1e-6)


def test_validation_leaves_packed_weights_alone(model_dirs, monkeypatch):
    """As on a CPU with AVX512-BF16, where bitsandbytes would rewrite them and cut the gradient."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_ours(model_dirs("llama"), SETTINGS["nf4"])
    before = {name: value.clone() for name, value in model.state_dict().items()}  # 4 bits in bf16 may read as NaN
    model.eval()
    with torch.no_grad():
        evaluated = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[..., 7].mean()
    model.train()
    torch.testing.assert_close(run(model), evaluated, rtol=RTOL, atol=0)
    assert model.get_submodule("model.layers.0.self_attn.q_proj").lora_B.weight.grad.abs().sum() > 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_the_base_is_packed_and_stays_as_it_is(model_dirs):
    model = load_ours(model_dirs("llama"), SETTINGS["nf4"]).train()
    layer = lora_layers(model)["model.layers.0.mlp.up_proj"]
    assert type(layer).__name__ == "Linear4bitLoRA"
    assert layer.weight.numel() * layer.weight.element_size() == 64 * 128 // 2
    assert type(model.lm_head) is torch.nn.Linear
    before = copy.deepcopy(layer.weight.data)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(run(model).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert torch.equal(before.view(torch.uint8), layer.weight.data.view(torch.uint8))  # as numbers some are NaN


def test_recomputation_over_a_packed_base(model_dirs):
    kwargs = {"quantization_config": SETTINGS["nf4"], "peft_config": PeftConfig(target_modules="*_proj", dim=2)}
    results = []
    for policy in ("none", "full", "selective"):
        torch.manual_seed(0)
        model = NeMoAutoModelForCausalLM.from_pretrained(
            str(model_dirs("llama")), device="cpu", activation_checkpointing=policy, **kwargs
        ).train()
        run(model)
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_adapter_of_a_packed_base_is_saved_and_read_back(model_dirs, tmp_path):
    model = load_ours(model_dirs("llama"), SETTINGS["nf4"])
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.weight.normal_()
    ModelFiles(model, None).write(tmp_path / "model")
    again = load_ours(model_dirs("llama"), SETTINGS["nf4"])
    assert not torch.allclose(run(again), run(model))
    ModelFiles(again, None).read(tmp_path / "model")
    assert torch.equal(run(again), run(model))


def test_mistakes(model_dirs, monkeypatch):
    name = str(model_dirs("llama"))
    load, build = NeMoAutoModelForCausalLM.from_pretrained, NeMoAutoModelForCausalLM.from_config
    cfg = PeftConfig(target_modules="*_proj")
    with pytest.raises(UserError, match="Add a `peft` section"):
        load(name, device="cpu", quantization_config={"load_in_4bit": True})
    with pytest.raises(UserError, match=r"`peft\.use_dora: true` needs"):
        load_ours(name, SETTINGS["nf4"], use_dora=True)
    with pytest.raises(UserError, match="not in 8 bits"):
        build(name, device="cpu", quantization_config={"load_in_8bit": True}, peft_config=cfg)
    with pytest.raises(ConfigError, match="but `load_in_4bit` is false"):
        load(name, quantization_config={"load_in_8bit": True, "compute_in_fp8": True}, peft_config=cfg)
    with pytest.raises(ConfigError, match="Did you mean `load_in_4bit`"):
        load(name, quantization_config={"load_in_4bits": True}, peft_config=cfg)
    with pytest.raises(ConfigError, match=r"quantization\.bnb_4bit_compute_dtype: fp7"):
        load(name, quantization_config={"load_in_4bit": True, "bnb_4bit_compute_dtype": "fp7"}, peft_config=cfg)
    monkeypatch.setattr("nemo_automodel.shared.imports.is_available", lambda package: False)
    with pytest.raises(UserError, match=r"pip install 'nemo-automodel\[qlora\]'"):
        load(name, quantization_config={"load_in_8bit": True}, peft_config=cfg)


def test_neither_4_nor_8_bit_is_an_ordinary_model(model_dirs):
    model = load_ours(model_dirs("llama"), {})
    assert type(lora_layers(model)["model.layers.0.mlp.up_proj"]).__name__ == "LinearLoRA"
