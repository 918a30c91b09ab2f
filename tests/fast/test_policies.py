"""What fast layers keep for the backward pass changes memory, not numbers."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from support.fast_models import (
    PROJECTIONS,
    adapters_of,
    assert_same_step,
    fast_model,
    full_model,
    plain_model,
    tokens,
    trained_model,
)
from support.ledger import Ledger
from support.packed import make_documents, pack, pad

from nemo_automodel._transformers import frozen_head
from nemo_automodel._transformers.fast_layers import FastRequest, use_fast_layers
from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel._transformers.fp8_base import Fp8Plan
from nemo_automodel.components.fast import attention
from nemo_automodel.components.fast.fp8_store import Fp8Scheme
from nemo_automodel.components.fast.policies import POLICIES, Tiles
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.shared import memory_policies
from nemo_automodel.shared.memory_policies import RECOMPUTE_POLICIES

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
EXACT = [name for name in RECOMPUTE_POLICIES if name != "fp8_gate_up"]
NEW = ["sac2", "sac1", "full_offload"]
TOLERANCE = 1e-11


def one_step(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum().backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        error = (found[name] - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error <= tolerance, f"{name} differs by {error:.1e} of its norm"


def test_every_name_is_a_policy():
    assert tuple(POLICIES) == RECOMPUTE_POLICIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", NEW)
def test_adapters_of_every_family(family, recompute):
    for number, targets in enumerate((PROJECTIONS, ["q_proj", "v_proj"], ["o_proj"], ["k_proj", "up_proj"])):
        plain = plain_model(family, adapters_of(targets))
        fast = fast_model(family, adapters_of(targets), recompute=recompute, mlp_tile_tokens=[None, 4, 14, 5][number])
        assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(2, 7))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", NEW)
def test_all_weights_of_every_family(family, recompute):
    tile = {"sac2": None, "sac1": 4, "full_offload": 5}[recompute]
    assert_same_step(
        full_model(family), trained_model(family, recompute=recompute, mlp_tile_tokens=tile), TOLERANCE,
        input_ids=tokens(2, 7),
    )  # fmt: skip


@pytest.mark.parametrize("frozen", ["mlp", "down_proj", "gate_proj up_proj post_attention", "self_attn layers.0 norm"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_tiles_of_partly_frozen_layers(frozen, recompute):
    plain = full_model("qwen3", frozen=frozen)
    fast = trained_model("qwen3", frozen=frozen, recompute=recompute, mlp_tile_tokens=4)
    assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(2, 7))


@pytest.mark.parametrize("recompute", EXACT[1:])
@pytest.mark.parametrize("is_full", [False, True])
def test_nothing_changes_by_a_bit(recompute, is_full):
    """In fp32: the same sums in the same order, whatever is made again."""
    found = []
    for policy in ("none", recompute):
        torch.manual_seed(1)
        peft = adapters_of(dtype="float32", dropout=0.2)
        model = (
            trained_model("qwen3", torch.float32, policy)
            if is_full
            else fast_model("qwen3", peft, torch.float32, policy)
        )
        torch.manual_seed(2)
        found.append(one_step(model, tokens(2, 9)))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


@pytest.mark.parametrize("recompute", RECOMPUTE_POLICIES)
@pytest.mark.parametrize("position", ["pre", "post"])
def test_tiles_are_under_the_masks_of_the_whole(recompute, position):
    """With the same seeds; the tile of 14 tokens is all of them, and 3 do not divide them."""
    peft, found = adapters_of(dropout=0.3, dropout_position=position), []
    for tile in (14, 3):
        model = fast_model("qwen2", peft, recompute=recompute, mlp_tile_tokens=tile)
        torch.manual_seed(5)
        found.append(one_step(model, tokens(2, 7)))
    assert_close(found[1], found[0], TOLERANCE)


@pytest.mark.parametrize("recompute", ["none", "sac1", "full"])
def test_tiles_and_dora(recompute):
    peft = adapters_of(use_dora=True)
    plain, fast = plain_model("llama", peft), fast_model("llama", peft, recompute=recompute, mlp_tile_tokens=4)
    assert_same_step(plain, fast, 1e-10, input_ids=tokens(2, 7))


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize(("family", "recompute"), [("qwen2", "sac1"), ("qwen3", "full_offload"), ("qwen3", "sac1")])
def test_packed_rows_equal_lonely_documents(family, recompute, is_full):
    rows = make_documents([[5, 9, 4], [12, 3]])
    fast = (
        trained_model(family, recompute=recompute, mlp_tile_tokens=16)
        if is_full
        else fast_model(family, adapters_of(), recompute=recompute, mlp_tile_tokens=16)
    )
    plain = full_model(family) if is_full else plain_model(family, adapters_of())
    LabelledForward(fast).loss(pack(rows, 20), MaskedCrossEntropy(), 23).backward()
    forward = LabelledForward(plain, joins_frozen_head=False)
    for document in (document for row in rows for document in row):
        forward.loss(pad([document]), MaskedCrossEntropy(), 23).backward()
    wanted, found = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, fast))
    assert_close(found, wanted, 1e-9)


@pytest.mark.parametrize("is_full", [False, True])
def test_micro_batches_add_up(is_full):
    """Two forward passes before two backward passes: inputs of both wait on the host at once."""
    found = []
    for recompute in ("none", "full_offload"):
        model = (
            trained_model("llama", recompute=recompute)
            if is_full
            else fast_model("llama", adapters_of(), recompute=recompute)
        )
        losses = [model(input_ids=tokens(2, n), use_cache=False).logits.square().sum() for n in (5, 8)]
        for loss in reversed(losses) if recompute == "none" else losses:
            loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_close(found[1], found[0], TOLERANCE)


# --- gate and up in 8 bits -------------------------------------------------------------------------------------------


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() * other.double()).sum() / (one.double().norm() * other.double().norm()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("tile", [None, 32])
def test_gate_and_up_in_8_bits(family, is_full, tile):
    """Noise of 2.6 % in gate and up: no output changes, and every gradient keeps its direction."""
    ids, sizes = tokens(4, 32), {"intermediate_size": 512}
    if is_full:
        plain, fast = full_model(family, **sizes), trained_model(family, torch.float32, "fp8_gate_up", tile, **sizes)
        usual = trained_model(family, torch.float32, "none", tile, **sizes)
    else:
        peft, fp32 = adapters_of(), adapters_of(dtype="float32")
        plain, fast = (
            plain_model(family, peft, **sizes),
            fast_model(family, fp32, torch.float32, "fp8_gate_up", tile, **sizes),
        )
        usual = fast_model(family, fp32, torch.float32, "none", tile, **sizes)
    plain.load_state_dict(fast.state_dict())
    wanted, found, exact = (one_step(model, ids) for model in (plain, fast, usual))
    assert torch.equal(found["logits"], exact["logits"])
    values = {name: cosine(found[name], wanted[name]) for name in wanted if name != "logits"}
    assert min(values.values()) > 0.998, values
    assert min(values.values()) < 0.999999, "nothing was rounded"


def test_only_gradients_behind_gate_and_up_are_noisy():
    peft, ids = adapters_of(dtype="float32"), tokens(2, 16)
    exact, noisy = (one_step(fast_model("llama", peft, torch.float32, p), ids) for p in ("none", "fp8_gate_up"))
    last = "model.layers.1.mlp.down_proj.lora_B.weight"  # s·dy·low, and low is of the forward pass
    assert torch.equal(noisy[last], exact[last])
    assert not torch.equal(noisy[last.replace("lora_B", "lora_A")], exact[last.replace("lora_B", "lora_A")])


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["full", "full_offload"])
def test_tiles_bound_what_a_long_row_needs(recompute):
    """No product of an MLP is there for more than a tile, forward or back."""
    seq_len, sizes = 512, {"intermediate_size": 1024, "max_position_embeddings": 1024}
    found = {}
    for tile in (None, 64):
        peft = adapters_of(dtype="float32")
        model = fast_model("llama", peft, torch.float32, recompute, tile, **sizes)
        one_step(model, tokens(1, 8))  # packs the weights
        with Ledger() as ledger:
            hidden = model.model(input_ids=tokens(1, seq_len), use_cache=False).last_hidden_state
            hidden.sum().backward()
        found[tile] = ledger
    token_bytes = 4 * seq_len * 1024  # one of h, gate and up
    assert found[None].largest >= 2 * token_bytes
    assert found[64].largest < token_bytes
    assert found[None].peak - found[64].peak > 3 * token_bytes  # plain operations hold more than kernels do


@pytest.mark.parametrize("has_mask", [True, False])
def test_nothing_of_a_long_row_is_as_wide_as_the_row_or_the_vocabulary(has_mask, monkeypatch):
    """Masks, scores, logits, rotary tables: whole micro-batch of one row, from token ids to gradients."""
    seq_len = 4096
    monkeypatch.setattr(frozen_head, "default_chunk_rows", lambda _: 256)  # a CPU's would hold all of so few
    model = fast_model("llama", adapters_of(dtype="float32"), torch.float32, "full_offload", 512)
    vocab_size, forward = model.config.vocab_size, LabelledForward(model)
    batch = {"input_ids": tokens(1, seq_len), "labels": tokens(1, seq_len, seed=1)}
    if has_mask:
        batch["attention_mask"] = torch.ones(1, seq_len, dtype=torch.int64)
    forward.loss({"input_ids": tokens(1, 8), "labels": tokens(1, 8)}, MaskedCrossEntropy(), 8).backward()
    with Ledger() as ledger:
        forward.loss(batch, MaskedCrossEntropy(), seq_len).backward()
    assert ledger.largest < 4 * seq_len * vocab_size / 3
    assert ledger.largest < seq_len * seq_len / 4  # a mask has a byte for each pair


def test_a_graph_that_is_thrown_away_is_freed():
    """Autograd's memory must not hold what holds it: nothing collects such a ring."""
    gc.disable()
    try:
        x = [torch.randn(1, 2, 5, 4) for _ in range(3)]
        graph = attention.AttentionGraph(attention.causal_attention, x, 0.5, keeps=True, forgets=x)
        out = weakref.ref(graph.out_BHSE)
        del graph
        assert out() is None
    finally:
        gc.enable()


def test_a_long_row_is_divided_by_itself_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(memory_policies, "LONG_TOKENS", 10)
    monkeypatch.setattr(memory_policies, "TILE_TOKENS", 6)
    tiles, full = Tiles(), "full"
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        assert tiles.of(10, full) == [slice(0, 10)]
        assert not caplog.messages
        for _ in range(2):
            assert tiles.of(14, full) == [slice(0, 6), slice(6, 12), slice(12, 14)]
    assert caplog.messages == [
        "A micro-batch has 14 tokens: the MLP works on tiles of 6. `distributed.mlp_tile_tokens` sets another size."
    ]
    assert tiles.of(14, "sac1") == [slice(0, 14)]
    assert Tiles(20).of(14, full) == [slice(0, 14)]
    assert_same_step(
        plain_model("llama", adapters_of()),
        fast_model("llama", adapters_of(), recompute="full_offload"), TOLERANCE, input_ids=tokens(2, 7),
    )  # fmt: skip


def test_copies_of_a_model_have_copies_of_their_own():
    fast = fast_model("llama", adapters_of(), recompute="full_offload")
    first = one_step(fast, tokens(1, 6))
    twin = copy.deepcopy(fast)
    twin.zero_grad()
    assert_close(one_step(twin, tokens(1, 6)), first, 0)
    hosts = {layer.fast_core.memory.host for layer in twin.model.layers}
    assert len(hosts) == 1
    assert hosts.isdisjoint({layer.fast_core.memory.host for layer in fast.model.layers})


@pytest.mark.parametrize("recompute", ["fp8_gate_up", "sac1", "full_offload"])
def test_weights_in_8_bits(recompute):
    peft, found = adapters_of(dtype="float32"), []
    for policy in ("none", recompute):
        model = plain_model("qwen3", peft, torch.float32)
        request = FastRequest("on", peft, policy, fp8=Fp8Plan(Fp8Scheme(emulate=True)))
        assert use_fast_layers(model, request)
        found.append(one_step(model, tokens(2, 7)))
    exact, other = found
    for name, expected in exact.items():
        if recompute == "fp8_gate_up":
            assert cosine(other[name], expected) > 0.995, name  # inputs of the products round the other way
        else:
            assert torch.equal(other[name], expected), name
