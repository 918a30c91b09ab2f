"""Measure which kernels the fast layers take on this machine, model by model, and how long finding out takes.

    python benchmarks/kernel_table.py [--models llama3_8b,smollm2_135m] [--out record.json]

For each shape a model of one decoder layer with random weights asks twice, as a run does at its start: with an empty
cache, Triton's included where it was never used before, and again. The record holds the tables and the seconds of both.

`--device cpu --small` runs the script itself on any machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from nemo_automodel._transformers.kernel_choice import KernelRequest, measured_table
from nemo_automodel.components._peft.lora import PeftConfig, apply_lora

MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "llama3_8b": (
        "LlamaConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
        (2, 4096),
    ),
    "qwen2_5_7b": (
        "Qwen2Config",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
        (2, 4096),
    ),
    "qwen3_8b": (
        "Qwen3Config",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 128},
        (2, 4096),
    ),
    "llama3_70b": (
        "LlamaConfig",
        {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
        (1, 4096),
    ),
    "smollm2_135m": (
        "LlamaConfig",
        {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
        (8, 1024),
    ),
}
"""Name → configuration class, sizes of a layer, rows and positions of a micro-batch."""
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    record = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NEMO_AUTOMODEL_CACHE"] = cache
        for name in args.models.split(","):
            print(f"== {name}")
            record[name] = ask_twice(name, args)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def ask_twice(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the table of one model and the seconds that it took without and with a cache."""
    kind, sizes, rows = MODELS[name]
    sizes, rows = (SMALL, (2, 64)) if args.small else (sizes, rows)
    config = getattr(transformers, kind)(**sizes, num_hidden_layers=1, vocab_size=512, max_position_embeddings=8192)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    apply_lora(model, PeftConfig(target_modules="*_proj", dim=args.rank))
    seconds, table = [], None
    for _ in range(2):
        started = time.perf_counter()
        table = measured_table(model, model.model.layers[0], KernelRequest(row_shape=rows))
        seconds.append(round(time.perf_counter() - started, 3))
    print(f"  {seconds[0]} s measured, {seconds[1]} s from the cache")
    assert table is not None
    return {"seconds": seconds[0], "seconds_from_cache": seconds[1], **table.to_json()}


if __name__ == "__main__":
    main()
