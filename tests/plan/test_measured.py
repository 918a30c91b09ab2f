"""The planner against every training run whose peak memory and rate were kept from a GPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from statistics import median

import pytest
import transformers

from nemo_automodel._transformers import outline
from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components.plan import memory, speed
from nemo_automodel.components.plan.machines import GIB, MACHINES
from nemo_automodel.components.plan.workload import ModelShape, Workload

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "dtype": "bfloat16"}
CONFIGS = {
    "8b": transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA
    ),
    "70b": transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
    ),
    "qwen": transformers.Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, tie_word_embeddings=False, dtype="bfloat16",
    ),
    "small": transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, dtype="bfloat16",
    ),
}  # fmt: skip


def _cases() -> list[tuple[str, str, dict[str, object], dict[str, float]]]:
    """Return name, shape, what the workload is besides, and what was measured."""
    found = []
    for run in json.loads((RESULTS / "compare_h100.json").read_text())["runs"]:
        arguments = run["arguments"]
        shape = {"llama3_1_8b": "8b", "qwen2_5_7b": "qwen", "smollm2_135m": "small"}[arguments["shape"]]
        more = {"rows": int(arguments["rows"]), "seq_len": int(arguments["seq_len"])}
        more |= {"grad_accum": int(arguments["grad_accum"]), "dropout": float(arguments["dropout"])}
        for case, measured in run["cases"].items():
            if case in ("ours", "ours_fp8"):
                store = "fp8" if case == "ours_fp8" else "dense"
                found.append((f"{shape} {case} {arguments['dropout']}", shape, {**more, "store": store}, measured))
    for name, measured in json.loads((RESULTS / "qlora_h100.json").read_text())["steps"].items():
        shape, size, recompute, store = name.split(":")
        rows, seq_len = map(int, size.split("x"))
        more = {"rows": rows, "seq_len": seq_len, "grad_accum": 4, "recompute": recompute, "store": "nf4"}
        found.append((name, shape, {**more, "computes_in_fp8": store == "nf4_fp8"}, measured))
    return found


CASES = _cases()


@functools.cache
def _shape(name: str) -> ModelShape:
    lora = PeftConfig(target_modules=["*_proj"], dim=16, alpha=32)
    return outline.shape_of(outline.from_config(CONFIGS[name], peft_config=lora), name)


def _load(shape: str, more: dict[str, object]) -> Workload:
    return Workload(_shape(shape), **more)


@pytest.mark.parametrize(("shape", "more", "measured"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_peak_memory_is_within_five_per_cent(shape, more, measured):
    planned = memory.peak(_load(shape, more)).total / GIB
    assert planned == pytest.approx(measured["peak_gib"], rel=0.05)


def test_rates_are_near():
    errors = {}
    for name, shape, more, measured in CASES:
        planned = speed.estimate(_load(shape, more), MACHINES["h100"]).tokens_per_s
        errors[name] = abs(planned / measured["tokens_per_s"] - 1)
    assert median(errors.values()) <= 0.12, errors
