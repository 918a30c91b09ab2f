"""The path from a batch to a loss: packed rows equal unpacked ones, and only labelled rows reach the head."""

from __future__ import annotations

import pytest
import torch
from support.packed import make_documents, make_model, pack, pad, shifted_labels

from nemo_automodel._transformers import forward, packing_masks
from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel.components._peft.lora import PeftConfig, apply_lora
from nemo_automodel.components.loss.chunked_ce import ChunkedCrossEntropy
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.kernels.attention import packed_mask
from nemo_automodel.shared.errors import UserError

# documents longer than every window and chunk (8, 7, 6), a row that is full, rows with different numbers of documents
LENGTHS = [[13, 11, 5], [32], [3, 21]]
SEQ_LEN = 32
FAMILIES = [
    "llama", "qwen2", "qwen2_window", "qwen3", "mistral_window", "gemma2", "gemma3", "gpt_oss", "phi3", "llama4",
]  # fmt: skip
EAGER_ONLY = ("gemma2", "gpt_oss")


def losses_and_gradients(model, batches, num_label_tokens):
    model.zero_grad()
    run = LabelledForward(model)
    total = sum(run.loss(batch, MaskedCrossEntropy(), num_label_tokens) for batch in batches)
    total.backward()
    return total.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(
            found[1][name], grad, rtol=1e-3, atol=1e-5 * scale + 1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_their_documents_alone(family, attention, monkeypatch):
    if family in EAGER_ONLY:
        attention = "eager"
    model = make_model(family, attention)
    rows = make_documents(LENGTHS)
    documents = [d for row in rows for d in row]
    num_labels = sum(int((shifted_labels(d) != -100).sum()) for d in documents)
    # alone: no mask and no padding in it at all
    alone = [{"input_ids": d.unsqueeze(0), "labels": shifted_labels(d).unsqueeze(0)} for d in documents]
    expected = losses_and_gradients(model, alone, num_labels)
    assert_same(losses_and_gradients(model, [pad(documents)], num_labels), expected)
    assert_same(losses_and_gradients(model, [pack(rows, SEQ_LEN)], num_labels), expected)
    assert_same(losses_and_gradients(model, [pack([row], SEQ_LEN) for row in rows], num_labels), expected)

    # the comparison notices a mask that only keeps the future out
    monkeypatch.setattr(forward, "build_packed_masks", lambda _, batch, __: torch.ones_like(batch["input_ids"]))
    leaky, _ = losses_and_gradients(model, [pack(rows, SEQ_LEN)], num_labels)
    assert abs(leaky - expected[0]) > 1e-3 * expected[0]


def test_a_sliding_window_left_out_is_noticed(monkeypatch):
    model = make_model("mistral_window", "sdpa")
    rows = make_documents(LENGTHS)
    right, _ = losses_and_gradients(model, [pack(rows, SEQ_LEN)], 60)
    monkeypatch.setattr(packing_masks, "packed_mask", lambda layout, **_: packed_mask(layout))
    wrong, _ = losses_and_gradients(model, [pack(rows, SEQ_LEN)], 60)
    assert abs(wrong - right) > 1e-3 * right


def test_changing_one_document_moves_no_other():
    model = make_model("qwen3").eval()
    rows = make_documents(LENGTHS)
    run = LabelledForward(model)
    with torch.no_grad():
        before = model(**run.model_inputs(pack(rows, SEQ_LEN))).logits
        rows[0][1] = (rows[0][1] + 1) % 96
        after = model(**run.model_inputs(pack(rows, SEQ_LEN))).logits
    changed = (before != after).any(dim=-1)
    assert changed[0, 13:24].all()
    changed[0, 13:24] = False
    assert not changed.any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_only_labelled_rows_reach_the_head_and_the_loss_is_the_same(family):
    """Gemma 2 caps its logits after the head, Granite divides them."""
    model = make_model(family)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    batch = pad([d for row in make_documents(LENGTHS) for d in row])
    num_labels = int((batch["labels"] != -100).sum())
    loss = LabelledForward(model, joins_frozen_head=False).loss(batch, MaskedCrossEntropy(), num_labels)
    assert seen == [(1, num_labels, 96)]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert seen[1] == (*batch["input_ids"].shape, 96)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    plain_sum = LabelledForward(model, joins_frozen_head=False).loss(batch, ChunkedCrossEntropy())
    torch.testing.assert_close(plain_sum, expected * num_labels, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_fn", [MaskedCrossEntropy(), FusedLinearCrossEntropy()])
def test_a_batch_without_labels_gives_zero_that_reaches_the_graph(loss_fn):
    model = make_model("llama")
    batch = pad(make_documents([[5]])[0])
    batch["labels"].fill_(-100)
    loss = LabelledForward(model).loss(batch, loss_fn, 10)
    loss.backward()
    assert loss.item() == 0.0
    assert not model.model.layers[0].mlp.up_proj.weight.grad.any()


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fused_head_and_loss_equal_logits_and_loss(family, is_packed):
    model = make_model(family)
    rows = make_documents(LENGTHS)
    batch = pack(rows, SEQ_LEN) if is_packed else pad(rows[0])
    expected = losses_and_gradients(model, [batch], 40)
    model.zero_grad()
    cap = 1.5 if family == "gemma2" else 0
    run = LabelledForward(model)
    loss = run.loss(batch, FusedLinearCrossEntropy(logit_softcapping=cap), 40)
    loss.backward()
    assert_same((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)


@pytest.mark.parametrize(
    ("family", "words"),
    [("gemma2", "Set `loss_fn.logit_softcapping: 1.5`"), ("granite", "changes its logits after the head. Use")],
)
def test_fused_loss_refuses_heads_that_are_more_than_a_matrix(family, words):
    with pytest.raises(UserError) as error:
        LabelledForward(make_model(family)).loss(pad(make_documents([[9]])[0]), FusedLinearCrossEntropy(), 5)
    assert words in str(error.value)


def test_fused_loss_refuses_an_adapted_head():
    model = make_model("llama")
    apply_lora(model, PeftConfig(target_modules="lm_head"))
    with pytest.raises(UserError, match="bias or an adapter"):
        LabelledForward(model).loss(pad(make_documents([[9]])[0]), FusedLinearCrossEntropy(), 5)


def test_generation_after_a_loss_is_untouched_by_the_hook():
    model = make_model("llama").eval()
    ids = make_documents([[9]])[0][0].unsqueeze(0)
    before = model(input_ids=ids).logits
    run = LabelledForward(model)
    run.loss(pad(make_documents([[9]])[0]), MaskedCrossEntropy(), 5)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_recurrent_models_are_refused_by_name():
    run = LabelledForward(make_model("mamba2"))
    with pytest.raises(UserError) as error:
        run.loss(pack(make_documents(LENGTHS), SEQ_LEN), MaskedCrossEntropy(), 5)
    assert "Mamba2ForCausalLM has" in str(error.value)
    assert "packed_sequence_size 0" in str(error.value)
    run.loss(pad(make_documents([[9]])[0]), MaskedCrossEntropy(), 5).backward()


def test_an_attention_that_reads_no_mask_is_exchanged_and_said(caplog):
    caplog.set_level("INFO")
    model = make_model("llama", "flex_attention")
    rows = make_documents(LENGTHS)
    found = losses_and_gradients(model, [pack(rows, SEQ_LEN)], 60)
    assert_same(found, losses_and_gradients(make_model("llama", "sdpa"), [pack(rows, SEQ_LEN)], 60))
    assert "`flex_attention` cannot read" in caplog.text
