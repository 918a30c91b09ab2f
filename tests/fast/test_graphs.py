"""Layers that are recorded compute what they compute without: every step of a run, to the last bit.

On the CPU a tape of operations stands in for CUDA graphs (`support/tape.py`): what must be copied, added up and kept
for a recording to be right is the same. `benchmarks/graphs.py` compares the real ones.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from fast.test_fp8 import fp8_model
from support.fast_models import adapters_of, fast_model, tokens, trained_model
from support.packed import make_documents, pack
from support.tape import TapeRecorder

from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel._transformers.layer_graphs import forget_recordings, record_layers, recorded_bytes
from nemo_automodel.components.fast import graphs
from nemo_automodel.components.fast.graphs import CudaRecorder, Graphs, LayerGraphs
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.shared.errors import UserError

NUM_LAYERS = 2
CASES = {
    "adapters": (lambda: fast_model("llama", adapters_of(dtype="float32"), torch.float32), "whole"),
    "two adapters": (lambda: fast_model("llama", adapters_of(["q_proj", "down_proj"]), torch.float32), "whole"),
    "pre": (lambda: fast_model("llama", adapters_of(dropout=0.2, dropout_position="pre"), torch.float32), "whole"),
    "post": (lambda: fast_model("qwen2", adapters_of(dropout=0.2, dropout_position="post"), torch.float32), "whole"),
    "head norms, selective": (lambda: fast_model("qwen3", adapters_of(), torch.float32, "selective"), "whole"),
    "full": (lambda: fast_model("llama", adapters_of(), torch.float32, "full"), "whole"),
    "8 bits kept": (lambda: fast_model("llama", adapters_of(), torch.float32, "fp8_gate_up"), "whole"),
    "base in 8 bits": (lambda: fp8_model("llama"), "whole"),
    "all weights": (lambda: trained_model("llama", torch.float32), "whole"),
    "all weights, biases": (lambda: trained_model("qwen2", torch.float32), "whole"),
    "all weights, head norms": (lambda: trained_model("qwen3", torch.float32), "whole"),
    "some weights": (lambda: trained_model("llama", torch.float32, frozen="q_proj embed norm"), "whole"),
    "packed": (lambda: fast_model("llama", adapters_of(), torch.float32), "packed"),
    "padded": (lambda: fast_model("llama", adapters_of(), torch.float32), "padded"),
}


def recorded(model, recorder: TapeRecorder, **settings: object):
    shared = Graphs(recorder, **settings)
    for layer in model.model.layers:
        layer.graphs = LayerGraphs(shared)
    return model


def whole(number: int, num_rows: int = 2, seq_len: int = 7) -> dict[str, torch.Tensor]:
    ids = tokens(num_rows, seq_len, number)
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def batch_of(form: str, number: int) -> dict[str, torch.Tensor]:
    if form == "whole":
        return whole(number)
    if form == "packed":
        return pack(make_documents([[5, 7], [4, 9]], seed=number), 16)
    batch = whole(number)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 4 + number % 3 :] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def train(model, batches: list[list[dict]], set_to_none: bool = True) -> list[float]:
    """Take one step per list of micro-batches; return the losses of all of these and the final weights."""
    torch.manual_seed(3)
    forward, loss_fn = LabelledForward(model), MaskedCrossEntropy()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in batches:
        for batch in step:
            with forward.attention_of(batch):
                loss = forward.loss(dict(batch), loss_fn, 20)
                loss.backward()
            losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return losses


def why_not(caplog) -> list[str]:
    """Return what the log says of passes that are computed without recordings."""
    lines = [record.getMessage().removeprefix("Decoder layers: ") for record in caplog.records]
    return [line for line in lines if line.startswith(("not recorded", "no longer"))]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_same_to_the_last_bit(name, set_to_none):
    make, form = CASES[name]
    batches = [[batch_of(form, 2 * step + micro) for micro in range(2)] for step in range(4)]
    plain, recorder = make(), TapeRecorder()
    model = recorded(make(), recorder)
    expected = train(plain, batches, set_to_none)
    assert train(model, batches, set_to_none) == expected
    for (key, value), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, other), key
    # the third micro-batch is the first to be recorded: six of eight, there and back
    assert recorder.num_recorded == 2 * NUM_LAYERS
    assert recorder.num_played == 6 * 2 * NUM_LAYERS


def test_kinds_of_batches_are_recorded_each_and_then_no_more(monkeypatch, caplog):
    monkeypatch.setattr(graphs, "MAX_KINDS", 2)
    plain, recorder = CASES["adapters"][0](), TapeRecorder()
    model = recorded(CASES["adapters"][0](), recorder)
    lengths = [5, 7, 5, 9, 7, 5, 9, 7, 5, 9, 9, 7]
    batches = [[whole(number, seq_len=length)] for number, length in enumerate(lengths)]
    with caplog.at_level(logging.INFO):
        assert train(model, batches) == train(plain, batches)
    assert recorder.num_recorded == 2 * 2 * NUM_LAYERS
    assert recorder.num_played == (2 + 2) * 2 * NUM_LAYERS
    assert [record.args[:2] for record in caplog.records if "kinds of batches" in record.msg] == [(2, 5), (2, 7)]
    assert why_not(caplog) == [
        "not recorded as CUDA graphs: batches of more than 2 kinds came, and the others are computed as ever."
    ]


@pytest.mark.parametrize(
    ("recorder", "settings", "reason"),
    [
        (TapeRecorder(), {"max_tokens": 13.4}, "more than 13 tokens take longer to compute than to start"),
        (TapeRecorder(), {"max_tokens": 0}, "how fast this card computes is not known, so `auto` leaves it"),
        (TapeRecorder(has_room=False), {}, "2 x 7 tokens would take too much memory"),
    ],
)
def test_large_batches_and_full_cards_are_left_alone(recorder, settings, reason, caplog):
    with caplog.at_level(logging.INFO):
        train(recorded(CASES["adapters"][0](), recorder, **settings), [[whole(n)] for n in range(4)])
    assert recorder.num_recorded == 0
    assert why_not(caplog) == [f"not recorded as CUDA graphs: {reason}."]
    assert {r.levelno for r in caplog.records if "not recorded" in r.getMessage()} == {logging.INFO}


def test_what_was_asked_for_is_recorded_on_a_full_card():
    recorder = TapeRecorder(has_room=False)
    train(recorded(CASES["adapters"][0](), recorder, is_asked=True), [[whole(n)] for n in range(4)])
    assert recorder.num_recorded == 2 * NUM_LAYERS


@pytest.mark.parametrize("policy", ["sac1", "full_offload"])
def test_policies_that_let_go_of_memory_in_the_middle_are_not_recorded(policy, caplog):
    recorder = TapeRecorder()
    model = recorded(fast_model("llama", adapters_of(), torch.float32, policy), recorder, is_asked=True)
    plain = fast_model("llama", adapters_of(), torch.float32, policy)
    batches = [[whole(n)] for n in range(4)]
    assert train(model, batches) == train(plain, batches)
    assert recorder.num_recorded == 0
    assert why_not(caplog) == [
        f"not recorded as CUDA graphs: `activation_checkpointing: {policy}` lets go of memory within a pass."
    ]
    (record,) = [record for record in caplog.records if "not recorded" in record.getMessage()]
    assert record.levelno == logging.WARNING, "somebody wrote `on`"


def test_gradients_that_somebody_waits_for_are_not_recorded(caplog):
    recorder = TapeRecorder()
    model = recorded(CASES["all weights"][0](), recorder)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: None) for p in model.model.layers[1].parameters()]
    with caplog.at_level(logging.INFO):
        train(model, [[whole(n)] for n in range(4)])
    assert recorder.num_recorded == 2  # the other layer
    assert why_not(caplog) == [
        "not recorded as CUDA graphs: a hook waits for single gradients, as under `optimizer.in_backward`."
    ]
    for hook in hooks:
        hook.remove()


def test_evaluation_between_steps_is_not_recorded_and_disturbs_nothing():
    plain, model = CASES["pre"][0](), recorded(CASES["pre"][0](), TapeRecorder())
    found = []
    for one in (plain, model):
        losses = []
        for number in range(5):
            losses += train(one, [[whole(number)]])
            one.eval()
            with torch.no_grad():
                losses.append(float(one(whole(9)["input_ids"]).logits.sum()))
            one.train()
        found.append(losses)
    assert found[0] == found[1]


def test_weights_that_move_are_computed_without_the_recording(caplog):
    plain, model = CASES["adapters"][0](), recorded(CASES["adapters"][0](), TapeRecorder())
    for one in (plain, model):
        train(one, [[whole(n)] for n in range(4)])
        for layer in one.model.layers:
            layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data * 2
    batches = [[whole(7)], [whole(8)]]
    assert train(model, batches) == train(plain, batches)
    # once, not for each layer and step
    assert why_not(caplog) == ["no longer computed by their CUDA graphs: weights have moved in memory."]


def test_other_passes_of_a_kind_are_computed_without_the_recording(caplog):
    plain, model = CASES["pre"][0](), recorded(CASES["pre"][0](), TapeRecorder())
    found = []
    for one in (plain, model):
        losses = train(one, [[whole(n)] for n in range(4)])
        one.eval()  # dropout off, and still on the way to gradients
        losses += train(one, [[whole(4)]])
        one.train()
        one.get_input_embeddings().weight.requires_grad_(True)
        found.append(losses + train(one, [[whole(5)]]))
    assert found[0] == found[1]
    assert why_not(caplog) == [
        "no longer computed by their CUDA graphs: dropout was switched.",
        "no longer computed by their CUDA graphs: a layer's input wants a gradient now and did not before, or the "
        "other way round.",
        "no longer computed by their CUDA graphs: a layer's input is not what the layer before it wrote.",
    ]


def test_gradients_given_from_outside_are_added_to():
    """As an optimizer that keeps its gradients elsewhere does."""
    plain, model = CASES["all weights"][0](), recorded(CASES["all weights"][0](), TapeRecorder())
    grads = []
    for one in (plain, model):
        train(one, [[whole(n)] for n in range(4)])
        for parameter in one.parameters():
            parameter.grad = torch.ones_like(parameter)
        LabelledForward(one).loss(whole(5), MaskedCrossEntropy(), 20).backward()
        grads.append([parameter.grad for parameter in one.parameters()])
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        assert torch.equal(ours, theirs)


def test_a_pass_that_was_overwritten_is_refused():
    model = recorded(CASES["adapters"][0](), TapeRecorder())
    train(model, [[whole(n)] for n in range(3)])
    first = LabelledForward(model).loss(whole(1), MaskedCrossEntropy(), 20)
    LabelledForward(model).loss(whole(2), MaskedCrossEntropy(), 20)
    with pytest.raises(RuntimeError, match="overwritten by a later one"):
        first.backward()


def test_a_forward_pass_that_nobody_followed_is_forgotten():
    plain, model = CASES["adapters"][0](), recorded(CASES["adapters"][0](), TapeRecorder())
    for one in (plain, model):
        train(one, [[whole(n)] for n in range(2)])
        LabelledForward(one).loss(whole(1), MaskedCrossEntropy(), 20)  # recorded here, there but not back
    batches = [[whole(n)] for n in range(3)]
    assert train(model, batches) == train(plain, batches)


def test_recordings_can_be_forgotten_and_made_again():
    plain, recorder = CASES["all weights"][0](), TapeRecorder()
    model = recorded(CASES["all weights"][0](), recorder)
    for number in (0, 1):
        batches = [[whole(10 * number + n)] for n in range(4)]
        assert train(model, batches) == train(plain, batches)
        assert recorded_bytes(model) == 1000 * (number + 1) * 2 * NUM_LAYERS
        forget_recordings(model)
    assert recorded_bytes(plain) == 0


def test_another_policy_is_another_recording():
    plain, recorder = CASES["adapters"][0](), TapeRecorder()
    model = recorded(CASES["adapters"][0](), recorder)
    for policy in ("none", "full"):
        for layer in (*model.model.layers, *plain.model.layers):
            layer.fast_core.recompute = policy
        batches = [[whole(n)] for n in range(3)]
        assert train(model, batches) == train(plain, batches)
    assert recorder.num_recorded == 2 * 2 * NUM_LAYERS


def test_memory_between_recordings_is_what_their_pool_has_free(monkeypatch):
    segments = [
        {"segment_pool_id": (0, 7), "total_size": 100, "allocated_size": 30},
        {"segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 10},
        {"segment_pool_id": (0, 7), "total_size": 50, "allocated_size": 50},
    ]
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert CudaRecorder().held_bytes() == 70


def test_asking_for_graphs_without_a_gpu_is_an_error():
    layers = CASES["adapters"][0]().model.layers
    with pytest.raises(UserError) as caught:
        record_layers(layers, "on", torch.device("cpu"))
    page = Path(__file__).resolve().parents[2] / "docs/errors.md"
    assert f"error: {caught.value}" in " ".join(page.read_text(encoding="utf-8").split())
    record_layers(layers, "auto", torch.device("cpu"))
    assert all(layer.graphs is None for layer in layers)
