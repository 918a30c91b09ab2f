"""One process: its device, its mesh, and gradient clipping against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch

from nemo_automodel.components.distributed.config import DistEnvConfig, DistributedConfig
from nemo_automodel.components.distributed.grad import clip_grad_norm
from nemo_automodel.components.distributed.init_utils import initialize_distributed
from nemo_automodel.components.distributed.mesh import build_mesh
from nemo_automodel.components.distributed.ranks import Ranks
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without CUDA")
def test_nccl_without_cuda_trains_on_the_cpu_and_says_so(caplog):
    with caplog.at_level("INFO"):
        info = initialize_distributed(DistEnvConfig())
    assert (info.device, info.backend, info.world_size) == (torch.device("cpu"), "gloo", 1)
    assert "no CUDA device is usable here" in caplog.text


def test_gloo_is_the_cpu():
    assert initialize_distributed(DistEnvConfig(backend="gloo")).device.type == "cpu"


def test_what_comes_later_or_never_is_said(monkeypatch):
    with pytest.raises(ConfigError, match=r"`dist_env.backend: mpi` is not supported"):
        initialize_distributed(DistEnvConfig(backend="mpi"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(NotSupportedYetError, match="2 of 4 processes are on this machine"):
        initialize_distributed(DistEnvConfig())


def test_one_process_is_the_whole_mesh():
    mesh = build_mesh(DistributedConfig(tp_size=None, dp_size=1), Ranks())
    assert (mesh.dp_size, mesh.dp_rank, mesh.sum_dp(7)) == (1, 0, 7)
    with pytest.raises(NotSupportedYetError, match=r"`distributed.tp_size` is 2"):
        build_mesh(DistributedConfig(tp_size=2))
    with pytest.raises(ConfigError, match=r"`distributed.dp_size` is 0"):
        build_mesh(DistributedConfig(dp_size=0))
    with pytest.raises(ConfigError, match=r"`distributed.dp_size` is 2, but the run was started as 1 process"):
        build_mesh(DistributedConfig(dp_size=2))


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(n, n, dtype=dtype)) for n in (3, 17, 5)]
    for p in params[:2]:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torchs(max_norm):
    params = make_params()
    expected = copy.deepcopy(params)
    for p, q in zip(params, expected, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    norm = clip_grad_norm(params, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(expected, max_norm))
    for p, q in zip(params[:2], expected[:2], strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_no_limit_only_measures():
    params = make_params()
    before = [p.grad.clone() for p in params[:2]]
    norm = clip_grad_norm(params, None)
    assert norm.item() == pytest.approx(sum(float(g.double().square().sum()) for g in before) ** 0.5, rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=False))


def test_the_norm_of_16_bit_gradients_is_exact_to_float32():
    params = make_params(torch.bfloat16)
    exact = sum(float(p.grad.double().square().sum()) for p in params[:2]) ** 0.5
    norm = clip_grad_norm(params, 0.25)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact, rel=1e-6)
    clipped = sum(float(p.grad.double().square().sum()) for p in params[:2]) ** 0.5
    assert clipped == pytest.approx(0.25, rel=1e-2)
