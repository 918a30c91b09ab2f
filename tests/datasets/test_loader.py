"""Loaders: every row once, the same order every time, and going on exactly where the state was taken."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from nemo_automodel.components.datasets.config import DataloaderConfig
from nemo_automodel.components.datasets.llm.column_mapped_text_instruction_iterable_dataset import (
    ColumnMappedTextInstructionIterableDataset,
)
from nemo_automodel.components.datasets.llm.mock_iterable_dataset import MockIterableDataset
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.loader import build_dataloader, shuffles
from nemo_automodel.components.datasets.streaming import IndexedStream
from nemo_automodel.components.datasets.utils import default_collater
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError, UserError

ROWS = [{"input_ids": [i] * (1 + i % 7)} for i in range(23)]


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def first_tokens(samples: list[dict]) -> list[int]:
    return [sample["input_ids"][0] for sample in samples]


def build(dataset=ROWS, *, size: int = 4, seed: int = 5, training: bool = True, replicas=(1, 0), **options):
    return build_dataloader(
        dataset,
        DataloaderConfig(**options),
        local_batch_size=size,
        collate_fn=first_tokens,
        seed=seed,
        is_training=training,
        num_replicas=replicas[0],
        replica=replicas[1],
    )


def epoch(loader, number: int = 0) -> list:
    loader.set_epoch(number)
    return list(loader)


class Numbers(IndexedStream[dict]):
    def item(self, index: int) -> dict:
        return {"input_ids": [index]}


def test_every_row_once_and_the_last_batch_kept():
    loader = build(training=False)
    assert epoch(loader) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [16, 17, 18, 19],
        [20, 21, 22],
    ]
    assert len(loader) == 6
    assert list(loader) == list(loader), "validation iterates the same epoch again and again"


def test_shuffle_follows_seed_and_epoch():
    loader = build()
    first = epoch(loader, 0)
    assert sorted(flat(first)) == list(range(23))
    assert first != epoch(loader, 1)
    assert first == epoch(loader, 0) == epoch(build(), 0)
    assert first != epoch(build(seed=6), 0)
    assert epoch(build(shuffle=False)) == epoch(build(training=False))
    assert epoch(build(training=False, shuffle=True)) == first
    assert (shuffles(DataloaderConfig(), True), shuffles(DataloaderConfig(), False)) == (True, False)


def test_drop_last():
    loader = build(drop_last=True)
    assert [len(batch) for batch in epoch(loader)] == [4] * 5
    assert len(loader) == 5
    with pytest.raises(UserError, match="has 23 rows, but one batch takes 30"):
        build(size=30, drop_last=True)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_resume_at_every_position(num_workers: int, grouped: bool):
    options = {"num_workers": num_workers, "group_by_length": grouped}
    undisturbed = [epoch(build(**options), number) for number in range(2)]
    loader = build(**options)
    loader.set_epoch(0)
    states, stream = [], iter(loader)
    for _ in undisturbed[0]:
        states.append(json.dumps(loader.state_dict()))
        next(stream)
    states.append(json.dumps(loader.state_dict()))
    assert next(stream, None) is None
    states.append(json.dumps(loader.state_dict()))
    for position in range(0, len(states), 3) if num_workers else range(len(states)):
        resumed = build(**options)
        resumed.load_state_dict(json.loads(states[position]))
        assert epoch(resumed, 0) == undisturbed[0][position:]
        assert epoch(resumed, 1) == undisturbed[1]
        assert epoch(resumed, 0) == undisturbed[0]


def test_states_do_not_depend_on_workers_or_batch_size():
    loader = build()
    rows = flat(epoch(loader))
    stream = iter(loader)
    next(stream), next(stream)
    for options in ({"num_workers": 1}, {"size": 3}, {"size": 8}):
        resumed = build(**options)
        resumed.load_state_dict(loader.state_dict())
        assert flat(epoch(resumed)) == rows[8:]


def test_a_state_saved_after_resuming_counts_on():
    undisturbed = epoch(build())
    state = {}
    for position in range(6):
        loader = build()
        if position:
            loader.load_state_dict(state)
        assert next(iter(loader)) == undisturbed[position]
        state = loader.state_dict()


def test_a_state_of_another_epoch_is_forgotten():
    loader = build()
    next(iter(loader))
    resumed = build()
    resumed.load_state_dict(loader.state_dict())
    assert epoch(resumed, 1) == epoch(build(), 1)


@pytest.mark.parametrize("make_dataset", [lambda: ROWS, lambda: Numbers(23)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_states_taken_between_epochs(make_dataset, num_workers: int):
    make = lambda: build(make_dataset(), num_workers=num_workers)  # noqa: E731
    expected = [epoch(make(), number) for number in range(2)]
    loader = make()
    fresh = loader.state_dict()
    assert epoch(loader, 0) == expected[0]
    loader.set_epoch(1)
    for state, number in ((fresh, 0), (loader.state_dict(), 1)):
        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state, "a state that was loaded can be saved again before it is used"
        assert epoch(resumed, number) == expected[number]


def test_other_data_is_refused():
    loader = build()
    with pytest.raises(UserError, match="The data set has 22 rows, but it had 23 when the checkpoint was written"):
        build(ROWS[:22]).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("grouped", [False, True])
def test_replicas_share_each_global_batch(grouped: bool):
    whole = epoch(build(size=6, group_by_length=grouped))
    parts = [epoch(build(size=2, replicas=(3, replica), group_by_length=grouped)) for replica in range(3)]
    assert {len(part) for part in parts} == {4}
    for number, batch in enumerate(whole[:3]):
        assert sorted(flat(part[number] for part in parts)) == sorted(batch)
    rows = flat(row for part in parts for row in part)
    assert len(rows) == len(set(rows)) == 21, "every replica gets the same number of rows"
    loader = build(size=2, replicas=(3, 1))
    stream = iter(loader)
    next(stream)
    resumed = build(size=2, replicas=(3, 1))
    resumed.load_state_dict(loader.state_dict())
    assert epoch(resumed) == epoch(build(size=2, replicas=(3, 1)))[1:]


def test_group_by_length():
    rng = np.random.default_rng(0)
    rows = [{"input_ids": [i] * int(length)} for i, length in enumerate(rng.integers(1, 100, 403))]
    loader = build(rows, size=8, group_by_length=True)
    batches = epoch(loader)
    assert sorted(flat(batches)) == list(range(403))
    assert [len(batch) for batch in batches] == [8] * 50 + [3]
    assert batches == epoch(build(rows, size=8, group_by_length=True))

    def padding(batches: list[list[int]]) -> int:
        lengths = [[len(rows[i]["input_ids"]) for i in batch] for batch in batches]
        return sum(max(batch) * len(batch) - sum(batch) for batch in lengths)

    assert padding(batches) < 0.1 * padding(epoch(build(rows, size=8)))
    longest = [max(len(rows[i]["input_ids"]) for i in batch) for batch in batches]
    assert longest != sorted(longest, reverse=True), "batches are shuffled"


def test_group_by_length_asks_tokenised_rows(tokenizer, squad_dir):
    dataset = make_squad_dataset(tokenizer, dataset_name=str(squad_dir))
    options = {"local_batch_size": 4, "collate_fn": default_collater, "seed": 0, "is_training": True}
    batches = list(build_dataloader(dataset, DataloaderConfig(group_by_length=True), **options))
    num_padding = sum(int(batch["padding_mask"].sum()) for batch in batches)
    shuffled = list(build_dataloader(dataset, DataloaderConfig(), **options))
    assert num_padding < 0.5 * sum(int(batch["padding_mask"].sum()) for batch in shuffled)
    count = lambda batches: sum(int((batch["labels"] != -100).sum()) for batch in batches)  # noqa: E731
    assert count(batches) == count(shuffled)


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_streams_resume(options: dict):
    make = lambda: build(Numbers(11), size=2, **options)  # noqa: E731
    undisturbed = [epoch(make(), number) for number in range(2)]
    assert sorted(flat(undisturbed[0])) == list(range(11))
    assert undisturbed[0] != undisturbed[1]
    loader = make()
    assert len(loader) == len(undisturbed[0])
    loader.set_epoch(0)
    stream, states = iter(loader), []
    for _ in undisturbed[0]:
        next(stream)
        states.append(loader.state_dict())
    assert next(stream, None) is None
    states.append(loader.state_dict())
    assert epoch(loader, 1) == undisturbed[1]
    for position, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(state)
        assert epoch(resumed, 0) == undisturbed[0][position + 1 :]
        assert epoch(resumed, 1) == undisturbed[1]


def test_streams_are_shared_out():
    shares = [epoch(build(Numbers(11), size=2, replicas=(3, replica))) for replica in range(3)]
    rows = flat(row for share in shares for row in share)
    assert len(rows) == len(set(rows)) == 9
    assert {len(share) for share in shares} == {2}
    assert epoch(build(Numbers(4), size=2, shuffle=False)) == [[0, 1], [2, 3]]


def test_streams_that_repeat():
    loader = build(Numbers(5, repeats=True), size=2)
    with pytest.raises(TypeError, match="has no length"):
        len(loader)
    stream = iter(loader)
    seen = [next(stream) for _ in range(10)]
    rounds = np.array(seen).reshape(4, 5)
    assert [sorted(row) for row in rounds.tolist()] == [list(range(5))] * 4
    assert rounds[0].tolist() != rounds[1].tolist()
    resumed = build(Numbers(5, repeats=True), size=2)
    state = loader.state_dict()
    following = [next(stream) for _ in range(5)]
    resumed.load_state_dict(state)
    stream = iter(resumed)
    assert [next(stream) for _ in range(5)] == following


def test_ready_made_batches():
    dataset = MockIterableDataset(vocab_size=20, seq_len=4, num_samples=6, batch_size=2)
    loader = build(dataset, batch_size=None, shuffle=False)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for batch, expected in zip(batches, dataset, strict=True):
        assert batch.keys() == expected.keys()
        torch.testing.assert_close(batch["input_ids"], expected["input_ids"])
    mapped = [{"x": torch.full((2, 3), i)} for i in range(4)]
    assert [batch["x"][0, 0].item() for batch in build(mapped, batch_size=None, shuffle=False)] == [0, 1, 2, 3]


def test_batch_size_key():
    assert [len(batch) for batch in epoch(build(batch_size=10))] == [10, 10, 3]


def test_column_mapped_stream_through_workers(tokenizer, tmp_path, write_jsonl):
    path = str(write_jsonl(tmp_path / "train.jsonl", [{"q": f"question {i}", "a": f"{i}"} for i in range(9)]))
    dataset = ColumnMappedTextInstructionIterableDataset(
        path, {"question": "q", "answer": "a"}, tokenizer, repeat_on_exhaustion=False
    )
    loader = build_dataloader(
        dataset,
        DataloaderConfig(num_workers=2),
        local_batch_size=2,
        collate_fn=default_collater,
        seed=0,
        is_training=True,
    )
    rows = [tuple(row[row != tokenizer.pad_token_id].tolist()) for batch in loader for row in batch["input_ids"]]
    assert len(rows) == len(set(rows)) == 9


def test_foreign_streams():
    class Foreign(IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    assert flat(list(build(Foreign()))) == list(range(23))
    with pytest.raises(UserError, match=r"`dataloader.shuffle: true` cannot shuffle a stream of the kind Foreign"):
        build(Foreign(), shuffle=True)
    with pytest.raises(NotSupportedYetError, match="on 2 ranks is not supported yet"):
        build(Foreign(), replicas=(2, 0))
    with pytest.raises(UserError, match="group_by_length: true` needs a data set with a length"):
        build(Numbers(3), group_by_length=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -1}, "`dataloader.num_workers` is -1"),
        ({"persistent_workers": True}, "`dataloader.persistent_workers: True` needs workers"),
        ({"prefetch_factor": 2}, "`dataloader.prefetch_factor: 2` needs workers"),
        ({"batch_size": 0}, "`dataloader.batch_size` is 0, but it must be at least 1"),
        ({"batch_size": "many"}, "`dataloader.batch_size` is many"),
    ],
)
def test_bad_settings(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        DataloaderConfig(**options)


def test_samplers_come_later():
    with pytest.raises(NotSupportedYetError, match=r"`dataloader.sampler` is not supported yet"):
        DataloaderConfig(sampler="x")


LEFT_BEHIND = """
import gc
from nemo_automodel.components.datasets.config import DataloaderConfig
from nemo_automodel.components.datasets.loader import build_dataloader

cfg = DataloaderConfig(num_workers=1)
loader = build_dataloader(range(64), cfg, local_batch_size=4, collate_fn=list, seed=5, is_training=True)
batches = iter(loader)
next(batches)
kept = loader._iterator  # as a cycle that is not collected yet keeps it
batches.close()
loader._iterator = loader.watch = None
del batches, loader
gc.collect()
print("ends", flush=True)
"""


def test_a_worker_that_nobody_stopped_does_not_keep_the_program_from_ending():
    """Workers ignore SIGTERM, with which Python ends what is left before it waits for it, for ever."""
    done = subprocess.run([sys.executable, "-c", LEFT_BEHIND], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("ends\n", 0), done.stderr
