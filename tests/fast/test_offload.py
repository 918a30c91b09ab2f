"""Inputs of layers on the host: what is held on the device when, and that the numbers come back."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from nemo_automodel.components.fast import offload
from nemo_automodel.components.fast.offload import HostCopies, HostCopy, host_bytes


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(offload, "_PIECE_BYTES", 100)  # three rows of 8 numbers


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("num_rows", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_inputs_at_a_time(num_rows, dtype):
    host = HostCopies()
    given = [torch.randn(num_rows, 8).to(dtype) for _ in range(4)]
    wanted, copies = [x.clone() for x in given], []
    for x in given:
        copies.append(host.put(x))
        assert [copy.on_device is not None for copy in copies] == [*[False] * (len(copies) - 1), True]
    held = [weakref.ref(x) for x in given]
    del given, x
    assert [x() is not None for x in held] == [False, False, False, True], "the newest was never away"
    for number in (3, 2, 1, 0):
        x = host.take(copies[number])
        assert torch.equal(x, wanted[number])
        there = [copy.on_device is not None for copy in copies]
        assert there == [below == number - 1 for below in range(4)], "the one below is on its way, and no other"
    assert not any(copy.pieces for copy in copies)


@pytest.mark.usefixtures("small_pieces")
def test_rows_of_a_wider_buffer_and_any_order():
    host, buffer = HostCopies(), torch.randn(7, 12)
    given = [buffer[:, :8], buffer[:, 4:]]
    wanted, copies = [x.clone() for x in given], [host.put(x) for x in given]
    assert torch.equal(host.take(copies[0]), wanted[0])
    assert torch.equal(host.take(copies[1]), wanted[1])


def test_what_nobody_comes_for_is_gone():
    """An evaluation that fails between a forward and a backward pass leaves nothing, and the next one is not misled."""
    host = HostCopies()
    copies = [host.put(torch.randn(3, 2)) for _ in range(3)]
    pieces = [weakref.ref(piece) for copy in copies for piece in copy.pieces]
    del copies
    gc.collect()
    assert not any(piece() is not None for piece in pieces)
    x = torch.randn(3, 2)
    copy = host.put(x)
    assert copy.below is None
    assert host.take(copy) is x


@pytest.mark.parametrize("num_tokens", [1, 7, 4096, 4097, 8191, 8192 * 3 + 5])
def test_what_the_host_holds_is_the_sum_of_its_pieces(num_tokens):
    pieces = HostCopy(torch.empty(num_tokens, 4096, dtype=torch.bfloat16), None).pieces
    rounded = [2 ** math.ceil(math.log2(piece.numel() * 2)) for piece in pieces]  # as torch's pinned allocator does
    assert host_bytes(num_tokens, 2 * 4096) == sum(rounded)
