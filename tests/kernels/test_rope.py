"""Bias, q/k norm and rotation of packed queries, keys and values: both forms against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import DTYPES, assert_close, filled, in_wider_buffer, rms_norm_64

from nemo_automodel.kernels import rope
from nemo_automodel.kernels.jit import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
RUNS = [
    pytest.param(rope.rotate_qkv_reference, rope.rotate_qkv_backward_reference, id="torch"),
    pytest.param(rope.rotate_qkv_triton, rope.rotate_qkv_backward_triton, id="triton", marks=needs_triton),
]
EPS = 1e-6


def oracle_heads(qkv, bias, cos, sin, norms, num_heads, num_kv_heads, head_dim, batch):
    """Return q, k, v as attention gets them, in the textbook's way."""
    x = qkv if bias is None else qkv + bias.double()
    heads = x.view(batch, -1, num_heads + 2 * num_kv_heads, head_dim).transpose(1, 2)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q, k = rms_norm_64(q, norms[0], EPS), rms_norm_64(k, norms[1], EPS)
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return turned(q), turned(k), v


@pytest.mark.parametrize(("forward", "backward"), RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("has_bias", "has_norm"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("heads", [(4, 2, 8), (3, 3, 6), (17, 1, 10)], ids=str)
@pytest.mark.parametrize("shares_positions", [True, False])
def test_forward_and_backward(forward, backward, dtype, has_bias, has_norm, heads, shares_positions):
    num_heads, num_kv_heads, head_dim = heads
    torch.manual_seed(num_heads)
    batch, seq = 2, 3
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = in_wider_buffer(torch.randn(batch * seq, width).to(dtype), 0)
    angles = torch.randn(1 if shares_positions else batch, seq, head_dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    bias = torch.randn(width).to(dtype) if has_bias else None
    norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)) if has_norm else None
    layout = rope.QKVLayout(num_heads, num_kv_heads, head_dim, *(norms or (None, None)), EPS, bias)
    leaf = qkv.double().requires_grad_()
    oracle = oracle_heads(leaf, bias, cos, sin, norms, num_heads, num_kv_heads, head_dim, batch)
    # gradients as attention returns them: some with heads outside positions, some inside
    grads = [torch.randn(x.shape).to(dtype) for x in oracle]
    grads[0] = grads[0].transpose(1, 2).contiguous().transpose(1, 2)
    oracle_dqkv = torch.autograd.grad(oracle, leaf, [g.double() for g in grads])[0]
    oracle_q, oracle_k, oracle_v = (x.detach().transpose(1, 2).flatten(0, 1).flatten(1) for x in oracle)

    results = {}
    for name, run in (("checked", (forward, backward)), ("plain", RUNS[0].values)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rope, "rotate_qkv_reference", run[0])
            patch.setattr(rope, "rotate_qkv_backward_reference", run[1])
            work = qkv.clone()
            qk, rstd = rope.rotate_qkv(work, cos, sin, layout)
            dqkv = in_wider_buffer(filled(batch * seq, width, dtype=dtype), 3)
            raw = work if has_norm else None
            rope.rotate_qkv_backward(*grads, cos, sin, layout, dqkv, raw_TW=raw, rstd_TC=rstd)
        results[name] = qk, work[:, layout.rotated_width :], dqkv
    oracles = torch.cat([oracle_q, oracle_k], dim=1), oracle_v, oracle_dqkv
    for checked, wanted, plain in zip(results["checked"], oracles, results["plain"], strict=True):
        assert_close(checked, wanted, plain)
