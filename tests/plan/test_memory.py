"""The planner's formulae against the layers themselves, and against what a GPU measured."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
import transformers
from support.autograd_bytes import bytes_kept
from support.fast_models import adapters_of, fast_model, trained_model
from support.ledger import Ledger

from nemo_automodel._transformers import outline
from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components.plan import memory, speed
from nemo_automodel.components.plan.machines import GIB, MACHINES
from nemo_automodel.components.plan.workload import Workload
from nemo_automodel.shared.memory_policies import EXACT_POLICIES, RECOMPUTE_POLICIES

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
LORA = PeftConfig(target_modules=["*_proj"], dim=16, alpha=32)


@pytest.fixture(scope="module")
def llama_8b():
    return outline.from_config(transformers.LlamaConfig(**LLAMA_8B), peft_config=LORA)


def load_of(found: outline.Outline, rows: int = 2, seq_len: int = 4096, **more: object) -> Workload:
    return Workload(outline.shape_of(found, "model"), rows, seq_len, 16, weight_bytes=found.dtype.itemsize, **more)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("recompute", RECOMPUTE_POLICIES)
@pytest.mark.parametrize("is_full", [False, True])
def test_a_fast_layer_keeps_what_the_formula_says(family, recompute, is_full):
    """Counted at the door of the allocator, autograd's memory of attention included."""
    peft = None if is_full else adapters_of(dtype="float32")
    model = (
        trained_model(family, torch.float32, recompute)
        if peft is None
        else fast_model(family, peft, torch.float32, recompute)
    )
    layer, num_tokens = model.model.layers[0], 2 * 24
    tables = model.model.rotary_emb(torch.zeros(1), torch.arange(24)[None])
    x = torch.randn(2, 24, model.config.hidden_size)
    layer(x.clone().requires_grad_(), position_embeddings=tables).sum().backward()  # packs weights
    with Ledger() as ledger:
        stream = x.clone().requires_grad_()
        out = layer(stream, position_embeddings=tables)
        del stream
        gc.collect()
        kept = ledger.now - out.untyped_storage().nbytes()
    found = outline.from_config(model.config, peft_config=peft, torch_dtype="float32", fast_layers="on")
    assert found.why_plain is None
    load = load_of(found, 2, 24, recompute=recompute, is_full=is_full)
    if recompute == "full_offload":  # the newest input is still there, and on a CPU its copy too
        assert kept == 2 * memory.offloaded(load) / load.shape.num_layers
    else:
        assert kept / num_tokens == memory.fast_kept(load, recompute)


def test_plain_layers_keep_what_autograd_keeps():
    config = transformers.Olmo2Config(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="sdpa", attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    kept = bytes_kept(model, 2, 96)
    found = outline.run_plain(outline.from_config(config, torch_dtype="float32"), 2, 96, "none")
    # the ledger also sees what Python still holds, such as the last hidden state
    assert found.kept == pytest.approx(kept, rel=0.07)
    assert found.written > 2 * found.kept


def test_an_outline_counts_every_weight(llama_8b):
    shape = outline.shape_of(llama_8b, "8B")
    assert shape.num_weights == 8_030_261_248
    assert shape.num_adapter_weights == 41_943_040
    assert llama_8b.why_plain is None


def test_a_tied_head_is_counted_once():
    config = transformers.LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": 2, "tie_word_embeddings": True})
    shape = outline.shape_of(outline.from_config(config), "tied")
    assert shape.num_head == 0
    assert shape.num_weights == sum(p.numel() for p in outline.from_config(config).model.parameters())


@pytest.mark.parametrize(("case", "store"), [("fast", "dense"), ("fp8", "fp8")])
def test_the_plan_meets_the_h100(llama_8b, case, store):
    measured = json.loads((RESULTS / "fast_core_h100.json").read_text())["steps"][case]
    load = load_of(llama_8b, store=store)
    assert memory.peak(load).total / GIB == pytest.approx(measured["peak_gib"], rel=0.02)
    assert speed.estimate(load, MACHINES["h100"]).tokens_per_s == pytest.approx(measured["tokens_per_s"], rel=0.1)


def test_the_plan_meets_the_h100_on_plain_layers(llama_8b):
    measured = json.loads((RESULTS / "fast_core_h100.json").read_text())["steps"]["plain"]
    load = load_of(llama_8b, plain=outline.run_plain(llama_8b, 2, 4096, "none"))
    assert memory.peak(load).total / GIB == pytest.approx(measured["peak_gib"], rel=0.05)
    assert speed.estimate(load, MACHINES["h100"]).tokens_per_s == pytest.approx(measured["tokens_per_s"], rel=0.1)


def test_recomputing_saves_memory_and_costs_time(llama_8b):
    h100 = MACHINES["h100"]
    loads = [load_of(llama_8b, recompute=policy) for policy in EXACT_POLICIES]
    totals = [memory.peak(load).total for load in loads]
    rates = [speed.estimate(load, h100).tokens_per_s for load in loads]
    assert totals == sorted(totals, reverse=True)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == rates[-2], "copies to the host are in the shadow of the layers"
    plain = [outline.run_plain(llama_8b, 1, 2048, policy) for policy in ("none", "full")]
    assert plain[1].kept < plain[0].kept / 10


def test_copies_in_8_bits_of_weights_that_learn_are_counted_beside_them():
    found = outline.from_config(transformers.LlamaConfig(**LLAMA_8B))
    load = load_of(found, is_full=True, trainable_bytes=2, state_bytes=4, rows=1)
    num_linear = 6_979_321_856
    dense = memory.peak(load)
    fp8 = [memory.peak(load.changed(store="fp8", fp8_copies=copies)) for copies in (0, 1, 2)]
    for copies, found_memory in enumerate(fp8):
        scales = 4 * 32 * (6144 + 4096 + 2 * 4096 + 28672 + 4096 + 4096 + 14336)
        assert found_memory.weights - dense.weights == pytest.approx(copies * num_linear + scales, rel=1e-3)
        assert found_memory.optimizer == dense.optimizer
    h100 = MACHINES["h100"]
    rates = [speed.estimate(load.changed(store="fp8", fp8_copies=copies), h100).tokens_per_s for copies in (0, 1, 2)]
    assert speed.estimate(load, h100).tokens_per_s < rates[0] < rates[1] < rates[2]
    with_grads = load.changed(store="fp8", fp8_weight_grads=True)
    assert speed.estimate(with_grads, h100).products < speed.estimate(load.changed(store="fp8"), h100).products
    few = {"store": "fp8", "labelled_share": 0.01}  # so that the layers' peak is the higher one
    working = [memory.peak(load.changed(fp8_weight_grads=grads, **few)).working for grads in (False, True)]
    assert working[1] - working[0] == 28672 * 4096 * 2 + (28672 + 4096) * 4096  # a product, and its operands again


def test_full_training_of_an_8b_fits_an_80_gb_card_with_all_state_in_16_bits():
    """8 bytes a weight are 59.8 GiB; 1 × 4096 tokens keep 11.5, and the logits once are 1.0."""
    found = outline.from_config(transformers.LlamaConfig(**LLAMA_8B))
    assert found.why_plain is None
    load = load_of(found, 1, 4096, is_full=True, trainable_bytes=2, state_bytes=4)
    several = memory.peak(load)
    assert several.total / GIB == pytest.approx(59.83 + 11.52 + 1.0, abs=0.3)
    assert several.total < MACHINES["h100"].usable_bytes
    # gradients come while activations go, and are more
    alone = memory.peak(load.changed(grad_accum=1))
    assert alone.total / GIB == pytest.approx(59.83, abs=0.5)
    released = memory.peak(load.changed(grad_accum=1, steps_in_backward=True))
    assert released.trainable / GIB == pytest.approx(0.98, abs=0.01), "the embedding's, which is larger than a layer's"
    assert released.total / GIB == pytest.approx(3 * 14.96 + 11.52 + 1.0, abs=0.3)
    plain = load.changed(plain=outline.run_plain(found, 1, 4096, "none"))
    assert memory.peak(plain).total > MACHINES["h100"].usable_bytes
