"""Packs hold exactly the documents that went in, in the order the strategy promises."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import make_tokenizer

from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.llm.mock_iterable_dataset import MockIterableDataset
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.packing import pack_dataset
from nemo_automodel.shared.errors import ConfigError, UserError

PAD = 99


def document(number: int, length: int) -> dict:
    ids = [1000 * number + i for i in range(length)]
    return {"input_ids": ids, "labels": [-100, *[i + 1 for i in ids[1:]]] if length > 1 else [7]}


def pack(documents: list[dict], size: int, shuffle: bool = False, seed: int = 0, **options):
    config = PackedSequenceConfig(packed_sequence_size=size, **options)
    return pack_dataset(documents, config, pad_token_id=PAD, seed=seed, shuffle=shuffle)


def unpack(packed) -> list[list[dict]]:
    """Rebuild the documents of every row, checking all that a row promises."""
    rows = []
    for i in range(len(packed)):
        row, documents, start = packed[i], [], 0
        size = packed.report.size
        assert {len(row[key]) for key in ("input_ids", "labels", "position_ids")} == {size}
        for length in row["seq_lens"]:
            end = start + length
            documents.append({"input_ids": row["input_ids"][start:end], "labels": row["labels"][start:end]})
            assert row["position_ids"][start:end] == list(range(length))
            start = end
        assert row["input_ids"][start:] == [PAD] * (size - start)
        assert row["labels"][start:] == [-100] * (size - start)
        last = row["seq_lens"][-1]
        assert row["position_ids"][start:] == list(range(last, last + size - start))
        assert max(row["position_ids"]) < size
        assert row["seq_lens_padded"] == [*row["seq_lens"][:-1], last + size - start]
        rows.append(documents)
    return rows


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, size=st.integers(20, 40))
def test_next_fit_keeps_order_and_loses_nothing(lengths: list[int], size: int):
    documents = [document(number, length) for number, length in enumerate(lengths)]
    rows = unpack(pack(documents, size))
    assert [doc for row in rows for doc in row] == documents
    used = [sum(len(doc["input_ids"]) for doc in row) for row in rows]
    for total, following in zip(used, rows[1:], strict=False):
        assert total + len(following[0]["input_ids"]) > size, "a document that fits begins no new row"


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, size=st.integers(20, 40))
def test_longest_first_loses_nothing_and_leaves_no_room(lengths: list[int], size: int):
    documents = [document(number, length) for number, length in enumerate(lengths)]
    rows = unpack(pack(documents, size, packing_strategy="neat"))
    key = lambda doc: doc["input_ids"][0]  # noqa: E731
    assert sorted((doc for row in rows for doc in row), key=key) == documents
    assert [key(row[0]) for row in rows] == sorted(key(row[0]) for row in rows)
    used = [sum(len(doc["input_ids"]) for doc in row) for row in rows]
    assert sum(2 * total <= size for total in used) <= 1, "two half-empty rows would have been one"


def test_longest_first_by_hand():
    documents = [document(number, length) for number, length in enumerate([3, 6, 4, 7, 2, 5])]
    rows = unpack(pack(documents, 10, packing_strategy="neat"))
    # 7+3 first, then 6+4, then 5+2; rows in the order of their first document
    assert [[len(doc["input_ids"]) for doc in row] for row in rows] == [[3, 7], [6, 4], [2, 5]]


def test_shuffle_follows_the_seed():
    documents = [document(number, 5) for number in range(30)]

    def order(**options) -> list[int]:
        return [doc["input_ids"][0] // 1000 for row in unpack(pack(documents, 10, **options)) for doc in row]

    assert order() == list(range(30))
    assert order(shuffle=True, seed=1) == order(shuffle=True, seed=1)
    assert sorted(order(shuffle=True, seed=1)) == list(range(30))
    assert order(shuffle=True, seed=1) != order(shuffle=True, seed=2)


def test_long_documents_are_dropped_and_counted_or_refused(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    documents = [document(0, 8), document(1, 11), document(2, 10)]
    packed = pack(documents, 10)
    assert unpack(packed) == [[documents[0]], [documents[2]]]
    assert packed.report.num_too_long == 1
    assert caplog.messages == [
        "Packed 2 documents with 18 tokens into 2 rows of 10: 10.0 % padding, "
        "1 documents dropped because they are longer than a row."
    ]
    with pytest.raises(UserError, match=r"Row 2 has 11 tokens, but `packed_sequence.packed_sequence_size` is 10"):
        pack(documents, 10, drop_long_samples=False)
    with pytest.raises(UserError, match="None of the 3 documents can be packed: 3 are longer"):
        pack(documents, 5)


def test_documents_that_teach_nothing_are_left_out():
    documents = [document(0, 4), {"input_ids": [1, 2], "labels": [-100, -100]}]
    packed = pack(documents, 10)
    assert unpack(packed) == [[documents[0]]]
    assert packed.report.num_unlearned == 1


@pytest.mark.parametrize("strategy", ["thd", "neat"])
def test_max_packs(strategy: str):
    documents = [document(number, 6) for number in range(5)]
    assert unpack(pack(documents, 10, max_packs=2, packing_strategy=strategy)) == [[documents[0]], [documents[1]]]


def test_padding_and_loss_masks_are_folded_in():
    padded = {
        "input_ids": [5, 6, 7, PAD, PAD],
        "labels": [6, 7, 8, -100, -100],
        "attention_mask": [1, 1, 1, 0, 0],
        "loss_mask": [0, 1, 1, 0, 0],
    }
    assert unpack(pack([padded], 4)) == [[{"input_ids": [5, 6, 7], "labels": [-100, 7, 8]}]]


def test_squad_rows_are_those_of_the_unpacked_set(squad_dir):
    dataset = make_squad_dataset(make_tokenizer(), dataset_name=str(squad_dir))
    seen = []
    config = PackedSequenceConfig(packed_sequence_size=128)
    packed = pack_dataset(
        dataset, config, pad_token_id=PAD, seed=0, shuffle=False, progress=lambda *at: seen.append(at)
    )
    expected = [{key: dataset[i][key] for key in ("input_ids", "labels")} for i in range(len(dataset))]
    assert [doc for row in unpack(packed) for doc in row] == expected
    assert seen == [(64, 64)]


def test_prepacked_rows_pass_through():
    packed = pack([document(0, 4)], 10)
    assert pack(packed, 10, prepacked=True) is packed
    with pytest.raises(UserError, match="expects packed rows of 12 tokens, but the first row has 10 tokens"):
        pack(packed, 12, prepacked=True)
    with pytest.raises(UserError, match="but the first row has no `position_ids`"):
        pack([document(0, 4)], 10, prepacked=True)


def test_streams_cannot_be_packed():
    with pytest.raises(UserError, match="needs a data set with a length"):
        pack(MockIterableDataset(), 10)


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"packing_strategy: tdh` is not known. Did you mean `thd`"):
        PackedSequenceConfig(packing_strategy="tdh")
