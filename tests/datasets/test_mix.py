"""Mixtures: shares in every stretch, nothing twice before its time, and going on exactly where it was."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import make_tokenizer
from torch.utils.data import IterableDataset

from nemo_automodel.components.datasets.config import DataloaderConfig, PackedSequenceConfig
from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset import (
    ColumnMappedTextInstructionDataset,
)
from nemo_automodel.components.datasets.llm.sample_stream import SampleStream
from nemo_automodel.components.datasets.loader import build_dataloader
from nemo_automodel.components.datasets.mix import MixedRows, MixedSet
from nemo_automodel.components.datasets.mix_stream import MixedStream, mix
from nemo_automodel.components.datasets.packed_rows import pack_dataset
from nemo_automodel.components.datasets.streaming import IndexedStream
from nemo_automodel.shared.errors import ConfigError, UserError

MAPPING = {"question": "q", "answer": "a"}


def numbered(set_number: int, size: int) -> list[dict]:
    return [{"input_ids": [set_number, row], "labels": [set_number, row]} for row in range(size)]


def mixed(sizes: list[int], weights: list[float], stopping: str = "first_exhausted", seed: int = 1) -> MixedRows:
    sets = [MixedSet(numbered(k, n), w, f"set {k}") for k, (n, w) in enumerate(zip(sizes, weights, strict=True))]
    return MixedRows(sets, stopping, seed)


def pairs(dataset: MixedRows) -> list[tuple[int, int]]:
    return [tuple(dataset[i]["input_ids"]) for i in range(len(dataset))]


mixtures = st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=5)


@given(sets=mixtures, seed=st.integers(0, 5), stopping=st.sampled_from(["first_exhausted", "all_exhausted"]))
@settings(deadline=None, max_examples=200)
def test_shares_hold_in_every_stretch(sets, seed, stopping):
    sizes, weights = [n for n, _ in sets], [w for _, w in sets]
    dataset = mixed(sizes, weights, stopping, seed)
    shares = np.array(weights) / sum(weights)
    rows = pairs(dataset)
    for order in (range(len(dataset)), dataset.shuffled(np.random.default_rng(seed))):
        drawn = np.zeros((len(rows) + 1, len(sizes)))
        for i, index in enumerate(order):
            drawn[i + 1] = drawn[i]
            drawn[i + 1, rows[index][0]] += 1
        # each set is within one row of share x "time", so within one row a set of share x rows
        allowed = 1 + len(sizes) * shares.max()
        assert np.abs(drawn - shares * np.arange(len(rows) + 1)[:, None]).max() <= allowed
    counts = np.array([[row[0] == k for row in rows].count(True) for k in range(len(sizes))])
    if stopping == "first_exhausted":
        assert len(set(rows)) == len(rows), "no row twice"
        assert any(count == size for count, size in zip(counts, sizes, strict=True))
        assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    else:
        assert set(rows) == {(k, row) for k, n in enumerate(sizes) for row in range(n)}, "every row of all"
    for k, size in enumerate(sizes):
        own = [row for number, row in rows if number == k]
        for start in range(0, len(own), size):
            assert len(set(own[start : start + size])) == len(own[start : start + size]), "a pass repeats no row"
    assert pairs(mixed(sizes, weights, stopping, seed)) == rows, "the seed decides"
    assert sorted(dataset.shuffled(np.random.default_rng(0))) == list(range(len(rows)))


def test_numbers_of_a_large_mixture(caplog):
    caplog.set_level(logging.INFO)
    dataset = mixed([10_000, 3_000, 50_000], [2.0, 1.0, 1.0])
    assert dataset.num_drawn == [pytest.approx(6000, abs=1), 3000, pytest.approx(3000, abs=1)]
    assert len(dataset) == sum(dataset.num_drawn)
    everything = mixed([100, 10], [1, 1], "all_exhausted")
    assert everything.num_drawn == [100, pytest.approx(100, abs=1)]
    assert caplog.messages[-1].startswith("Mixed 2 sets into ")
    assert "set 0 5" in caplog.messages[-1]
    assert "times its 10)" in caplog.messages[-1]
    first, second = ([row for k, row in pairs(everything) if k == 1][start : start + 10] for start in (0, 10))
    assert first != second, "each pass has an order of its own"
    assert pairs(mixed([30, 30], [1, 1], seed=1)) != pairs(mixed([30, 30], [1, 1], seed=2))


def test_several_rows_are_asked_for_together():
    dataset = mixed([9, 5, 7], [3, 1, 2])
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    assert dataset.__getitems__(order) == [dataset[i] for i in order]
    assert dataset.lengths(order) == [2] * len(order)
    assert dataset.__getitems__([]) == []


@pytest.fixture
def tables(tmp_path, write_jsonl):
    """Return a function (number, rows) → a column-mapped set over a file of that many rows."""
    tokenizer = make_tokenizer()

    def make(number: int, num_rows: int, **options):
        rows = [{"q": f"set {number} row {row}", "a": "good " * (1 + row % 4)} for row in range(num_rows)]
        path = str(write_jsonl(tmp_path / f"set{number}" / "train.jsonl", rows))
        return ColumnMappedTextInstructionDataset(path, MAPPING, tokenizer, **options)

    return make


def test_rows_keep_their_place_and_text(tables, tmp_path):
    first, second = tables(0, 6), tables(1, 8)
    inner = MixedRows([MixedSet(first, 1, "`first`"), MixedSet(second, 2, "`second`")])
    dataset = MixedRows([MixedSet(inner, 1, "inner"), MixedSet(numbered(9, 5), 1, "`numbers`")])
    for index in range(len(dataset)):
        found, row = dataset.locate(index)
        assert dataset[index] == found[row]
        if found is not first and found is not second:
            assert dataset.where(index) == f"`numbers` row {row + 1}"
        else:
            number = 0 if found is first else 1
            assert dataset.where(index) == f"{tmp_path / f'set{number}' / 'train.jsonl'} line {row + 1}"
    assert dataset.lengths(range(len(dataset))) == [len(dataset[i]["input_ids"]) for i in range(len(dataset))]


def loader_of(dataset, size: int = 4, **options):
    return build_dataloader(
        dataset,
        DataloaderConfig(**options),
        local_batch_size=size,
        collate_fn=lambda samples: [tuple(sample["input_ids"]) for sample in samples],
        seed=3,
        is_training=True,
    )


def epoch(loader, number: int = 0) -> list:
    loader.set_epoch(number)
    return list(itertools.chain.from_iterable(loader))


def test_a_loader_shuffles_within_the_shares_and_resumes():
    dataset = mixed([60, 60, 60], [4, 1, 1])
    plain = epoch(loader_of(dataset, shuffle=False))
    assert plain == pairs(dataset)
    first, second = epoch(loader_of(dataset)), epoch(loader_of(dataset), 1)
    assert sorted(first) == sorted(second) == sorted(plain)
    assert len({tuple(plain), tuple(first), tuple(second)}) == 3
    for rows in (first, second):
        assert [k for k, _ in rows] == [k for k, _ in plain]
    loader = loader_of(dataset)
    loader.set_epoch(1)
    stream = iter(loader)
    done = list(itertools.chain.from_iterable(next(stream) for _ in range(5)))
    resumed = loader_of(dataset, num_workers=1)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert done + epoch(resumed, 1) == second
    grouped = epoch(loader_of(dataset, group_by_length=True))
    assert sorted(grouped) == sorted(plain)


def test_a_mixture_is_packed_like_any_set(tables):
    dataset = MixedRows([MixedSet(tables(0, 20), 1, "a"), MixedSet(tables(1, 20), 1, "b")], seed=5)
    config = PackedSequenceConfig(packed_sequence_size=64)
    packed = pack_dataset(dataset, config, pad_token_id=3, seed=0, shuffle=False)
    documents = []
    for i in range(len(packed)):
        row, start = packed[i], 0
        for length in row["seq_lens"]:
            documents.append(list(row["input_ids"][start : start + length]))
            start += length
    assert documents == [dataset[i]["input_ids"] for i in range(len(dataset))]


# --- with streams ----------------------------------------------------------------------------------------------------


class Counted(IndexedStream[dict]):
    """A stream without rows behind it, like one from the network."""

    def __init__(self, set_number: int, size: int, repeats: bool = False) -> None:
        super().__init__(size, repeats)
        self.set_number = set_number

    def item(self, index: int) -> dict:
        return {"input_ids": [self.set_number, index]}


def mixed_stream(*sets, stopping: str = "first_exhausted", seed: int = 1):
    return mix([MixedSet(dataset, weight, f"set {k}") for k, (dataset, weight) in enumerate(sets)], stopping, seed)


def test_streams_of_numbered_rows_make_a_stream_of_the_map_style_mixture(tables):
    streamed, plain = tables(0, 12, streaming=True), tables(1, 30)
    dataset = mixed_stream((streamed, 1), (plain, 2))
    assert isinstance(dataset, SampleStream)
    expected = MixedRows([MixedSet(tables(0, 12), 1, "a"), MixedSet(plain, 2, "b")], seed=1)
    assert list(dataset) == [expected[i] for i in range(len(expected))]
    assert len(loader_of(dataset)) == -(-len(expected) // 4)
    assert epoch(loader_of(dataset)) == epoch(loader_of(dataset)) != epoch(loader_of(dataset), 1)
    forever = mixed_stream(*((tables(k, 5, streaming=True, repeat_on_exhaustion=True), 1) for k in (2, 3)))
    assert forever.repeats
    assert len(list(itertools.islice(forever, 33))) == 33


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
def test_merged_streams_keep_the_shares(stopping):
    weights = [3.0, 1.0, 0.5]
    sizes = [300, 60, 90]
    dataset = mixed_stream(*((Counted(k, n), w) for k, (n, w) in enumerate(zip(sizes, weights, strict=True))),
                           stopping=stopping)  # fmt: skip
    assert isinstance(dataset, MixedStream)
    rows = [tuple(sample["input_ids"]) for sample in dataset]
    shares = np.array(weights) / sum(weights)
    for end in range(1, len(rows) + 1):
        drawn = np.bincount([k for k, _ in rows[:end]], minlength=3)
        assert np.abs(drawn - shares * end).max() <= 3
    if stopping == "first_exhausted":
        assert len(set(rows)) == len(rows)
        assert {row for k, row in rows if k == 1} == set(range(60))
    else:
        assert set(rows) == {(k, row) for k, n in enumerate(sizes) for row in range(n)}
    with pytest.raises(TypeError, match="Only reading this stream to its end tells how long it is"):
        len(loader_of(dataset))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
def test_merged_streams_resume_anywhere(stopping, num_workers):
    def make():
        dataset = mixed_stream((Counted(0, 19), 2), (numbered(1, 11), 1), (Counted(2, 7), 1), stopping=stopping)
        return loader_of(dataset, 3, num_workers=num_workers)

    whole = [epoch(make(), number) for number in range(2)]
    assert whole[0] != whole[1]
    loader = make()
    for number in range(2):
        loader.set_epoch(number)
        done = []
        for batch in loader:
            done += batch
            if len(done) % 6 == 0 or num_workers == 0:
                resumed = make()
                resumed.load_state_dict(loader.state_dict())
                assert done + epoch(resumed, number) == whole[number]


def test_a_stream_that_repeats_never_ends_a_mixture():
    dataset = mixed_stream((Counted(0, 3, repeats=True), 1), (Counted(1, 12), 1))
    rows = [tuple(sample["input_ids"]) for sample in dataset]
    assert {row for k, row in rows if k == 1} == set(range(12))
    assert [k for k, _ in rows].count(0) >= 11


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_mixed():
    class Foreign(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(UserError, match="A mixture needs at least one set"):
        mixed([], [])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"The weight of set 0 is .*, but it must be positive. Use 1.0."):
            mixed([3], [weight])
    with pytest.raises(ConfigError, match=r"`stopping: first` of a mixture is not known. .* first_exhausted, all_exh"):
        mixed([3], [1], "first")
    with pytest.raises(UserError, match=r"The mixture would have .* rows, because the others are read again"):
        mixed([30_000, 30], [1e-5, 1], "all_exhausted")
    with pytest.raises(UserError, match="set 0 is a stream of the kind Foreign, which does not keep a place"):
        mixed_stream((Foreign(), 1), (numbered(1, 3), 1))
