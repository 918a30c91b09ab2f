"""Gradients of norms' weights: both forms against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from kernels.oracle import DTYPES, assert_close, in_wider_buffer, rms_norm_64

from nemo_automodel.kernels import norm_grad
from nemo_automodel.kernels.jit import HAS_TRITON
from nemo_automodel.kernels.rope import QKVLayout

EPS = 1e-5
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
FORMS = ["torch", pytest.param("triton", marks=needs_triton)]


def form_of(name: str, form: str):
    return getattr(norm_grad, f"{name}_{'reference' if form == 'torch' else form}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (17, 130), (600, 5), (33, 257)])
def test_norm_weight_grad(form, dtype, shape):
    torch.manual_seed(shape[0])
    x, dy = (in_wider_buffer(torch.randn(shape).to(dtype), extra) for extra in (3, 5))
    weight = torch.randn(shape[1], dtype=torch.float64, requires_grad=True)
    (oracle,) = torch.autograd.grad(rms_norm_64(x, weight, EPS), weight, dy.double())
    rstd = (x.float().square().mean(-1) + EPS).rsqrt()
    assert_close(form_of("norm_weight_grad", form)(dy, x, rstd), oracle)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "kv_heads", "head_dim"), [(1, 1, 1, 1, 2), (2, 9, 5, 2, 6), (3, 50, 17, 1, 8)]
)
def test_head_norm_grads(form, dtype, has_bias, batch, seq, heads, kv_heads, head_dim):
    torch.manual_seed(seq)
    bias = torch.randn((heads + 2 * kv_heads) * head_dim).to(dtype) if has_bias else None
    norms = [torch.randn(head_dim).to(dtype) for _ in range(2)]
    layout = QKVLayout(heads, kv_heads, head_dim, *norms, EPS, bias)
    raw = in_wider_buffer(torch.randn(batch * seq, layout.width).to(dtype), 3)
    angle = torch.randn(1, seq, head_dim // 2).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    grads = [torch.randn(batch, seq, n, head_dim).to(dtype).transpose(1, 2) for n in (heads, kv_heads)]

    biased = raw.double() + (0 if bias is None else bias.double())
    queries_keys = biased[:, : layout.rotated_width].view(batch, seq, -1, head_dim).transpose(1, 2)
    rstd = (queries_keys.square().mean(-1) + EPS).rsqrt()
    leaves = [weight.double().requires_grad_() for weight in norms]
    parts = queries_keys.split([heads, kv_heads], dim=1)
    c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    total = torch.zeros((), dtype=torch.float64)
    for part, leaf, grad in zip(parts, leaves, grads, strict=True):
        y = rms_norm_64(part, torch.ones(head_dim), EPS) * leaf
        half = head_dim // 2
        turned = y * c + torch.cat([-y[..., half:], y[..., :half]], dim=-1) * s
        total = total + (turned * grad.double()).sum()
    oracle = torch.autograd.grad(total, leaves)

    rstd_TC = rstd.transpose(1, 2).flatten(0, 1).float()
    tables = cos.reshape(-1, head_dim), sin.reshape(-1, head_dim)
    grad_CE = form_of("head_norm_grads", form)(*grads, *tables, layout, raw, rstd_TC)
    assert_close(grad_CE[:heads].sum(0), oracle[0])
    assert_close(grad_CE[heads:].sum(0), oracle[1])
