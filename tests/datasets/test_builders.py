"""The data sets that YAML files name: SQuAD, column-mapped, HellaSwag and the mock sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import PreTrainedTokenizerFast as Fast

from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
    ColumnMappedTextInstructionDataset,
)
from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_iterable_dataset import (
    ColumnMappedTextInstructionIterableDataset,
)
from nemo_automodel.components.datasets.llm.hellaswag import HellaSwag
from nemo_automodel.components.datasets.llm.mock import build_packed_dataset, build_unpacked_dataset
from nemo_automodel.components.datasets.llm.mock_iterable_dataset import MockIterableDataset
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.utils import split_prompt_answer
from nemo_automodel.shared.errors import UserError

FIRST = "Context: The tower was built in 1800 in Paris. Question: Where was the tower of 1800 built? Answer:"


def texts(tokenizer: Fast, sample: dict) -> tuple[str, str]:
    prompt, answer = split_prompt_answer(sample)
    return tokenizer.decode(prompt), tokenizer.decode(answer)


def test_squad_without_template(tokenizer: Fast, squad_dir: Path):
    dataset = make_squad_dataset(tokenizer, dataset_name=str(squad_dir))
    assert len(dataset) == 64
    assert texts(tokenizer, dataset[0]) == (FIRST, " Paris<|im_end|>")
    assert len(make_squad_dataset(tokenizer, dataset_name=str(squad_dir), split="validation")) == 16
    assert len(make_squad_dataset(tokenizer, dataset_name=str(squad_dir), limit_dataset_samples=5)) == 5
    assert len(make_squad_dataset(tokenizer, dataset_name=str(squad_dir), split="train[60:]")) == 4


def test_squad_with_template(tokenizer: Fast, squad_dir: Path):
    expected = (f"<|im_start|>user\n{FIRST} <|im_end|>\n<|im_start|>assistant\n", "Paris<|im_end|>")
    given = make_squad_dataset(tokenizer, dataset_name=str(squad_dir), chat_template=CHAT_TEMPLATE)
    assert texts(tokenizer, given[0]) == expected
    own = make_tokenizer(CHAT_TEMPLATE)
    assert texts(own, make_squad_dataset(own, dataset_name=str(squad_dir))[0]) == expected


def test_squad_refuses(tokenizer: Fast, tmp_path: Path, write_jsonl):
    row = {"context": "c", "question": "q", "answers": {"text": []}}
    path = str(write_jsonl(tmp_path / "train.jsonl", [row]))
    with pytest.raises(UserError, match=r"train.jsonl line 1: `answers` must look like"):
        make_squad_dataset(tokenizer, dataset_name=path)[0]
    other = str(write_jsonl(tmp_path / "other.jsonl", [{"context": "c", "questions": "q", "answers": {}}]))
    with pytest.raises(UserError, match=r"no column `question`. Did you mean `questions`"):
        make_squad_dataset(tokenizer, dataset_name=other)


@pytest.mark.parametrize("options", [{}, {"seq_length": 40, "padding": "max_length", "truncation": True}])
def test_fp8_pads_to_a_multiple_of_16(tokenizer: Fast, squad_dir: Path, options: dict):
    plain = make_squad_dataset(tokenizer, dataset_name=str(squad_dir), **options)
    padded = make_squad_dataset(tokenizer, dataset_name=str(squad_dir), fp8=True, **options)
    for i in range(8):
        short, long = plain[i], padded[i]
        length = len(short["input_ids"])
        assert len(long["input_ids"]) == -(-length // 16) * 16
        for key, fill in (("input_ids", tokenizer.pad_token_id), ("labels", -100), ("attention_mask", 0)):
            assert long[key] == short[key] + [fill] * (len(long["input_ids"]) - length)
    assert padded.lengths(range(8)) == [len(padded[i]["input_ids"]) for i in range(8)]


ALPACA = [
    {"instruction": "Name the city.", "input": "The tower.", "output": "Paris"},
    {"instruction": "Name the dog.", "input": "", "output": "lazy"},
    {"instruction": "Count.", "input": None, "output": 7},
]
MAPPING = {"context": "instruction", "question": "input", "answer": "output"}


def test_column_mapped(tokenizer: Fast, tmp_path: Path, write_jsonl):
    path = str(write_jsonl(tmp_path / "train.jsonl", ALPACA))
    dataset = ColumnMappedTextInstructionDataset(path, MAPPING, tokenizer)
    got = ["".join(texts(tokenizer, dataset[i])) for i in range(3)]
    assert got == ["Name the city. The tower. Paris<|im_end|>", "Name the dog. lazy<|im_end|>", "Count. 7<|im_end|>"]
    assert texts(tokenizer, dataset[1])[1].strip() == "lazy<|im_end|>"
    everything = ColumnMappedTextInstructionDataset(path, MAPPING, tokenizer, answer_only_loss_mask=False)[0]
    assert everything["labels"][:-1] == everything["input_ids"][1:]
    answer_only = ColumnMappedTextInstructionDataset(path, {"question": "instruction", "answer": "output"}, tokenizer)
    assert texts(tokenizer, answer_only[0])[0] == "Name the city."


def test_column_mapped_with_template(tokenizer: Fast, tmp_path: Path, write_jsonl):
    path = str(write_jsonl(tmp_path / "train.jsonl", ALPACA))
    with pytest.raises(UserError, match="use_hf_chat_template: true` needs a chat template"):
        ColumnMappedTextInstructionDataset(path, MAPPING, tokenizer, use_hf_chat_template=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    dataset = ColumnMappedTextInstructionDataset(path, MAPPING, tokenizer, use_hf_chat_template=True)
    assert texts(tokenizer, dataset[0]) == (
        "<|im_start|>user\nName the city. The tower.<|im_end|>\n<|im_start|>assistant\n",
        "Paris<|im_end|>",
    )


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"answers": "output", "question": "input"},
            "`dataset.column_mapping.answers` is not known. Did you mean `answer`?",
        ),
        ({"answer": "output"}, "names answer, but it needs `answer` and at least one of"),
        ({"context": "instruction", "question": "input"}, "names context, question, but it needs `answer`"),
        ({"answer": "outputs", "question": "input"}, "no column `outputs`. Did you mean `output`?"),
    ],
)
def test_column_mapping_mistakes(tokenizer: Fast, tmp_path: Path, write_jsonl, mapping: dict, message: str):
    path = str(write_jsonl(tmp_path / "train.jsonl", ALPACA))
    with pytest.raises(UserError) as caught:
        ColumnMappedTextInstructionDataset(path, mapping, tokenizer)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x", "output": True}, "line 2: the column `output` holds true or false"),
        ({"instruction": "", "output": "Paris"}, "line 2: instruction and input hold no text"),
    ],
)
def test_column_mapped_bad_rows(tokenizer: Fast, tmp_path: Path, write_jsonl, row: dict, message: str):
    path = str(write_jsonl(tmp_path / "train.jsonl", [ALPACA[0], row]))
    dataset = ColumnMappedTextInstructionDataset(path, MAPPING, tokenizer)
    with pytest.raises(UserError, match=message):
        dataset[1]


def test_column_mapped_stream(tokenizer: Fast, tmp_path: Path, write_jsonl):
    path = str(write_jsonl(tmp_path / "train.jsonl", ALPACA))
    rows = ColumnMappedTextInstructionDataset(path, MAPPING, tokenizer)
    once = ColumnMappedTextInstructionIterableDataset(path, MAPPING, tokenizer, repeat_on_exhaustion=False)
    assert list(once) == [rows[i] for i in range(3)]
    forever = iter(ColumnMappedTextInstructionIterableDataset(path, MAPPING, tokenizer))
    assert [next(forever) for _ in range(7)] == [rows[i % 3] for i in range(7)]


def test_hellaswag(tokenizer: Fast, tmp_path: Path, write_jsonl):
    rows = [
        {"ctx": "The fox", "endings": ["jumps over the lazy dog.", "is poor.", "ends.", "was."], "label": "0"},
        {"ctx": "The tower was", "endings": ["brown.", "built in Paris.", "moving.", "quick."], "label": 1},
    ]
    path = str(write_jsonl(tmp_path / "train.jsonl", rows))
    dataset = HellaSwag(path, tokenizer)
    samples = [dataset[0], dataset[1]]
    longest = max(
        len(sample["input_ids"])
        for sample in map(HellaSwag(path, tokenizer, pad_to_max_length=False).__getitem__, range(2))
    )
    assert {
        len(sample[key]) for sample in samples for key in ("input_ids", "labels", "attention_mask", "loss_mask")
    } == {-(-longest // 8) * 8}
    assert texts(tokenizer, samples[0]) == ("The fox", " jumps over the lazy dog.<|im_end|>")
    assert texts(tokenizer, samples[1]) == ("The tower was", " built in Paris.<|im_end|>")
    assert [int(label != -100) for label in samples[0]["labels"]] == samples[0]["loss_mask"]
    assert len(HellaSwag(path, tokenizer, num_samples_limit=1)) == 1
    bad = str(write_jsonl(tmp_path / "bad.jsonl", [{**rows[0], "label": 4}]))
    with pytest.raises(UserError, match=r"bad.jsonl line 1: `label` is '4'"):
        HellaSwag(bad, tokenizer)


def test_mock_batches():
    dataset = MockIterableDataset(vocab_size=50, seq_len=6, num_samples=7, batch_size=2)
    batches = list(dataset)
    assert len(batches) == len(list(dataset)) == 4
    for batch, again in zip(batches, dataset, strict=True):
        assert batch["input_ids"].shape == (2, 6)
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
        assert batch["input_ids"].max() < 50
        torch.testing.assert_close(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
        assert (batch["labels"][:, -1] == -100).all()
        assert batch["position_ids"].tolist() == [list(range(6))] * 2
        torch.testing.assert_close(batch["input_ids"], again["input_ids"])
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    with pytest.raises(UserError, match=r"`dataset.seq_len` is 1, but it must be at least 2"):
        MockIterableDataset(seq_len=1)


def test_mock_sentences(tokenizer: Fast):
    samples = build_unpacked_dataset(num_sentences=200, mean_len=20, std_len=6, vocab_size=30, max_sentence_len=24)
    lengths = [len(sample["input_ids"]) + 1 for sample in samples]
    assert len(samples) == 200
    assert 4 <= min(lengths) < max(lengths) == 24
    assert all(sample["labels"][:-1] == sample["input_ids"][1:] for sample in samples)
    assert {token for sample in samples for token in sample["input_ids"]} == set(range(1, 30))
    assert samples == build_unpacked_dataset(200, 20, 6, 30, 24, seed=0)
    assert samples != build_unpacked_dataset(200, 20, 6, 30, 24, seed=1)
    named = build_unpacked_dataset(tokenizer=tokenizer)
    assert named[0]["___PAD_TOKEN_IDS___"]["input_ids"] == tokenizer.pad_token_id


@pytest.mark.parametrize("max_sentence_len", [4, 64])
def test_mock_packs(max_sentence_len: int):
    packs = build_packed_dataset(num_blocks=5, block_size=70, max_sentence_len=max_sentence_len)
    assert len(packs) == 5
    assert all(len(packs[i]["input_ids"]) == 70 for i in range(5))
    assert sum(packs[0]["seq_lens_padded"]) == 70
