"""Train with one process and with several on this machine, compare, and lose one of them on purpose.

    python benchmarks/several_gpus.py [--processes 2] [--cases lora,all,sharded,fp32,faults] [--out results.json]

Every case is whole commands as a user types them, on random weights of the shape of Llama-3.2-1B and rows of 1024
random tokens. `lora`, `all` and `sharded` (all weights, the optimizer split) train in bfloat16 on fast layers, `fp32`
all weights of two plain layers in float32: the same global batch by one process and by several, losses and gradient
norms compared step by step, tokens a second of the later steps. In float32 losses may differ by 1e-5 of themselves, in
bfloat16 by 2e-3.

`faults` takes several processes only, with the optimizer split: SIGTERM to the command and a second start that must go
on with the recorded batch and loss, then SIGKILL of the last process: seconds until the command has ended, its exit
status, its one line.

Exit status 1 when something is not as it must be. `--device cpu --small` runs the script itself on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from measuring import LORA_ALPHA, LORA_RANK, SHAPES, environment

ROOT = Path(__file__).resolve().parents[1]
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-3}
NUM_WARM_UP = 4


def configuration(case: str, args: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """Return the recipe of a case."""
    name, sizes = SHAPES["llama3_2_1b"]
    row_len, rows = 1024, args.processes * 8
    if case == "fp32":
        sizes, rows = sizes | {"num_hidden_layers": 2, "vocab_size": 32000}, args.processes * 2
    if args.small:
        sizes = sizes | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        row_len = 64
    adapters = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig", "target_modules": "*_proj"}
    return {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": 42,
        "step_scheduler": {
            "global_batch_size": rows,
            "local_batch_size": 1 if case == "fp32" else 4,
            "max_steps": 1_000_000 if case == "faults" else args.steps,
            "ckpt_every_steps": 1_000_000,
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": {"_target_": f"transformers.{name}", "max_position_embeddings": row_len, **sizes},
            "torch_dtype": "float32" if case == "fp32" else "bfloat16",
            **({"fast_layers": "off"} if case == "fp32" else {}),
        },
        **({} if case in ("all", "sharded", "fp32") else {"peft": {**adapters, "dim": LORA_RANK, "alpha": LORA_ALPHA}}),
        "distributed": {"strategy": "fsdp2" if case in ("sharded", "faults") else "ddp"},
        "dist_env": {"backend": "nccl" if args.device == "cuda" else "gloo", "timeout_minutes": 2},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.mock.build_unpacked_dataset",
            **{"num_sentences": 4096, "mean_len": row_len, "std_len": 0.0, "max_sentence_len": row_len},
            "vocab_size": sizes["vocab_size"],
        },
        "data_check": False,
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-5},
        "checkpoint": {"checkpoint_dir": str(run_dir), "enabled": case == "faults"},
    }


def start(config: dict[str, Any], num_processes: int) -> subprocess.Popen[str]:
    """Start a run as a user does."""
    run_dir = Path(config["checkpoint"]["checkpoint_dir"])
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "nemo_automodel.cli.app", str(path), "--nproc-per-node", str(num_processes)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )


def records(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    path = Path(config["checkpoint"]["checkpoint_dir"]) / "training.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def compare(case: str, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Train a case with one process and with several."""
    found = {}
    for size in (1, args.processes):
        config = configuration(case, args, root / f"{case}_{size}")
        run = start(config, size)
        text = run.communicate()[1]
        if run.returncode:
            return {"case": case, "failed": text[-3000:], "is_good": False}
        found[size] = records(config)
    one, several = found[1], found[args.processes]
    dtype = configuration(case, args, root)["model"]["torch_dtype"]
    loss = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(several, one, strict=True))
    norm = max(abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"] for a, b in zip(several, one, strict=True))
    rates = {size: _rate(run[NUM_WARM_UP:]) for size, run in found.items()}
    return {
        "case": case,
        "dtype": dtype,
        "steps": len(one),
        "largest_loss_difference": loss,
        "largest_norm_difference": norm,
        "tokens_per_s": rates,
        "speed_up": rates[args.processes] / rates[1],
        "peak_gib": {size: max(record["mem"] for record in run) for size, run in found.items()},
        "is_good": loss <= TOLERANCES[dtype]
        and [r["num_label_tokens"] for r in one] == [r["num_label_tokens"] for r in several],
    }


def _rate(found: list[dict[str, Any]]) -> float:
    seconds = sum(record["num_tokens_per_step"] / record["tps"] for record in found)
    return float(sum(record["num_tokens_per_step"] for record in found) / seconds)


def lose(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Stop a run, let it go on, kill one of its processes."""
    config = configuration("faults", args, root / "faults")
    run = start(config, args.processes)
    _read_until(run, "| step 3 |")
    began = time.perf_counter()
    run.send_signal(signal.SIGTERM)
    text = run.communicate()[1]
    stopped = {"status": run.returncode, "seconds": time.perf_counter() - began}
    if run.returncode:
        stopped["failed"] = text[-3000:]
    run = start(config, args.processes)
    lines = _read_until(run, "| step 7 |")
    resumed = next((line.partition("Checked")[2].strip() for line in lines if "Checked before going on" in line), "")
    victim = _children(run.pid)[-1]
    began = time.perf_counter()
    os.kill(victim, signal.SIGKILL)
    text = run.communicate()[1]
    seconds = time.perf_counter() - began
    said = [line for line in text.splitlines() if line.startswith("error: ")]
    is_named = len(said) == 1 and bool(re.match(rf"error: Lost rank \d+ \(process {victim}\)", said[0]))
    return {
        "case": "faults",
        "sigterm": stopped,
        "resumed": resumed,
        "sigkill": {"status": run.returncode, "seconds": seconds, "said": said},
        "is_good": stopped["status"] == 0 and bool(resumed) and run.returncode == 4 and is_named and seconds < 30,
    }


def _read_until(run: subprocess.Popen[str], wanted: str) -> list[str]:
    lines = []
    assert run.stderr is not None
    for line in run.stderr:
        lines.append(line)
        if wanted in line:
            return lines
    raise SystemExit(f"the run ended before `{wanted}`:\n{''.join(lines)[-3000:]}")


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return sorted(int(child) for child in path.read_text().split())


def main() -> int:
    """Run all cases and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cases", default="lora,all,sharded,fp32,faults")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as root:
        for case in args.cases.split(","):
            began = time.perf_counter()
            result = lose(args, Path(root)) if case == "faults" else compare(case, args, Path(root))
            results.append({**result, "took_s": time.perf_counter() - began})
            sys.stdout.write(json.dumps(results[-1]) + "\n")
            sys.stdout.flush()
    if args.out is not None:
        kept = {"environment": environment(args.device), "processes": args.processes, "results": results}
        args.out.write_text(json.dumps(kept, indent=1) + "\n")
    return 0 if all(result["is_good"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
