"""Sums over two processes of gradients that not every one has, in pieces of any size; and shares of an optimizer."""

from __future__ import annotations

import time

import pytest
import torch
from support.ranks import run_ranks

from nemo_automodel.components.distributed import grad, peer_watch, shares
from nemo_automodel.components.distributed.config import DistEnvConfig
from nemo_automodel.components.distributed.grad import copy_from_first, sum_over_ranks
from nemo_automodel.components.distributed.init_utils import initialize_distributed
from nemo_automodel.components.distributed.ranks import ALONE
from nemo_automodel.components.distributed.shares import Shares
from nemo_automodel.components.loggers.log_utils import setup_logging

SHAPES = [(3, 5), (7,), (40, 30), (), (2, 2)]


def parameters(dtype=torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.full(shape, float("nan"), dtype=dtype)) for shape in SHAPES]


def gradient(rank: int, number: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + number)
    return torch.randn(SHAPES[number], generator=generator).to(dtype)


def together(work, tmp_path):
    """Run ``work(ranks)`` in two processes, which must not fail."""

    def as_rank(rank):
        setup_logging()
        ranks = initialize_distributed(DistEnvConfig(backend="gloo")).ranks
        work(ranks)
        ranks.leave()

    assert run_ranks(2, as_rank, tmp_path / "logs") == [0, 0], (tmp_path / "logs" / "rank_0").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1, 37, 10**6])
def test_gradients_become_their_sums_and_missing_ones_stay_missing(tmp_path, monkeypatch, dtype, most):
    buckets = grad._buckets
    monkeypatch.setattr(grad, "_buckets", lambda parameters, _: buckets(parameters, most))

    def work(ranks):
        found = parameters(dtype)
        for number, p in enumerate(found):
            # the second one is missing everywhere, the fourth in the first process
            if number != 1 and not (number == 3 and ranks.rank == 0):
                p.grad = gradient(ranks.rank, number, dtype)
        # rows of a wider matrix, as no fast layer leaves them but anybody may
        found[2].grad = torch.zeros(40, 60, dtype=dtype)[:, :30].copy_(found[2].grad)
        loss = sum_over_ranks(found, torch.tensor(float(ranks.rank + 1)), ranks)
        assert loss.item() == 3
        assert found[1].grad is None
        for number in (0, 2, 3, 4):
            parts = [gradient(rank, number, dtype).float() for rank in range(2) if not (number == 3 and rank == 0)]
            assert torch.equal(found[number].grad, sum(parts).to(dtype)), number

    together(work, tmp_path)


def test_large_gradients_are_cut(monkeypatch):
    found = parameters()
    for number, p in enumerate(found):
        p.grad = gradient(0, number)
    groups = list(grad._buckets(found, 500))
    assert [sum(piece.numel() for piece in group) for group in groups] == [22, 500, 500, 205]
    assert torch.equal(
        torch.cat([piece.reshape(-1) for group in groups for piece in group]),
        torch.cat([p.grad.reshape(-1) for p in found]),
    )


def test_one_process_sums_nothing():
    found = parameters()
    loss = torch.tensor(2.0)
    assert sum_over_ranks(found, loss, ALONE) is loss
    assert all(p.grad is None for p in found)


def test_every_parameter_has_one_owner_who_hands_it_out(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "_BUCKET_BYTES", 100)

    def work(ranks):
        found = [*parameters(), *parameters(torch.bfloat16)]
        for p in found:
            p.data.fill_(ranks.rank)
        before = [p._version for p in found]
        copy_from_first(found, ranks)
        assert all(p._version > version for p, version in zip(found, before, strict=True))
        assert all((p == 0).all() for p in found)
        split = Shares(found, ranks)
        mine = [split.is_mine(p) for p in found]
        others = ranks.gather(mine)
        assert all(a != b for a, b in zip(*others, strict=True))
        sizes = [sum(p.numel() for p, own in zip(found, owned, strict=True) if own) for owned in others]
        assert abs(sizes[0] - sizes[1]) <= 15  # but for the largest ones, which are two
        for number, (p, own) in enumerate(zip(found, mine, strict=True)):
            p.data.fill_(10 * number + ranks.rank if own else -1)
        before = [p._version for p in found]
        split.spread()
        assert all(own or p._version > version for p, own, version in zip(found, mine, before, strict=True))
        for number, p in enumerate(found):
            owner = next(rank for rank in range(2) if others[rank][number])
            assert (p == torch.tensor(10 * number + owner, dtype=p.dtype)).all()

    together(work, tmp_path)


def test_objects_are_shared_and_gathered_by_rank(tmp_path):
    def work(ranks):
        assert ranks.share({"who": ranks.rank}) == {"who": 0}
        assert ranks.gather(ranks.rank * 2) == [0, 2]
        assert (ranks.sum(ranks.rank + 1), ranks.largest(5 - ranks.rank)) == (3, 5)
        order = []
        with ranks.first_alone():
            order.append(ranks.rank)
        assert ranks.gather(order) == [[0], [1]]

    together(work, tmp_path)


def test_a_patient_wait_is_spoken_of(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_watch, "SPEAK_AFTER_S", 0.3)

    def work(ranks):
        if ranks.rank == 1:
            time.sleep(1.5)
        ranks.wait_for_all()

    together(work, tmp_path)
    said = (tmp_path / "logs" / "rank_0").read_text()
    assert "Rank 0 has waited 0.005 minutes for other processes (all come here)." in said
    assert "Rank 0 has waited 0.01 minutes for other processes (all come here)." in said
    assert (tmp_path / "logs" / "rank_1").read_text() == ""
