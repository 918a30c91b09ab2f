"""Run the playbook's three commands one after the other in one directory and check what they leave behind.

The commands are the printed ones; the model and the data are local, because the Hub may be out of reach:

    python benchmarks/playbook.py --model ~/models/SmolLM2-135M-Instruct --data data/squad_like --out results.json

Each run must end with exit status 0, `checkpoints/LATEST/` must list what the playbook shows, and plain Transformers
(or PEFT over the base) must load `checkpoints/LATEST/model` and answer differently from the base. The record holds the
command, the wall time, the first and last training losses and the validation losses, and the machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = "examples/llm_finetune/finetune.py"
LISTING = {"config.yaml", "dataloader", "model", "optim", "rng", "step_scheduler.pt"}
COMMANDS = {
    "LoRA": ["-c", "examples/llm_finetune/llama3_2/llama3_2_1b_squad_peft.yaml"],
    "QLoRA": [
        "-c",
        "examples/llm_finetune/llama3_1/llama3_1_8b_squad_qlora.yaml",
        "--loss_fn._target_",
        "nemo_automodel.components.loss.te_parallel_ce.TEParallelCrossEntropy",
        "--step_scheduler.local_batch_size",
        "1",
    ],
    "SFT": ["-c", "examples/llm_finetune/qwen/qwen3_8b_squad_spark.yaml", "--step_scheduler.local_batch_size", "1"],
}


def command(name: str, args: argparse.Namespace) -> list[str]:
    return [
        *COMMANDS[name],
        "--model.pretrained_model_name_or_path",
        str(args.model.resolve()),
        "--packed_sequence.packed_sequence_size",
        "1024",
        "--step_scheduler.max_steps",
        str(args.steps),
        "--dataset.dataset_name",
        str(args.data.resolve()),
        "--validation_dataset.dataset_name",
        str(args.data.resolve()),
        *args.override,
    ]


def run(name: str, workplace: Path, args: argparse.Namespace) -> dict:
    """Run one command in ``workplace`` and return its record."""
    words = command(name, args)
    print(f"\n=== {name}: {SCRIPT} {' '.join(words)}", flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], cwd=workplace, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seconds = time.perf_counter() - start
    (workplace / f"{name}.log").write_text(done.stdout)
    lines = [line for line in done.stdout.splitlines() if "step " in line and "loss" in line]
    print("\n".join([*lines[:2], "...", *lines[-3:]] if lines else [done.stdout[-3000:]]), flush=True)
    if done.returncode:
        print(done.stdout[-4000:])
        raise SystemExit(f"{name} ended with exit status {done.returncode}")
    latest = workplace / "checkpoints" / "LATEST"
    missing = LISTING - {entry.name for entry in latest.iterdir()}
    if missing:
        raise SystemExit(f"{name}: checkpoints/LATEST lacks {sorted(missing)}")
    run_dir = latest.resolve().parent
    train = [json.loads(line) for line in (run_dir / "training.jsonl").read_text().splitlines()]
    validation = [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]
    steady = train[len(train) // 2 :]
    return {
        "command": f"{SCRIPT} {' '.join(words)}",
        "seconds": round(seconds, 1),
        "checkpoint": str(latest.resolve().relative_to(workplace)),
        "losses": [train[0]["loss"], train[-1]["loss"]],
        "validation": [[record["step"], record["val_loss"]] for record in validation],
        "median_tps_second_half": sorted(record["tps"] for record in steady)[len(steady) // 2],
        "peak_mem_gib": max(record["mem"] for record in train),
        "opens_in": opens_in(latest / "model", args.model),
    }


def opens_in(saved: Path, base: Path) -> str:
    """Load the saved model with plain Transformers or PEFT, prove that it learned something, and say how."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer("Context: The tower stands in Paris. Question: Where? Answer: ", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = model(ids).logits
        if (saved / "adapter_config.json").exists():
            from peft import PeftModel

            after, reader = PeftModel.from_pretrained(model, saved)(ids).logits, "peft"
        else:
            model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
            after, reader = model(ids).logits, "transformers"
    change = ((after - before).norm() / before.norm()).item()
    if not change > 1e-5:
        raise SystemExit(f"{saved}: the saved model answers like the base (relative change {change:.2e})")
    return f"{reader}, logits moved by {change:.2e} of their norm"


def machine() -> dict:
    """Return what a reader needs to judge the numbers."""
    import torch

    found = {"date": datetime.date.today().isoformat(), "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "torchdata"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = f"CPU, {os.cpu_count()} cores"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="local model directory, used by all three commands")
    parser.add_argument("--data", type=Path, required=True, help="local directory with SQuAD-shaped splits")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", choices=COMMANDS, nargs="+", default=list(COMMANDS))
    parser.add_argument("--out", type=Path, help="write the record here as JSON")
    parser.add_argument("--workplace", type=Path, help="an empty directory; a temporary one by default")
    parser.add_argument("override", nargs="*", default=[], help="after `--`: overrides for all three commands")
    args = parser.parse_args()
    workplace = args.workplace or Path(tempfile.mkdtemp(prefix="playbook_"))
    workplace.mkdir(parents=True, exist_ok=True)
    for folder in ("examples", "nemo_automodel"):
        shutil.copytree(REPOSITORY / folder, workplace / folder, dirs_exist_ok=True)
    record = {
        "machine": machine(),
        "argv": sys.argv[1:],
        "runs": {name: run(name, workplace, args) for name in args.only},
    }
    print(json.dumps(record, indent=2))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
