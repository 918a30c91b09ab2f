"""Full training on the fast layers against Transformers' own, number by number in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from support.fast_models import assert_same_step, full_model, tokens, trained_model
from support.packed import make_documents, pack, pad

from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel.components.fast.embedding import sums_by_token
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
POLICIES = ["none", "selective", "full"]
TOLERANCE = 1e-11


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, expected: dict[str, torch.Tensor], tolerance: float = TOLERANCE * 100) -> None:
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        error = (found[name] - grad).norm() / grad.norm().clamp_min(1e-6)
        assert error <= tolerance, f"{name} differs by {error:.1e} of its norm"


@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_under_every_policy(family, recompute):
    ties = recompute != "none"
    plain = full_model(family, tie_word_embeddings=ties)
    fast = trained_model(family, recompute=recompute, tie_word_embeddings=ties)
    assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(2, 7))


@pytest.mark.parametrize(
    "frozen",
    [
        "embed_tokens",
        "layers.0",
        "layers.1 embed_tokens",
        "norm",
        "q_proj.weight up_proj",
        "k_proj v_proj o_proj embed_tokens",
        "mlp layers.0.self_attn layers.0.input_layernorm embed_tokens",
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens",
        "self_attn layernorm embed_tokens layers.0",
        "layers.0 embed_tokens self_attn input_layernorm mlp",
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_whatever_is_frozen(family, frozen):
    plain, fast = full_model(family, frozen=frozen), trained_model(family, frozen=frozen)
    assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(2, 7))
    assert gradients(fast).keys() == gradients(plain).keys()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_micro_batches_add_up(ties, set_to_none):
    """Lengths on both sides of the hidden size take both ways of the loss."""
    batches = [pad(rows) for rows in make_documents([[9, 4, 6], [30, 30, 20], [3]])]
    plain, fast = (make("qwen2", tie_word_embeddings=ties) for make in (full_model, trained_model))
    one, other = LabelledForward(plain, joins_frozen_head=False), LabelledForward(fast)
    for _ in range(2):
        losses = []
        for forward in (one, other):
            forward.model.zero_grad(set_to_none=set_to_none)
            losses.append([forward.loss(batch, MaskedCrossEntropy(), 99) for batch in batches])
            for loss in losses[-1]:
                loss.backward()
        torch.testing.assert_close(torch.stack(losses[1]), torch.stack(losses[0]), rtol=1e-10, atol=0)
        assert_same_gradients(fast, gradients(plain))


@pytest.mark.parametrize(("family", "recompute"), list(zip(FAMILIES, [*POLICIES, "none"], strict=True)))
def test_packed_rows_equal_lonely_documents(family, recompute):
    rows = make_documents([[5, 9, 4], [12, 3]])
    fast, plain = trained_model(family, recompute=recompute), full_model(family)
    loss = LabelledForward(fast).loss(pack(rows, 20), MaskedCrossEntropy(), 23)
    loss.backward()
    forward, total = LabelledForward(plain), torch.zeros((), dtype=torch.float64)
    for document in (document for row in rows for document in row):
        part = forward.loss(pad([document]), MaskedCrossEntropy(), 23)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-10, atol=0)
    assert_same_gradients(fast, gradients(plain))


def test_an_incoming_gradient_scales_all():
    plain, fast = full_model("llama"), trained_model("llama")
    for batch in (pad(make_documents([[9, 4]])[0]), pad(make_documents([[40, 30]])[0])):
        for model in (plain, fast):
            (
                LabelledForward(model, joins_frozen_head=model is fast).loss(batch, MaskedCrossEntropy(), 9) * 3
            ).backward()
    assert_same_gradients(fast, gradients(plain))


def test_gradients_that_somebody_exchanged_are_kept():
    plain, fast = full_model("qwen2"), trained_model("qwen2")
    for model in (plain, fast):
        model(input_ids=tokens(2, 5), use_cache=False).logits.square().sum().backward()
        attention = model.model.layers[0].self_attn
        attention.k_proj.weight.grad = attention.k_proj.weight.grad.clone() * 2
        attention.q_proj.bias.grad = None
        model.model.layers[1].mlp.up_proj.weight.grad = None
        model(input_ids=tokens(2, 5, seed=1), use_cache=False).logits.square().sum().backward()
    assert_same_gradients(fast, gradients(plain))


def test_gradients_of_a_group_are_one_matrix_and_gone_after_the_step():
    fast = trained_model("llama")
    fast(input_ids=tokens(2, 5), use_cache=False).logits.sum().backward()
    attention = fast.model.layers[0].self_attn
    storages = {p.weight.grad.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj)}
    assert len(storages) == 1
    fast.zero_grad()
    assert all(p.grad is None for p in fast.parameters())


@pytest.mark.parametrize("keywords", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_optimizers_step_the_packed_weights(keywords):
    plain, fast = full_model("qwen3", torch.float32), trained_model("qwen3", torch.float32)
    for model in (plain, fast):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **keywords)
        for seed in range(4):
            model(input_ids=tokens(2, 6, seed), use_cache=False).logits.square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    for (name, expected), found in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5, msg=name)


def test_names_and_files(tmp_path):
    plain, fast = full_model("qwen2", torch.float32), trained_model("qwen2", torch.float32)
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for model, name in ((plain, "plain"), (fast, "fast")):
        model.save_pretrained(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fast").iterdir())
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes(), name


def test_other_memory_and_copies():
    plain, fast = full_model("qwen2", torch.float32), trained_model("qwen2", torch.float32)
    fast(input_ids=tokens(2, 6), use_cache=False)
    twin = copy.deepcopy(fast)
    state = {name: value * 1.1 for name, value in plain.state_dict().items()}
    plain.load_state_dict(state)
    for model, assign in ((fast, True), (twin, False)):
        model.load_state_dict(copy.deepcopy(state), assign=assign)
        model.requires_grad_(True)
        assert_same_step(plain, model, 2e-5, input_ids=tokens(2, 6))


def test_rows_of_an_embedding_are_summed_by_token():
    ids = torch.tensor([7, 3, 7, 0, 3, 3])
    grad = torch.randn(6, 4, dtype=torch.float64)
    tokens_found, sums = sums_by_token(ids, grad, 8)
    assert tokens_found[:3].tolist() == [0, 3, 7]
    assert not sums[3:].any()
    wanted = torch.zeros(8, 4, dtype=torch.float64).index_add_(0, ids, grad)
    torch.testing.assert_close(torch.zeros_like(wanted).index_add_(0, tokens_found, sums), wanted)


@pytest.mark.parametrize("ties", [False, True])
def test_padding_has_no_gradient_of_its_own(ties):
    plain, fast = (make("llama", tie_word_embeddings=ties) for make in (full_model, trained_model))
    assert fast.model.embed_tokens.padding_idx == 3
    ids = torch.tensor([[5, 6, 5, 3, 3], [3, 3, 8, 5, 9]])
    for _ in range(2):
        for model in (plain, fast):
            model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    assert_same_gradients(fast, gradients(plain))
