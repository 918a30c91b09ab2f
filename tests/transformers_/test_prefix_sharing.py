"""Shared prefixes: loss and every gradient are those of the same rows each alone."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from support.packed import make_model
from support.tiny import make_tokenizer
from transformers import PreTrainedModel

from nemo_automodel._transformers import forward, packing_masks
from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel._transformers.isolation_proof import prove_isolation
from nemo_automodel._transformers.packing_masks import Machine
from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.packed_rows import pack_dataset
from nemo_automodel.components.datasets.prefix_sharing import MIN_PREFIX
from nemo_automodel.components.datasets.utils import default_collater, packed_sequence_thd_collater
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.kernels.attention import PackedLayout, packed_mask
from nemo_automodel.recipes.engine import count_label_tokens, count_tokens
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import Batch

SQUAD_LIKE = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "squad_like.py"))
ROW_LEN = 1024
# windows and chunks that begin in the prefix and end in a branch, in models where nothing else hides them
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3": {"sliding_window": 60, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral_window": {"sliding_window": 60},
    "llama4": {"attention_chunk_size": 90},
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Real prose with several questions on each paragraph, as samples of a tiny tokenizer."""
    path = tmp_path_factory.mktemp("squad_like")
    SQUAD_LIKE["write"](path, 12, 1)
    dataset = make_squad_dataset(make_tokenizer(vocab_size=600), dataset_name=str(path))
    rows = [{key: dataset[i][key] for key in ("input_ids", "labels")} for i in range(len(dataset))]
    return [row for row in rows if len(row["input_ids"]) <= ROW_LEN]


def packed_batch(samples, share_prefix: bool, row_len: int = ROW_LEN) -> tuple[Batch, object]:
    cfg = PackedSequenceConfig(packed_sequence_size=row_len, share_prefix=share_prefix)
    rows = pack_dataset(samples, cfg, pad_token_id=3, seed=0, shuffle=False)
    batch = packed_sequence_thd_collater([rows[i] for i in range(len(rows))])
    del batch["qkv_format"]
    return batch, rows.report


def losses_and_gradients(model: PreTrainedModel, batches: list[Batch]) -> list[torch.Tensor]:
    model.zero_grad()
    run, num_label_tokens = LabelledForward(model), count_label_tokens(batches)
    total = sum(run.loss(batch, MaskedCrossEntropy(), num_label_tokens) for batch in batches)
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def relative_differences(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    assert len(found) == len(expected)
    return [float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(found, expected, strict=True)]


def tiny(family: str) -> PreTrainedModel:
    sizes = {"max_position_embeddings": ROW_LEN, "vocab_size": 600}
    return make_model(family, "sdpa", **sizes, **FAMILIES[family]).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_each_row_alone(family, samples):
    model = tiny(family)
    alone = [default_collater([sample]) for sample in samples]
    expected = losses_and_gradients(model, alone)
    shared, _ = packed_batch(samples, True)
    plain, _ = packed_batch(samples, False)
    assert count_label_tokens([shared]) == count_label_tokens(alone)
    assert count_tokens([plain]) == count_tokens(alone)
    assert count_tokens([shared]) < 0.6 * count_tokens(alone)
    for batch in (shared, plain):
        assert max(relative_differences(losses_and_gradients(model, [batch]), expected)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_to_one_prompt_and_branches_of_a_dialogue(family):
    """The first answers' tokens follow the shared prompt; a dialogue's earlier turn, where learned, is not shared."""
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(4, 600, (n,), generator=generator).tolist()

    def sample(prompt, answer):
        return {"input_ids": prompt + answer[:-1], "labels": [-100] * (len(prompt) - 1) + answer}

    prompt, turn = ids(40), ids(6)
    samples = [sample(prompt, ids(n)) for n in (3, 12, 1)]
    dialogue = [prompt + turn + ids(5) + ids(4) for _ in range(2)]
    for row in dialogue:
        labels = [*row[1:], -100]
        labels[:39] = [-100] * 39  # the first answer is learned, in both
        labels[45:50] = [-100] * 5
        samples.append({"input_ids": row, "labels": labels})
    model = tiny(family)
    shared, report = packed_batch(samples, True, row_len=160)
    alone = [default_collater([s]) for s in samples]
    assert count_label_tokens([shared]) == count_label_tokens(alone)
    expected = losses_and_gradients(model, alone)
    assert max(relative_differences(losses_and_gradients(model, [shared]), expected)) < 1e-5
    assert count_tokens([shared]) == count_tokens(alone) - 39 * 4
    assert report.num_documents == 5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(("trunk", "limb"), [(60, 8), (20, 50)])
def test_a_dialogue_whose_branches_branch_again(family, trunk, limb):
    """One level is shared, the one that saves most: the trunk of all six rows, or the longer one of each three."""
    generator = torch.Generator().manual_seed(2)

    def ids(n):
        return torch.randint(4, 600, (n,), generator=generator).tolist()

    root, samples = ids(trunk), []
    for _ in range(2):
        prompt = root + ids(limb)
        for length in (4, 9, 2):
            answer = ids(length)  # the last turn, the only one that is learned
            samples.append({"input_ids": prompt + answer[:-1], "labels": [-100] * (len(prompt) - 1) + answer})
    model = tiny(family)
    shared, report = packed_batch(samples, True, row_len=300)
    saved = {"all": 5 * trunk, "each three": 2 * 2 * (trunk + limb - 1)}
    assert report.num_saved_tokens == max(saved.values())
    assert max(saved, key=saved.__getitem__) == ("all" if trunk == 60 else "each three")
    alone = [default_collater([s]) for s in samples]
    assert count_label_tokens([shared]) == count_label_tokens(alone)
    expected = losses_and_gradients(model, alone)
    assert max(relative_differences(losses_and_gradients(model, [shared]), expected)) < 1e-5


def test_flex_attention_computes_branches(samples, monkeypatch):
    model = tiny("qwen3")  # heads of 16
    shared, _ = packed_batch(samples, True)
    with torch.no_grad():
        expected = model(**LabelledForward(model).model_inputs(shared)).logits
        monkeypatch.setattr(forward.Machine, "of", lambda device: Machine("cuda", has_triton=True, has_compiler=True))
        found = model(**LabelledForward(model, "flex").model_inputs(shared)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["branches see each other", "windows count places"])
def test_the_comparison_notices_wrong_masks(wrong, samples, monkeypatch):
    def leaky(layout, **settings):
        return packed_mask(PackedLayout(layout.documents_BS, layout.positions_BS), **settings)

    def by_place(layout, **settings):
        places = torch.arange(layout.positions_BS.shape[1]).expand_as(layout.positions_BS)
        return packed_mask(PackedLayout(layout.documents_BS, places, layout.branches_BS), **settings)

    model = tiny("mistral_window")
    expected = losses_and_gradients(model, [default_collater([sample]) for sample in samples])
    monkeypatch.setattr(packing_masks, "packed_mask", leaky if wrong.startswith("branches") else by_place)
    shared, _ = packed_batch(samples, True)
    assert max(relative_differences(losses_and_gradients(model, [shared]), expected)) > 1e-3


def packer(documents):
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in documents]
    return packed_batch(rows, True, row_len=320)[0]


def test_the_proof_covers_branches(monkeypatch):
    model = tiny("llama")
    proof = prove_isolation(LabelledForward(model), packer, 320, MIN_PREFIX)
    assert proof.is_conclusive
    assert proof.difference < 1e-5
    monkeypatch.setattr(
        packing_masks,
        "packed_mask",
        lambda layout, **settings: packed_mask(PackedLayout(layout.documents_BS, layout.positions_BS), **settings),
    )
    with pytest.raises(UserError, match="see each other"):
        prove_isolation(LabelledForward(model), packer, 320, MIN_PREFIX)
