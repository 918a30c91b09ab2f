"""Packs hold exactly the documents that went in, in the order the strategy promises."""

from __future__ import annotations

import itertools
import logging
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_documents import PAD, document, unpacked
from support.tiny import make_tokenizer

from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.packed_rows import pack_dataset
from nemo_automodel.components.datasets.packing import best_fit, next_fit
from nemo_automodel.shared.errors import ConfigError, UserError


def pack(documents: list[dict], size: int, shuffle: bool = False, seed: int = 0, **options):
    config = PackedSequenceConfig(packed_sequence_size=size, **options)
    return pack_dataset(documents, config, pad_token_id=PAD, seed=seed, shuffle=shuffle)


def unpack(packed) -> list[list[dict]]:
    """Rebuild the documents of every row, checking all that a row promises."""
    return [unpacked(packed[i], packed.report.size) for i in range(len(packed))]


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, size=st.integers(20, 40))
def test_next_fit_keeps_order_and_loses_nothing(lengths: list[int], size: int):
    documents = [document(number, length) for number, length in enumerate(lengths)]
    rows = unpack(pack(documents, size, packing_strategy="thd"))
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


def brute_best_fit(lengths: list[int], size: int, look_ahead: int) -> list[list[int]]:
    """The definition, written out: the oldest, then of the next ones what leaves the least room."""
    waiting, packs = list(range(len(lengths))), []
    while waiting:
        pack = [waiting.pop(0)]
        while fitting := [n for n in waiting[:look_ahead] if sum(lengths[i] for i in [*pack, n]) <= size]:
            best = max(fitting, key=lambda n: (lengths[n], -n))
            waiting.remove(best)
            pack.append(best)
        packs.append(pack)
    return packs


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, size=st.integers(20, 40), look_ahead=st.integers(1, 50))
def test_best_fit_equals_its_definition(lengths: list[int], size: int, look_ahead: int):
    packs = list(best_fit(enumerate(lengths), size, look_ahead))
    assert packs == brute_best_fit(lengths, size, look_ahead)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in pack) <= size for pack in packs)
    firsts = [pack[0] for pack in packs]
    assert firsts == sorted(firsts), "no document waits while a younger one begins a pack"


def fewest_packs(lengths: list[int], size: int) -> int:
    """The smallest number of packs there is, by trying all partitions of a few documents."""

    def place(number: int, free: list[int]) -> int:
        if number == len(lengths):
            return len(free)
        options = [place(number + 1, [*free, size - lengths[number]])]
        for i, room in enumerate(free):
            if lengths[number] <= room:
                options.append(place(number + 1, [*free[:i], room - lengths[number], *free[i + 1 :]]))
        return min(options)

    return place(0, [])


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7))
def test_best_fit_is_close_to_the_best_there_is(lengths: list[int]):
    num_packs = len(list(best_fit(enumerate(lengths), 20, 100)))
    assert fewest_packs(lengths, 20) <= num_packs <= fewest_packs(lengths, 20) + 1
    assert num_packs <= len(list(next_fit(enumerate(lengths), 20))) + 1


def test_best_fit_wastes_less_than_next_fit():
    rng = np.random.default_rng(0)
    documents = [document(number, int(length)) for number, length in enumerate(rng.integers(5, 60, 400))]
    waste = {name: padding(pack(documents, 100, packing_strategy=name)) for name in ("thd", "best_fit", "neat")}
    assert waste["best_fit"] < 0.05 < 0.2 < waste["thd"]
    assert padding(pack(documents, 100, packing_strategy="best_fit", look_ahead=1)) == waste["thd"]


def padding(packed) -> float:
    return 1 - sum(sum(packed[i]["seq_lens"]) for i in range(len(packed))) / (len(packed) * packed.report.size)


@pytest.mark.parametrize(("strategy", "read"), [("thd", 4), ("best_fit", 12)])
def test_packs_come_before_the_last_document_is_read(strategy: str, read: int):
    seen = []
    pieces = ((seen.append(number) or number, 5) for number in range(1000))
    strategies = {"thd": next_fit(pieces, 15), "best_fit": best_fit(pieces, 15, 9)}
    assert next(strategies[strategy]) == [0, 1, 2]
    assert len(seen) == read


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
    with pytest.raises(UserError, match="None of the 3 documents can be packed: 3 are longer than"):
        pack(documents, 5)


LONG = (
    "Row 2 has 11 tokens, but `packed_sequence.packed_sequence_size` is 10. Raise it, set `packed_sequence.on_long` to "
    "drop or truncate, or truncate with `dataset.seq_length`."
)


@pytest.mark.parametrize("options", [{"drop_long_samples": False}, {"on_long": "error"}])
def test_long_documents_are_refused(options: dict):
    documents = [document(0, 8), document(1, 11), document(2, 10)]
    with pytest.raises(UserError, match=f"^{re.escape(LONG)}$"):
        len(pack(documents, 10, **options))
    assert len(pack(documents, 10, on_long="drop", drop_long_samples=False)) == 2, "on_long is the newer word"


def test_long_documents_are_cut(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    unlearned = {"input_ids": list(range(12)), "labels": [-100] * 11 + [5]}
    documents = [document(0, 8), document(1, 11), unlearned]
    with pytest.raises(UserError, match=r"^Row 3 has 12 tokens, and `packed_sequence.packed_sequence_size: 10`"):
        len(pack(documents, 10, on_long="truncate"))
    cfg = PackedSequenceConfig(packed_sequence_size=10, on_long="truncate")
    packed = pack_dataset(documents, cfg, pad_token_id=PAD, seed=0, shuffle=False, bears_unlearned=True)
    cut = {key: value[:10] for key, value in document(1, 11).items()}
    assert unpack(packed) == [[document(0, 8)], [cut]]
    assert caplog.messages == [
        "Packed 2 documents with 18 tokens into 2 rows of 10: 10.0 % padding, 2 documents cut because they are longer "
        "than a row, 1 dropped because nothing of them is learned."
    ]


def test_documents_that_teach_nothing_are_left_out():
    documents = [document(0, 4), {"input_ids": [1, 2], "labels": [-100, -100]}]
    packed = pack(documents, 10)
    assert unpack(packed) == [[documents[0]]]
    assert packed.report.num_unlearned == 1


@pytest.mark.parametrize("strategy", ["thd", "best_fit", "neat"])
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
    packed = pack(dataset, 128)
    expected = [{key: dataset[i][key] for key in ("input_ids", "labels")} for i in range(len(dataset))]
    assert [doc for row in unpack(packed) for doc in row] == expected


def test_waiting_for_the_whole_set_shows_a_bar():
    moves = []

    class Bar:
        def move_to(self, done: float, detail: str = "") -> None:
            moves.append((done, detail))

        def close(self) -> None:
            moves.append("closed")

    documents = [document(number, 6) for number in range(3)]
    config = PackedSequenceConfig(packed_sequence_size=10)
    packed = pack_dataset(documents, config, pad_token_id=PAD, seed=0, shuffle=False, bar=Bar)
    assert moves == []
    assert len(packed) == len(packed) == 3
    assert moves[-2:] == [(3, "of 3 documents"), "closed"]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"labels": [1]}, "Row 1 of the data set has no `input_ids`, so it cannot be packed"),
        ({"input_ids": [1]}, "Row 1 of the data set has no `labels`, so it cannot be packed"),
        ({"input_ids": [1, 2], "labels": [1]}, "Row 1 of the data set has `labels` of another length"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "`input_ids` of Row 1 has 2 dimensions"),
        ("text", "Row 1 of the data set is text, but it must be a dict with `input_ids`"),
    ],
)
def test_samples_that_cannot_be_packed(sample, message: str):
    with pytest.raises(UserError, match=message):
        pack([sample], 10)


def test_prepacked_rows_pass_through():
    packed = pack([document(0, 4)], 10)
    assert pack(packed, 10, prepacked=True) is packed
    with pytest.raises(UserError, match="expects packed rows of 12 tokens, but the first row has 10 tokens"):
        pack(packed, 12, prepacked=True)
    with pytest.raises(UserError, match="but the first row has no `position_ids`"):
        pack([document(0, 4)], 10, prepacked=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing_strategy": "tdh"}, r"packing_strategy: tdh` is not known. Did you mean `thd`"),
        ({"look_ahead": 0}, "`packed_sequence.look_ahead` is 0, but it must be at least 1. Use 1000."),
        ({"on_long": "cut"}, r"`packed_sequence.on_long: cut` is not known. Known: drop, error, truncate."),
    ],
)
def test_bad_settings(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PackedSequenceConfig(**options)
