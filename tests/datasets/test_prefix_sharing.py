"""Grouping documents that begin alike: what is shared, how groups are cut, and that nothing is lost."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from torch.utils.data import IterableDataset

from nemo_automodel.components.datasets.branches import branch_places
from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.packed_rows import pack_dataset
from nemo_automodel.components.datasets.packing import Document
from nemo_automodel.components.datasets.prefix_sharing import MIN_PREFIX, PrefixSharing, group, join
from nemo_automodel.components.datasets.utils import packed_sequence_thd_collater


def document(ids: list[int], num_prompt: int) -> Document:
    """Return a document whose first ``num_prompt`` positions have no label."""
    labels = [-100] * num_prompt + [*ids[num_prompt + 1 :], 9]
    return Document(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))


def split(shared: Document) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of the documents that a shared one stands for."""
    if shared.branches is None:
        return [(shared.ids.tolist(), shared.labels.tolist())]
    prefix, found, start = int(shared.branches[0]), [], int(shared.branches[0])
    for length in shared.branches[1:].tolist():
        parts = [np.concatenate([v[:prefix], v[start : start + length]]).tolist() for v in (shared.ids, shared.labels)]
        found.append((parts[0], parts[1]))
        start += length
    assert start == len(shared.ids)
    return found


def test_places_of_prefix_and_branches():
    positions, numbers = branch_places(np.array([3, 2, 1], dtype=np.int32))
    assert positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert numbers.tolist() == [0, 0, 0, 1, 1, 2]


def test_questions_on_one_paragraph():
    paragraph = list(range(100, 120))
    documents = [document([*paragraph, 1, 2, 3], 21), document([*paragraph, 4, 5], 20), document([7] * 22, 3)]
    shared, other = PrefixSharing(100, shuffle=False)(documents)
    assert other is documents[2]
    assert shared.ids.tolist() == [*paragraph, 1, 2, 3, 4, 5]
    assert shared.branches.tolist() == [20, 3, 2]
    assert shared.num_saved_tokens == 20
    assert other.num_saved_tokens == 0
    assert split(shared) == [(d.ids.tolist(), d.labels.tolist()) for d in documents[:2]]


def test_answers_to_one_prompt_keep_the_position_that_predicts_them():
    """The last token of the prompt is the same in both, but its label is the answer's first token."""
    prompt = list(range(100, 130))
    documents = [document([*prompt, 1, 2], 29), document([*prompt, 3], 29)]
    (shared,) = PrefixSharing(100, shuffle=False)(documents)
    assert shared.branches.tolist() == [29, 3, 2]
    assert shared.ids[29:].tolist() == [129, 1, 2, 129, 3]
    assert shared.labels[29:].tolist() == [1, 2, 9, 3, 9]


def test_learned_positions_are_never_shared():
    ids = list(range(100, 140))
    one, other = document([*ids, 1], 25), document([*ids, 2], 18)
    (shared,) = PrefixSharing(200, shuffle=False)([one, other])
    assert shared.branches[0] == 18
    assert (shared.labels != -100).sum() == sum((d.labels != -100).sum() for d in (one, other))
    identical = PrefixSharing(200, shuffle=False)([one, one])
    assert identical[0].branches.tolist() == [25, 16, 16], "doubles are learned twice, as without sharing"


def test_short_prefixes_are_left_alone():
    template = list(range(MIN_PREFIX - 1))
    documents = [document([*template, 50, 51, 52], 17), document([*template, 60, 61, 62], 17)]
    assert PrefixSharing(100, shuffle=False)(documents) == documents


def test_a_group_longer_than_a_row_becomes_several_with_a_prefix_each():
    paragraph = list(range(100, 140))
    documents = [document([*paragraph, *range(number, number + 10)], 45) for number in range(7)]
    found = PrefixSharing(75, shuffle=False)(documents)
    assert len(found) == 3
    assert all(len(one.ids) <= 75 for one in found)
    assert sum(one.num_saved_tokens for one in found) == 4 * 40
    rows = sorted(pair for one in found for pair in split(one))
    assert rows == sorted((d.ids.tolist(), d.labels.tolist()) for d in documents)


def test_documents_that_begin_alike_are_found_apart_from_each_other():
    first, second = list(range(100, 120)), list(range(200, 220))
    documents = [document([*part, number], 19) for number in range(3) for part in (first, second)]
    documents.insert(2, document(list(range(300, 325)), 19))
    found = PrefixSharing(100, shuffle=False)(documents)
    assert [one.ids.tolist() for one in found] == [
        [*first[:19], 119, 0, 119, 1, 119, 2],
        [*second[:19], 219, 0, 219, 1, 219, 2],
        list(range(300, 325)),
    ]


def best_saving(documents: list[Document], size: int, min_prefix: int) -> int:
    """Return the most tokens that any cut into consecutive groups saves, by trying all cuts."""

    def saving(part: list[Document]) -> int:
        if len(part) == 1:
            return 0
        limit = min(int((d.labels != -100).argmax()) for d in part)
        prefix = next(
            (i for i in range(limit) if len({int(d.ids[i]) for d in part}) > 1),
            limit,
        )
        total = sum(len(d.ids) for d in part) - prefix * (len(part) - 1)
        return prefix * (len(part) - 1) if prefix >= min_prefix and total <= size else -(10**9)

    best = 0
    for cuts in itertools.product([False, True], repeat=len(documents) - 1):
        parts, part = [], [documents[0]]
        for cut, one in zip(cuts, documents[1:], strict=True):
            if cut:
                parts.append(part)
                part = []
            part.append(one)
        best = max(best, sum(map(saving, [*parts, part])))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_no_other_cut_saves_more(seed):
    rng = random.Random(seed)
    documents = []
    for _ in range(9):
        ids = [1] * rng.randrange(2, 6) + [2] * rng.randrange(4) + [rng.randrange(3, 6) for _ in range(4)]
        documents.append(document(ids, rng.randrange(2, len(ids) - 1)))
    groups = list(group(documents, 30, 2))
    assert [start for start, _, _ in groups] == [0, *(end for _, end, _ in groups[:-1])]
    assert groups[-1][1] == len(documents)
    joined = [join(documents[start:end], prefix) for start, end, prefix in groups]
    assert max(len(one.ids) for one in joined) <= 30
    assert sum(one.num_saved_tokens for one in joined) == best_saving(documents, 30, 2)
    assert [pair for one in joined for pair in split(one)] == [(d.ids.tolist(), d.labels.tolist()) for d in documents]


def test_groups_are_shuffled_whole_and_the_same_way_again():
    documents = [document([*range(30 * number, 30 * number + 20), i], 19) for number in range(10) for i in range(3)]
    plain, mixed = (PrefixSharing(100, shuffle=mix)(documents) for mix in (False, True))
    again = PrefixSharing(100, shuffle=True)(documents)
    assert [d.ids.tolist() for d in mixed] == [d.ids.tolist() for d in again]
    assert [d.ids.tolist() for d in mixed] != [d.ids.tolist() for d in plain]
    assert sorted(d.ids.tolist() for d in mixed) == sorted(d.ids.tolist() for d in plain)
    assert len(plain) == 10


# --- through the packer ----------------------------------------------------------------------------------------------


def samples_of(documents: list[Document]) -> list[dict]:
    return [{"input_ids": one.ids.tolist(), "labels": one.labels.tolist()} for one in documents]


def paragraphs(num: int, questions: int = 3) -> list[Document]:
    return [
        document([*range(1000 * number, 1000 * number + 20), 7, 100 * number + i, 8], 20)
        for number in range(1, num + 1)
        for i in range(questions)
    ]


def pack(documents: list[Document], size: int = 80, shuffle: bool = False, **settings):
    cfg = PackedSequenceConfig(packed_sequence_size=size, share_prefix=True, cache=False, **settings)
    return pack_dataset(samples_of(documents), cfg, pad_token_id=0, seed=1, shuffle=shuffle)


def test_rows_tell_branches_and_the_report_tells_what_was_saved(caplog):
    caplog.set_level("INFO")
    alone = document([*range(500, 530)], 5)
    packed = pack([*paragraphs(2), alone])
    assert len(packed) == 2
    first, second = packed[0], packed[1]
    assert first["seq_lens"] == [29, 29]
    positions = [*range(20), 20, 21, 22, 20, 21, 22, 20, 21, 22]
    assert first["position_ids"][:58] == positions * 2
    assert first["branch_ids"] == ([0] * 20 + [1] * 3 + [2] * 3 + [3] * 3) * 2 + [0] * 22
    assert second["seq_lens"] == [30]
    assert "branch_ids" not in second, "rows without branches stay as they are"
    both = packed_sequence_thd_collater([first, second])
    assert both["branch_ids"].tolist() == [first["branch_ids"], [0] * 80]
    assert "branch_ids" not in packed_sequence_thd_collater([second])
    assert packed.report.num_documents == 7
    assert "7 documents with 88 tokens into 2 rows of 80" in caplog.text
    assert "; prefix sharing saved 80 tokens, 47.6 %." in caplog.text


@pytest.mark.parametrize("strategy", ["thd", "best_fit", "neat"])
def test_a_shuffle_moves_groups_whole_and_loses_nothing(strategy):
    documents = paragraphs(200)
    plain, shuffled = (pack(documents, shuffle=mix, packing_strategy=strategy) for mix in (False, True))
    rows = [[packed[i]["input_ids"] for i in range(len(packed))] for packed in (plain, shuffled)]
    assert plain.report.num_saved_tokens >= 0.98 * 200 * 40
    assert shuffled.report.num_saved_tokens >= 0.98 * 200 * 40, "groups at the borders of windows are cut"
    assert rows[0] != rows[1]
    for packed in (plain, shuffled):
        learned = [
            pair
            for i in range(len(packed))
            for pair in zip(packed[i]["input_ids"], packed[i]["labels"], strict=True)
            if pair[1] != -100
        ]
        assert sorted(learned) == sorted(
            pair
            for one in documents
            for pair in zip(one.ids.tolist(), one.labels.tolist(), strict=True)
            if pair[1] != -100
        )


def test_a_stream_shares_prefixes_and_goes_on_where_it_stopped():
    class Rows(IterableDataset):
        def __iter__(self):
            return iter(samples_of(paragraphs(300)))

    cfg = PackedSequenceConfig(packed_sequence_size=80, share_prefix=True)

    def stream():
        return pack_dataset(Rows(), cfg, pad_token_id=0, seed=1, shuffle=False)

    whole = list(stream())
    assert sum("branch_ids" in row for row in whole) == len(whole)
    begun = stream()
    rows = iter(begun)
    head = [next(rows) for _ in range(70)]
    resumed = stream()
    resumed.load_state_dict(begun.state_dict())
    assert head + list(resumed) == whole
