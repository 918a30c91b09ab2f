"""Random state: round trips through a weights-only file, ranks, and blocks that leave no trace."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import torch

from nemo_automodel.components.training.garbage_collection import GarbageCollection
from nemo_automodel.components.training.rng import ScopedRNG, StatefulRNG


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), *torch.rand(3).tolist()]


def test_the_same_seed_draws_the_same_numbers_and_another_seed_others():
    StatefulRNG(7)
    first = draw()
    StatefulRNG(7)
    assert draw() == first
    StatefulRNG(8)
    assert draw() != first


def test_the_generators_are_the_seeded_ones_of_their_libraries():
    StatefulRNG(123)
    assert random.random() == random.Random(123).random()
    assert np.random.random() == np.random.RandomState(123).random_sample()
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(123)))


def test_state_survives_a_weights_only_file(tmp_path):
    rng = StatefulRNG(3, ranked=True)
    draw()  # an odd number of gaussians leaves one cached, which must survive too
    torch.save(rng.state_dict(), tmp_path / "rng.pt")
    expected = [draw() for _ in range(3)]
    StatefulRNG(99)
    rng.load_state_dict(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_state_has_the_contracts_names():
    assert list(StatefulRNG(0).state_dict()) == [
        "random_rng_state",
        "np_bit_generator",
        "np_keys",
        "np_position",
        "np_has_gauss",
        "np_cached_gaussian",
        "torch_rng_state",
        "cuda_rng_state",
    ]


def test_a_scope_draws_its_own_numbers_and_leaves_no_trace():
    StatefulRNG(5)
    expected = [draw(), draw()]
    StatefulRNG(5)
    seen = [draw()]
    with ScopedRNG(1) as scope:
        inside = draw()
        with scope:
            assert draw() == inside
        draw()
    seen.append(draw())
    assert seen == expected
    StatefulRNG(1)
    assert draw() == inside


def test_garbage_waits_for_its_step():
    class Node:
        pass

    made = []

    def make_cycle() -> None:
        node = Node()
        node.me = node
        made.append(weakref.ref(node))

    with GarbageCollection(every_steps=3) as collection:
        for index, expected in enumerate([1, 2, 0, 1]):
            make_cycle()
            collection.after_step(index)
            assert sum(ref() is not None for ref in made) == expected
        assert not gc.isenabled()
    assert gc.isenabled()
    with GarbageCollection(every_steps=None) as collection:
        collection.after_step(0)
        assert gc.isenabled()
