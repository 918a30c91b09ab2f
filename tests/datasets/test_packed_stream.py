"""Streams are packed as they come, and a packed stream goes on exactly where its state was taken."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_documents import PAD, document, unpacked
from torch.utils.data import IterableDataset

from nemo_automodel.components.datasets import packed_stream
from nemo_automodel.components.datasets.config import DataloaderConfig, PackedSequenceConfig
from nemo_automodel.components.datasets.llm.mock_iterable_dataset import MockIterableDataset
from nemo_automodel.components.datasets.loader import ResumableDataLoader, build_dataloader
from nemo_automodel.components.datasets.packed_rows import pack_dataset
from nemo_automodel.components.datasets.packed_stream import PackedStream
from nemo_automodel.components.datasets.streaming import IndexedStream
from nemo_automodel.shared.errors import NotSupportedYetError, UserError

SIZE = 40
LENGTHS = [3, 17, 9, 30, 5, 12, 40, 8, 21, 1, 14, 33, 6, 11, 2, 25, 19, 7, 10, 4, 38, 16, 13]


class Indexed(IndexedStream[dict]):
    """Documents of known lengths."""

    def __init__(self, lengths: list[int], repeats: bool = False) -> None:
        super().__init__(len(lengths), repeats)
        self.lengths = lengths

    def item(self, index: int) -> dict:
        return document(index, self.lengths[index])


class Foreign(IterableDataset):
    """A stream that knows nothing of places."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __iter__(self):
        return (document(number, length) for number, length in enumerate(self.lengths))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_stream, "_DOCUMENTS_IN_ORDER", 5)


def pack(source: IterableDataset, **options) -> PackedStream:
    config = PackedSequenceConfig(**{"packed_sequence_size": SIZE, "look_ahead": 6, **options})
    return pack_dataset(source, config, pad_token_id=PAD, seed=0, shuffle=False)


def loader_of(source: IterableDataset, num_workers: int = 0, shuffle: bool | None = False, **options):
    return build_dataloader(
        pack(source, **options),
        DataloaderConfig(num_workers=num_workers, shuffle=shuffle),
        local_batch_size=1,
        collate_fn=lambda rows: rows[0],
        seed=4,
        is_training=True,
    )


def epoch(loader: ResumableDataLoader, number: int = 0) -> list[dict]:
    loader.set_epoch(number)
    return list(loader)


def documents(rows: list[dict]) -> list[int]:
    """Numbers of the documents, in order."""
    found = []
    for row in rows:
        for doc in unpacked(row, len(row["input_ids"])):
            number = doc["input_ids"][0] // 1000
            assert doc == document(number, len(doc["input_ids"]))
            found.append(number)
    return found


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=40), strategy=st.sampled_from(["thd", "best_fit", "neat"]))
@pytest.mark.parametrize("kind", [Indexed, Foreign])
def test_every_document_once(kind, lengths: list[int], strategy: str):
    stream = pack(kind(lengths), packing_strategy=strategy)
    numbers = documents(list(stream))
    assert sorted(numbers) == list(range(len(lengths)))
    if strategy == "thd":
        assert numbers == list(range(len(lengths)))
    assert documents(list(stream)) == numbers, "each iteration begins anew"


def test_in_order_the_packs_are_those_of_the_whole_set():
    config = PackedSequenceConfig(packed_sequence_size=SIZE)
    whole = pack_dataset(list(Foreign(LENGTHS)), config, pad_token_id=PAD, seed=0, shuffle=False)
    assert list(pack(Indexed(LENGTHS))) == [whole[i] for i in range(len(whole))]


def test_only_a_chunk_is_read_ahead():
    read = []

    class Counting(Foreign):
        def __iter__(self):
            return (read.append(1) or doc for doc in super().__iter__())

    next(iter(pack(Counting([15] * 1000))))
    assert len(read) == 5


@pytest.mark.parametrize("strategy", ["thd", "best_fit", "neat"])
@pytest.mark.parametrize("kind", [Indexed, Foreign])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_where_its_state_was_taken(kind, strategy: str, num_workers: int):
    if kind is Foreign and num_workers:
        return  # every worker would read all of it
    shuffle = kind is Indexed or None
    make = lambda: loader_of(kind(LENGTHS), num_workers, shuffle, packing_strategy=strategy)  # noqa: E731
    expected = [epoch(make(), number) for number in range(2)]
    assert sorted(documents(expected[0])) == list(range(len(LENGTHS)))
    if kind is Indexed:
        assert documents(expected[0]) != documents(expected[1])
    loader = make()
    loader.set_epoch(0)
    states, batches = [], iter(loader)
    for _ in expected[0]:
        next(batches)
        states.append(json.dumps(loader.state_dict()) if num_workers == 0 else loader.state_dict())
    for position in range(0, len(states), 4 if num_workers else 1):
        resumed = make()
        state = states[position]
        resumed.load_state_dict(json.loads(state) if num_workers == 0 else state)
        assert epoch(resumed, 0) == expected[0][position + 1 :]
        assert epoch(resumed, 1) == expected[1]


@pytest.mark.parametrize("strategy", ["thd", "best_fit"])
@pytest.mark.parametrize("kind", [Indexed, Foreign])
def test_the_report_counts_every_document_once_however_often_it_resumes(kind, strategy: str):
    """Some documents are too long, so what is left out is counted, too; the place is taken after every row."""
    lengths = [length + 20 * (number % 5 == 1) for number, length in enumerate(LENGTHS)]
    whole = pack(kind(lengths), packing_strategy=strategy)
    expected = [(row, str(whole.report)) for row in whole]
    assert "dropped because they are longer than a row" in str(whole.report)
    for again in (False, True):  # in a new process, and in the same one
        stream, state = pack(kind(lengths), packing_strategy=strategy), None
        for row, report in expected:
            if not again:
                stream = pack(kind(lengths), packing_strategy=strategy)
            if state is not None:
                stream.load_state_dict(json.loads(state))
            assert next(iter(stream)) == row
            assert str(stream.report) == report
            state = json.dumps(stream.state_dict())
        stream.load_state_dict(json.loads(state))
        assert list(stream) == []
        assert str(stream.report) == str(whole.report)
    list(whole)
    assert str(whole.report) == str(stream.report), "of one pass, not of two"


def test_a_place_without_counts_is_that_of_an_older_checkpoint(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    stream = pack(Indexed(LENGTHS))
    rows = list(stream)
    taken = iter(stream)
    next(taken)
    state = {key: value for key, value in stream.state_dict().items() if key != "counts"}
    resumed = pack(Indexed(LENGTHS))
    resumed.load_state_dict(state)
    caplog.clear()
    assert list(resumed) == rows[1:]
    assert [line.partition(":")[0] for line in caplog.messages] == ["The stream, with what was read before"]


def test_resuming_twice_counts_on():
    expected = epoch(loader_of(Foreign(LENGTHS), shuffle=None))
    state = None
    for row in expected:
        loader = loader_of(Foreign(LENGTHS), shuffle=None)
        if state is not None:
            loader.load_state_dict(state)
        assert next(iter(loader)) == row
        state = loader.state_dict()


def test_a_stream_that_repeats():
    loader = loader_of(Indexed(LENGTHS, repeats=True))
    with pytest.raises(TypeError):
        len(loader)
    rows = list(itertools.islice(loader, 40))
    numbers = documents(rows)
    assert numbers[: len(LENGTHS)] == list(range(len(LENGTHS)))
    assert len(numbers) > 2 * len(LENGTHS)


def test_ranks_get_documents_of_their_own():
    shares = []
    for replica in range(2):
        loader = build_dataloader(
            pack(Indexed(LENGTHS)),
            DataloaderConfig(),
            local_batch_size=1,
            collate_fn=lambda rows: rows[0],
            seed=4,
            is_training=True,
            num_replicas=2,
            replica=replica,
        )
        shares.append(documents(list(loader)))
    assert len(shares[0]) == len(shares[1]) == len(LENGTHS) // 2
    assert set(shares[0]).isdisjoint(shares[1])


def test_the_length_is_not_known():
    with pytest.raises(TypeError, match="Only reading this stream to its end tells how long it is"):
        len(loader_of(Indexed(LENGTHS)))


def test_long_and_unlearned_documents(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    unlearned = {"input_ids": [1, 2], "labels": [-100, -100]}

    class Mixed(IterableDataset):
        def __iter__(self):
            return iter([document(0, 30), unlearned, document(1, 41), document(2, 20)])

    stream = pack(Mixed())
    assert documents(list(stream)) == [0, 2]
    assert caplog.messages == [
        "The beginning of the stream: Packed 2 documents with 50 tokens into 2 rows of 40: 37.5 % padding, 1 documents "
        "dropped because they are longer than a row, 1 dropped because nothing of them is learned."
    ]
    cut = list(pack(Mixed(), on_long="truncate"))
    assert [row["seq_lens"] for row in cut] == [[30], [40], [20]]
    with pytest.raises(UserError, match=r"^Document 3 of the stream has 41 tokens, but "):
        list(pack(Mixed(), on_long="error"))


def test_what_streams_cannot_do():
    with pytest.raises(UserError, match=r"`packed_sequence.max_packs: 3` needs a data set with a length"):
        pack(Foreign(LENGTHS), max_packs=3)
    with pytest.raises(UserError, match="`input_ids` of Document 1 of the stream has 2 dimensions: the data set"):
        next(iter(pack(MockIterableDataset())))
    with pytest.raises(UserError, match=r"`dataloader.shuffle: true` cannot shuffle a stream of the kind Foreign"):
        loader_of(Foreign(LENGTHS), shuffle=True)
    with pytest.raises(NotSupportedYetError, match="A stream of the kind Foreign on 2 ranks is not supported yet"):
        build_dataloader(
            pack(Foreign(LENGTHS)),
            DataloaderConfig(),
            local_batch_size=1,
            collate_fn=list,
            seed=0,
            is_training=True,
            num_replicas=2,
        )
