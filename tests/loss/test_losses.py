"""Every loss against cross-entropy written out in float64, forward and gradient, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.components.loss import linear_ce, token_loss
from nemo_automodel.components.loss.chunked_ce import ChunkedCrossEntropy
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.loss.te_parallel_ce import TEParallelCrossEntropy
from nemo_automodel.shared.errors import NotSupportedYetError, UserError

RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

LOGIT_LOSSES = {
    "masked": MaskedCrossEntropy,
    "chunked": lambda **kw: ChunkedCrossEntropy(chunk_len=3, **kw),
    "te_parallel": TEParallelCrossEntropy,
}
SHAPES = [((1,), 5), ((7,), 11), ((3, 5), 129), ((2, 1, 4), 33)]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Make chunks so small that every shape needs several, the last one short."""
    monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", 66)


def oracle_token_losses(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Cross-entropy of every position in float64: log of the sum of exponentials minus the target's logit."""
    flat = logits.double().reshape(-1, logits.shape[-1])
    shifted = flat - flat.max(dim=-1, keepdim=True).values.detach()
    log_probs = shifted - shifted.exp().sum(dim=-1, keepdim=True).log()
    losses = [
        -log_probs[i, label] if label != ignore_index else log_probs.new_zeros(())
        for i, label in enumerate(labels.flatten().tolist())
    ]
    return torch.stack(losses).view(labels.shape)


def make_logits(shape, vocab, dtype=torch.float32, ignore_index=-100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocab, generator=generator) * 5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, shape, generator=generator)
    labels.view(-1)[1::3] = ignore_index
    return logits, labels


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize(("shape", "vocab"), SHAPES)
@pytest.mark.parametrize("dtype", RTOL)
def test_sum_and_gradient_equal_the_oracle(name, shape, vocab, dtype):
    logits, labels = make_logits(shape, vocab, dtype)
    reference = logits.detach().double().requires_grad_()
    expected = oracle_token_losses(reference, labels, -100).sum() / 7
    expected.backward()
    loss = LOGIT_LOSSES[name]()(logits, labels, num_label_tokens=7)
    loss.backward()
    assert loss.dtype == torch.promote_types(torch.float32, dtype)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=RTOL[dtype], atol=RTOL[dtype] * 0.1)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_ignored_rows_may_hold_anything(name):
    logits, labels = make_logits((7,), 11)
    with torch.no_grad():
        logits[labels == -100] = torch.nan
    loss = LOGIT_LOSSES[name]()(logits, labels)
    loss.backward()
    keep = labels != -100
    expected = oracle_token_losses(logits.detach()[keep], labels[keep], -100).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert (logits.grad[~keep] == 0).all()
    assert logits.grad[keep].abs().sum() > 0


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_ignore_index_mask_and_reductions(name):
    logits, labels = make_logits((3, 5), 29, ignore_index=-7)
    mask = (torch.arange(15).view(3, 5) % 4 != 0).long()
    before = labels.clone()
    tokens = oracle_token_losses(logits.detach(), labels.masked_fill(mask == 0, -7), -7)
    num_labels = int(((labels != -7) & (mask != 0)).sum())
    for reduction, expected in (("sum", tokens.sum()), ("mean", tokens.sum() / num_labels), ("none", tokens)):
        loss = LOGIT_LOSSES[name](ignore_index=-7, reduction=reduction)(logits, labels, mask=mask)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(labels, before)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize(
    ("reduction", "num_label_tokens"), [("sum", None), ("sum", 0), ("sum", torch.tensor(0)), ("mean", None)]
)
def test_no_label_is_zero_and_reaches_the_graph(name, num_label_tokens, reduction):
    logits, labels = make_logits((4,), 9)
    loss = LOGIT_LOSSES[name](reduction=reduction)(
        logits, torch.full_like(labels, -100), num_label_tokens=num_label_tokens
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_micro_batches_add_up_to_the_whole():
    logits, labels = make_logits((6, 5), 17)
    whole = MaskedCrossEntropy()(logits, labels, num_label_tokens=20)
    parts = sum(MaskedCrossEntropy()(logits[i : i + 2], labels[i : i + 2], num_label_tokens=20) for i in (0, 2, 4))
    torch.testing.assert_close(parts, whole)


def test_without_upcast_the_arithmetic_keeps_the_dtype():
    logits, labels = make_logits((9,), 31, torch.bfloat16)
    assert MaskedCrossEntropy(fp32_upcast=False)(logits, labels).dtype == torch.bfloat16
    assert MaskedCrossEntropy()(logits, labels).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5)])
@pytest.mark.parametrize("softcap", [0, 2.5])
@pytest.mark.parametrize("is_head_frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_linear_equals_the_oracle(shape, softcap, is_head_frozen, dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*shape, 6, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(33, 6, generator=generator).to(dtype).requires_grad_(not is_head_frozen)
    labels = torch.randint(0, 33, shape, generator=generator)
    labels.view(-1)[2::3] = -100
    hidden64, weight64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = hidden64 @ weight64.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = oracle_token_losses(logits, labels, -100).sum() / 5
    (2 * expected).backward()

    loss = FusedLinearCrossEntropy(logit_softcapping=softcap)(hidden, labels, weight, num_label_tokens=5)
    (2 * loss).backward()
    rtol = RTOL[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=rtol, atol=rtol)
    if is_head_frozen:
        assert weight.grad is None
    else:
        torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=rtol, atol=rtol)


def test_fused_linear_without_a_label_is_zero():
    hidden = torch.randn(4, 6, requires_grad=True)
    loss = FusedLinearCrossEntropy()(hidden, torch.full((4,), -100), torch.randn(9, 6), num_label_tokens=0)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_fused_linear_never_holds_all_logits(monkeypatch):
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.append(linear(*a).shape) or linear(*a))
    hidden, labels = torch.randn(20, 6), torch.randint(0, 33, (20,))
    linear_ce.FusedLinearCrossEntropy()(hidden, labels, torch.randn(33, 6))
    assert seen == [(2, 33)] * 10


def test_fused_linear_under_autocast_computes_in_its_dtype():
    hidden, labels, weight = torch.randn(5, 6, requires_grad=True), torch.arange(5), torch.randn(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = FusedLinearCrossEntropy()(hidden, labels, weight)
    expected = FusedLinearCrossEntropy()(hidden.bfloat16(), labels, weight.bfloat16())
    assert torch.equal(loss, expected)
    loss.backward()
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaskedCrossEntropy(reduction="avg"), "`loss_fn.reduction: avg`"),
        (lambda: ChunkedCrossEntropy(chunk_len=0), "`loss_fn.chunk_len` is 0"),
        (lambda: FusedLinearCrossEntropy(reduction="mean"), "Use sum"),
        (lambda: FusedLinearCrossEntropy(logit_softcapping=-1), "is -1"),
        (
            lambda: MaskedCrossEntropy(reduction="mean")(*make_logits((4,), 9), num_label_tokens=3),
            "Use `reduction: sum`",
        ),
        (lambda: MaskedCrossEntropy()(torch.zeros(2, 3, 9), torch.zeros(2, 4, dtype=torch.long)), "(2, 4)"),
        (lambda: FusedLinearCrossEntropy()(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(9, 4)), "(9, 4)"),
    ],
)
def test_mistakes_are_one_line(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_vocabulary_over_devices_is_not_there_yet():
    with pytest.raises(NotSupportedYetError, match="tp_group"):
        TEParallelCrossEntropy(tp_group=object())
