"""What a fast layer attends to: padding on either side, windows, packed documents, caches; and when it steps aside."""

from __future__ import annotations

import pytest
import torch
from support.fast_models import adapters_of, assert_same_step, fast_model, plain_model, tokens
from support.packed import make_documents, pack, pad

from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
WINDOW = {"sliding_window": 4}
LAYERED_WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
TOLERANCE = 1e-11


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family, side):
    mask = torch.ones(3, 8, dtype=torch.int64)
    if side != "right":
        mask[1, :3] = 0
    if side != "left":
        mask[2, 5:] = 0
    plain, fast = plain_model(family, adapters_of()), fast_model(family, adapters_of())
    assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(3, 8), attention_mask=mask)


@pytest.mark.parametrize(("family", "window"), [("mistral", WINDOW), ("qwen2", LAYERED_WINDOW)])
@pytest.mark.parametrize("seq_len", [3, 11])
def test_windows(family, window, seq_len):
    plain, fast = plain_model(family, adapters_of(), **window), fast_model(family, adapters_of(), **window)
    assert_same_step(plain, fast, TOLERANCE, input_ids=tokens(2, seq_len))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_lonely_documents(family, recompute):
    rows = make_documents([[5, 9, 4], [12, 3]])
    packed, alone = pack(rows, 20), [pad([document]) for row in rows for document in row]
    loss_fn = MaskedCrossEntropy()
    fast = fast_model(family, adapters_of(), recompute=recompute)
    forward = LabelledForward(fast)
    loss = forward.loss(packed, loss_fn, 23)
    loss.backward()
    found = gradients(fast)
    plain = plain_model(family, adapters_of())
    total = torch.zeros((), dtype=torch.float64)
    for batch in alone:
        part = LabelledForward(plain).loss(batch, loss_fn, 23)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-10, atol=0)
    for name, expected in gradients(plain).items():
        assert (found[name] - expected).norm() <= TOLERANCE * 100 * expected.norm(), name


def test_a_neighbour_changes_nothing():
    fast = fast_model("qwen2", adapters_of()).eval()
    first, other = make_documents([[6, 7]], seed=0), make_documents([[6, 7]], seed=1)
    outputs = []
    with torch.no_grad():
        for rows in (first, [[other[0][0], first[0][1]]]):
            batch = pack(rows, 16)
            outputs.append(fast(**LabelledForward(fast).model_inputs(batch), use_cache=False).logits[0, 6:13])
    assert torch.equal(*outputs)


def test_unpacked_rows_need_no_mask_and_give_the_same():
    batch = pad(make_documents([[9, 4, 6]])[0])
    losses = []
    for model in (plain_model("llama", adapters_of()), fast_model("llama", adapters_of())):
        forward = LabelledForward(model)
        assert forward._needs_no_mask(batch)
        losses.append(forward.loss(batch, MaskedCrossEntropy(), 13))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-11, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generation_goes_through_transformers(family):
    peft = adapters_of(dtype="float32")
    answers = [
        model.eval().generate(tokens(1, 5), max_new_tokens=8, do_sample=False)
        for model in (plain_model(family, peft, torch.float32), fast_model(family, peft, torch.float32))
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("way", ["eager", "autocast"])
def test_what_the_fast_layers_do_not_know_runs_in_transformers(way):
    peft = adapters_of(dtype="float32")
    outputs = []
    for model in (plain_model("llama", peft, torch.float32), fast_model("llama", peft, torch.float32)):
        if way == "eager":
            model.set_attn_implementation("eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            outputs.append(model(input_ids=tokens(2, 6), use_cache=False).logits)
    assert outputs[1].dtype == outputs[0].dtype
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5 if way == "eager" else 2e-2, atol=1e-5)


def test_hidden_states_can_be_asked_for():
    plain, fast = plain_model("qwen2", adapters_of()), fast_model("qwen2", adapters_of())
    for one, other in zip(
        *(m(input_ids=tokens(1, 6), use_cache=False, output_hidden_states=True).hidden_states for m in (plain, fast)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
