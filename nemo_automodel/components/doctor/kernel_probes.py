"""One real kernel of each backend, compared with float64. Run by ``probe_process`` in a process of its own.

A library that loads can still compute nothing, or something wrong: built for another GPU, another CUDA, another
processor. So each probe runs what training runs and compares the result with the same formula in float64 on the CPU,
from the inputs as the kernel got them (already rounded to bf16 or FP8). Attention is compared with its gradients.

A probe returns a line to show, or raises: ``Skip`` where the thing is not there, ``Wrong`` where the numbers are not
the expected ones, anything else where it fails.

Shapes: B rows, S positions, H heads, E head dimension, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CAPABILITY_FP8 = (8, 9)
_NF4_OFFSET = 0.9677083
"""Where the quantiles of NF4 begin: Dettmers et al., QLoRA (2023), appendix E; from its reference code."""

TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,  # one rounding of the result is 2^-9; attention rounds the probabilities too
}
"""Largest difference, as a part of the largest value."""


class Skip(Exception):
    """This cannot be tried here; the message says why."""


class Wrong(Exception):
    """The numbers are not the expected ones."""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference as a part of the largest value; NaN and infinity where ``got`` has them."""
    got, want = got.detach().cpu().double(), want.detach()
    return float((got - want).abs().max() / want.abs().max())


def compare(got: torch.Tensor, want: torch.Tensor, tolerance: float | None = None) -> str:
    """Return a line with the error against float64.

    Raises:
        Wrong: the error is above the tolerance of ``got``'s dtype, or not a number.
    """
    error, allowed = relative_error(got, want), tolerance or TOLERANCES[got.dtype]
    if not error <= allowed:  # NaN too
        raise Wrong(f"differs from float64 by {error:.1e}, {allowed:.0e} is normal")
    return f"error {error:.0e}"


def need_cuda() -> torch.device:
    """Return the first GPU.

    Raises:
        Skip: there is none.
    """
    if not torch.cuda.is_available():
        raise Skip("no CUDA device")
    return torch.device("cuda", 0)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return the same normal numbers every time, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------------------- matmul


def cpu_matmul() -> str:
    """Multiply in fp32 on the CPU."""
    a, b = random(257, 512), random(512, 129, seed=1)
    return compare(a @ b, a.double() @ b.double())


def cuda_matmul() -> str:
    """Multiply in bf16 on the GPU."""
    return bf16_product(need_cuda())


def bf16_product(device: torch.device) -> str:
    """Multiply in bf16 on ``device``."""
    a, b = random(512, 1024, dtype=torch.bfloat16), random(1024, 256, dtype=torch.bfloat16, seed=1)
    return compare(a.to(device) @ b.to(device), a.double() @ b.double())


def cuda_fp8() -> str:
    """Multiply in FP8 on the GPU."""
    device = need_cuda()
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY_FP8:
        raise Skip("FP8 needs compute capability {}.{}, this GPU has {}.{}".format(*CAPABILITY_FP8, *capability))
    return fp8_product(device)


def fp8_product(device: torch.device) -> str:
    """Multiply in FP8 on ``device``, one scale a tensor."""
    a, b = random(256, 512).to(torch.float8_e4m3fn), random(128, 512, seed=1).to(torch.float8_e4m3fn)
    scale_a, scale_b = torch.tensor(0.5), torch.tensor(2.0)
    got = torch._scaled_mm(  # the public name differs between PyTorch releases
        a.to(device),
        b.to(device).t(),
        scale_a=scale_a.to(device),
        scale_b=scale_b.to(device),
        out_dtype=torch.bfloat16,
    )
    return compare(got, (a.double() * 0.5) @ (b.double() * 2.0).t())


# ---------------------------------------------------------------------------------------------------------- attention


def reference_attention(q_BHSE: torch.Tensor, k_BHSE: torch.Tensor, v_BHSE: torch.Tensor) -> torch.Tensor:
    """Return causal attention, written out."""
    seq_len, head_dim = q_BHSE.shape[-2:]
    scores = q_BHSE @ k_BHSE.transpose(-2, -1) / math.sqrt(head_dim)
    is_future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    return scores.masked_fill(is_future, float("-inf")).softmax(-1) @ v_BHSE


def _attention_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    return [random(2, 4, 256, 64, dtype=dtype, seed=seed) for seed in range(4)]


def _with_gradients(attend: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype) -> str:
    *inputs, grad = _attention_inputs(dtype)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    want = reference_attention(*exact)
    want_grads = torch.autograd.grad(want, exact, grad.double())
    here = [tensor.to(device).requires_grad_() for tensor in inputs]
    got = attend(*here)
    got_grads = torch.autograd.grad(got, here, grad.to(device))
    pairs = [(got, want), *zip(got_grads, want_grads, strict=True)]
    for pair in pairs:  # each, because a maximum may pass over a NaN
        compare(*pair)
    return compare(*max(pairs, key=lambda pair: relative_error(*pair)))


def cpu_attention() -> str:
    """Attend in fp32 on the CPU, with gradients."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _with_gradients(attend, torch.device("cpu"), torch.float32)


def sdpa(backend: SDPBackend, device: torch.device) -> str:
    """Attend in bf16 on ``device`` with one of PyTorch's kernels, with gradients."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    try:
        return _with_gradients(attend, device, torch.bfloat16)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise Skip("this PyTorch has no such kernel for this GPU") from error
        raise


def cuda_flash() -> str:
    """Attend with FlashAttention as PyTorch brings it."""
    return sdpa(SDPBackend.FLASH_ATTENTION, need_cuda())


def cuda_cudnn() -> str:
    """Attend with cuDNN."""
    return sdpa(SDPBackend.CUDNN_ATTENTION, need_cuda())


def cuda_efficient() -> str:
    """Attend with the memory-efficient kernel."""
    return sdpa(SDPBackend.EFFICIENT_ATTENTION, need_cuda())


def cuda_varlen() -> str:
    """Attend inside the documents of a packed row."""
    from nemo_automodel.kernels.attention import document_borders, has_varlen_attention, varlen_attention

    device = need_cuda()
    if not has_varlen_attention():
        raise Skip("PyTorch has it from 2.11 on")
    lengths = [100, 156]
    q, k, v, _ = (tensor[:1] for tensor in _attention_inputs(torch.bfloat16))
    borders, longest = document_borders(torch.tensor([lengths]), sum(lengths))
    got = varlen_attention(q.to(device), k.to(device), v.to(device), borders.to(device), longest)
    documents = zip(*(torch.split(tensor.double(), lengths, dim=2) for tensor in (q, k, v)), strict=True)
    want = torch.cat([reference_attention(*document) for document in documents], dim=2).transpose(1, 2)
    return compare(got.reshape(want.shape), want)


# -------------------------------------------------------------------------------------------------- Triton and 4 bits


def triton() -> str:
    """Compile and run one of our Triton kernels: RMSNorm."""
    from nemo_automodel.kernels.jit import HAS_TRITON
    from nemo_automodel.kernels.norm import rms_norm_triton

    device = need_cuda()
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed")
    x_TD, weight_D = random(33, 192, dtype=torch.bfloat16), random(192, dtype=torch.bfloat16, seed=1)
    out_TD = torch.full_like(x_TD, float("nan"), device=device)
    rms_norm_triton(x_TD.to(device), weight_D.to(device), 1e-6, None, out_TD)
    exact = x_TD.double()
    want = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight_D.double()
    return compare(out_TD, want)


def nf4_codes() -> torch.Tensor:
    """Return the 16 values of NF4, float64: quantiles of the normal distribution, scaled to ±1, with an exact zero."""

    def quantiles(count: int) -> torch.Tensor:
        places = torch.linspace(_NF4_OFFSET, 0.5, count, dtype=torch.float64)[:-1]
        found: torch.Tensor = torch.special.ndtri(places)
        return found

    codes = torch.cat([quantiles(9), -quantiles(8), torch.zeros(1, dtype=torch.float64)])
    return torch.sort(codes / codes.max()).values


def bitsandbytes() -> str:
    """Store numbers in NF4 and read them back: each must come back as the nearest of the 16 values."""
    from bitsandbytes import functional

    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    block = 64
    values = random(128, block)
    packed, state = functional.quantize_4bit(values.to(device), blocksize=block, quant_type="nf4")
    got = functional.dequantize_4bit(packed, state).cpu().double().reshape(values.shape)
    largest = values.double().abs().amax(dim=1, keepdim=True)
    distance = (values.double() - got).abs() / largest
    nearest = (values.double().unsqueeze(-1) / largest.unsqueeze(-1) - nf4_codes()).abs().amin(dim=-1)
    excess = float((distance - nearest).max())
    if not excess < 1e-3:
        raise Wrong(f"NF4 values come back {excess:.1e} of the block's largest value off")
    return f"exact on the {'GPU' if is_cuda else 'CPU'}"


KERNELS: dict[str, Callable[[], str]] = {
    "cpu_matmul": cpu_matmul,
    "cpu_attention": cpu_attention,
    "cuda_matmul": cuda_matmul,
    "cuda_flash": cuda_flash,
    "cuda_cudnn": cuda_cudnn,
    "cuda_efficient": cuda_efficient,
    "cuda_varlen": cuda_varlen,
    "cuda_fp8": cuda_fp8,
    "triton": triton,
    "bitsandbytes": bitsandbytes,
}
