"""A row whose whole answer is cut off is refused wherever it is tokenised, or borne where the user says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.tiny import CHAT_TEMPLATE, make_tokenizer

from nemo_automodel.components.datasets.config import DataloaderConfig, PackedSequenceConfig
from nemo_automodel.components.datasets.content_key import key_of_dataset
from nemo_automodel.components.datasets.document_view import rows_of
from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset
from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
    ColumnMappedTextInstructionDataset,
)
from nemo_automodel.components.datasets.llm.sample_stream import bear_unlearned
from nemo_automodel.components.datasets.loader import build_dataloader
from nemo_automodel.components.datasets.mix import MixedSet
from nemo_automodel.components.datasets.mix_stream import mix
from nemo_automodel.components.datasets.packed_rows import pack_dataset
from nemo_automodel.components.datasets.utils import default_collater
from nemo_automodel.shared.errors import UserError

NUM_ROWS, CUT = 6, 4
"""The last row but one, line 5, is long."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path, write_jsonl) -> Path:
    rows = [{"q": "Where is it? " * (60 if i == CUT else 1), "a": f"Paris {i}"} for i in range(NUM_ROWS)]
    return write_jsonl(tmp_path / "train.jsonl", rows)


def table(data: Path, streaming: bool = False):
    mapping = {"question": "q", "answer": "a"}
    return ColumnMappedTextInstructionDataset(
        str(data), mapping, make_tokenizer(), seq_length=40, truncation=True, streaming=streaming
    )


def message(data: Path) -> str:
    return (
        f"{data} line 5 has 365 tokens, and `dataset.seq_length: 40` cuts off all 3 learned ones, so it teaches "
        "nothing. Raise `dataset.seq_length`, shorten or remove the row, or bear such rows with "
        "`data_check.max_unlearned_share`."
    )


def loader_of(dataset, num_workers: int = 0):
    return build_dataloader(
        dataset,
        DataloaderConfig(num_workers=num_workers, shuffle=False),
        local_batch_size=2,
        collate_fn=default_collater,
        seed=0,
        is_training=True,
    )


def packed(dataset, **options):
    cfg = PackedSequenceConfig(**{"packed_sequence_size": 64, "num_proc": 1, **options})
    return pack_dataset(dataset, cfg, pad_token_id=0, seed=0, shuffle=False)


WAYS = {
    "map-style": lambda data: loader_of(table(data)),
    "with a worker": lambda data: loader_of(table(data), num_workers=1),
    "streamed": lambda data: loader_of(table(data, streaming=True)),
    "streamed with a worker": lambda data: loader_of(table(data, streaming=True), num_workers=1),
    "mixed": lambda data: loader_of(mix([MixedSet(table(data), 1.0, "a"), MixedSet(table(data), 1.0, "b")])),
    "packed": lambda data: (packed(table(data))[i] for i in range(9)),
    "packed, not cached": lambda data: (packed(table(data), cache=False)[i] for i in range(9)),
    "packed stream": lambda data: packed(table(data, streaming=True)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_row_is_refused(way: str, data: Path):
    with pytest.raises(UserError, match=f"^{re.escape(message(data))}$"):
        list(WAYS[way](data))


def test_a_packed_row_is_refused_from_the_cache_too(data: Path):
    for _ in range(2):
        with pytest.raises(UserError, match=f"^{re.escape(message(data))}$"):
            len(packed(table(data)))


def test_a_cut_by_packing_is_refused(data: Path):
    mapping = {"question": "q", "answer": "a"}
    whole = ColumnMappedTextInstructionDataset(str(data), mapping, make_tokenizer())
    expected = message(data).replace("dataset.seq_length", "packed_sequence.packed_sequence_size").replace("40", "64")
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        len(packed(whole, on_long="truncate"))
    stream = ColumnMappedTextInstructionDataset(str(data), mapping, make_tokenizer(), streaming=True)
    with pytest.raises(UserError, match=r"^Document 5 of the stream has 364 tokens, and `packed_sequence.packed_seq"):
        list(packed(stream, on_long="truncate"))


@pytest.mark.parametrize("streaming", [False, True])
def test_borne_rows_teach_nothing_and_are_told(streaming: bool, data: Path, caplog: pytest.LogCaptureFixture):
    dataset = table(data, streaming)
    bear_unlearned(dataset)
    labels = [batch["labels"] for batch in loader_of(dataset)]
    has_labels = [bool((row != -100).any()) for batch in labels for row in batch]
    assert has_labels == [number != CUT for number in range(NUM_ROWS)]
    assert caplog.messages == [
        f"{data} line 5 has 365 tokens and loses its whole answer and teaches nothing at `seq_length: 40` (1 such rows "
        "so far). Raise `dataset.seq_length`."
    ]


def test_bearing_does_not_change_the_tokens(data: Path):
    strict, lenient = table(data), table(data)
    bear_unlearned(lenient)
    assert key_of_dataset(strict) == key_of_dataset(lenient) is not None
    report = packed(lenient)
    assert len(report) >= 1
    assert report.report.num_unlearned == 1


def test_invalid_rows_that_are_skipped(tmp_path: Path, write_jsonl):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = [
        {"messages": [{"role": "user", "content": "Where? " * n}, {"role": "assistant", "content": "Paris"}]}
        for n in (1, 60)
    ]
    path = str(write_jsonl(tmp_path / "chats.jsonl", chats))
    options = {"seq_length": 40, "truncation": True}
    with pytest.raises(UserError, match=r"line 2 has .* so it teaches nothing"):
        ChatDataset(path, tokenizer, **options)[1]
    dataset = ChatDataset(path, tokenizer, skip_invalid_samples=True, **options)
    assert set(dataset[1]["labels"]) == {-100}
    (first,), (second,) = rows_of(dataset, [0, 1])
    assert (first.is_skipped, second.is_skipped) == (False, True), "the gate counts it as skipped"
