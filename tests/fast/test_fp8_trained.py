"""All weights learning in 8 bits, emulated on the CPU: against the scheme in float64, and the exact layer."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from fast.test_fp8 import FAMILIES, rounded
from support.fast_models import assert_same_step, full_model, tokens

from nemo_automodel._transformers.fast_layers import FastRequest, use_fast_layers
from nemo_automodel._transformers.fp8_base import Fp8Plan, choose_scheme
from nemo_automodel.components.fast.fp8_store import Fp8Scheme
from nemo_automodel.components.fast.fp8_trained import Fp8TrainedLinear, Fp8TrainedStore
from nemo_automodel.components.fast.names import Slot
from nemo_automodel.components.fast.trained_layer import TrainedStore
from nemo_automodel.components.quantization.config import FP8Config
from nemo_automodel.shared.errors import UserError

IDS = {"input_ids": tokens(2, 6)}
RECIPES = [None, "rowwise_with_gw_hp", "rowwise", "tensorwise"]
PACKS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def fp8_model(family, recipe=None, dtype=torch.float64, recompute="none", wish="on", copies=1, plan=None, **more):
    """Return the model that `full_model` returns, multiplying in 8 bits."""
    model = full_model(family, dtype, **more)
    for module in model.modules():
        if wish == "on":
            module.__dict__.pop("forward", None)
    cfg = FP8Config(True, recipe, emulate=True, weight_copies=copies)
    asked = Fp8Plan(choose_scheme(cfg, model.device, True), is_trained=True, **(plan or {}))
    assert use_fast_layers(model, FastRequest(wish, None, recompute, fp8=asked)) == (wish == "on")
    return model


class RoundedProducts(torch.autograd.Function):
    """Several linear layers with one input, each operand rounded where the scheme says."""

    @staticmethod
    def forward(ctx, x, by_rows, rounds_grads, *weights):
        weight = torch.cat(weights)
        ctx.save_for_backward(x, weight)
        ctx.by_rows, ctx.rounds_grads, ctx.sizes = by_rows, rounds_grads, [len(w) for w in weights]
        return (rounded(x, by_rows) @ rounded(weight, by_rows).t()).split(ctx.sizes, -1)

    @staticmethod
    def backward(ctx, *grads):
        (x, weight), by_rows = ctx.saved_tensors, ctx.by_rows
        dy = torch.cat(grads, -1)
        if by_rows:  # the scales of the weight's rows are in the gradient when that is rounded
            scale = weight.abs().amax(1).float() / 448
            dx = rounded(dy.float() * scale, True) / scale.double() @ rounded(weight, True)
        else:
            dx = rounded(dy, False) @ rounded(weight, False)
        dy, x = dy.flatten(0, -2).t(), x.flatten(0, -2).t()
        if ctx.rounds_grads:
            dy, x = rounded(dy, by_rows), rounded(x, by_rows)
        return dx, None, None, *(dy @ x.t()).split(ctx.sizes)


def emulate_by_hand(model, recipe, packs=PACKS) -> None:
    by_rows, rounds_grads = recipe != "tensorwise", recipe in ("rowwise", "tensorwise")
    for block in model.model.layers:
        for names in packs:
            part = block.mlp if hasattr(block.mlp, names[0]) else block.self_attn
            pack = [getattr(part, name) for name in names]

            def first(x, pack=pack):
                outputs = RoundedProducts.apply(x, by_rows, rounds_grads, *(linear.weight for linear in pack))
                for linear, y in zip(pack, outputs, strict=True):
                    linear.found = y if linear.bias is None else y + linear.bias
                return pack[0].found

            pack[0].forward = first
            for linear in pack[1:]:
                linear.forward = lambda x, linear=linear: linear.found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_every_gradient_are_the_scheme_and_nothing_else(family, recipe):
    plain = full_model(family)
    emulate_by_hand(plain, recipe)
    assert_same_step(plain, fp8_model(family, recipe), 1e-10, **IDS)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("copies", [0, 2])
def test_recomputing_and_copies_change_nothing(recompute, copies):
    fast = fp8_model("qwen3", recompute=recompute, copies=copies)
    assert_same_step(fp8_model("qwen3"), fast, 1e-12, **IDS)


@pytest.mark.parametrize("frozen", ["layers.0 embed_tokens", "q_proj up_proj", "mlp"])
def test_whatever_is_frozen(frozen):
    plain = full_model("qwen2", frozen=frozen)
    emulate_by_hand(plain, "rowwise")
    assert_same_step(plain, fp8_model("qwen2", "rowwise", frozen=frozen), 1e-10, **IDS)


@pytest.mark.parametrize(("recipe", "least"), [(None, 0.993), ("rowwise", 0.993), ("tensorwise", 0.99)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_stay_near_the_exact_ones(family, recipe, least):
    exact, found = full_model(family), fp8_model(family, recipe)
    grads = []
    for model in (exact, found):
        model(**IDS, use_cache=False).logits.square().mean().backward()
        grads.append({name: p.grad.flatten() for name, p in model.named_parameters()})
    cosines = {n: float(torch.nn.functional.cosine_similarity(g, grads[1][n], dim=0)) for n, g in grads[0].items()}
    assert min(cosines.values()) > 0.96, cosines
    one, other = (torch.cat(list(part.values())) for part in grads)
    assert least < float(torch.nn.functional.cosine_similarity(one, other, dim=0)) < 0.99999


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_linear_layers_of_plain_models(family, recipe):
    plain = full_model(family)
    emulate_by_hand(plain, recipe, [(name,) for names in PACKS for name in names])
    found = fp8_model(family, recipe, wish="off")
    assert sum(isinstance(module, Fp8TrainedLinear) for module in found.modules()) == 14
    assert_same_step(plain, found, 1e-10, **IDS)


@pytest.mark.parametrize("wish", ["on", "off"])
@pytest.mark.parametrize("copies", [0, 1])
def test_weights_are_rounded_when_an_optimizer_has_stepped(wish, copies):
    fast = fp8_model("llama", dtype=torch.float32, wish=wish, copies=copies)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    for _ in range(2):
        fast(**IDS, use_cache=False).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found = fast(**IDS, use_cache=False).logits
        fresh = fp8_model("llama", dtype=torch.float32, wish=wish, copies=copies)
        fresh.load_state_dict(fast.state_dict())
        assert torch.equal(found, fresh(**IDS, use_cache=False).logits)


def store_of(linear: torch.nn.Linear, **scheme: object) -> Fp8TrainedStore:
    return Fp8TrainedStore.under(Fp8Scheme(emulate=True, **scheme))([Slot("weight", linear, None)])


def test_micro_batches_share_one_rounding():
    linear, x = torch.nn.Linear(32, 16, bias=False), torch.randn(3, 32)
    store = store_of(linear, copies=1)
    store.prepare()
    before = store.forward(x, None)
    linear.weight.data.mul_(2)  # leaves no trace: what is seen next is what was rounded
    store.prepare()
    assert torch.equal(store.forward(x, None), before)
    with torch.no_grad():
        linear.weight.mul_(2)
    store.prepare()
    assert torch.equal(store.forward(x, None), 4 * before)
    linear.weight.data.mul_(2)
    store.forget_adapters()  # as evaluation does
    store.prepare()
    assert torch.equal(store.forward(x, None), 8 * before)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("copies", [0, 1, 2])
def test_both_directions_multiply_by_the_same_bytes(copies, by_rows):
    class OnAGpu(Fp8TrainedStore):  # takes the ways that bytes go there; the products are not asked for
        _is_plain = False

    linear = torch.nn.Linear(48, 32, bias=False)
    store = OnAGpu.under(Fp8Scheme(by_rows, copies))([Slot("weight", linear, None)])
    for _ in range(2):
        store.prepare()
        forward = store.forward_bytes().double()
        wanted = rounded(linear.weight.detach(), by_rows)
        torch.testing.assert_close(forward * store._scale_N1.double(), wanted, rtol=1e-12, atol=0)
        backward = store.backward_bytes()
        assert backward.is_contiguous()
        assert torch.equal(backward.double(), forward.t())
        with torch.no_grad():
            linear.weight.mul_(torch.rand(32, 1) + 0.5)


def test_bytes_round_again_after_moves_and_copies():
    fast = fp8_model("qwen2", dtype=torch.float32)
    before = fast(**IDS, use_cache=False).logits.detach()
    twin = copy.deepcopy(fast).double().float()
    assert torch.equal(twin(**IDS, use_cache=False).logits, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(fast(**IDS, use_cache=False).logits, before)
    assert not twin(**IDS, use_cache=False).logits.any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_micro_batches_add_up(recipe):
    fast = fp8_model("qwen2", recipe)
    sums: dict[str, torch.Tensor] = {}
    for seed in range(3):
        fast.zero_grad()
        fast(input_ids=tokens(2, 5, seed), use_cache=False).logits.square().sum().backward()
        for name, parameter in fast.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad
    fast.zero_grad()
    for seed in range(3):
        fast(input_ids=tokens(2, 5, seed), use_cache=False).logits.square().sum().backward()
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("wish", ["on", "off"])
def test_files_hold_the_weights_that_learn(tmp_path, wish):
    plain, fast = full_model("qwen2", torch.float32), fp8_model("qwen2", dtype=torch.float32, wish=wish)
    fast(**IDS, use_cache=False)
    for model, name in ((plain, "plain"), (fast, "fast")):
        model.save_pretrained(tmp_path / name)
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "fast" / path.name).read_bytes(), path.name


def test_what_stays_as_it_is():
    plan = {"filter_fqns": ("k_proj",), "keeps_first_last_down": True}
    fast = fp8_model("llama", plan=plan)
    kinds = [[type(store) is TrainedStore for store in layer.fast_core.stores] for layer in fast.model.layers]
    assert kinds == [[True, False, False, True]] * 2  # qkv, o, gate and up, down
    plain = fp8_model("llama", plan=plan, wish="off")
    names = {name for name, module in plain.named_modules() if isinstance(module, Fp8TrainedLinear)}
    wanted = {"self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"}
    assert names == {f"model.layers.{index}.{name}" for index in (0, 1) for name in wanted}
    for words, message in (
        (("lm_haed",), "`fp8.filter_fqns: lm_haed` is part of no layer's name. Did you mean `lm_head`?"),
        (("proj",), "`fp8.enabled: true` leaves no matrix in 8 bits (fp8.filter_fqns). Set it to false."),
    ):
        with pytest.raises(UserError) as refused:
            fp8_model("llama", plan={"filter_fqns": words}, wish="off")
        assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("request_", "other"),
    [({"autocast_dtype": "bfloat16"}, "`distributed.autocast_dtype`"), ({"is_compiled": True}, "compiled layers")],
)
def test_what_excludes_it(request_, other):
    plan = Fp8Plan(Fp8Scheme(emulate=True), is_trained=True)
    with pytest.raises(UserError) as refused:
        use_fast_layers(full_model("llama", torch.float32), FastRequest(fp8=plan, **request_))
    assert str(refused.value) == f"`fp8.enabled: true` and {other} exclude each other. Leave one of them out."


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_no_recipe_loses_more_than_torchaos_of_that_name(recipe):
    float8 = pytest.importorskip("torchao.float8")
    config = replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    scheme = choose_scheme(FP8Config(True, recipe, emulate=True), torch.device("cpu"), True)
    torch.manual_seed(0)
    linear, x, dy = torch.nn.Linear(128, 96).bfloat16(), *(torch.randn(256, n).bfloat16() for n in (128, 96))
    results = []
    for kind in ("exact", "torchao", "ours"):
        model = torch.nn.Sequential(copy.deepcopy(linear))
        if kind == "torchao":
            model = float8.convert_to_float8_training(model, config=config)
        if kind == "ours":
            Fp8TrainedLinear.attach(model[0], Fp8TrainedStore.under(scheme))
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(dy)
        results.append([t.double() for t in (y.detach(), leaf.grad, model[0].weight.grad)])
    exact, theirs, ours = results
    for name, wanted, a, b in zip(("output", "input", "weight"), exact, theirs, ours, strict=True):
        errors = [float((found - wanted).norm() / wanted.norm()) for found in (a, b)]
        assert errors[1] <= 1.1 * errors[0] < 0.1, f"{name}: torchao {errors[0]:.4f}, ours {errors[1]:.4f}"


def test_a_weight_that_changed_before_its_gradient_is_refused():
    linear = torch.nn.Linear(32, 16)
    Fp8TrainedLinear.attach(linear, Fp8TrainedStore.under(Fp8Scheme(emulate=True)))
    y = linear(torch.randn(3, 32))
    with torch.no_grad():
        linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
