"""What `automodel plan` says of many training runs, beside what a GPU measures in them.

    python benchmarks/plan_runs.py [--cases llama3_1_8b:bf16:2x4096:none:adamw:2,...] [--seconds-limit 240] [--out FILE]

A case is shape, store, rows x length, what is recomputed (none, selective, full), the optimizer, micro-batches of a
step and, if it is shorter than the real one, the number of layers. Stores: bf16, fp8, fp8_once (one copy), nf4 and
nf4_fp8 are bases under LoRA, r 16 on all projections; sft trains all weights, and `-in_backward` behind its optimizer
steps in the backward pass.

Each case is one recipe. The planner reads it (`recipes/plan.py`) and says peak memory and rate; the recipe of
`automodel benchmark` then trains it, all in this process: weights and tokens are random, two steps to warm up and two
that count. The record holds the recipe, the plan by term, and what was measured: the peak of allocated memory in the
steps that count, what stays allocated between steps, the peak while the model was made, reserved memory, and the rate
of so short a window. Kernels are the defaults, unmeasured, unless ``--kernels measure`` asks. What the planner puts
above the card's memory is not run, but kept as a prediction; a case that fails is kept with its error. The file is
written after every case, and no case begins after ``--seconds-limit``.

`--device cpu --small` runs the script itself on any machine, without peaks. Exit status 1 when a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # or the gaps of one case fail the next

import torch
from measuring import LORA_ALPHA, LORA_RANK, SHAPES, SMALL, environment

from nemo_automodel.cli.plan import as_json
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.plan.machines import GIB, MACHINES
from nemo_automodel.recipes.llm.benchmark import BenchmarkingRecipeForNextTokenPrediction
from nemo_automodel.recipes.plan import Plan, plan_run
from nemo_automodel.shared.types import Batch, StepMetrics

# shape:store:rows x length:recomputed:optimizer:micro-batches[:layers]
CASES = """llama3_1_8b:bf16:2x4096:none:adamw:2
llama3_1_8b:nf4:2x4096:none:adamw:1
llama3_1_8b:fp8:2x4096:none:adamw:2
llama3_1_8b:sft:1x4096:none:adam:2
phi3_mini:bf16:2x2048:none:adamw:1
llama3_1_8b:nf4_fp8:2x4096:none:adamw:1
llama3_70b:nf4:2x1024:none:adamw:1
qwen3_8b:bf16:1x8192:selective:adamw:1
qwen2_5_7b:bf16:2x4096:none:adam:1
qwen3_8b:sft:1x4096:none:torch.optim.Adagrad:1
smollm2_135m:bf16:8x1024:none:adamw:2
llama3_2_1b:sft:4x2048:none:adamw:1
llama3_1_8b:bf16:1x16384:none:adamw:1
llama3_1_8b:bf16:4x1024:selective:adamw:2
llama3_1_8b:bf16:2x4096:full:adamw:1
qwen3_8b:fp8:1x8192:full:adamw:1
qwen2_5_7b:nf4:1x8192:selective:adamw:1
qwen3_8b:nf4:2x2048:none:adamw:1
qwen2_5_7b:fp8:4x2048:selective:adamw:1
phi3_mini:bf16:2x2048:full:adamw:1
phi3_mini:bf16:1x4096:selective:adamw:1
olmo2_7b:bf16:2x2048:none:adamw:1
llama3_2_3b:sft:2x4096:none:adamw:1
qwen3_8b:sft:1x4096:full:adam:1
llama3_1_8b:sft:1x1024:none:adam-in_backward:1
llama3_1_8b:fp8_once:2x2048:none:adamw:1
llama3_1_8b:nf4:1x16384:full:adamw:1
qwen3_8b:nf4_fp8:4x1024:full:adamw:1
llama3_2_3b:bf16:4x1024:none:adamw8bit:1
llama3_2_1b:bf16:4x4096:selective:adam:1
smollm2_135m:sft:8x2048:none:adam:2
smollm2_135m:bf16:1x16384:full:adamw:1
qwen2_5_7b:sft:2x2048:selective:torch.optim.SGD:2
llama3_1_8b:bf16:5x4096:none:adamw:1
llama3_70b:nf4_fp8:2x1024:none:adamw:1
llama3_70b:nf4:1x4096:full:adamw:1
llama3_70b:nf4:1x4096:none:adamw:1:40
qwen3_8b:sft:2x4096:none:adam:2
qwen3_8b:sft:1x4096:none:adamw8bit:2
llama3_1_8b:bf16:2x16384:none:adamw:1
olmo2_7b:bf16:2x4096:full:adamw:1
smollm2_135m:sft:4x1024:none:adamw_sr:1"""
WARMUP_STEPS, TIMED_STEPS = 2, 2


@dataclass(frozen=True)
class Case:
    """One training run."""

    shape: str
    store: str
    rows: int
    seq_len: int
    recompute: str
    optimizer: str
    grad_accum: int
    num_layers: int | None = None

    @classmethod
    def read(cls, text: str) -> Case:
        """Read ``shape:store:rowsxlength:recompute:optimizer:grad_accum[:layers]``."""
        shape, store, size, recompute, optimizer, grad_accum, *rest = text.split(":")
        rows, _, seq_len = size.partition("x")
        num_layers = int(rest[0]) if rest else None
        return cls(shape, store, int(rows), int(seq_len), recompute, optimizer, int(grad_accum), num_layers)


def recipe_of(case: Case, device: str, is_small: bool, kernels: str) -> dict[str, Any]:
    """Return the configuration of a benchmark run, as a YAML file would hold it."""
    class_name, sizes = SHAPES[case.shape]
    seq_len = 64 if is_small else case.seq_len
    small = {**SMALL, "intermediate_size": 128} if is_small else {}  # 8 bits want multiples of 64
    sizes = {**sizes, **small, "max_position_embeddings": 32768}
    if case.num_layers is not None and not is_small:
        sizes["num_hidden_layers"] = case.num_layers
    dtype = "bfloat16" if device == "cuda" else "float32"
    optimizer = case.optimizer.removesuffix("-in_backward")
    config: dict[str, Any] = {
        "recipe": "BenchmarkingRecipeForNextTokenPrediction",
        "dist_env": {"backend": "nccl" if device == "cuda" else "gloo"},
        "benchmark": {"warmup_steps": WARMUP_STEPS},
        "step_scheduler": {
            "global_batch_size": case.rows * case.grad_accum,
            "local_batch_size": case.rows,
            "max_steps": WARMUP_STEPS + TIMED_STEPS,
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": {"_target_": f"transformers.{class_name}", **sizes},
            "torch_dtype": dtype,
            "kernels": kernels,
            **({} if device == "cuda" else {"fast_layers": "on"}),
        },
        "distributed": {"activation_checkpointing": False if case.recompute == "none" else case.recompute},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset",
            "vocab_size": sizes["vocab_size"],
            "seq_len": seq_len,
        },
        "dataloader": {"batch_size": None, "num_workers": 0},
        "optimizer": {"_target_": optimizer, "lr": 1e-4},
    }
    if optimizer != case.optimizer:
        config["optimizer"]["in_backward"] = True
        config["clip_grad_norm"] = {"max_norm": None}
    if case.store != "sft":
        config["peft"] = {"target_modules": "*_proj", "dim": LORA_RANK, "alpha": LORA_ALPHA}
    if case.store.startswith("fp8"):
        copies = 1 if case.store == "fp8_once" else 2
        config["fp8"] = {"enabled": True, "weight_copies": copies, "emulate": device != "cuda"}
    if case.store.startswith("nf4"):
        in_fp8 = case.store == "nf4_fp8"
        config["quantization"] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype, "compute_in_fp8": in_fp8}
    return config


class NotingRecipe(BenchmarkingRecipeForNextTokenPrediction):
    """The benchmark recipe, which also notes what lies in memory when."""

    def __init__(self, cfg: ConfigNode) -> None:
        super().__init__(cfg)
        self.notes: dict[str, Any] = {}

    def build_model(self) -> None:
        """Make the model; see the base class."""
        started = time.perf_counter()
        if self.device.type == "cuda":
            self.notes["before_gib"] = torch.cuda.memory_allocated() / GIB
        super().build_model()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.notes["build_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            self.notes["built_gib"] = torch.cuda.memory_allocated() / GIB
        self.notes["build_s"] = time.perf_counter() - started

    def train_step(self, batches: Sequence[Batch]) -> StepMetrics:
        """Train one step; see the base class."""
        metrics = super().train_step(batches)
        if self.device.type == "cuda":
            self.notes["between_steps_gib"] = torch.cuda.memory_allocated() / GIB
            self.notes["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        self.notes.setdefault("step_peaks_gib", []).append(metrics.mem_gib)
        return metrics


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Train the recipe and return what was measured, or why it failed. Nothing of it stays in memory."""
    reset_peaks()
    with tempfile.TemporaryDirectory() as directory:
        cfg = ConfigNode({**config, "checkpoint": {"enabled": False, "checkpoint_dir": directory}})
        recipe = NotingRecipe(cfg)
        try:
            recipe.setup()
            recipe.run_train_validation_loop()
            result = json.loads(recipe.result_path.read_text())
        except Exception as error:  # whatever sinks one case must not sink the others, and is its result
            reason = str(error).strip() or type(error).__name__
            kind = "out_of_memory" if isinstance(error, torch.OutOfMemoryError) else "error"
            return {kind: reason.splitlines()[0][:300], **recipe.notes}
    return {
        "peak_gib": result["peak_gib"] or None,
        "tokens_per_s": result["tokens_per_s"]["processed"],
        "step_s": result["seconds_per_step"],
        "hardware_tflops": result["tflops"]["hardware"],
        "layers": result["conditions"]["decoder_layers"],
        "losses": [result["first_loss"], result["last_loss"]],
        **recipe.notes,
    }


def reset_peaks() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_case(text: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the record of one case."""
    started = time.perf_counter()
    config = recipe_of(Case.read(text), args.device, args.small, args.kernels)
    try:
        plan = plan_run(ConfigNode(config), MACHINES[args.gpu])
    except Exception as error:  # as in `measure`; the measured half is worth having all the same
        measured = {"error": "only planned"} if args.plan_only else measure(config)
        return {"recipe": config, "plan": {"error": repr(error)[:300]}, "measured": measured}
    planned = as_json(plan)
    keys = ("fits", "needed_gib", "memory_gib", "load_device_gib", "tokens_per_s", "step_s", "notes")
    record = {"recipe": config, "plan": {key: planned[key] for key in keys}, "plan_s": time.perf_counter() - started}
    if args.plan_only or plan.needed_bytes > plan.machine.memory_gib * GIB:
        record["skipped"] = "only planned" if args.plan_only else "planned above the card's memory"
    else:
        record["measured"] = measure(config)
        reset_peaks()
        record |= errors_of(plan, record["measured"])
    return record | {"seconds": time.perf_counter() - started}


def errors_of(plan: Plan, measured: dict[str, Any]) -> dict[str, float]:
    """Return by what share the plan is above what was measured."""
    found = {}
    if measured.get("peak_gib"):
        found["memory_error"] = plan.memory.total / GIB / measured["peak_gib"] - 1
    if "tokens_per_s" in measured:
        found["rate_error"] = plan.speed.tokens_per_s / measured["tokens_per_s"] - 1
    return found


def describe(text: str, record: dict[str, Any]) -> str:
    plan, measured = record["plan"], record.get("measured", {})
    if "error" in plan:
        return f"{text:44s} no plan: {plan['error']}"
    line = f"{text:44s} {plan['needed_gib']:7.2f} GiB"
    failed = measured.get("out_of_memory") or measured.get("error")
    if failed or not measured:
        return f"{line}  {record.get('skipped') or failed}"
    if measured["peak_gib"]:
        line += f" | {measured['peak_gib']:7.2f} {record['memory_error']:+7.1%}"
    line += f" | {plan['tokens_per_s']:8,.0f} | {measured['tokens_per_s']:9,.0f} {record['rate_error']:+7.1%}"
    return f"{line} tok/s, {measured['layers']}, {record['seconds']:.1f} s"


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the errors' sizes, and the runs that were said to fit and did not."""
    found: dict[str, Any] = {}
    for key in ("memory_error", "rate_error"):
        sizes = [abs(run[key]) for run in runs.values() if key in run]
        found[key] = {"runs": len(sizes)}
        if sizes:
            found[key] |= {"median": statistics.median(sizes), "worst": max(sizes)}
    oom = [n for n, r in runs.items() if r["plan"].get("fits") and "out_of_memory" in r.get("measured", {})]
    failed = [n for n, r in runs.items() if "error" in r["plan"] or "error" in r.get("measured", {})]
    return found | {"false_fits": oom, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="what to run, separated by commas or lines")
    parser.add_argument("--only", default="", metavar="WORD", help="of these, the cases whose name holds WORD")
    parser.add_argument("--seconds-limit", type=float, default=240, help="no case begins later")
    parser.add_argument("--kernels", default="defaults", choices=("defaults", "measure"), help="of the fast layers")
    parser.add_argument("--gpu", default="h100", help="what is planned for, as `automodel plan --gpu`")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--plan-only", action="store_true", help="run nothing")
    parser.add_argument("--verbose", action="store_true", help="show what the recipes print")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    started, runs = time.perf_counter(), {}
    record: dict[str, Any] = {"command": " ".join(["python", "benchmarks/plan_runs.py", *sys.argv[1:]])}
    record |= {"date": time.strftime("%Y-%m-%d"), "environment": environment("cpu" if args.plan_only else args.device)}
    print(json.dumps(record["environment"]), flush=True)
    for text in filter(lambda name: name and args.only in name, args.cases.replace(",", "\n").splitlines()):
        if time.perf_counter() - started > args.seconds_limit:
            print(f"{text}: not begun after {args.seconds_limit:g} s")
            continue
        quiet = contextlib.nullcontext() if args.verbose else contextlib.redirect_stdout(io.StringIO())
        with quiet:
            runs[text] = run_case(text, args)
        print(describe(text, runs[text]), flush=True)
        record |= {"summary": summary(runs), "runs": runs}
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary(runs), indent=1), f"{time.perf_counter() - started:.0f} s", sep="\n")
    found = summary(runs)
    return 1 if found["failed"] or found["false_fits"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
