"""Rows of a table: both forms against indexing."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import filled

from nemo_automodel.kernels import host_rows
from nemo_automodel.kernels.jit import HAS_TRITON

RUNS = [
    pytest.param(host_rows.gather_rows_reference, id="torch"),
    pytest.param(
        host_rows.gather_rows_triton, id="triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
    ),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("num_tokens", "num_cols"), [(1, 1), (7, 1024), (5, 2051)])
def test_rows(run, num_tokens, num_cols):
    torch.manual_seed(0)
    table, ids = torch.randn(11, num_cols), torch.randint(0, 11, (num_tokens,))
    out = filled(num_tokens, num_cols, dtype=torch.float32)
    run(ids, table, out)
    assert torch.equal(out, table[ids])
