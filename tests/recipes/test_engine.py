"""The engine: one loss and one gradient for every split of a global batch, equal to a hand-written loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.tiny import tiny_config

from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes.engine import EagerEngine, count_label_tokens, count_tokens

NUM_ROWS = 8
CPU = torch.device("cpu")


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(), dtype=dtype)


def make_rows(seed=0):
    """Return (ids, labels) of rows of different lengths with different numbers of labels; one has none."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(NUM_ROWS):
        length = int(torch.randint(4, 12, (), generator=generator))
        ids = torch.randint(5, 400, (length,), generator=generator)
        labels = torch.randint(5, 400, (length,), generator=generator)
        labels[: length if i == 3 else i % 4] = -100
        rows.append((ids, labels))
    return rows


def collate(rows):
    length = max(len(ids) for ids, _ in rows)
    pad = lambda x, value: F.pad(x, (0, length - len(x)), value=value)  # noqa: E731
    return {
        "input_ids": torch.stack([pad(ids, 3) for ids, _ in rows]),
        "labels": torch.stack([pad(labels, -100) for _, labels in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(ids), 0) for ids, _ in rows]),
    }


def split(rows, size):
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def by_hand(rows):
    """Return loss and gradients of plain Transformers, one unpadded row at a time."""
    model = make_model()
    num_labels = sum(int((labels != -100).sum()) for _, labels in rows)
    loss = torch.zeros(())
    for ids, labels in rows:
        logits = model(input_ids=ids[None]).logits[0]
        loss = loss + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / num_labels
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("local_batch_size", [1, 2, 3, 8])
def test_every_split_gives_the_loss_and_gradients_of_a_hand_written_loop(local_batch_size):
    rows = make_rows()
    batches = split(rows, local_batch_size)
    model = make_model()
    engine = EagerEngine(model, MaskedCrossEntropy(), CPU)
    loss = engine.forward_backward(batches, count_label_tokens(batches))
    expected_loss, expected_grads = by_hand(rows)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected_grads[name], atol=1e-6, rtol=1e-5)


def test_evaluation_adds_up_to_the_training_loss_and_keeps_no_gradients():
    batches = split(make_rows(), 3)
    model = make_model()
    engine = EagerEngine(model, MaskedCrossEntropy(), CPU)
    results = [engine.evaluate(batch) for batch in batches]
    num_labels = sum(count for _, count in results)
    assert num_labels == count_label_tokens(batches)
    assert sum(float(loss) for loss, _ in results) / num_labels == pytest.approx(by_hand(make_rows())[0], rel=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_a_micro_batch_without_labels_adds_nothing():
    rows = make_rows()
    without = split([row for i, row in enumerate(rows) if i != 3], 1)
    with_empty = split(rows, 1)
    results = []
    for batches in (without, with_empty):
        model = make_model()
        loss = EagerEngine(model, MaskedCrossEntropy(), CPU).forward_backward(batches, count_label_tokens(batches))
        results.append((loss, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights_and_gradients():
    batches = split(make_rows(), 4)
    model = make_model()
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    loss = EagerEngine(model, MaskedCrossEntropy(), CPU, torch.bfloat16).forward_backward(
        batches, count_label_tokens(batches)
    )
    assert seen == [torch.bfloat16] * 2
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert loss.item() == pytest.approx(by_hand(make_rows())[0], rel=2e-2)


def test_token_counts_leave_padding_out():
    rows = make_rows()
    assert count_tokens(split(rows, 3)) == sum(len(ids) for ids, _ in rows)
    packed = {"input_ids": torch.zeros(2, 16), "seq_lens": torch.tensor([[4, 5, 6], [9, -1000, -1000]])}
    assert count_tokens([packed, {"input_ids": torch.zeros(2, 5)}]) == 24 + 10
