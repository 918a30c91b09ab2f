"""A base in 8 bits, emulated on the CPU: against the scheme written out in float64, and in files, moves and copies."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
import transformers
from support.fast_models import adapters_of, assert_same_step, plain_model, tokens
from support.tiny import make_model_dir

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import fp8_base
from nemo_automodel._transformers.fast_layers import FastRequest, use_fast_layers
from nemo_automodel._transformers.fp8_base import Fp8Plan
from nemo_automodel._transformers.kernel_choice import KernelRequest, measured_table
from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components._peft.lora import LinearLoRA, lora_layers
from nemo_automodel.components.fast.fp8_linear import Fp8Linear
from nemo_automodel.components.fast.fp8_store import Fp8Scheme, Fp8Store
from nemo_automodel.shared.errors import UserError

PEFT = adapters_of(dtype="float32")
IDS = {"input_ids": tokens(2, 6)}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def fp8_model(family="qwen2", peft=PEFT, dtype=torch.float32, by_rows=True, recompute="none", **plan):
    """Return the model that `plain_model` returns, its base in 8 bits."""
    model = plain_model(family, peft, dtype)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    scheme = Fp8Scheme(by_rows, emulate=True)
    assert use_fast_layers(model, FastRequest("on", peft, recompute, fp8=Fp8Plan(scheme, **plan)))
    return model


def rounded(x: torch.Tensor, by_rows: bool) -> torch.Tensor:
    """Round to E4M3, written with the grid itself and not with a cast: 3 bits of mantissa, exponents from -6."""
    x = x.double()
    top = x.abs().amax(-1, keepdim=True) if by_rows else x.abs().amax()
    scale = torch.where(top > 0, top.float() / 448, 1.0).double()
    value = (x.float() / scale.float()).double()
    step = torch.exp2(value.abs().clamp_min(2.0**-6).log2().floor() - 3)
    return (value / step).round().mul(step) * scale


class RoundedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_NK, scale_N, by_rows):
        ctx.save_for_backward(weight_NK, scale_N)
        ctx.by_rows = by_rows
        return rounded(x, by_rows) @ weight_NK.t()

    @staticmethod
    def backward(ctx, dy):
        weight_NK, scale_N = ctx.saved_tensors
        if ctx.by_rows:
            return rounded(dy * scale_N, True) / scale_N @ weight_NK, None, None, None
        return rounded(dy, False) @ weight_NK, None, None, None


def emulate_by_hand(model, by_rows: bool) -> None:
    """Give every projection of a plain float64 model the products of the scheme."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        packs = [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]
        for pack in packs:
            weight_NK = rounded(torch.cat([linear.weight.detach() for linear in pack]), by_rows)
            scales = (torch.cat([linear.weight.detach() for linear in pack]).abs().amax(1).float() / 448).double()
            first = 0
            for linear in pack:
                rows = slice(first, first + linear.out_features)
                first = rows.stop

                def forward(x, linear=linear, rows=rows, weight_NK=weight_NK, scales=scales):
                    base = RoundedProduct.apply(x, weight_NK[rows], scales[rows], by_rows)
                    bias = 0 if linear.bias is None else linear.bias
                    return base + bias + linear._update(x)

                linear.forward = forward


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_scheme_and_nothing_else(family):
    for by_rows in (True, False):
        plain = plain_model(family, adapters_of())
        emulate_by_hand(plain, by_rows)
        fast = fp8_model(family, adapters_of(), torch.float64, by_rows)
        with torch.no_grad():
            expected, found = (model(**IDS, use_cache=False).logits for model in (plain, fast))
        assert float((found - expected).norm() / expected.norm()) <= 1e-11


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_of_a_chain_are_those_of_the_scheme(recompute):
    """With adapters on one down projection a gradient crosses no packed matrix whose parts have scales of their own."""
    peft = adapters_of("*.layers.1.mlp.down_proj")
    plain = plain_model("llama", peft)
    emulate_by_hand_everywhere_but_adapters(plain)
    assert_same_step(plain, fp8_model("llama", peft, torch.float64, recompute=recompute), 1e-11, **IDS)


def emulate_by_hand_everywhere_but_adapters(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not isinstance(module, LinearLoRA):
            module._update = lambda x: 0
    emulate_by_hand(model, True)


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**IDS, use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_stay_near_those_of_the_exact_base(family):
    exact, found = gradients(plain_model(family, PEFT, torch.float32)), gradients(fp8_model(family))
    assert exact.keys() == found.keys()
    one, other = (torch.cat([grads[name].flatten() for name in exact]) for grads in (exact, found))
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.97


def test_transformers_modules_compute_and_generate():
    fast, plain = fp8_model(), plain_model("qwen2", PEFT, torch.float32)
    for name, linear in fast.named_modules():
        if isinstance(linear, Fp8Linear):
            plain.get_submodule(name).weight.data = linear.dequantized(torch.float32)
    x = torch.randn(2, 3, 32, requires_grad=True)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        outputs = [m.model.layers[1].get_submodule(name)(x) for m in (fast, plain)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in outputs))
    answers = [m.eval().generate(**IDS, max_new_tokens=8, do_sample=False) for m in (fast, plain)]
    assert torch.equal(*answers)


def test_files_hold_an_ordinary_model(tmp_path):
    fast = fp8_model("qwen2")
    plain = plain_model("qwen2", PEFT, torch.float32)
    state = fast.state_dict()
    assert list(state) == list(plain.state_dict())
    weight = fast.model.layers[0].mlp.up_proj
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], weight.dequantized(torch.float32))
    exact = plain.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert 0.015 < float((state["model.layers.0.mlp.up_proj.weight"] - exact).norm() / exact.norm()) < 0.035
    fast.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(loaded.state_dict()[name], state[name])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("by_rows", [True, False])
def test_loaded_weights_count(assign, by_rows):
    fast, twin = fp8_model(by_rows=by_rows), fp8_model(by_rows=by_rows)
    with torch.no_grad():
        before = fast(**IDS, use_cache=False).logits
        state = {name: value * 1.5 for name, value in fast.state_dict().items()}
        fast.load_state_dict(copy.deepcopy(state), assign=assign)
        for name, parameter in twin.named_parameters():
            if parameter.dtype != torch.float8_e4m3fn:
                parameter.copy_(state[name])
            else:
                twin.get_submodule(name.removesuffix(".weight")).scale_N1.mul_(1.5)
        found, expected = (m(**IDS, use_cache=False).logits for m in (fast, twin))
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(fast.state_dict()[name], value)
    # an activation in the middle between two numbers may be rounded either way
    assert (found - expected).norm() < 0.02 * expected.norm() < 0.2 * (expected - before).norm()


def test_casts_and_copies_leave_the_bytes_alone():
    fast = fp8_model("qwen3")
    before = fast(**IDS, use_cache=False).logits.detach()
    twin = copy.deepcopy(fast).double().float()
    names = [name for name, _ in fast.named_parameters()]
    assert [name for name, _ in twin.named_parameters()] == names
    assert torch.equal(twin(**IDS, use_cache=False).logits, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dtype != torch.float8_e4m3fn:
                parameter.zero_()
    assert torch.equal(fast(**IDS, use_cache=False).logits, before)
    assert fast.double().state_dict()["model.layers.0.mlp.up_proj.weight"].dtype == torch.float64


def test_first_and_last_down_projections_and_filters_stay_as_they_are(caplog):
    caplog.set_level(logging.INFO, logger="nemo_automodel")
    fast = fp8_model("llama", filter_fqns=("k_proj",), keeps_first_last_down=True)
    is_fp8 = {name.removeprefix("model.") for name, m in fast.named_modules() if isinstance(m, Fp8Linear)}
    kinds = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    assert is_fp8 == {f"layers.{index}.{kind}" for index in (0, 1) for kind in kinds}
    (line,) = [m for m in caplog.messages if m.startswith("FP8 base: 4 of 8 matrices in 8 bits; largest output")]
    assert line.endswith("All: fp8_quality.json.")
    assert len(lora_layers(fast)) == 14
    gradients(fast)


def test_the_report_is_the_error_of_the_matrices(tmp_path):
    fast = fp8_model("llama")
    fp8_base.write_report(fast, tmp_path)
    rows = json.loads((tmp_path / "fp8_quality.json").read_text())
    assert len(rows) == 8
    assert rows[0]["name"] == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    plain = plain_model("llama", PEFT, torch.float32).eval()
    inputs = {}
    for name, module in plain.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0][0]))
    ids = torch.randint(448, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain(input_ids=ids, use_cache=False)
    for index in (0, 1):
        name = f"model.layers.{index}.mlp.down_proj"
        weight = plain.get_submodule(name).weight.detach().double()
        exact = inputs[name].double() @ weight.t()
        found = rounded(inputs[name], True) @ rounded(weight, True).t()
        (error,) = [row["output_error"] for row in rows if row["name"] == name]
        assert error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-3)
    fp8_base.write_report(plain, tmp_path / "nowhere")


MISTAKES = [
    ({"filter_fqns": ("lm_haed",)}, "`fp8.filter_fqns: lm_haed` is part of no layer's name. Did you mean `lm_head`? "),
    ({"filter_fqns": ("proj",)}, "`fp8.enabled: true` leaves no matrix in 8 bits (fp8.filter_fqns). Set it to false."),
]


@pytest.mark.parametrize(("plan", "message"), MISTAKES)
def test_filters_are_checked(plan, message):
    with pytest.raises(UserError) as refused:
        fp8_model("llama", **plan)
    assert str(refused.value).startswith(message)


def test_what_fast_layers_cannot_do_is_an_error(tmp_path):
    directory = make_model_dir(tmp_path / "model", mlp_bias=True)
    keywords = {"peft_config": PEFT, "fp8_config": {"enabled": True, "emulate": True}}
    with pytest.raises(UserError) as refused:
        NeMoAutoModelForCausalLM.from_pretrained(str(directory), **keywords)
    assert str(refused.value) == (
        "`fp8.enabled: true` needs the fast layers, but `gate_proj` has a bias. Set it to false."
    )
    dora = PeftConfig(target_modules="*_proj", dim=2, use_dora=True)
    with pytest.raises(UserError) as refused:
        NeMoAutoModelForCausalLM.from_pretrained(
            str(make_model_dir(tmp_path / "plain")), peft_config=dora, fp8_config={"enabled": True, "emulate": True}
        )
    assert str(refused.value) == (
        "`fp8.enabled: true` needs the fast layers, but DoRA needs the weights in 16 bits or more. Set it to false."
    )


def test_a_machine_without_such_products_is_told_so():
    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=32, vocab_size=64)
    with pytest.raises(UserError) as refused:
        NeMoAutoModelForCausalLM.from_config(config, device="cpu", peft_config=PEFT, fp8_config={"enabled": True})
    assert str(refused.value) == (
        "`fp8.enabled: true` needs compute capability 8.9, but the model is on the cpu. Set `fp8.emulate: true` to "
        "round in the same places in PyTorch, which is slow."
    )


def test_kernels_are_measured_on_a_layer_packed_alike(monkeypatch, tmp_path):
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(tmp_path))
    model = plain_model("llama", PEFT, torch.float32)
    store = Fp8Store.under(Fp8Scheme(emulate=True))
    table = measured_table(model, model.model.layers[0], KernelRequest(row_shape=(1, 32)), store)
    (entry,) = [entry for entry in table.entries if entry.operation == "swiglu_products"]
    assert "Fp8Store2RowsEmulated" in entry.subject
    assert {name for name, trial in entry.trials.items() if trial.failure is None} == {"on", "off"}
    assert all(0 < trial.error < 0.05 for trial in entry.trials.values())
    assert not isinstance(model.model.layers[0].mlp.up_proj, Fp8Linear)
