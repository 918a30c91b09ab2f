"""Only labelled rows reach the head: for any loss on logits, and without the logits of all tokens in any form."""

from __future__ import annotations

import pytest
import torch
from support.packed import make_documents, make_model, pack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel.components.loss.chunked_ce import ChunkedCrossEntropy
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

VOCAB_SIZE = 1024
LENGTHS = [[13, 11, 5], [32], [3, 21]]
SEQ_LEN = 32
CHUNK_ROWS = 4


class Widest(TorchDispatchMode):
    """Keeps the most rows of a tensor over the vocabulary that any operation gives back, by dtype.

    The head's weight is no such tensor, transposed though it may be.
    """

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.head = head.untyped_storage().data_ptr()
        self.rows: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor) or leaf.ndim < 2 or leaf.shape[-1] != VOCAB_SIZE:
                continue
            if leaf.untyped_storage().data_ptr() != self.head:
                self.rows[leaf.dtype] = max(self.rows.get(leaf.dtype, 0), leaf.numel() // VOCAB_SIZE)
        return result


def few_labels() -> tuple[dict[str, torch.Tensor], int]:
    batch = pack(make_documents(LENGTHS), SEQ_LEN)
    generator = torch.Generator().manual_seed(2)
    batch["labels"][torch.rand(batch["labels"].shape, generator=generator) > 0.2] = -100
    return batch, int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("loss_fn", [MaskedCrossEntropy(), ChunkedCrossEntropy(), FusedLinearCrossEntropy()])
def test_no_step_makes_logits_of_all_tokens_nor_wide_ones_in_fp32(loss_fn, monkeypatch):
    monkeypatch.setattr("nemo_automodel.components.loss.token_loss.CHUNK_ELEMENTS", CHUNK_ROWS * VOCAB_SIZE)
    # the head is frozen, as under LoRA; its own gradient would be as wide as the vocabulary the other way round
    model = make_model("llama", vocab_size=VOCAB_SIZE).to(torch.bfloat16)
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    batch, num_labels = few_labels()
    num_tokens = batch["labels"].numel()
    assert CHUNK_ROWS < num_labels < num_tokens / 4
    if isinstance(loss_fn, ChunkedCrossEntropy):
        loss_fn = ChunkedCrossEntropy(chunk_len=CHUNK_ROWS)
    run = LabelledForward(model)
    with Widest(model.get_output_embeddings().weight) as seen:
        run.loss(batch, loss_fn, num_labels).backward()
    assert seen.rows[torch.bfloat16] <= num_labels
    assert seen.rows.get(torch.float32, 0) <= (CHUNK_ROWS if not loss_fn.needs_hidden_states else num_labels)
    if isinstance(loss_fn, MaskedCrossEntropy):
        # the plain form does: the numbers above mean something
        with Widest(model.get_output_embeddings().weight) as plain:
            logits = model(input_ids=batch["input_ids"]).logits.float()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        assert plain.rows == {torch.bfloat16: num_tokens, torch.float32: num_tokens}


def squared_hinge(*, logits, labels, num_label_tokens):
    """Any loss on logits will do."""
    margins = 1 - logits.gather(1, labels.unsqueeze(1)) + logits
    return margins.clamp(min=0).square().sum() / num_label_tokens


def smoothed(*, logits, labels, num_label_tokens):
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum") / num_label_tokens


@pytest.mark.parametrize("loss_fn", [squared_hinge, smoothed, MaskedCrossEntropy()])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite", "phi3"])
def test_value_and_gradients_equal_the_plain_form(family, loss_fn):
    model = make_model(family)
    batch, num_labels = few_labels()
    run = LabelledForward(model)
    loss = run.loss(batch, loss_fn, num_labels)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits_TV = model(**run.model_inputs(batch)).logits.flatten(0, 1)
    is_label_T = batch["labels"].flatten() != -100
    plain = loss_fn(
        logits=logits_TV[is_label_T], labels=batch["labels"].flatten()[is_label_T], num_label_tokens=num_labels
    )
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    assert found.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            largest = float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)
