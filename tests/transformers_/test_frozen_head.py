"""The output head and the loss in one step: loss and gradients as on logits, and only if nothing is lost."""

from __future__ import annotations

import logging

import pytest
import torch
from support.packed import make_documents, make_model, pad

from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel.components._peft.lora import PeftConfig, apply_lora
from nemo_automodel.components.loss.chunked_ce import ChunkedCrossEntropy
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.loss.te_parallel_ce import TEParallelCrossEntropy

LOSSES = [MaskedCrossEntropy, ChunkedCrossEntropy, TEParallelCrossEntropy, FusedLinearCrossEntropy]
BATCH = pad(make_documents([[9, 5, 12]])[0])
JOINED = "Loss: in one step with the frozen output head."


def adapted(family: str = "llama", targets: str = "*_proj", **overrides: object):
    model = make_model(family, **overrides)
    apply_lora(model, PeftConfig(target_modules=targets, dim=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def step(model, loss_fn, num_label_tokens=20, **keywords):
    model.zero_grad()
    loss = LabelledForward(model, **keywords).loss(BATCH, loss_fn, num_label_tokens)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def message_of(caplog, model, loss_fn) -> str | None:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nemo_automodel"):
        step(model, loss_fn)
    found = [m for m in caplog.messages if m.startswith("Loss: ")]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}], ids=["own head", "tied"])
@pytest.mark.parametrize("count", [20, None, torch.tensor(7)], ids=["int", "none", "tensor"])
def test_loss_and_gradients_are_those_on_logits(caplog, loss, overrides, count):
    model = adapted(**overrides)
    expected = step(model, MaskedCrossEntropy(), count, joins_frozen_head=False)
    found = step(model, loss(), count)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert message_of(caplog, model, loss()) == JOINED


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}], ids=["own head", "tied"])
def test_a_head_that_learns(caplog, loss, overrides):
    model = make_model("llama", **overrides).requires_grad_(True)
    expected = step(model, MaskedCrossEntropy(), joins_frozen_head=False)
    found = step(model, loss())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert message_of(caplog, model, loss()) == JOINED.replace("frozen", "trained")


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "gpt_oss"])
def test_other_families(caplog, family):
    model = adapted(family, "*.self_attn.*_proj")
    expected = step(model, MaskedCrossEntropy(), joins_frozen_head=False)
    found = step(model, MaskedCrossEntropy())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert message_of(caplog, model, MaskedCrossEntropy()) == JOINED


def with_biased_head():
    model = adapted()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features), requires_grad=False)
    return model


def compiled():
    model = adapted()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: adapted(targets="lm_head"), "the head has a bias, an adapter or packed weights"),
        (with_biased_head, "the head has a bias, an adapter or packed weights"),
        (lambda: adapted("gemma2"), "the model caps its logits"),
        (lambda: adapted("granite"), "GraniteForCausalLM changes its logits after the head"),
        (compiled, "the model is compiled"),
    ],
    ids=["adapter", "bias", "softcap", "scaled", "compiled"],
)
def test_where_something_would_be_lost_the_loss_stays_on_logits(caplog, make, reason):
    model = make()
    assert message_of(caplog, model, MaskedCrossEntropy()) == f"Loss: on logits, {reason}."


def test_autocast_stays_on_logits(caplog):
    with torch.autocast("cpu", torch.bfloat16):
        message = message_of(caplog, adapted(), MaskedCrossEntropy())
    assert message == "Loss: on logits, the model runs under autocast."


class Doubled(MaskedCrossEntropy):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    "loss_fn", [Doubled(), MaskedCrossEntropy(fp32_upcast=False), lambda logits, labels, **_: logits.sum()]
)
def test_other_losses_are_called_as_they_are(caplog, loss_fn):
    model = adapted()
    with torch.no_grad():
        expected = LabelledForward(model, joins_frozen_head=False).loss(BATCH, loss_fn, 20)
        found = LabelledForward(model).loss(BATCH, loss_fn, 20)
    assert torch.equal(found, expected)
    assert message_of(caplog, model, loss_fn) is None


def test_finding_out_moves_neither_the_mode_nor_random_numbers():
    model = adapted()
    before = torch.random.get_rng_state()
    step(model, MaskedCrossEntropy())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
