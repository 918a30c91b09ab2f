"""A loader over rows that are still being made: the same batches as over rows that are all there, and no waiting."""

from __future__ import annotations

import json

import pytest
from support.packed_documents import document

from nemo_automodel.components.datasets import tokenize_workers
from nemo_automodel.components.datasets.config import DataloaderConfig, PackedSequenceConfig
from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
    ColumnMappedTextInstructionDataset,
)
from nemo_automodel.components.datasets.loader import ResumableDataLoader, build_dataloader
from nemo_automodel.components.datasets.packed_rows import PackedRows, pack_dataset
from nemo_automodel.shared.errors import UserError

DOCUMENTS = [document(number, 6) for number in range(23)]


class Counted(list):
    """Documents that count how often they are asked for."""

    num_read = 0

    def __getitem__(self, index):
        Counted.num_read = max(Counted.num_read, index + 1)
        return super().__getitem__(index)


def packed(documents=DOCUMENTS, size: int = 10, shuffle: bool = False, **options) -> PackedRows:
    config = PackedSequenceConfig(packed_sequence_size=size, **options)
    return pack_dataset(documents, config, pad_token_id=0, seed=0, shuffle=shuffle)


def first_tokens(samples: list[dict]) -> list[int]:
    return [sample["input_ids"][0] // 1000 for sample in samples]


def loader_of(rows, size: int = 4, replicas: tuple[int, int] = (1, 0), **options) -> ResumableDataLoader:
    return build_dataloader(
        rows,
        DataloaderConfig(**options),
        local_batch_size=size,
        collate_fn=first_tokens,
        seed=5,
        is_training=True,
        num_replicas=replicas[0],
        replica=replicas[1],
    )


def epoch(loader: ResumableDataLoader, number: int = 0) -> list[list[int]]:
    loader.set_epoch(number)
    return list(loader)


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Read documents of a set that is not ours one by one."""
    monkeypatch.setattr("nemo_automodel.components.datasets.row_tokens._SAMPLES_AT_ONCE", 1)


def test_the_first_epoch_is_read_as_it_is_made_and_later_ones_are_shuffled():
    loader = loader_of(packed())
    assert epoch(loader) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [16, 17, 18, 19],
        [20, 21, 22],
    ]
    later = [epoch(loader, number) for number in (1, 2)]
    assert [sorted(row for batch in batches for row in batch) for batches in later] == [list(range(23))] * 2
    assert later[0] != later[1]
    assert epoch(loader_of(packed()), 2) == later[1]
    assert epoch(loader_of(packed(), shuffle=False), 1) == epoch(loader)
    documents = sorted(row for batch in epoch(loader_of(packed(shuffle=True))) for row in batch)
    assert documents == list(range(23))
    assert epoch(loader_of(packed(shuffle=True))) != epoch(loader)


def test_a_batch_waits_for_its_own_rows_only():
    Counted.num_read = 0
    rows = packed(Counted(DOCUMENTS))
    assert Counted.num_read == 2, "the first pack is closed by the document that begins the next"
    loader = loader_of(rows)
    batches = iter(loader)
    assert Counted.num_read == 2
    for number in range(4):
        next(batches)
        assert Counted.num_read == 4 * (number + 1) + 1
        assert loader.grows
    assert loader.at_least(4)
    assert Counted.num_read == 17
    assert loader.at_least(5)
    assert Counted.num_read == 18
    assert not loader.at_least(7)
    assert Counted.num_read == 23
    assert not loader.grows
    assert len(loader) == 6


@pytest.mark.parametrize("replica", [0, 1, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("start", range(6))
def test_growing_rows_give_the_batches_of_rows_that_are_there(replica: int, drop_last: bool, start: int):
    results = []
    for is_complete in (False, True):
        rows = packed()
        if is_complete:
            len(rows)
        loader = loader_of(rows, size=2, replicas=(3, replica), drop_last=drop_last)
        loader.load_state_dict({"epoch": 0, "is_finished": False, "num_rows_done": 3 * start, "num_rows": None})
        counts = [loader.at_least(n) for n in range(7)]
        results.append((list(loader), counts, len(loader)))
    assert results[0] == results[1]
    assert results[0][1] == [n <= results[0][2] for n in range(7)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_at_every_position(num_workers: int):
    make = lambda: loader_of(packed(shuffle=True), num_workers=num_workers)  # noqa: E731
    expected = [epoch(make(), number) for number in range(2)]
    for number in range(2):
        loader = make()
        loader.set_epoch(number)
        states, batches = [json.dumps(loader.state_dict())], iter(loader)
        for _ in expected[number]:
            next(batches)
            states.append(json.dumps(loader.state_dict()))
        assert next(batches, None) is None
        states.append(json.dumps(loader.state_dict()))
        for position in range(0, len(states), 3 if num_workers else 1):
            resumed = make()
            resumed.load_state_dict(json.loads(states[position]))
            assert epoch(resumed, number) == expected[number][position:]
            assert epoch(resumed, 1) == expected[1] if number == 0 else True


def test_other_data_is_refused():
    loader = loader_of(packed())
    next(iter(loader))
    assert loader.state_dict()["num_rows"] is None, "nobody waits for the end to save a checkpoint"
    loader_of(packed(DOCUMENTS[:20])).load_state_dict(loader.state_dict())  # as far as it is known, it is the same
    len(loader)
    state = loader.state_dict()
    for documents in (DOCUMENTS[:22], [*DOCUMENTS, document(30, 6)]):
        with pytest.raises(
            UserError, match=rf"has {len(documents)} rows, but it had 23 when the checkpoint was written"
        ):
            loader_of(packed(documents)).load_state_dict(state)
    loader_of(packed()).load_state_dict(state)


def test_nothing_for_a_batch():
    loader = loader_of(packed(DOCUMENTS[:3]), size=10, drop_last=True)
    with pytest.raises(UserError, match="The data set has 3 rows, but one batch takes 10"):
        next(iter(loader))


def test_grouping_by_length_leaves_packed_rows_as_they_are():
    assert epoch(loader_of(packed(), group_by_length=True), 1) == epoch(loader_of(packed()), 1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache", [True, False])
def test_workers_of_the_loader_see_rows_that_come_later(
    tokenizer, tmp_path, write_jsonl, monkeypatch, num_workers, cache
):
    monkeypatch.setattr(tokenize_workers, "_FIRST_ROWS_AT_ONCE", 5)
    monkeypatch.setattr(tokenize_workers, "_ROWS_AT_ONCE", 20)
    monkeypatch.setenv("NEMO_AUTOMODEL_CACHE", str(tmp_path / "cache"))
    rows = [{"q": "what " + "so " * (i % 7), "a": f"answer {i}"} for i in range(200)]
    path = str(write_jsonl(tmp_path / "train.jsonl", rows))

    def batches(cache: bool) -> list[list[list[int]]]:
        dataset = ColumnMappedTextInstructionDataset(path, {"question": "q", "answer": "a"}, tokenizer)
        growing = packed(dataset, size=100, shuffle=True, cache=cache)
        loader = build_dataloader(
            growing,
            DataloaderConfig(num_workers=num_workers),
            local_batch_size=2,
            collate_fn=lambda samples: [sample["input_ids"] for sample in samples],
            seed=5,
            is_training=True,
        )
        return epoch(loader) + epoch(loader, 1)

    dataset = ColumnMappedTextInstructionDataset(path, {"question": "q", "answer": "a"}, tokenizer)
    own = packed([dataset[i] for i in range(200)], size=100, shuffle=True)
    expected = [own[i]["input_ids"] for i in range(len(own))]
    found = batches(cache)
    assert [row for batch in found[: len(found) // 2] for row in batch] == expected
    assert batches(True) == found
