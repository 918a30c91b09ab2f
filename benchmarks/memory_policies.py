"""What layers keep for the backward pass, on one GPU: every policy against none, and the longest row that trains.

    python benchmarks/memory_policies.py [--base bf16|nf4] [--lengths 131072,262144] [--out results.json]

**Policies**: LoRA, r 16 on all linear layers, of four layers of the shape of Llama-3.1-8B, 2 x 4096 random tokens. For
every name of `activation_checkpointing`, and for tiles of the MLP: bytes that a layer keeps for a token, peak, time of
a micro-batch, and the least cosine of a gradient with that of the policy none. It must be 0.99999 (attention may add in
another order from run to run), under fp8_gate_up 0.995. **Rows**: the whole model, one row of so many tokens, all of
them labelled, forward, backward, clipping and AdamW, under ``--policy`` and ``--tile``; a short step before it warms
up. Peak and rate of that one step, in which the host's pages are locked, and what the planner says. 131,072 tokens are
a minute's work of an H100, most of it attention; ``--layers 4`` takes an eighth of it and no longer shows whether the
whole fits.

`--device cpu --small` runs the script itself on any machine. Exit status 1 when a check fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from fast_core import synchronize
from measuring import LORA_ALPHA, LORA_RANK, dtype_of, environment, make_config, random_batches

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import outline
from nemo_automodel.components._peft.lora import PeftConfig, lora_layers
from nemo_automodel.components.distributed.grad import clip_grad_norm
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.plan import memory
from nemo_automodel.components.plan.machines import GIB
from nemo_automodel.components.plan.workload import Workload
from nemo_automodel.components.quantization.config import QuantizationConfig
from nemo_automodel.recipes.engine import EagerEngine
from nemo_automodel.shared.memory_policies import EXACT_POLICIES, RECOMPUTE_POLICIES

PEFT = PeftConfig(target_modules="*_proj", dim=LORA_RANK, alpha=LORA_ALPHA)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("bf16", "nf4"), default="bf16", help="the frozen weights")
    parser.add_argument("--lengths", default="131072", help="tokens of the long rows, comma-separated; empty: none")
    parser.add_argument("--policy", default="full_offload", choices=RECOMPUTE_POLICIES, help="of the long rows")
    parser.add_argument("--tile", type=int, help="mlp_tile_tokens of the long rows; left out: what the layers choose")
    parser.add_argument("--layers", type=int, help="layers of the model of the long rows")
    parser.add_argument("--skip-policies", action="store_true", help="only the long rows")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(args.device), "policies": {}, "rows": {}}
    record["arguments"] = {key: str(value) for key, value in vars(args).items()}
    print(json.dumps(record["environment"]))
    failures: list[str] = []
    if not args.skip_policies:
        record["policies"] = compare_policies(args, failures)
    for length in map(int, filter(None, args.lengths.split(","))):
        record["rows"][length] = time_row(length, args)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(f"FAILED {line}" for line in failures) or "all checks passed")
    return 1 if failures else 0


def build(args: argparse.Namespace, num_layers: int | None, policy: str, tile: int | None, length: int) -> Any:
    torch.manual_seed(0)
    config = make_config("llama3_1_8b", num_layers, args.small)
    config.max_position_embeddings = max(config.max_position_embeddings, length)
    dtype = str(dtype_of(args.device)).removeprefix("torch.")
    nf4 = QuantizationConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    model = NeMoAutoModelForCausalLM.from_config(
        config,
        torch_dtype=dtype,
        device=args.device,
        fast_layers="on",
        kernels="defaults",
        activation_checkpointing=policy,
        mlp_tile_tokens=tile,
        peft_config=PEFT,
        **({"quantization_config": nf4} if args.base == "nf4" else {}),
    ).train()
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.02)
    return model


def peak_gib(device: str) -> float | None:
    """Return the peak since the last call, and forget it."""
    if device == "cpu":
        return None
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peak


def clear(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


# --- policies --------------------------------------------------------------------------------------------------------


def compare_policies(args: argparse.Namespace, failures: list[str]) -> dict[str, Any]:
    """Return what each policy keeps, costs and changes."""
    seq_len, num_layers = (96, 2) if args.small else (4096, 4)
    tile = seq_len // 2
    cases: list[tuple[str, int | None]] = [(policy, None) for policy in RECOMPUTE_POLICIES]
    cases += [("none", tile), ("full", tile), ("full_offload", tile)]
    found, wanted = {}, None
    for policy, size in cases:
        name = policy if size is None else f"{policy}, tiles of {size}"
        model = build(args, num_layers, policy, size, seq_len)
        result, grads = run_policy(model, args, seq_len)
        wanted = wanted or grads
        result["least_cosine"] = min(cosine(grads[key], wanted[key]) for key in wanted)
        least = 0.99999 if policy in (*EXACT_POLICIES, "sac2") else 0.995
        if not result["least_cosine"] >= least:
            failures.append(f"{name}: a gradient's cosine with none is {result['least_cosine']:.6f} < {least}")
        found[name] = result
        print(f"{name:28s} {json.dumps({k: v if v is None else round(v, 6) for k, v in result.items()})}", flush=True)
        del model, grads
        clear(args.device)
    return found


def run_policy(
    model: Any, args: argparse.Namespace, seq_len: int
) -> tuple[dict[str, float | None], dict[str, torch.Tensor]]:
    device, rows, num_layers = args.device, 2, model.config.num_hidden_layers
    (batch,) = random_batches(model.config.vocab_size, rows, seq_len, 1)
    ids = batch["input_ids"].to(device)

    def pass_once() -> float | None:
        before = torch.cuda.memory_allocated() if device != "cpu" else 0
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        kept = torch.cuda.memory_allocated() - before if device != "cpu" else None
        hidden.backward(direction[: hidden.shape[0]])
        # the last hidden state, and what the last norm keeps of it, are not a layer's
        around = 2 * hidden.numel() * hidden.element_size()
        return None if kept is None else (kept - around) / (rows * seq_len * num_layers)

    generator = torch.Generator(device).manual_seed(1)
    shape = (rows, seq_len, model.config.hidden_size)
    direction = torch.randn(shape, generator=generator, device=device).to(model.dtype)
    pass_once()
    model.zero_grad()
    synchronize(device)
    peak_gib(device)
    kept = pass_once()
    grads = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    peak, repeats = peak_gib(device), 1 if device == "cpu" else 5
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        pass_once()
    synchronize(device)
    milliseconds = (time.perf_counter() - started) / repeats * 1e3
    return {"bytes_a_token_and_layer": kept, "peak_gib": peak, "ms": milliseconds}, grads


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = one.double().flatten(), other.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


# --- long rows -------------------------------------------------------------------------------------------------------


def time_row(length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return peak and rate of one step of one row; out of memory is a result, not an error."""
    length = min(length, 500) if args.small else length
    print(f"--- one row of {length:,} tokens, {args.base}, {args.policy}", flush=True)
    try:
        return _time_row(length, args)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        print(f"out of memory: {message[:200]}")
        return {"out_of_memory": message}
    finally:
        clear(args.device)


def _time_row(length: int, args: argparse.Namespace) -> dict[str, Any]:
    device, tile = args.device, args.tile or (96 if args.small else None)
    started = time.perf_counter()
    model = build(args, args.layers, args.policy, tile, length)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device != "cpu")
    engine = EagerEngine(model, MaskedCrossEntropy(), model.device, joins_frozen_head=True)

    def step(num_tokens: int) -> list[float]:
        batches = random_batches(model.config.vocab_size, 1, num_tokens, 1)
        loss = engine.forward_backward(batches, num_tokens)
        norm = clip_grad_norm(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack([loss, norm]).tolist()

    step(min(length, 2048))
    synchronize(device)
    set_up_s = time.perf_counter() - started
    peak_gib(device)
    started = time.perf_counter()
    loss, norm = step(length)
    synchronize(device)
    elapsed = time.perf_counter() - started
    assert math.isfinite(loss), loss
    assert math.isfinite(norm), norm
    found = outline.from_config(model.config, peft_config=PEFT, fast_layers="on")
    load = Workload(
        outline.shape_of(found, "8b"),
        rows=1,
        seq_len=length,
        grad_accum=1,
        store="nf4" if args.base == "nf4" else "dense",
        weight_bytes=dtype_of(device).itemsize,
        recompute=args.policy,
        mlp_tile_tokens=tile,
    )
    result = {
        "tokens": length,
        "seconds": elapsed,
        "tokens_per_s": length / elapsed,
        "peak_gib": peak_gib(device),
        "planned_gib": memory.peak(load).total / GIB,
        "on_the_host_gib": memory.offloaded(load) / GIB,
        "set_up_s": set_up_s,
        "loss": loss,
        "grad_norm": norm,
    }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}), flush=True)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
