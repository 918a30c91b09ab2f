"""Check and time the fast decoder layers on one GPU, on random weights of the shape of Llama-3.1-8B.

    python benchmarks/fast_core.py [--seconds 30] [--layers 32] [--cases fast,fp8,plain] [--out results.json]

Three parts. **Kernels**: every Triton kernel in bf16 against a float64 oracle, on odd shapes; its error may be at most
1.1 times that of the same formula in plain bf16 PyTorch. **Layers**: output and every LoRA gradient of one full-size
layer of each family in bf16 against the same Hugging Face layer in fp32: cosine at least 0.9999, norm ratio 0.99 to
1.01. With 8-bit weights two things are asked: a cosine of at least 0.998, which the scheme itself misses on these
random weights, and that 1 − cosine is at most 1.1 times that of the same layer with the same roundings and all else in
fp32 ("emulated"), so that a fault of the computation shows apart from the scheme.

**Steps**: whole optimizer steps of LoRA training, r 16 on all linear layers, 16 micro-batches of 2 × 4096 random tokens
over the full vocabulary, every token labelled, clipping and AdamW inside the clock, weights made on the device: the
fast path, the same with 8-bit weights, and Hugging Face's layers with this project's adapters, SDPA and the default
loss; ``--cases "fast:swiglu_products=0"`` makes another choice of `fast/choices.py`, ``fp8:copies=1``,
``fp8:by_rows=0`` or ``fp8:rounds_in_norm=0`` another scheme of the base in 8 bits, ``fast:dropout=0.1`` and
``fast:dropout=0.1;position=pre`` drop adapters' outputs or inputs, ``fast:recompute=sac1`` keeps less. TFLOP/s are
hardware operations by the formula in `lora_flops_per_token`; a rate above the device's peak is refused. Exit status 1
when a check fails.

`--device cpu --small` runs the script itself on any machine.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import math
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from measuring import LORA_RANK, environment, lora_work
from torch import nn

from nemo_automodel.components._peft.lora import PeftConfig, apply_lora, lora_layers
from nemo_automodel.components.distributed.grad import clip_grad_norm
from nemo_automodel.components.fast.choices import DEFAULT, Choices
from nemo_automodel.components.fast.decoder_layer import speed_up
from nemo_automodel.components.fast.dropout import AdapterDropout
from nemo_automodel.components.fast.final_norm import speed_up_norm
from nemo_automodel.components.fast.fp8_store import Fp8Scheme, Fp8Store
from nemo_automodel.components.fast.names import Adapter, Slot
from nemo_automodel.components.fast.policies import Memory, Tiles
from nemo_automodel.components.fast.watch import Watch
from nemo_automodel.components.fast.weight_store import DenseStore, WeightStore
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.training import flops
from nemo_automodel.components.training.flops import StepSize
from nemo_automodel.kernels import dropped_products, fp8, linear_ce, norm, rope, swiglu_lora
from nemo_automodel.kernels.copy_many import CopyMany, copy_many_reference
from nemo_automodel.kernels.dropout import Dropout, shares_of
from nemo_automodel.kernels.jit import HAS_TRITON, next_power_of_2
from nemo_automodel.kernels.lora import Update, add_update_reference, add_update_triton

PEAK_TFLOPS = {part: half for part, (half, _) in flops.PEAK_TFLOPS.items()}
SHAPES = {
    "llama": {"config": "LlamaConfig", "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0},
    "qwen2": {"config": "Qwen2Config", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28},
    "qwen3": {"config": "Qwen3Config", "vocab_size": 151936, "intermediate_size": 12288, "num_key_value_heads": 8}
    | {"head_dim": 128, "num_hidden_layers": 36},
}
BASE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 512, "head_dim": 16}
FP8_COSINE = 0.998


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="timed window of each case")
    parser.add_argument("--layers", type=int, help="layers of the timed model")
    parser.add_argument("--cases", default="fast,fp8,plain", help="which steps to time, comma-separated; empty: none")
    parser.add_argument("--family", default="llama", choices=SHAPES, help="shape of the timed model")
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--grad-accum", type=int, default=16, help="micro-batches of a step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--skip-checks", action="store_true", help="only time")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    record: dict[str, Any] = {
        "environment": environment(args.device),
        "arguments": {k: str(v) for k, v in vars(args).items()},
    }
    print(json.dumps(record["environment"]))
    failures: list[str] = []
    if not args.skip_checks:
        record["kernels"] = check_kernels(args.device, failures)
        record["layers"] = {family: check_layer(family, args, failures) for family in SHAPES}
    record["steps"] = {}
    for case in filter(None, re.split(r",(?![a-z_]+=)", args.cases)):
        record["steps"][case] = time_case(case, args)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(f"FAILED {line}" for line in failures) or "all checks passed")
    return 1 if failures else 0


# --- kernels ---------------------------------------------------------------------------------------------------------


def relative_error(result: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((result.double() - oracle.double()).norm() / oracle.double().norm())


def check_kernels(device: str, failures: list[str]) -> dict[str, float]:
    """Return for every result of every kernel how many times the error of plain bf16 it has."""
    if device != "cuda" or not HAS_TRITON:
        print("kernels: no GPU or no Triton, nothing to check")
        return {}
    ratios: dict[str, float] = {}
    for case in (
        norm_case,
        swiglu_case,
        swiglu_lora_case,
        add_update_case,
        dropped_case,
        rope_case,
        cross_entropy_case,
        copy_many_case,
    ):
        for name, (checked, plain, oracle) in case().items():
            ratio = relative_error(checked, oracle) / max(relative_error(plain, oracle), 1e-30)
            ratios[name] = ratio
            print(f"kernel {name:28s} error {relative_error(checked, oracle):.2e}, {ratio:.3f} times plain bf16")
            if not ratio <= 1.1:
                failures.append(f"kernel {name}: {ratio:.3f} times the error of plain bf16")
    x = _random(515, 5123)
    results = [
        (torch.empty(x.shape, dtype=torch.float8_e4m3fn, device="cuda"), torch.empty(len(x), 1, device="cuda"))
        for _ in range(2)
    ]
    factor = torch.rand(x.shape[1], device="cuda")
    fp8.quantize_rows_triton(x, factor, *results[0])
    fp8.quantize_rows_reference(x, factor, *results[1])
    differ = float((results[0][0].float() != results[1][0].float()).float().mean())
    print(f"kernel fp8 quantize: {differ:.2e} of the numbers differ from the plain form (ties)")
    if differ > 1e-3:
        failures.append(f"kernel fp8 quantize: {differ:.2e} of the numbers differ")
    turned = torch.empty(x.shape[::-1], dtype=torch.float8_e4m3fn, device="cuda")
    fp8.transpose_bytes(results[0][0], turned)
    if not torch.equal(turned.view(torch.uint8), results[0][0].view(torch.uint8).t()):
        failures.append("kernel fp8 transpose: bytes differ")
    weight, rounded = torch.rand(x.shape[1], device="cuda").bfloat16(), fp8.Rounded.room(*x.shape, x.device)
    normed, _ = norm.rms_norm(x, weight, 1e-5, rounded=rounded)
    for inside, apart in zip((rounded.data_MK, rounded.scale_M1), fp8.quantize_rows(normed), strict=True):
        if not torch.equal(inside.view(torch.uint8), apart.view(torch.uint8)):
            failures.append("kernel norm with rounding: differs from two steps")
    check_copies(failures)
    return ratios


def check_copies(failures: list[str]) -> None:
    """Compare one stored copy with two: the same bytes must meet the same gradients. Time the transposition."""
    linear = nn.Linear(4096, 14336, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x, dy = _random(8192, 4096), _random(8192, 14336)
    found = []
    for copies in (2, 1):
        store = Fp8Store.under(Fp8Scheme(copies=copies))([Slot("up_proj", copy.deepcopy(linear), None)])
        found.append((store.forward_pending(x, None), store.dgrad(dy, None)))
    exact = x.float() @ linear.weight.float().t(), dy.float() @ linear.weight.float()
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    errors = [relative_error(a, b) for a, b in zip(found[0], exact, strict=True)]
    print(
        f"fp8 store: error forward {errors[0]:.4f}, backward {errors[1]:.4f}; one copy is {'' if same else 'NOT '}two"
    )
    if not same or max(errors) > 0.045:
        failures.append(f"fp8 store: copies agree: {same}, errors {errors}")
    weight = torch.empty(28672, 4096, dtype=torch.float8_e4m3fn, device="cuda")
    out = torch.empty(4096, 28672, dtype=torch.float8_e4m3fn, device="cuda")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    fp8.transpose_bytes(weight, out)
    events[0].record()
    for _ in range(20):
        fp8.transpose_bytes(weight, out)
    events[1].record()
    torch.cuda.synchronize()
    ms = events[0].elapsed_time(events[1]) / 20
    print(f"fp8 transpose: {ms:.3f} ms for 28672 x 4096, {2 * weight.numel() / ms / 1e9:.2f} TB/s")


def _nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


Case = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def norm_case() -> Case:
    rows, width, eps = 515, 3585, 1e-5
    x, r, dy, weight = _random(rows, width), _random(rows, width), _random(rows, width), _random(width)
    total = (x.float() + r.float()).bfloat16()
    leaf = total.double().requires_grad_()
    y = leaf / (leaf.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    dx = torch.autograd.grad(y, leaf, dy.double())[0] + r.double()
    results = []
    for forward, backward in (
        (norm.rms_norm_triton, norm.rms_norm_backward_triton),
        (norm.rms_norm_reference, norm.rms_norm_backward_reference),
    ):
        out, grad, again = _nan(rows, width + 64)[:, :width], _nan(rows, width), _nan(rows, width)
        rstd = forward(x.clone(), weight, eps, r, out)
        backward(dy, total, weight, rstd, r, grad, again)
        results.append((out, grad, again))
    oracle = (y.detach(), dx, y.detach())
    return {f"norm {n}": (a, b, c) for n, a, b, c in zip(("y", "dx", "y again"), *results, oracle, strict=True)}


def swiglu_case() -> Case:
    rows, width = 515, 5123
    gate_up, dh = _random(rows, 2 * width) * 3, _random(rows, width)
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    h = gate * torch.sigmoid(gate) * up
    grad = torch.autograd.grad(h, leaf, dh.double())[0]
    results = []
    for forward, backward in (
        (swiglu_lora.swiglu_lora_triton, swiglu_lora.swiglu_lora_backward_triton),
        (swiglu_lora.swiglu_lora_reference, swiglu_lora.swiglu_lora_backward_reference),
    ):
        out, work, again = _nan(rows, width + 64)[:, :width], gate_up.clone(), dh.clone()
        forward(gate_up, out, None, None, 0)
        backward(again, work, None, None, None, ())
        results.append((out, work, again))
    oracle = (h.detach(), grad, h.detach())
    return {f"swiglu {n}": (a, b, c) for n, a, b, c in zip(("h", "dgate_up", "h again"), *results, oracle, strict=True)}


def swiglu_lora_case() -> Case:
    """SwiGLU at every way its kernels are compiled: odd widths and wide loads, each number of tiles, each mask."""
    found: Case = {}
    for width, rank, has_update, masked in (
        (5123, 11, True, "nothing"),
        (5123, 11, True, "update"),
        (5123, 11, True, "a"),
        *((5120, rank, has, "nothing") for rank in (8, 16, 32, 64, 128) for has in (False, True)),
        *((5120, rank, True, masked) for rank in (16, 32, 64, 128) for masked in ("update", "a")),
        (5120, 16, False, "a"),
    ):
        found |= _swiglu_lora_case(width, rank, has_update, masked)
    return found


def _swiglu_lora_case(width: int, rank: int, has_update: bool, masked: str) -> Case:
    rows, parts, seed = 515, ((0, rank), (rank, 2 * rank)), torch.tensor([2**40 + 7], device="cuda")
    ranks = next_power_of_2(2 * rank)  # stacked adapters are rounded up, the rest is zero
    gate_up, dh = _random(rows, 2 * width) * 2, _random(rows, width)
    low, dlow, a = _random(rows, ranks), _random(rows, ranks), _random(ranks, width) * 0.1
    a[rank:] = 0
    b = torch.zeros(2 * width, ranks, dtype=torch.bfloat16, device="cuda")
    for index, (first, to) in enumerate(parts):
        b[index * width : (index + 1) * width, first:to] = _random(width, rank) * 0.3
    over_h, over_update = (torch.ones(rows, n, device="cuda").double() for n in (width, 2 * width))
    a_mask, update_mask = Dropout(seed, 9, 0.1), Dropout(seed, 10, 0.1)
    over_h = a_mask.apply(over_h) if masked == "a" else over_h
    over_update = update_mask.apply(over_update) if masked == "update" else over_update
    added = low.double() @ b.double().t() * over_update if has_update else 0.0
    leaf = (gate_up.double() + added).requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    h = gate * torch.sigmoid(gate) * up
    grad = torch.autograd.grad(h, leaf, dh.double() + dlow.double() @ a.double() * over_h)[0]
    h = h.detach()
    update = Update(low, b.t(), parts, (update_mask,) if masked == "update" else ()) if has_update else None
    dh_update = Update(dlow, a, ((0, rank),), (a_mask,) if masked == "a" else ())
    results = []
    for form in ("triton", "reference"):
        runs = form == "triton"
        out, work, again = _nan(rows, width + 64)[:, :width], gate_up.clone(), dh.clone()
        forward = swiglu_lora.swiglu_lora if runs else swiglu_lora.swiglu_lora_reference
        backward = swiglu_lora.swiglu_lora_backward if runs else swiglu_lora.swiglu_lora_backward_reference
        low_h = forward(work, out, update, a, rank, a_mask if masked == "a" else None)
        # under a mask gate and up have become the sums
        product = backward(again, work, None if masked == "update" else update, dh_update, b, parts)
        results.append((out, work, again, low_h, product))
    oracle = (h, grad, h, (h * over_h) @ a.double().t(), grad @ b.double())
    names = ("h", "dgate_up", "h again", "h·A", "d·B")
    what = f"swiglu {width} r{rank}{' +update' if has_update else ''} mask {masked}"
    return {f"{what} {n}": case for n, *case in zip(names, *results, oracle, strict=True)}  # type: ignore[misc]


def add_update_case() -> Case:
    rows, width = 515, 5123
    y, residual, low, b = _random(rows, width), _random(rows, width), _random(rows, 64), _random(width, 64) * 0.1
    oracle = y.double() + residual.double() + low.double() @ b.double().t()
    update, plain = Update(low, b.t(), ((0, 64),)), y.clone()
    add_update_reference(plain, update, residual)
    add_update_triton(y, update, residual)
    return {"update in place": (y, plain, oracle)}


def copy_many_case() -> Case:
    sources = [torch.randn(shape, device="cuda") for shape in ((16, 5123), (5123, 16), (3, 70))]
    copies = [
        [(_nan(len(s), s.shape[1] + 64)[:, : s.shape[1]], s, 0.3 * (i + 1)) for i, s in enumerate(sources)]
        for _ in range(2)
    ]
    CopyMany()(copies[0])
    copy_many_reference(copies[1])
    checked, plain = (torch.cat([t.flatten() for t, _, _ in c]) for c in copies)
    return {"copy many": (checked, plain, torch.cat([(s.double() * scale).flatten() for _, s, scale in copies[0]]))}


def dropped_case() -> Case:
    """Every kernel with masks; the plain form makes its masks in PyTorch, so a mask that differs shows as an error."""
    found: Case = {}
    rows, width, parts = 515, 5123, ((0, 16), (16, 27), (27, 43))
    seed = torch.randint(2**63 - 1, (1,), device="cuda")
    x, low, y = _random(rows, width), _random(rows, 64), _random(rows, width)
    factor = _random(width, 64) * 0.1
    for name, streams in (("one mask", (3,)), ("three masks", (4, 5, 6))):
        masks = tuple(Dropout(seed, stream, 0.1) for stream in streams)
        shares = shares_of(parts, masks)
        exact = {"low": torch.zeros(rows, 64, device="cuda").double(), "grad": torch.zeros(width, 64).double().cuda()}
        total = y.double()
        for first, to, mask in shares:
            exact["low"][:, first:to] = mask.apply(x.double()) @ factor.double()[:, first:to]
            exact["grad"][:, first:to] = mask.apply(x.double()).t() @ low.double()[:, first:to]
            total = total + mask.apply(low.double()[:, first:to] @ factor.double().t()[first:to])
        for kind, other in (("low", factor), ("grad", low)):
            results = [
                getattr(dropped_products, f"dropped_{kind}_{run}")(x, other, shares) for run in ("triton", "reference")
            ]
            found[f"{kind} under {name}"] = (*results, exact[kind])
        update, added, plain = Update(low, factor.t(), parts, masks), y.clone(), y.clone()
        add_update_triton(added, update, None)
        add_update_reference(plain, update, None)
        found[f"update under {name}"] = (added, plain, total)
    return found


def rope_case() -> Case:
    found: Case = {}
    for with_norm in (False, True):
        num_q, num_kv, head, batch, seq = 28, 4, 96, 2, 257
        width = (num_q + 2 * num_kv) * head
        qkv, bias = _random(batch * seq, width), _random(width)
        norms = (_random(head), _random(head)) if with_norm else (None, None)
        angles = torch.randn(1, seq, head // 2, device="cuda").repeat(1, 1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        layout = rope.QKVLayout(num_q, num_kv, head, *norms, 1e-6, bias)
        leaf = qkv.double().requires_grad_()
        heads = (leaf + bias.double()).view(batch, seq, -1, head).transpose(1, 2)
        q, k, v = heads.split([num_q, num_kv, num_kv], dim=1)
        if with_norm:
            q, k = (
                x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()
                for x, w in zip((q, k), norms, strict=True)
            )
        q, k = (
            x * cos.double() + torch.cat([-x[..., head // 2 :], x[..., : head // 2]], -1) * sin.double() for x in (q, k)
        )
        grads = [_random(*x.shape) for x in (q, k, v)]
        oracle_grad = torch.autograd.grad([q, k, v], leaf, [g.double() for g in grads])[0]
        oracle = torch.cat([q, k], 1).detach().transpose(1, 2).reshape(batch * seq, -1)
        results = []
        for forward, backward in (
            (rope.rotate_qkv_triton, rope.rotate_qkv_backward_triton),
            (rope.rotate_qkv_reference, rope.rotate_qkv_backward_reference),
        ):
            work, tables = qkv.clone(), (cos[0], sin[0])
            out, rstd = work[:, : layout.rotated_width], None
            if with_norm:
                out = _nan(*out.shape)
                rstd = torch.empty(batch * seq, num_q + num_kv, device="cuda")
            forward(work, *tables, layout, out, rstd)
            grad = _nan(batch * seq, width + 64)
            backward(*grads, *tables, layout, grad, work if with_norm else None, rstd)
            results.append((out, grad[:, :width]))
        name = "rope with norm" if with_norm else "rope"
        found[f"{name} qk"] = results[0][0], results[1][0], oracle
        found[f"{name} dqkv"] = results[0][1], results[1][1], oracle_grad
    return found


def cross_entropy_case() -> Case:
    logits, labels = _random(67, 128257) * 4, torch.randint(0, 128257, (67,), device="cuda")
    labels[3] = -100
    scale = torch.tensor(0.01, device="cuda")
    leaf = logits.double().requires_grad_()
    losses = nn.functional.cross_entropy(leaf, labels, ignore_index=-100, reduction="none")
    grad = torch.autograd.grad(losses.sum() * 0.01, leaf)[0]
    results = []
    for run in (linear_ce.cross_entropy_triton, linear_ce.cross_entropy_reference):
        work = logits.clone()
        results.append((run(work, labels, scale, -100), work))
    found = {"cross entropy gradient": (results[0][1], results[1][1], grad)}
    print(f"cross entropy: largest error of a loss {float((results[0][0] - losses.detach()).abs().max()):.1e}")
    return found


# --- layers ----------------------------------------------------------------------------------------------------------


def make_config(family: str, args: argparse.Namespace, num_layers: int | None) -> Any:
    values = BASE | {k: v for k, v in SHAPES[family].items() if k not in ("config", "rope_theta")}
    values |= SMALL if args.small else {}
    if args.small:
        values["num_hidden_layers"] = 2
    if num_layers is not None:
        values["num_hidden_layers"] = num_layers
    config = getattr(transformers, str(SHAPES[family]["config"]))(**values, max_position_embeddings=8192)
    config._attn_implementation = "sdpa"
    return config


def add_lora(model: nn.Module, random_b: bool, dropout: AdapterDropout | None = None) -> None:
    cfg = PeftConfig(target_modules=["*_proj"], dim=LORA_RANK, alpha=2 * LORA_RANK)
    if dropout is not None:
        cfg.dropout, cfg.dropout_position = dropout.probability, dropout.position
    apply_lora(model, cfg)  # type: ignore[arg-type]
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A.weight, std=0.02)
        if random_b:
            nn.init.normal_(layer.lora_B.weight, std=0.02)


def make_fast(
    model: nn.Module,
    store: type[WeightStore] = DenseStore,
    choices: Choices = DEFAULT,
    dropout: AdapterDropout | None = None,
    memory: Memory | None = None,
) -> None:
    adapters: dict[nn.Module, Adapter] = {
        layer: Adapter(layer.lora_A, layer.lora_B, layer.scaling) for layer in lora_layers(model).values()
    }
    for layer in model.model.layers:  # type: ignore[union-attr]
        speed_up(layer, adapters, memory, store=store, choices=choices, dropout=dropout)
    Watch(model, [store for layer in model.model.layers for store in layer.fast_core.stores])  # type: ignore[union-attr]
    speed_up_norm(model.model.norm)  # type: ignore[union-attr, arg-type]


def agreement(result: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Return the cosine and the ratio of the norms."""
    a, b = result.double().flatten(), wanted.double().flatten()
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())


def check_layer(family: str, args: argparse.Namespace, failures: list[str]) -> dict[str, float]:
    """Compare one layer in bf16, fast and as it is, with the same layer in fp32."""
    device = args.device
    config = make_config(family, args, 1)
    half = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for p in model.parameters():  # noise only where Transformers leaves ones and zeros
            noise = 0.02 * torch.randn_like(p) if p.ndim == 1 else 0
            p.data = (p.data + noise).bfloat16().float()
        add_lora(model, random_b=True)
    seq = 64 if args.small else 512
    x = torch.randn(2, seq, config.hidden_size, device=device).to(half)
    dy = torch.randn(2, seq, config.hidden_size, device=device).to(half)
    positions = torch.arange(seq, device=device)[None]
    results = {}
    models = {"oracle": model, "emulated": copy.deepcopy(model)}
    make_fast(models["emulated"], Fp8Store.under(Fp8Scheme(emulate=True)))
    for name in ("oracle", "emulated", "plain", "fast", "fp8"):
        if name == "plain":
            for n, p in models["oracle"].named_parameters():
                p.data = p.data if "lora_" in n else p.data.to(half)
            models = {name: copy.deepcopy(models["oracle"]) for name in ("plain", "fast", "fp8")}
            make_fast(models["fast"])
            make_fast(models["fp8"], Fp8Store)
        model = models[name]
        dtype = torch.float32 if name in ("oracle", "emulated") else half
        leaf = x.detach().to(dtype).requires_grad_()
        tables = model.model.rotary_emb(x, positions)  # bf16 tables for all, so that only the layer differs
        layer = model.model.layers[0]
        out = layer(leaf, position_embeddings=tuple(t.to(dtype) for t in tables), position_ids=positions)
        out.backward(dy.to(dtype))
        grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
        results[name] = {"output": out.detach() - x.to(out.dtype), "dx": leaf.grad - dy.to(out.dtype), **grads}
    found: dict[str, dict[str, tuple[float, float]]] = {
        name: {key: agreement(value, results["oracle"][key]) for key, value in results[name].items()}
        for name in ("plain", "fast", "fp8", "emulated")
    }
    found["fp8 to emulated"] = {key: agreement(results["fp8"][key], results["emulated"][key]) for key in results["fp8"]}
    summary = {}
    for name, values in found.items():
        summary[f"{name} worst cosine"] = min(cosine for cosine, _ in values.values())
        summary[f"{name} worst ratio"] = max((ratio for _, ratio in values.values()), key=lambda r: abs(r - 1))
        for key, (cosine, ratio) in values.items():
            # 8 bits: as far from fp32 as the same roundings are with everything else exact, and no further
            scheme = found["emulated"][key] if name == "fp8" else (1.0, 1.0)
            least = 1 - 1.1 * (1 - scheme[0]) - 1e-4
            if name in ("fast", "fp8") and not (cosine >= least and 0.99 <= ratio / scheme[1] <= 1.01):
                failures.append(f"layer {family} {name} {key}: cosine {cosine:.6f} < {least:.6f} or ratio {ratio:.4f}")
            if name == "fp8" and cosine < FP8_COSINE:
                failures.append(
                    f"layer {family} fp8 {key}: cosine {cosine:.6f} < {FP8_COSINE}, emulated {scheme[0]:.6f}"
                )
    print(f"layer {family}: " + ", ".join(f"{key} {value:.6f}" for key, value in summary.items()))
    del model, models, results
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return summary


# --- steps -----------------------------------------------------------------------------------------------------------


def lora_flops_per_token(config: Any, seq_len: int, recomputed: str) -> float:
    """Return hardware operations of a LoRA step on all linear layers: 4·N_lin + 4·N_head + 6·l + 3.5·A, or more."""
    return lora_work(config, recomputed).hardware(StepSize(seq_len, seq_len, seq_len, seq_len**2)) / seq_len


def time_case(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of one case; out of memory is a result, not an error."""
    print(f"--- {case}")
    try:
        return _time_case(case, args)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        print(f"{case}: out of memory: {message[:200]}")
        return {"out_of_memory": message}
    finally:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def read_case(case: str) -> tuple[str, type[WeightStore], Choices, AdapterDropout | None, Memory]:
    """Read ``fast``, ``fp8`` or ``plain``, with choices behind a colon: ``fp8:swiglu_products=0;copies=1``.

    ``dropout=0.1`` and ``position=pre`` (post without it) are choices too, also of ``plain``; ``recompute=sac1`` and
    ``mlp_tile_tokens=4096`` say what layers keep.
    """
    path, _, rest = case.partition(":")
    values = {name: value for name, _, value in (part.partition("=") for part in re.split("[;,]", rest) if part)}
    probability, position = float(values.pop("dropout", 0)), values.pop("position", "post")
    tile = int(values.pop("mlp_tile_tokens", 0)) or None
    memory = Memory(values.pop("recompute", "none"), Tiles(tile))
    scheme = Fp8Scheme(
        by_rows=bool(int(values.pop("by_rows", 1))),
        copies=int(values.pop("copies", 2)),
        rounds_in_norm=bool(int(values.pop("rounds_in_norm", 1))),
    )
    choices = dataclasses.replace(DEFAULT, **{name: bool(int(value)) for name, value in values.items()})
    dropout = AdapterDropout(probability, position) if probability else None
    return path, Fp8Store.under(scheme) if path == "fp8" else DenseStore, choices, dropout, memory


def _time_case(case: str, args: argparse.Namespace) -> dict[str, Any]:
    device, seq_len = args.device, 64 if args.small else args.seq_len
    path, store, choices, dropout, memory = read_case(case)
    config = make_config(args.family, args, args.layers)
    started = time.perf_counter()
    torch.manual_seed(2)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
        add_lora(model, random_b=False, dropout=dropout)
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.lora_A.weight.requires_grad_()
        layer.lora_B.weight.requires_grad_()
    model.train()
    if path != "plain":
        make_fast(model, store, choices, dropout, memory)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    batches = [torch.randint(0, config.vocab_size, (args.rows, seq_len), device=device) for _ in range(8)]
    tokens_per_micro = args.rows * seq_len
    scale = torch.tensor(1.0 / (args.grad_accum * tokens_per_micro), device=device)
    loss_fn = MaskedCrossEntropy()

    def micro_batch(index: int) -> torch.Tensor:
        ids = batches[index % len(batches)]
        labels = ids.roll(-1, dims=1).flatten()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        if path != "plain":
            loss = linear_ce.frozen_head_loss(hidden, model.lm_head.weight, labels, scale, -100)
        else:
            loss = loss_fn(
                logits=model.lm_head(hidden), labels=labels, num_label_tokens=args.grad_accum * tokens_per_micro
            )
        loss.backward()
        return loss.detach()

    def step(grad_accum: int) -> float:
        total = torch.zeros((), device=device)
        for index in range(grad_accum):
            total += micro_batch(index)
        grad_norm = clip_grad_norm(parameters, 1.0)
        values = torch.stack([total, grad_norm]).tolist()
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(values[1])
        return values[0]

    step(2)
    synchronize(device)
    setup_s = time.perf_counter() - started
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    num_steps, clocks, losses = 0, [], []
    started = time.perf_counter()
    while num_steps == 0 or time.perf_counter() - started < args.seconds:
        reader = read_clocks() if device == "cuda" else None
        losses.append(step(args.grad_accum))
        num_steps += 1
        if reader is not None:
            clocks.append(reader.communicate()[0].strip())
    synchronize(device)
    elapsed = time.perf_counter() - started
    rate = num_steps * args.grad_accum * tokens_per_micro / elapsed
    tflops = rate * lora_flops_per_token(config, seq_len, flops.FAST_RECOMPUTED[memory.recompute]) / 1e12
    result: dict[str, Any] = {
        "tokens_per_s": rate,
        "hardware_tflops": tflops,
        "ms_per_micro_batch": elapsed / num_steps / args.grad_accum * 1e3,
        "timed_s": elapsed,
        "steps": num_steps,
        "setup_s": setup_s,
        "losses": losses,
        "clocks": clocks,
    }
    if device == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        name = torch.cuda.get_device_name()
        peak = flops.peak_tflops(name, with_fp8=path == "fp8")
        assert peak is None or tflops < peak, f"{tflops:.0f} TFLOP/s is above the peak of {name}: the count is wrong"
    print(
        f"{case}: {rate:,.0f} tok/s, {tflops:.0f} TFLOP/s, {result['ms_per_micro_batch']:.1f} ms a micro-batch, "
        f"peak {result.get('peak_gib', 0):.2f} GiB, {num_steps} steps in {elapsed:.1f} s, set-up {setup_s:.1f} s"
    )
    print(f"  losses {' '.join(f'{value:.4f}' for value in losses)}; clocks {clocks}")
    result["profile"] = profile(lambda: micro_batch(0), device)
    optimizer.zero_grad()
    return result


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def read_clocks() -> subprocess.Popen[str]:
    """Start reading clock, power and temperature; the reader waits half a second, so that the step is running."""
    query = "sleep 0.5; nvidia-smi --query-gpu=clocks.sm,power.draw,temperature.gpu --format=csv,noheader,nounits"
    return subprocess.Popen(["sh", "-c", query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


# --- profile ---------------------------------------------------------------------------------------------------------

_KINDS = {
    "aten::copy_": "copy",
    "aten::cat": "copy",
    "aten::embedding": "other",
}


def kind_of(name: str, shapes: list[list[int]]) -> str:
    """Sort an operation by what it is for; a product with a side of at most 128 belongs to the adapters."""
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        sides = [side for shape in shapes if len(shape) == 2 for side in shape]
        return "LoRA" if sides and min(sides) <= 128 else "GEMM"
    if name == "aten::_scaled_mm":
        return "GEMM"
    if "scaled_dot_product" in name or "attention" in name:
        return "attention"
    return _KINDS.get(name, "elementwise")


def profile(run: Callable[[], Any], device: str) -> dict[str, Any]:
    """Print and return where the device spends one micro-batch, by kind and by the 25 longest operations."""
    if device != "cuda":
        return {}
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        started = time.perf_counter()
        run()
        launched_ms = (time.perf_counter() - started) * 1e3
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - started) * 1e3
    kinds: dict[str, float] = defaultdict(float)
    rows: list[tuple[float, int, str, str]] = []
    for event in profiler.key_averages(group_by_input_shape=True):
        ms = event.self_device_time_total / 1e3
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        # our kernels count as kernels, everything else under the operation that launched it: each once
        if ms == 0 or is_kernel != is_ours(event.key) or not (is_kernel or event.key.startswith("aten::")):
            continue
        kind = kind_of_kernel(event.key) if is_kernel else kind_of(event.key, event.input_shapes)
        kinds[kind] += ms
        rows.append((ms, event.count, kind, f"{event.key[:60]} {event.input_shapes if not is_kernel else ''}"))
    total_ms = (
        sum(
            e.self_device_time_total for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA
        )
        / 1e3
    )
    print(
        f"  one micro-batch: {wall_ms:.1f} ms, device busy {total_ms:.1f} ms, idle {1 - total_ms / wall_ms:.1%}, "
        f"launched in {launched_ms:.1f} ms; in the table below {sum(kinds.values()):.1f} ms"
    )
    print("  " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])) + " ms")
    rows.sort(reverse=True)
    for ms, count, kind, text in rows[:25]:
        print(f"  {ms:8.2f} ms {count:5d}x {kind:12s} {text[:150]}")
    return {
        "wall_ms": wall_ms,
        "device_ms": total_ms,
        "launched_ms": launched_ms,
        "kinds_ms": dict(kinds),
        "longest": [[ms, count, kind, text] for ms, count, kind, text in rows[:40]],
    }


def kind_of_kernel(name: str) -> str:
    if name.startswith("_fp8_"):
        return "quantise"
    if name.startswith("_nf4_"):
        return "unpack"
    return "LoRA" if name.startswith(("_add_update_", "_sum_", "_dropped_")) else "elementwise"


def is_ours(kernel: str) -> bool:
    return kernel.startswith(
        ("_norm_", "_rope_", "_swiglu_", "_cross_entropy_", "_fp8_", "_nf4_", "_add_update_", "_sum_", "_dropped_")
    )


if __name__ == "__main__":
    raise SystemExit(main())
