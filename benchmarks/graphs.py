"""Recorded layers against the same layers unrecorded: the losses, and the rates.

    python benchmarks/graphs.py [--cases smollm2_135m:2x4096,...] [--seconds 10] [--out results.json]

A case is shape, rows x length, and what else: `lora` (the default), `sft`, `fp8`, `nf4`; `dropout`; `packed` (documents
of about 170 tokens); `full` or `selective`; and a number, which exchanges the count of layers. Weights are random and
made on the device, tokens random, all labelled; a step is eight micro-batches, clipping and AdamW. Both ways start from
the same weights and random numbers; two runs without recordings differ too where attention's backward pass adds in no
fixed order, so one more shows by how much. Exit status 1 where recording differs by more than three times that.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measuring import LORA_ALPHA, LORA_RANK, environment, make_config, packed_batches, random_batches, time_steps

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.layer_graphs import recorded_bytes
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.distributed.grad import clip_grad_norm
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes.engine import EagerEngine, count_label_tokens

CASES = (
    "smollm2_135m:2x4096,smollm2_135m:8x1024:packed:dropout,llama3_1_8b:1x1024:sft,qwen3_8b:1x1024:sft,"
    "llama3_1_8b:1x1024:fp8:8,llama3_1_8b:1x1024:nf4:8,qwen2_5_7b:1x1024:full:8,qwen3_8b:1x1024:selective:packed:8"
)
GRAD_ACCUM = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--seconds", type=float, default=5, help="timed window of each way, at least")
    parser.add_argument("--steps", type=int, default=4, help="steps whose losses are compared")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"environment": environment("cuda"), "argv": sys.argv[1:], "cases": {}}
    differ = []
    for case in args.cases.split(","):
        ways = {
            "again": run(case, "off", args, seconds=0.1),
            "off": run(case, "off", args),
            "on": run(case, "on", args),
        }
        ways["noise"] = gap(ways["again"], ways["off"])
        ways["difference"] = gap(ways["on"], ways["off"])
        ways["faster"] = ways["on"]["tokens_per_s"] / ways["off"]["tokens_per_s"]
        record["cases"][case] = ways
        print(
            f"{case}: {ways['off']['tokens_per_s']:,.0f} -> {ways['on']['tokens_per_s']:,.0f} tok/s "
            f"({ways['faster']:.2f}x), {ways['off']['peak_gib']:.2f} -> {ways['on']['peak_gib']:.2f} GiB allocated, "
            f"{ways['off']['reserved_gib']:.2f} -> {ways['on']['reserved_gib']:.2f} reserved, "
            f"losses differ by {ways['difference']:.1e}, of two runs without by {ways['noise']:.1e}",
            flush=True,
        )
        if ways["difference"] > 3 * ways["noise"]:
            differ.append(case)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"losses differ: {', '.join(differ)}" if differ else "all losses equal")
    return 1 if differ else 0


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest relative difference of the losses of the first steps."""
    return max(abs(a / b - 1) for a, b in zip(one["first losses"], other["first losses"], strict=True))


def run(case: str, wish: str, args: argparse.Namespace, seconds: float | None = None) -> dict[str, Any]:
    """Train one case one way."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    shape, size, *words = case.split(":")
    rows, seq_len = map(int, size.split("x"))
    num_layers = next((int(word) for word in words if word.isdigit()), None)
    options: dict[str, Any] = {}
    if "sft" not in words:
        dropout = 0.1 if "dropout" in words else 0.0
        options["peft_config"] = PeftConfig(target_modules="*_proj", dim=LORA_RANK, alpha=LORA_ALPHA, dropout=dropout)
    if "fp8" in words:
        options["fp8_config"] = {"enabled": True}
    if "nf4" in words:
        options["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    recompute = next((word for word in words if word in ("full", "selective")), "none")
    torch.manual_seed(5)
    model = NeMoAutoModelForCausalLM.from_config(
        make_config(shape, num_layers),
        torch_dtype="bfloat16",
        device="cuda",
        fast_layers="on",
        kernels="defaults",
        cuda_graphs=wish,
        activation_checkpointing=recompute,
        **options,
    ).train()
    engine = EagerEngine(model, MaskedCrossEntropy(), model.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    vocab = model.config.vocab_size
    if "packed" in words:
        batches = packed_batches(vocab, rows, seq_len, GRAD_ACCUM, 170, 60)
    else:
        batches = random_batches(vocab, rows, seq_len, GRAD_ACCUM)
    num_labels = count_label_tokens(batches)

    def step() -> float:
        loss = engine.forward_backward(batches, num_labels)
        norm = clip_grad_norm(parameters, 1.0)
        value, total = torch.stack([loss, norm]).tolist()
        assert math.isfinite(total)
        optimizer.step()
        optimizer.zero_grad()
        return float(value)

    started = time.perf_counter()
    first = [step() for _ in range(args.steps)]
    first_s = time.perf_counter() - started
    window = time_steps(step, args.seconds if seconds is None else seconds, "cuda")
    return {
        "tokens_per_s": window.num_steps * GRAD_ACCUM * rows * seq_len / window.seconds,
        "first losses": first,
        "first_steps_s": first_s,
        "timed_s": window.seconds,
        "peak_gib": (window.peak_gib or 0.0) + recorded_bytes(model) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


if __name__ == "__main__":
    raise SystemExit(main())
