"""Which kernel computes packed rows, and that each reads its mask through real models."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from support.packed import make_documents, make_model, pack, varlen_by_loop
from torch.utils.checkpoint import checkpoint

from nemo_automodel._transformers import forward
from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel._transformers.packing_masks import PACKED_ATTENTION, BatchFiller, Machine, choose_backend
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.kernels import attention
from nemo_automodel.shared.errors import UserError

LENGTHS = [[13, 11, 5], [32], [3, 21]]
GPU = Machine("cuda", (9, 0), has_varlen=True, has_triton=True, has_compiler=True)
WIDE = {"hidden_size": 64}
"""Heads of 16 for the families without a head size of their own."""


def on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward.Machine, "of", lambda device: machine)


@pytest.mark.parametrize(
    ("family", "dtype", "has_branches", "changes", "expected"),
    [
        ("llama", torch.bfloat16, False, {}, ("varlen", "whole documents in bfloat16")),
        ("llama", torch.float16, False, {"has_triton": False}, ("varlen", "whole documents in float16")),
        ("llama", torch.bfloat16, True, {}, ("flex", "documents share prefixes")),
        ("llama", torch.float32, False, {}, ("flex", "attention computes in float32")),
        ("mistral_window", torch.bfloat16, False, {}, ("flex", "layers have windows or chunks")),
        ("llama4", torch.bfloat16, False, {}, ("flex", "layers have windows or chunks")),
        ("llama", torch.bfloat16, False, {"device_type": "cpu"}, ("dense", "the model is on the cpu")),
        ("gpt_oss", torch.bfloat16, False, {}, ("dense", "GptOssForCausalLM computes its attention in its own way")),
        (
            "llama",
            torch.float32,
            False,
            {"has_compiler": False},
            (
                "dense",
                "attention computes in float32; FlexAttention needs a C compiler and Python's headers, and they are "
                "not installed (gcc, python3-dev)",
            ),
        ),
    ],
)
def test_the_first_kernel_that_can_run_is_chosen_and_the_reason_said(family, dtype, has_branches, changes, expected):
    model = make_model(family, **(WIDE if family in ("llama", "mistral_window") else {"head_dim": 16}))
    machine = dataclasses.replace(GPU, **changes)
    assert choose_backend(model, "auto", machine, dtype, has_branches) == expected


def test_what_is_asked_for_runs_or_is_an_error():
    model = make_model("llama", **WIDE)
    assert choose_backend(model, "dense", GPU, torch.bfloat16, False) == ("dense", "asked for")
    with pytest.raises(UserError) as error:
        choose_backend(model, "varlen", GPU, torch.float32, False)
    assert str(error.value) == (
        "`packed_sequence.attention: varlen` cannot run: attention computes in float32. Set it to auto, which takes "
        "what can."
    )
    with pytest.raises(UserError, match=r"attention: flex` cannot run: the model is on the cpu\. Set it to auto"):
        LabelledForward(model, "flex").model_inputs(pack(make_documents(LENGTHS), 32))


def test_layers_that_want_more_than_a_mask_are_refused_at_the_kernel(monkeypatch):
    on(GPU, monkeypatch)
    model = make_model("llama", **WIDE)
    run = LabelledForward(model, "flex")
    inputs = run.model_inputs(pack(make_documents(LENGTHS), 32))
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"uses dropout, which .* Set `packed_sequence.attention: dense`"):
        model(**inputs)


@pytest.mark.parametrize(
    ("family", "extra"),
    [("llama", WIDE), ("qwen3", {}), ("mistral_window", WIDE), ("gemma3", {}), ("llama4", {"head_dim": 16})],
)
def test_flex_attention_gives_the_logits_of_the_dense_mask(family, extra, monkeypatch, caplog):
    caplog.set_level("INFO")
    model = make_model(family, "sdpa", **extra).eval()
    batch = pack(make_documents(LENGTHS), 32)
    with torch.no_grad():
        expected = model(**LabelledForward(model).model_inputs(batch)).logits
        on(GPU, monkeypatch)
        run = LabelledForward(model)
        found = model(**run.model_inputs(batch)).logits
        assert "Attention of packed rows: flex (" in caplog.text
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # rows without documents go through the same implementation as before
        plain = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
        switched = model(**plain).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(switched, model(**plain).logits)


@pytest.mark.parametrize("recomputes", [False, True])
def test_borders_reach_the_kernel_in_forward_backward_and_recomputation(recomputes, monkeypatch):
    """The variable-length kernel runs on a GPU alone; a plain loop over the borders stands for it."""
    model = make_model("llama", "sdpa", **WIDE)
    if recomputes:
        model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
    batch = pack(make_documents(LENGTHS), 32)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = LabelledForward(model).loss(batch, MaskedCrossEntropy(), 60)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    expected = gradients()
    on(GPU, monkeypatch)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_loop)
    attention._varlen_arguments.cache_clear()
    monkeypatch.setattr("nemo_automodel._transformers.packing_masks._obstacle_to_varlen", lambda *_: None)
    found = gradients()
    attention._varlen_arguments.cache_clear()
    assert model.config._attn_implementation == PACKED_ATTENTION
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4, "factor": 8.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "rope", "limit"), [("phi3", LONGROPE, 16), ("llama", DYNAMIC, 20)], ids=["longrope", "dynamic"]
)
def test_rotary_embeddings_that_follow_the_longest_document_are_refused(family, rope, limit, monkeypatch):
    sizes = {"max_position_embeddings": 20} if family == "llama" else {"original_max_position_embeddings": 16}
    model = make_model(family, "sdpa", rope_parameters=rope, **sizes).eval()
    with pytest.raises(UserError) as error:
        LabelledForward(model).model_inputs(pack(make_documents([[5, 25]]), 32))
    assert str(error.value) == (
        f"The rotary embeddings of {type(model).__name__} change for all documents of a batch once one is longer than "
        f"{limit} tokens. Set `packed_sequence.packed_sequence_size` to {limit} or less, not 32."
    )
    LabelledForward(model).model_inputs(pack(make_documents([[5, 7]]), 16))
    # the refusal is right: another document's length moves the logits of the first
    monkeypatch.setattr(forward, "check_can_isolate", lambda *_: None)
    (row,) = make_documents([[5, 25]])
    short, long = pack([[row[0], row[1][:4]]], 9), pack([row], 30)
    with torch.no_grad():
        logits = [model(**LabelledForward(model).model_inputs(batch)).logits[0, :5] for batch in (short, long)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# --- batches with fewer rows -----------------------------------------------------------------------------------------


def rows_given(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> tuple[list[int], list[float], list[float]]:
    """Return the rows the model sees, its losses, and those of the same batches one by one.

    Batches are filled as for FlexAttention and computed with the dense mask, since it has no backward pass on a CPU.
    """
    build = forward.build_packed_masks
    monkeypatch.setattr(forward, "build_packed_masks", lambda model, batch, _: build(model, batch, "dense"))
    monkeypatch.setattr(LabelledForward, "_backend_of", lambda *_: "flex")
    model, seen = make_model("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    # joined with the head, the loss would ask the model about two tokens first
    run, loss_fn = LabelledForward(model, joins_frozen_head=False), MaskedCrossEntropy()
    losses, alone = [], []
    for number, size in enumerate(sizes):
        batch = pack(make_documents([[7, 9, 12]] * size, seed=number), 32)
        losses.append(run.loss(batch, loss_fn))
        model.zero_grad()
        losses[-1].backward()
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        expected = LabelledForward(model, joins_frozen_head=False).loss(batch, loss_fn)
        expected.backward()
        for found, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)
        alone.append(expected.item())
    return seen[::2], [loss.item() for loss in losses], alone


def test_the_last_batch_is_filled_up_and_changes_neither_loss_nor_gradients(monkeypatch):
    seen, losses, alone = rows_given(monkeypatch, [4, 4, 3, 4, 1, 4])
    assert seen == [4] * 6
    assert losses == pytest.approx(alone, rel=1e-6)


def test_a_smaller_size_that_stays_is_left_alone(monkeypatch):
    seen, losses, alone = rows_given(monkeypatch, [3, 2, 2, 2, 3])
    assert seen == [3, 3, 2, 2, 3]
    assert losses == pytest.approx(alone, rel=1e-6)


def test_only_flex_attention_needs_it():
    model = make_model("llama")
    run = LabelledForward(model)
    for size in (3, 2):
        inputs = run.model_inputs(pack(make_documents([[7, 9]] * size), 32))
        assert len(inputs["input_ids"]) == size


def test_branches_are_filled_up_as_well():
    filler = BatchFiller()
    batch = pack(make_documents([[7, 9]] * 3), 32)
    batch["branch_ids"] = torch.randint(0, 3, (3, 32))
    assert filler.fill(batch) is batch
    short = {key: rows[:1] for key, rows in batch.items()}
    filled = filler.fill(short)
    assert {key: tuple(rows.shape) for key, rows in filled.items()} == {
        key: tuple(rows.shape) for key, rows in batch.items()
    }
    assert all(torch.equal(filled[key][:1], short[key]) for key in batch)
    assert (filled["labels"][1:] == -100).all()
    assert filler.fill({key: rows[:1] for key, rows in pack(make_documents([[7]]), 32).items()})["labels"].shape[0] == 1
