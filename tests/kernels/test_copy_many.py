"""Many copies at once: both forms against float64, in wider buffers, with nothing else touched.

In fp16 where models use bf16: Triton's interpreter cuts numbers off instead of rounding them when it makes bf16.
"""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.kernels import copy_many
from nemo_automodel.kernels.copy_many import CopyMany, copy_many_reference, copy_many_triton, copy_table
from nemo_automodel.kernels.jit import HAS_TRITON

SHAPES = [(3, 130), (1, 1), (70, 16), (16, 600), (5, 7)]
SCALES = [1.0, 2.0, 0.3, -1.5, 1e-3]


def triton_form(copies):
    copy_many_triton(copies, copy_table(copies))


FORMS = [
    pytest.param(copy_many_reference, id="torch"),
    pytest.param(triton_form, id="triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")),
]


def case(source_dtype: torch.dtype, target_dtype: torch.dtype):
    """Return the copies and the buffers that hold the targets, full of NaN."""
    torch.manual_seed(0)
    copies, buffers = [], []
    for (rows, cols), scale in zip(SHAPES, SCALES, strict=True):
        buffer = torch.full((rows + 2, cols + 5), torch.nan, dtype=target_dtype)
        buffers.append(buffer)
        copies.append((buffer[1 : rows + 1, 3 : cols + 3], torch.randn(rows, cols).to(source_dtype), scale))
    return copies, buffers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("source_dtype", "target_dtype"),
    [(torch.float32, torch.float16), (torch.float32, torch.float32), (torch.float16, torch.float16)],
)
def test_values_and_nothing_beside_them(form, source_dtype, target_dtype, monkeypatch):
    monkeypatch.setattr(copy_many, "BLOCK", 64)  # several programs a matrix
    copies, buffers = case(source_dtype, target_dtype)
    form(copies)
    for (target, source, scale), buffer in zip(copies, buffers, strict=True):
        expected = (source.double() * scale).to(target_dtype)
        torch.testing.assert_close(target, expected, rtol=1e-6 if target_dtype == torch.float32 else 1e-3, atol=0)
        assert not target.isnan().any()
        assert int(buffer.isnan().sum()) == buffer.numel() - target.numel(), "something beside the target was written"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_both_forms_give_the_same_bits():
    results = []
    for form in (copy_many_reference, triton_form):
        copies, _ = case(torch.float32, torch.float16)
        form(copies)
        results.append([target.clone() for target, _, _ in copies])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_a_matrix_that_moved_is_found(monkeypatch):
    monkeypatch.setattr(copy_many, "runs_triton", lambda tensor: True)
    made = []
    monkeypatch.setattr(copy_many, "copy_table", lambda copies: made.append(1) or copy_table(copies))
    run, (copies, _) = CopyMany(), case(torch.float32, torch.float16)
    run(copies)
    copies[0][1].add_(1)
    run(list(copies))
    assert len(made) == 1
    target, source, scale = copies[2]
    copies[2] = (target, source.clone().mul_(2), scale)
    run(copies)
    assert len(made) == 2
    for target, source, scale in copies:
        torch.testing.assert_close(target, (source * scale).half(), rtol=0, atol=0)


def test_matrices_of_several_kinds_take_the_plain_form(monkeypatch):
    monkeypatch.setattr(copy_many, "runs_triton", lambda tensor: True)
    copies = case(torch.float32, torch.float16)[0] + case(torch.float16, torch.float16)[0]
    CopyMany()(copies)
    assert not any(target.isnan().any() for target, _, _ in copies)
