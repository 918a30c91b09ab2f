"""Packed layers: bitsandbytes' state dicts, moving, random codes, 8-bit products, and fast layers over them."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from support.fast_models import tokens
from support.tiny import tiny_config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import fast_layers, kernel_choice
from nemo_automodel._transformers.fast_layers import FastRequest, use_fast_layers
from nemo_automodel._transformers.kernel_trial import LayerTrial
from nemo_automodel.components._peft.lora import PeftConfig, lora_layers
from nemo_automodel.components.fast.choices import DEFAULT
from nemo_automodel.components.fast.nf4_store import Nf4Fp8Store, Nf4Store, Scratch
from nemo_automodel.components.quantization.linear4bit import Linear4bit
from nemo_automodel.kernels import nf4
from nemo_automodel.kernels.fp8 import quantize_rows
from nemo_automodel.shared.errors import UserError

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
PEFT = PeftConfig(target_modules="*_proj", dim=3, alpha=5)
NF4 = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}


def build(family="llama", peft=PEFT, quantization=NF4, fast_layers="off", **keywords):
    """Return a model of random codes with adapters that matter, the same for the same arguments."""
    torch.manual_seed(0)
    config = tiny_config(family, **{**SIZES, "initializer_range": 0.1, **keywords.pop("config", {})})
    model = NeMoAutoModelForCausalLM.from_config(
        config, torch_dtype="float32", device="cpu", peft_config=peft, quantization_config=quantization,
        fast_layers=fast_layers, **keywords,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model.train()


def step(model, ids=None):
    """Return the logits and every gradient."""
    model.zero_grad()
    logits = model(input_ids=tokens(2, 9) if ids is None else ids, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}}


def assert_same(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-3)
        assert error <= tolerance, f"{name} differs by {error:.1e} of its norm"


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", ["*_proj", ["k_proj", "up_proj"], ["down_proj"]])
def test_fast_layers_compute_the_same(family, recompute, targets):
    peft = PeftConfig(target_modules=targets, dim=3, alpha=5)
    fast = build(family, peft, fast_layers="on", activation_checkpointing=recompute)
    assert {type(store) for layer in fast.model.layers for store in layer.fast_core.stores} == {Nf4Store}
    assert_same(step(fast), step(build(family, peft)), 1e-5)


@pytest.mark.parametrize("dim", [1, 24, 70])
def test_ranks(dim):
    peft = PeftConfig(target_modules="*_proj", dim=dim)
    fast = build(peft=peft, fast_layers="on")
    widths = {1: (16, 16, 16, 16), 24: (128, 32, 64, 32), 70: (256, 128, 192, 128)}[dim]
    assert tuple(store.rank_width for store in fast.model.layers[0].fast_core.stores) == widths
    assert_same(step(fast), step(build(peft=peft)), 1e-4)


def test_all_layers_share_one_scratch_as_large_as_the_largest_group():
    gc.collect()  # models of other tests
    fast = build(fast_layers="on")
    scratches = {id(store._scratch) for layer in fast.model.layers for store in layer.fast_core.stores}
    assert scratches == {id(Scratch.of(torch.device("cpu")))}
    assert Scratch.of(torch.device("cpu"))._memory.numel() == (2 * 128 + 16) * (64 + 16) * 4
    held = sum(
        t.numel() for layer in fast.model.layers for t in vars(layer.fast_core.gate_up).values() if torch.is_tensor(t)
    )
    assert held == 2 * 16 * (64 + 2 * 128)  # the adapters' copies
    del fast
    gc.collect()
    assert Scratch.of(torch.device("cpu"))._memory.numel() == 0


def test_evaluation_and_generation_compute_the_same():
    fast, plain = build(fast_layers="on").eval(), build().eval()
    prompt = tokens(2, 5)
    with torch.no_grad():
        a, b = (m(input_ids=prompt, use_cache=False).logits for m in (fast, plain))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        a, b = (m.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=3) for m in (fast, plain))
    assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [{}, {"bnb_4bit_use_double_quant": False}, {"bnb_4bit_quant_type": "fp4"}])
@pytest.mark.parametrize("storage", ["bfloat16", "uint8"])
def test_state_dict_is_that_of_bitsandbytes(settings, storage):
    bnb = pytest.importorskip("bitsandbytes")
    model = build(quantization={**NF4, **settings, "bnb_4bit_quant_storage": storage})
    ours = model.model.layers[0].mlp.up_proj
    state = {name: value for name, value in ours.state_dict().items() if "lora_" not in name}
    weight = {name.removeprefix("weight."): value for name, value in state.items() if name != "weight"}
    theirs = bnb.nn.Params4bit.from_prequantized(state["weight"], dict(weight), device="cpu")
    numbers = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(ours.unpacked(), numbers)
    assert theirs.quant_state.dtype == torch.float32
    layer = bnb.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32)
    layer.weight = theirs
    layer.quant_state = theirs.quant_state
    again = build(
        quantization={**NF4, **settings, "bnb_4bit_quant_storage": storage}, config={"initializer_range": 0.3}
    )
    target = again.model.layers[0].mlp.up_proj
    assert not torch.equal(target.unpacked(), numbers)
    assert not target.load_state_dict(layer.state_dict(), strict=False).unexpected_keys
    assert torch.equal(target.unpacked(), numbers)
    assert {n: v.shape for n, v in target.state_dict().items() if "lora_" not in n} == {
        n: v.shape for n, v in state.items()
    }


def test_fast_layers_see_loaded_codes():
    fast, other = build(fast_layers="on"), build(config={"initializer_range": 0.2})
    step(fast)
    fast.load_state_dict(other.state_dict())
    assert_same(step(fast), step(other), 1e-5)


def test_casts_and_moves_do_not_reach_the_codes():
    model = build("qwen2")
    before = {name: module.packed for name, module in linears(model).items()}
    model.to(torch.bfloat16).to("cpu", torch.float64).to(torch.float32)
    for name, module in linears(model).items():
        assert torch.equal(module.packed.codes, before[name].codes)
        assert torch.equal(module.packed.nested_absmax, before[name].nested_absmax)
        assert module.packed.nested_absmax.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.lora_A.weight.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_random_models(family):
    model = build(family)
    assert len(linears(model)) == 14
    for module in linears(model).values():
        assert float(module.unpacked().std()) == pytest.approx(0.1, rel=0.1)
    assert float(model.lm_head.weight.std()) == pytest.approx(0.1, rel=0.1)
    assert not any(p.is_meta for p in model.parameters())
    losses, optimizer = [], torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=tokens(2, 9)).logits.flatten(0, 1), tokens(2, 9).flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


class _EmulatedStore(Nf4Store):
    """What 8-bit products mean, in fp32: inputs and gradients rounded by rows, weights by output channels."""

    def _rounded_weights(self):
        for packed in self._packed:
            scales = nf4.channel_scales(packed).unsqueeze(1)
            numbers = nf4.dequantize(packed, torch.empty(packed.shape))
            yield (numbers / scales).to(torch.float8_e4m3fn).float() * scales, scales

    def _rounded(self, x):
        quantized, scales = quantize_rows(x)
        return quantized.float() * scales

    def forward(self, x_TM, low_TR, rounded=None):
        weight = torch.cat([w for w, _ in self._rounded_weights()])
        y = self._rounded(x_TM[:, : self.num_in].contiguous()) @ weight.t()
        y = y if low_TR is None else y + low_TR @ self._b_NR.t()
        return torch.cat([y, torch.zeros(len(y), self.margin)], 1)

    def forward_added(self, residual_TN, x_TM, low_TR):
        return residual_TN + self.forward(x_TM, low_TR)[:, : self.num_out]

    def dgrad_pending(self, dy_TM, dlow_TR):
        return self.dgrad(dy_TM, dlow_TR), None

    def dgrad(self, dy_TM, dlow_TR):
        weight, scales = map(torch.cat, zip(*self._rounded_weights(), strict=True))
        dx = self._rounded((dy_TM[:, : self.num_out] * scales[:, 0]).contiguous()) @ (weight / scales)
        return dx if dlow_TR is None else dx + dlow_TR @ self._a_RK


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_products_in_8_bits(recompute, monkeypatch):
    eight = build(
        "qwen2", quantization={**NF4, "compute_in_fp8": True}, fast_layers="on", activation_checkpointing=recompute
    )
    assert {type(store) for layer in eight.model.layers for store in layer.fast_core.stores} == {Nf4Fp8Store}
    monkeypatch.setattr("nemo_automodel._transformers.fast_layers.Nf4Store", _EmulatedStore)
    emulated, exact = build("qwen2", fast_layers="on"), build("qwen2")
    found, wanted = step(eight), step(emulated)
    for name, value in step(exact).items():
        cosine = torch.nn.functional.cosine_similarity(found[name].flatten(), value.flatten(), dim=0)
        assert 0.99 < cosine < 0.999999, name
    assert_same(found, wanted, 2e-2)  # a rounding that falls the other way moves what follows


def log_of(caplog, **keywords):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        build(**keywords)
    return next(m for m in caplog.messages if m.startswith("Decoder layers: ")).removeprefix("Decoder layers: ")


def test_the_log_names_the_weights(caplog):
    assert log_of(caplog, fast_layers="on") == "fast (2 of 2, LlamaDecoderLayer; weights: nf4; recomputed: none)."
    eight = {**NF4, "bnb_4bit_quant_type": "fp4", "compute_in_fp8": True}
    assert log_of(caplog, fast_layers="on", quantization=eight) == (
        "fast (2 of 2, LlamaDecoderLayer; weights: fp4, multiplied in 8 bits; recomputed: none)."
    )


def test_what_does_not_fit(caplog):
    half = {**NF4, "bnb_4bit_compute_dtype": "bfloat16"}
    assert log_of(caplog, quantization=half, fast_layers="auto") == (
        "plain Transformers: `quantization.bnb_4bit_compute_dtype` is bfloat16 and the model's dtype float32."
    )
    with pytest.raises(UserError, match="is bfloat16 and the model's dtype float32"):
        build(quantization=half, fast_layers="on")
    with pytest.raises(UserError) as refused:
        build(quantization={**NF4, "compute_in_fp8": True}, fast_layers="auto")
    assert str(refused.value) == (
        "`quantization.compute_in_fp8: true` needs the fast decoder layers, and the model is on the cpu. Leave "
        "`compute_in_fp8` out: weights stay in 4 bits and are multiplied in the compute dtype."
    )
    with pytest.raises(UserError, match=r"has 96 inputs and 64 outputs, and 8 bits need multiples of 64 and 16"):
        build(quantization={**NF4, "compute_in_fp8": True}, fast_layers="on", config={"intermediate_size": 96})
    model = build()
    plain = torch.nn.Linear(128, 64, bias=False)
    model.model.layers[1].mlp.down_proj = plain.requires_grad_(False)
    with pytest.raises(UserError, match=r"`mlp\.down_proj` is not packed and other layers are"):
        use_fast_layers(model, FastRequest("on", PEFT))


@pytest.mark.parametrize("in_fp8", [False, True])
def test_ways_to_compute_are_tried_on_a_layer_packed_alike(in_fp8):
    model = build("qwen3")
    trial = LayerTrial(model, model.model.layers[0], Nf4Fp8Store if in_fp8 else Nf4Store, (1, 8))
    assert trial.matters("down_in_depth") is not in_fp8
    question = trial.question("swiglu_products", DEFAULT, "a layer")
    errors = [candidate.error() for candidate in question.candidates.values()]
    assert len(errors) == 2
    assert all(error <= question.tolerance for error in errors)
    assert all(isinstance(m, Linear4bit) for n, m in trial._scratch.named_modules() if n.endswith("_proj"))


@pytest.mark.parametrize("in_fp8", [False, True])
def test_a_model_whose_ways_are_measured(in_fp8, monkeypatch, tmp_path):
    """Measured on the CPU as on a GPU."""
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "_obstacle", lambda model, layer: None)
    quantization = {**NF4, "compute_in_fp8": in_fp8}
    fast = build(quantization=quantization, fast_layers="on", row_shape=(1, 8))
    entries = fast_layers.kernel_table(fast)["entries"]
    assert {"operation": "swiglu_products", "reason": "measured now"}.items() <= entries[1].items()
    assert_same(step(fast), step(build()), 0.3 if in_fp8 else 1e-5)


def test_rows_that_are_not_whole_blocks():
    config = {"hidden_size": 48, "intermediate_size": 80, "head_dim": 12}
    assert_same(step(build(fast_layers="on", config=config)), step(build(config=config)), 1e-5)
