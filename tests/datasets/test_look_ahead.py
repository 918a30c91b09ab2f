"""Looking at the next item moves nothing: not the items, not their order, not the state."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from nemo_automodel.components.datasets.config import DataloaderConfig
from nemo_automodel.components.datasets.loader import build_dataloader
from nemo_automodel.components.datasets.streaming import IndexedStream

ROWS = [{"input_ids": [i]} for i in range(11)]
NUM_EPOCHS = 3


class Numbers(IndexedStream[dict]):
    def item(self, index: int) -> dict:
        return {"input_ids": [index]}


class Foreign(IterableDataset):
    """A stream without a state of its own."""

    def __iter__(self):
        return iter(ROWS)


KINDS: dict[str, Any] = {
    "rows": lambda: (ROWS, {}),
    "rows in workers": lambda: (ROWS, {"num_workers": 2}),
    "stream": lambda: (Numbers(11), {}),
    "stream in workers": lambda: (Numbers(11), {"num_workers": 2}),
    "workers that stay": lambda: (Numbers(11), {"num_workers": 2, "persistent_workers": True}),
    "foreign stream": lambda: (Foreign(), {"shuffle": False}),
}


def first_tokens(samples: list[dict]) -> list[int]:
    return [sample["input_ids"][0] for sample in samples]


def build(kind: str):
    dataset, options = KINDS[kind]()
    return build_dataloader(
        dataset,
        DataloaderConfig(**options),
        local_batch_size=2,
        collate_fn=first_tokens,
        seed=5,
        is_training=True,
    )


def read(loader, first_epoch: int, look: Any) -> tuple[list[list], list[dict], list[Any]]:
    """Return the items of every epoch, the state after each, and what was seen ahead where ``look`` says so."""
    items, states, seen = [], [], []
    for epoch in range(first_epoch, NUM_EPOCHS):
        loader.set_epoch(epoch)
        items.append([])
        for item in loader:
            items[-1].append(item)
            if look(len(states)):
                seen.append(loader.look_ahead())
            states.append(loader.state_dict())
    return items, states, seen


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing(kind: str):
    plain, plain_states, _ = read(build(kind), 0, lambda _: False)
    looked, states, seen = read(build(kind), 0, lambda _: True)
    assert looked == plain
    assert states == plain_states
    following = [*itertools.chain(*plain)][1:]
    ends = list(itertools.accumulate(map(len, plain)))
    has_numbers = kind.startswith("rows")
    for place, ahead in enumerate(seen[:-1]):
        if place + 1 in ends and not has_numbers:
            assert ahead is None, "what comes in another epoch of a stream is not known yet"
        else:
            assert ahead == (following[place], following[place] if has_numbers else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("looks_at_start", [False, True])
def test_a_state_taken_after_looking_goes_on_with_the_item_that_was_seen(kind: str, looks_at_start: bool):
    plain, _, _ = read(build(kind), 0, lambda _: False)
    flat = [*itertools.chain(*plain)]
    _, states, _ = read(build(kind), 0, lambda place: place % 2 == 0)
    for place in (0, 5, 7):
        resumed = build(kind)
        resumed.load_state_dict(states[place])
        if looks_at_start:
            ahead = resumed.look_ahead()
            assert ahead is None or ahead[0] == flat[place + 1]
            assert resumed.look_ahead() == ahead
            assert resumed.state_dict()["epoch"] == place // 6
        items, _, _ = read(resumed, place // 6, lambda _: False)
        assert [*itertools.chain(*items)] == flat[place + 1 :]


def test_looking_before_the_first_item():
    loader = build("stream")
    ahead = loader.look_ahead()
    items, _, _ = read(loader, 0, lambda _: False)
    assert ahead == (items[0][0], None)
    assert items == read(build("stream"), 0, lambda _: False)[0]


def test_what_was_seen_is_forgotten_with_its_epoch():
    loader = build("stream")
    loader.look_ahead()
    loader.set_epoch(1)
    assert list(loader) == read(build("stream"), 1, lambda _: False)[0][0]


def test_looking_without_waiting_for_workers():
    """Rows with numbers are made at once, in mid-epoch and at its end; a stream tells what was drawn before."""
    plain, _, _ = read(build("rows in workers"), 0, lambda _: False)
    loader, stream = build("rows in workers"), build("stream in workers")
    for place in (0, 5):
        for some in (loader, stream):
            some.set_epoch(0)
        items = iter(loader)
        for _ in range(place + 1):
            next(items)
        following = [*itertools.chain(*plain)][place + 1]
        assert loader.look_ahead(may_draw=False) == (following, following)
    assert stream.look_ahead(may_draw=False) is None
    seen = stream.look_ahead()
    assert seen is not None
    assert stream.look_ahead(may_draw=False) == seen
