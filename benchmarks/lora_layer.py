"""Time the pieces of a decoder layer of the shape of Llama-3.1-8B one by one, on one GPU: where the choices come from.

    python benchmarks/lora_layer.py [--tokens 8192] [--out results.json]

For each packed matrix: the bare product, the product with the adapters folded into its depth, what a separate in-place
update costs instead, and the products of low rank around it, forward and backward; the same in 8 bits. Then the
elementwise kernels with the memory rate they reach, attention on packed queries, keys and values, and the output head
with its loss for several chunk lengths. Data are random; every number is the mean of at least 0.2 s of back-to-back
launches, so products run warm but not as power-limited as in a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from nemo_automodel.components.fast.attention import causal_attention
from nemo_automodel.kernels import fp8, linear_ce, swiglu_lora_triton
from nemo_automodel.kernels import swiglu_lora as module
from nemo_automodel.kernels.assembler import tile_rows
from nemo_automodel.kernels.lora import Update, add_update_
from nemo_automodel.kernels.norm import rms_norm, rms_norm_backward
from nemo_automodel.kernels.rope import QKVLayout, rotate_qkv, rotate_qkv_backward

D, F, HEADS, KV_HEADS, E, VOCAB, RANK = 4096, 14336, 32, 8, 128, 128256, 64
MATRICES = {"qkv": (D, (HEADS + 2 * KV_HEADS) * E), "o": (D, D), "gate_up": (D, 2 * F), "down": (F, D)}
records: dict[str, dict[str, float]] = {}


def measure(name: str, run: Callable[[], object], tflop: float = 0, gigabytes: float = 0) -> float:
    """Print and record the milliseconds of one call, and its rate."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats, ms = 4, 0.0
    while ms < 200:
        repeats *= 2
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        ms = start.elapsed_time(end)
    ms /= repeats
    records[name] = {"ms": ms}
    rate = ""
    if tflop:
        records[name]["tflops"] = tflop / ms * 1e3
        rate = f"{tflop / ms * 1e3:7.0f} TFLOP/s"
    if gigabytes:
        records[name]["gb_per_s"] = gigabytes / ms * 1e3
        rate = f"{gigabytes / ms * 1e3:7.0f} GB/s"
    print(f"{name:44s} {ms:8.4f} ms {rate}", flush=True)
    return ms


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def time_matrix(name: str, num_in: int, num_out: int, tokens: int) -> None:
    work = 2 * tokens * num_in * num_out / 1e12
    buffer = random(num_out + RANK, num_in + RANK) * 0.02
    wide_x, wide_y = random(tokens, num_in + RANK), random(tokens, num_out + RANK)
    x, y, weight = wide_x[:, :num_in], wide_y[:, :num_out], buffer[:num_out, :num_in]
    a, b, low = buffer[num_out:, :num_in], buffer[:num_out, num_in:], random(tokens, RANK)
    dense_x, dense_y, dense_w = x.contiguous(), y.contiguous(), weight.contiguous()
    measure(f"{name} forward, dense", lambda: torch.mm(dense_x, dense_w.t()), work)
    measure(f"{name} forward, W and x in wide buffers", lambda: torch.mm(x, weight.t(), out=y), work)
    measure(f"{name} forward, adapters in depth", lambda: torch.mm(wide_x, buffer[:num_out].t(), out=y), work)
    measure(f"{name} forward, update in place", lambda: dense_y.addmm_(low, b.t()))
    measure(f"{name} dgrad, dense", lambda: torch.mm(dense_y, dense_w), work)
    measure(f"{name} dgrad, adapters in depth", lambda: torch.mm(wide_y, buffer[:, :num_in]), work)
    measure(f"{name} dgrad, update in place", lambda: dense_x.addmm_(low, a))
    measure(f"{name} low = x·Aᵀ", lambda: torch.mm(x, a.t()), gigabytes=x.numel() * 2 / 1e9)
    measure(f"{name} dlow = dy·B", lambda: torch.mm(y, b), gigabytes=y.numel() * 2 / 1e9)
    measure(f"{name} dA = dlowᵀ·x", lambda: torch.mm(low.t(), x), gigabytes=x.numel() * 2 / 1e9)
    measure(f"{name} dB = dyᵀ·low", lambda: torch.mm(y.t(), low), gigabytes=y.numel() * 2 / 1e9)
    measure(f"{name} copy of low to the margin", lambda: wide_x[:, num_in:].copy_(low))
    x8, x_scale = fp8.quantize_rows(x)
    y8, y_scale = fp8.quantize_rows(y)
    w8, w_scale = fp8.quantize_rows(weight)
    t8, t_scale = fp8.quantize_rows(weight.t().contiguous())
    measure(f"{name} fp8 quantize x", lambda: fp8.quantize_rows(x), gigabytes=x.numel() * 3 / 1e9)
    measure(f"{name} fp8 quantize dy", lambda: fp8.quantize_rows(y), gigabytes=y.numel() * 3 / 1e9)
    half = torch.bfloat16
    measure(f"{name} fp8 forward", lambda: fp8.scaled_product(x8, x_scale, w8, w_scale, half), work)
    measure(f"{name} fp8 dgrad", lambda: fp8.scaled_product(y8, y_scale, t8, t_scale, half), work)
    one = torch.ones((), device="cuda")
    measure(
        f"{name} fp8 forward, one scale",
        lambda: torch._scaled_mm(x8, w8.t(), scale_a=one, scale_b=one, out_dtype=half, use_fast_accum=True),
        work,
    )


def time_elementwise(tokens: int) -> None:
    x, y, dy, weight = random(tokens, D), random(tokens, D), random(tokens, D), random(D)
    out, out2 = random(tokens, D + RANK)[:, :D], random(tokens, D)
    unit = tokens * D * 2 / 1e9
    _, rstd = rms_norm(x, weight, 1e-5)
    measure("norm", lambda: rms_norm(x, weight, 1e-5, out_TD=out), gigabytes=2 * unit)
    measure("norm with residual", lambda: rms_norm(x, weight, 1e-5, residual_TD=y, out_TD=out), gigabytes=4 * unit)
    measure(
        "norm backward, residual, y",
        lambda: rms_norm_backward(dy, x, weight, rstd, residual_grad_TD=y, out_TD=out, y_TD=out2),
        gigabytes=5 * unit,
    )
    measure("copy into a wide buffer", lambda: out.copy_(x), gigabytes=2 * unit)
    gate_up, h = random(tokens, 2 * F + RANK)[:, : 2 * F], random(tokens, F + RANK)[:, :F]
    dh, unit = random(tokens, F), tokens * F * 2 / 1e9
    measure("swiglu", lambda: module.swiglu_lora(gate_up, h, None, None, 0), gigabytes=3 * unit)
    backward = partial(module.swiglu_lora_backward, dh, gate_up, None, None, None, ())
    measure("swiglu backward", backward, gigabytes=6 * unit)


def time_swiglu_lora(tokens: int) -> None:
    """SwiGLU with the products of low rank around it, for several tiles, beside what it replaces."""
    parts, unit = ((0, 16), (16, 32)), tokens * F * 2 / 1e9
    gate_up, h, dh = random(tokens, 2 * F + RANK)[:, : 2 * F], random(tokens, F + RANK)[:, :F], random(tokens, F)
    low, dlow, a, b = random(tokens, RANK), random(tokens, RANK), random(RANK, F), random(2 * F, RANK)
    update, dh_update = Update(low, b.t(), parts), Update(dlow, a, ((0, 16),))
    runs = {
        "swiglu": (3, lambda: module.swiglu_lora(gate_up, h, None, None, 0)),
        "swiglu, h·A": (3, lambda: module.swiglu_lora(gate_up, h, None, a, 16)),
        "swiglu, update": (3, lambda: module.swiglu_lora(gate_up, h, update, None, 0)),
        "swiglu, update, h·A": (3, lambda: module.swiglu_lora(gate_up, h, update, a, 16)),
    }
    for with_update, with_dlow, with_b in itertools.product((False, True), repeat=3):
        name = "swiglu backward" + ", update" * with_update + ", dlow·A" * with_dlow + ", d·B" * with_b
        arguments = (update if with_update else None, dh_update if with_dlow else None, b if with_b else None, parts)
        runs[name] = (6, partial(module.swiglu_lora_backward, dh, gate_up, *arguments))
    for tile in [(32, 64, 2), (32, 64, 3), (32, 128, 2), (64, 64, 2), (64, 64, 3), (64, 128, 2)]:
        if tile[0] > tile_rows(gate_up.device):
            continue
        shape = dict(zip(("BLOCK_T", "BLOCK_N", "STAGES"), tile, strict=True))
        swiglu_lora_triton.shape_of = lambda *_, shape=shape: shape
        for name, (passes, run) in runs.items():
            gate_up.normal_()
            dh.normal_()
            measure(f"{name} {tile}", run, gigabytes=passes * unit)
    y, residual, low = random(tokens, D), random(tokens, D), random(tokens, RANK)
    update = Update(low, random(D, RANK).t(), ((0, 16),))
    measure(
        "update and residual in place", lambda: add_update_(y, update, residual), gigabytes=3 * tokens * D * 2 / 1e9
    )
    measure("update in place, our kernel", lambda: add_update_(y, update), gigabytes=2 * tokens * D * 2 / 1e9)


def time_alternately(name: str, runs: dict[str, Callable[[], object]]) -> None:
    """Time ways to do one thing in turn, memory traffic between them, so that heat and clocks favour none."""
    waste = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    spent = dict.fromkeys(runs, 0.0)
    rounds = 40
    for index in range(rounds + 3):
        events = {}
        for key, run in runs.items():
            waste.fill_(index)
            events[key] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[key][0].record()
            run()
            events[key][1].record()
        torch.cuda.synchronize()
        if index >= 3:
            for key, (start, end) in events.items():
                spent[key] += start.elapsed_time(end)
    for key, ms in spent.items():
        records[f"{name}: {key}"] = {"ms": ms / rounds}
    print(f"{name:16s} " + ", ".join(f"{key} {ms / rounds:.4f}" for key, ms in spent.items()) + " ms", flush=True)


def time_choices(name: str, num_in: int, num_out: int, tokens: int) -> None:
    """What a dispatch table would choose between, for one packed matrix."""
    buffer = random(num_out + RANK, num_in + RANK) * 0.02
    wide_x, wide_y = random(tokens, num_in + RANK), random(tokens, num_out + RANK) * 0.01
    x, y, low = wide_x[:, :num_in].contiguous(), wide_y[:, :num_out].contiguous(), random(tokens, RANK)
    weight, a, b = buffer[:num_out, :num_in], buffer[num_out:, :num_in], buffer[:num_out, num_in:]
    dense = weight.contiguous()
    time_alternately(
        f"{name} forward",
        {
            "in depth": lambda: torch.mm(wide_x, buffer[:num_out].t()),
            "base, wide": lambda: torch.mm(wide_x[:, :num_in], weight.t()),
            "base, dense": lambda: torch.mm(x, dense.t()),
            "base, update in place": lambda: torch.mm(x, dense.t()).addmm_(low, b.t()),
        },
    )
    time_alternately(
        f"{name} dgrad",
        {
            "in depth": lambda: torch.mm(wide_y, buffer[:, :num_in]),
            "base, wide": lambda: torch.mm(wide_y[:, :num_out], weight),
            "base, dense": lambda: torch.mm(y, dense),
            "base, update in place": lambda: torch.mm(y, dense).addmm_(low, a),
        },
    )
    x8, x_scale = fp8.quantize_rows(x)
    w8, w_scale = fp8.quantize_rows(dense)
    blocks = torch.rand((num_in // 128, tokens), device="cuda").t() + 0.5
    w_blocks = torch.rand((num_out // 128, num_in // 128), device="cuda") + 0.5
    runs = {
        "rows": lambda: torch._scaled_mm(
            x8, w8.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "rows, slow accumulation": lambda: torch._scaled_mm(
            x8, w8.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=False
        ),
        "1×128 and 128×128": lambda: torch._scaled_mm(
            x8, w8.t(), scale_a=blocks, scale_b=w_blocks.t(), out_dtype=torch.bfloat16
        ),
    }
    for key in list(runs):
        try:
            runs[key]()
        except (RuntimeError, ValueError) as error:  # what this card or version does not do is a result
            print(f"{name} fp8 {key}: {str(error).splitlines()[0][:300]}")
            del runs[key]
    time_alternately(f"{name} fp8", runs)
    wanted = (x8.double() * x_scale.double()) @ (w8.double() * w_scale.double()).t()
    for key in [key for key in runs if key.startswith("rows")]:
        got: torch.Tensor = runs[key]()  # type: ignore[assignment]
        print(f"{name} fp8 {key}: error of the product {float((got.double() - wanted).norm() / wanted.norm()):.2e}")
    time_alternately(
        f"{name} bytes turned",
        {"contiguous": lambda: w8.t().contiguous(), "as int8": lambda: w8.view(torch.int8).t().contiguous()},
    )


def time_attention(rows: int, seq_len: int) -> None:
    layout = QKVLayout(HEADS, KV_HEADS, E)
    qkv = random(rows * seq_len, layout.width + RANK)[:, : layout.width]
    angles = torch.randn(1, seq_len, E // 2, device="cuda").repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    rotated = rows * seq_len * layout.rotated_width * 2 / 1e9
    measure("rope in place", lambda: rotate_qkv(qkv, cos, sin, layout), gigabytes=2 * rotated)
    qkv.normal_()
    parts = qkv.split([HEADS * E, KV_HEADS * E, KV_HEADS * E], dim=1)
    q, k, v = (p.view(rows, seq_len, -1, E).transpose(1, 2).detach().requires_grad_() for p in parts)
    out = causal_attention(q, k, v, E**-0.5)
    dout = random(rows, seq_len, HEADS, E).transpose(1, 2)
    print(f"attention: {out.grad_fn}, output strides {out.stride()}")
    work = 2 * rows * seq_len * seq_len * HEADS * E / 1e12
    measure("attention forward, packed", lambda: causal_attention(q, k, v, E**-0.5), work)
    grads = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    print(f"attention gradients: strides {[g.stride() for g in grads]}")
    measure(
        "attention backward, packed",
        lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
        2.5 * work,
    )
    dqkv = random(rows * seq_len, layout.width + RANK)
    measure(
        "rope backward",
        lambda: rotate_qkv_backward(*grads, cos, sin, layout, dqkv),
        gigabytes=2 * qkv.numel() * 2 / 1e9,
    )


def time_head(tokens: int) -> None:
    hidden, weight = random(tokens, D).requires_grad_(), random(VOCAB, D) * 0.02
    labels = torch.randint(0, VOCAB, (tokens,), device="cuda")
    scale = torch.tensor(1 / tokens, device="cuda")
    for chunk in (1024, 2048, 4096, 8192):
        linear_ce.CHUNK_ROWS = chunk
        measure(
            f"head and loss, chunks of {chunk}",
            lambda: linear_ce.frozen_head_loss(hidden, weight, labels, scale, -100),
            4 * tokens * D * VOCAB / 1e12,
        )
    logits = random(2048, VOCAB)
    measure(
        "cross entropy of 2048 rows, in place",
        lambda: linear_ce.cross_entropy_(logits, labels[:2048], scale, -100),
        gigabytes=3 * logits.numel() * 2 / 1e9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--parts", default="swiglu,elementwise,choices,attention,head,matrices", help="what to time")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    parts = args.parts.split(",")
    if "swiglu" in parts:
        time_swiglu_lora(args.tokens)
    if "elementwise" in parts:
        time_elementwise(args.tokens)
    if "choices" in parts:
        for name, (num_in, num_out) in MATRICES.items():
            time_choices(name, num_in, num_out, args.tokens)
    if "attention" in parts:
        time_attention(args.tokens // args.seq_len, args.seq_len)
    if "head" in parts:
        time_head(args.tokens)
    if "matrices" in parts:
        for name, (num_in, num_out) in MATRICES.items():
            time_matrix(name, num_in, num_out, args.tokens)
    if args.out:
        args.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
