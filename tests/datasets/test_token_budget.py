"""Micro-batches by tokens: no row lost, no budget exceeded, and never more micro-batches than needed."""

from __future__ import annotations

import functools
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_automodel.components.datasets.config import DataloaderConfig
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.loader import build_dataloader
from nemo_automodel.components.datasets.token_budget import MicroBatches, TokenBudgetCollater
from nemo_automodel.components.datasets.utils import default_collater

row_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=24)


def samples_of(lengths: list[int]) -> list[dict]:
    """Return rows whose tokens are all the row's own number."""
    return [{"input_ids": [i + 1] * n, "labels": [i + 1] * n} for i, n in enumerate(lengths)]


def numbers_in(batch: dict) -> list[int]:
    return [int(row[0]) for row in batch["input_ids"]]


def rows_of(batches: list[dict]) -> list[list[int]]:
    """Return the rows of some micro-batches without padding, in an order of their own."""
    pairs = [pair for b in batches for pair in zip(b["input_ids"], b["attention_mask"], strict=True)]
    return sorted(row[mask == 1].tolist() for row, mask in pairs)


def fewest_micro_batches(lengths: list[int], budget: int) -> int:
    """Try every cut of the rows in ascending order: the opposite direction, and by exhaustion instead of greed."""
    ascending = sorted(lengths)
    best = [0] + [math.inf] * len(ascending)
    for end in range(1, len(ascending) + 1):
        for start in range(end):
            rows, longest = end - start, ascending[end - 1]
            if rows == 1 or rows * longest <= budget:
                best[end] = min(best[end], best[start] + 1)
    return best[-1]


@given(lengths=row_lengths, budget=st.integers(1, 200), multiple=st.sampled_from([None, 8, 16]))
@settings(deadline=None, max_examples=300)
def test_every_row_once_within_the_budget_in_the_fewest_micro_batches(lengths, budget, multiple):
    collate = TokenBudgetCollater(functools.partial(default_collater, pad_seq_len_divisible=multiple), budget)
    batches = collate(samples_of(lengths))
    assert sorted(itertools.chain(*map(numbers_in, batches))) == list(range(1, len(lengths) + 1))
    for batch in batches:
        assert batch["input_ids"].numel() <= budget or len(batch["input_ids"]) == 1
        for number, row, mask in zip(numbers_in(batch), batch["input_ids"], batch["attention_mask"], strict=True):
            assert row[mask == 1].tolist() == [number] * lengths[number - 1]
    padded = lengths if multiple is None else [-(-n // multiple) * multiple for n in lengths]
    assert len(batches) == fewest_micro_batches(padded, budget)
    assert collate.num_rows_over == sum(n > budget for n in padded)
    sizes = [batch["input_ids"].shape[1] for batch in batches]
    assert sizes == sorted(sizes, reverse=True), "the largest comes first, so that a lack of memory shows at once"


def test_a_row_over_the_budget_is_reported(caplog: pytest.LogCaptureFixture):
    collate = TokenBudgetCollater(default_collater, 10)
    for _ in range(11):
        assert [numbers_in(batch) for batch in collate(samples_of([3, 12, 4]))] == [[2], [3, 1]]
    assert collate.num_rows_over == 11
    assert [record.getMessage() for record in caplog.records] == [
        f"A row of 12 tokens is longer than `step_scheduler.local_batch_tokens: 10`, so it is a micro-batch of its own "
        f"({count} such rows so far). Raise the budget, or truncate with `dataset.seq_length`."
        for count in (1, 10)
    ]


def test_packed_rows_share_a_budget_evenly():
    batches = TokenBudgetCollater(default_collater, 35)(samples_of([8] * 9))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 8), (4, 8), (1, 8)]


def step_loader(dataset, num_rows: int, budget: int, **options):
    return build_dataloader(
        dataset,
        DataloaderConfig(**options),
        local_batch_size=num_rows,
        collate_fn=TokenBudgetCollater(default_collater, budget),
        seed=3,
        is_training=True,
    )


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"group_by_length": True}])
def test_an_item_of_the_loader_is_one_step_and_its_state_counts_rows(tokenizer, squad_dir, options):
    dataset = make_squad_dataset(tokenizer, dataset_name=str(squad_dir), split="train[:22]")
    by_rows = build_dataloader(
        dataset, DataloaderConfig(**options), local_batch_size=5, collate_fn=default_collater, seed=3, is_training=True
    )
    expected = [rows_of([batch]) for batch in by_rows]
    loader = step_loader(dataset, 5, 120, **options)
    assert len(loader) == 5
    steps, states = [], []
    for batches in loader:
        steps.append(rows_of(batches))
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert steps == expected, "a step holds the rows it has under any other split"
    assert [state["num_rows_done"] for state in states] == [5, 10, 15, 20, 22]
    resumed = step_loader(dataset, 5, 64, **options)
    resumed.load_state_dict(states[1])
    assert [rows_of(batches) for batches in resumed] == expected[2:], "also with another budget"


def test_validation_reads_micro_batches_one_by_one():
    loader = step_loader(samples_of([3, 9, 4, 5]), 2, 8, shuffle=False)
    flat = MicroBatches(loader)
    assert [numbers_in(batch) for batch in flat] == [numbers_in(batch) for batch in flat] == [[2], [1], [4], [3]]
