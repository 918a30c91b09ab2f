"""Does `deterministic: true` hold on this card, what does it cost, and are recorded layers the same under it?

    python benchmarks/determinism.py [--out determinism.json] [--cases lora:packed:dropout,sft] [--budget 140]
    python benchmarks/determinism.py --device cpu --small

A case is `lora`, `fp8`, `nf4` or `sft`, and what else: `packed` (documents of about 170 tokens), `dropout` (0.1). The
model has layers of Llama-3.1-8B's shape with random weights, made anew from one seed for every run; a run is six steps
of four micro-batches with clipping and AdamW, and then a timed window. For each case:

    twice        two runs under the switch: losses, gradient norms, the first step's gradients, the final weights
    without      how far the losses of two runs without it are apart
    recorded     a run under the switch with layers recorded as CUDA graphs, against the unrecorded ones
    tokens/s     with the switch and without

`equal` means every bit. Where recordings differ, the parameters whose gradients differ in the first step are named: the
earliest place to look. Before the cases a real recipe runs as a program (packed rows, LoRA with dropout, validation):
once undisturbed, and once killed (SIGKILL) after the checkpoint of step 4 and started again; the records must be equal.

Exit status 1 where something under the switch is not equal; recordings are reported and do not count. No case is begun
after `--budget` seconds; what was left out is said.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from measuring import LORA_ALPHA, LORA_RANK, environment, make_config, packed_batches, random_batches, time_steps

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.fast_layers import kernel_table
from nemo_automodel._transformers.layer_graphs import recorded_bytes
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.distributed.grad import clip_grad_norm
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.training.determinism import switch_determinism
from nemo_automodel.recipes.engine import EagerEngine, count_label_tokens

ROOT = Path(__file__).resolve().parents[1]
CASES = "lora:packed:dropout,sft,fp8,nf4:packed:dropout,lora,sft:packed,fp8:packed:dropout"
NUM_STEPS, GRAD_ACCUM = 6, 4
_CLOCK = ("timestamp", "tps", "tps_per_gpu", "mem", "mfu")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny model, on a CPU")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="timed window of a run, at least")
    parser.add_argument("--budget", type=float, default=130, help="seconds after which no case is begun")
    parser.add_argument("--no-recipe", action="store_true", help="leave the killed recipe out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.small:
        args.rows, args.length, args.layers, args.seconds = 2, 128, 2, 0.1
    started = time.perf_counter()
    switch_determinism(True)  # before CUDA starts: cuBLAS reads its configuration once
    record: dict[str, Any] = {"environment": environment(args.device), "argv": sys.argv[1:], "cases": {}}
    if not args.no_recipe:
        record["recipe"] = killed_recipe(args)
        print(f"recipe killed after step 4 and resumed: {_words(record['recipe']['equal'])}", flush=True)
    left_out = []
    print(f"{'case':24} {'twice':>7} {'without differ by':>18} {'recorded':>9} {'tokens/s with':>14} {'without':>9}")
    for case in args.cases.split(","):
        if time.perf_counter() - started > args.budget:
            left_out.append(case)
            continue
        found = record["cases"][case] = measure(case, args)
        print(_line(case, found), flush=True)
        for name in found.get("recorded_differs_in", [])[:6]:
            print(f"    first gradients differ: {name}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    record |= {"left_out": left_out, "seconds": time.perf_counter() - started}
    if left_out:
        print(f"left out, the time was over: {', '.join(left_out)}")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    holds = [found["equal"] for found in record["cases"].values()] + [record.get("recipe", {}).get("equal", True)]
    print("everything under the switch is equal" if all(holds) else "NOT EQUAL under the switch")
    return 0 if all(holds) else 1


def _words(equal: bool | None) -> str:
    return "-" if equal is None else "equal" if equal else "DIFFERS"


def _line(case: str, found: dict[str, Any]) -> str:
    recorded = found.get("recorded_equal")
    return (
        f"{case:24} {_words(found['equal']):>7} {found['without_differ_by']:>18.1e} {_words(recorded):>9} "
        f"{found['tokens_per_s']:>14,.0f} {found['tokens_per_s_without']:>9,.0f}"
    )


# --- runs of a model -------------------------------------------------------------------------------------------------


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Do all runs of a case."""
    one, two = (train(case, args, seconds=seconds) for seconds in (0.0, args.seconds))
    free = [train(case, args, is_deterministic=False, seconds=seconds) for seconds in (0.0, args.seconds)]
    found = {
        "equal": _same(one, two),
        "differs_in": _differing(one, two),
        "without_differ_by": _gap(*free),
        "losses": one["losses"],
        "losses_again": two["losses"],
        "losses_without": [run["losses"] for run in free],
        "grad_norms": one["grad_norms"],
        "kernels": one["kernels"],
        "kernels_without": free[0]["kernels"],
        "tokens_per_s": two["tokens_per_s"],
        "tokens_per_s_without": free[1]["tokens_per_s"],
        "peak_gib": two["peak_gib"],
        "peak_gib_without": free[1]["peak_gib"],
    }
    if args.device == "cuda":
        recorded = train(case, args, graphs="on", seconds=args.seconds)
        found |= {
            "recorded_equal": _same(one, recorded),
            "recorded_differs_in": _differing(one, recorded),
            "recorded_differ_by": _gap(one, recorded),
            "recorded_losses": recorded["losses"],
            "recorded_tokens_per_s": recorded["tokens_per_s"],
            "recorded_gib": recorded["recorded_gib"],
        }
    return found


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("losses", "grad_norms", "first_grads", "weights"))


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the parameters whose gradients in the first step differ."""
    return [name for name, digest in one["first_grads"].items() if other["first_grads"][name] != digest]


def _gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest relative difference of the losses."""
    return max(abs(a / b - 1) for a, b in zip(one["losses"], other["losses"], strict=True))


def train(
    case: str, args: argparse.Namespace, *, is_deterministic: bool = True, graphs: str = "auto", seconds: float = 0.0
) -> dict[str, Any]:
    """Train one case from its seed."""
    switch_determinism(is_deterministic)
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    kind, *words = case.split(":")
    torch.manual_seed(5)
    model = _model(kind, words, graphs, args)
    engine = EagerEngine(model, MaskedCrossEntropy(), model.device)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-4, fused=True)
    size = (model.config.vocab_size, args.rows, args.length, GRAD_ACCUM)
    batches = packed_batches(*size, 170, 60) if "packed" in words else random_batches(*size)
    num_labels = count_label_tokens(batches)
    first_grads: dict[str, str] = {}

    def step() -> tuple[float, float]:
        loss = engine.forward_backward(batches, num_labels)
        if not first_grads:
            first_grads.update({name: _digest(p.grad) for name, p in named.items() if p.grad is not None})
        norm = clip_grad_norm(named.values(), 1.0)
        loss_value, norm_value = torch.stack([loss, norm]).tolist()
        optimizer.step()
        optimizer.zero_grad()
        return loss_value, norm_value

    torch.manual_seed(6)
    done = [step() for _ in range(NUM_STEPS)]
    found: dict[str, Any] = {
        "losses": [loss for loss, _ in done],
        "grad_norms": [norm for _, norm in done],
        "first_grads": first_grads,
        "weights": {name: _digest(p.detach()) for name, p in named.items()},
        "kernels": {entry["operation"]: entry["implementation"] for entry in kernel_table(model)["entries"]},
        "recorded_gib": recorded_bytes(model) / 2**30,
    }
    if seconds:
        window = time_steps(lambda: step()[0], seconds, args.device)
        tokens = window.num_steps * GRAD_ACCUM * args.rows * args.length
        found |= {"tokens_per_s": tokens / window.seconds, "peak_gib": window.peak_gib}
    return found


def _model(kind: str, words: list[str], graphs: str, args: argparse.Namespace) -> Any:
    options: dict[str, Any] = {}
    if kind != "sft":
        dropout = 0.1 if "dropout" in words else 0.0
        options["peft_config"] = PeftConfig(target_modules="*_proj", dim=LORA_RANK, alpha=LORA_ALPHA, dropout=dropout)
    if kind == "fp8":
        options["fp8_config"] = {"enabled": True, "emulate": args.device == "cpu"}
    if kind == "nf4":
        options["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        if args.device == "cpu":
            options["quantization_config"]["bnb_4bit_compute_dtype"] = "float32"
    return NeMoAutoModelForCausalLM.from_config(
        make_config("llama3_1_8b", args.layers, args.small),
        torch_dtype="bfloat16" if args.device == "cuda" else "float32",
        device=args.device,
        fast_layers="on",
        kernels="defaults",
        cuda_graphs=graphs,
        **options,
    ).train()


def _digest(tensor: torch.Tensor) -> str:
    """Return a digest of the sums of the bits of every row."""
    bits = tensor.contiguous().view(_BITS[tensor.element_size()])
    return hashlib.sha256(bits.sum(dim=-1, dtype=torch.int64).cpu().numpy().tobytes()).hexdigest()[:16]


# --- a recipe that is killed -----------------------------------------------------------------------------------------


def killed_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """Run a recipe undisturbed and, beside it, one that is killed after step 4 and started again; compare."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny import make_model_dir, write_squad

    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        size = {} if args.small else {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
        make_model_dir(work / "model", num_attention_heads=8, num_key_value_heads=2, **{"hidden_size": 128, **size})
        write_squad(work / "squad", num_train=512)
        whole, killed = work / "whole", work / "killed"
        whole_run, killed_run = (_start(_recipe(work, run, args), work) for run in (whole, killed))
        while killed_run.poll() is None and not os.path.lexists(killed / "LATEST"):
            time.sleep(0.0005)
        was_killed = killed_run.poll() is None
        killed_run.send_signal(signal.SIGKILL)
        killed_run.wait()
        if not was_killed:
            raise SystemExit(f"the recipe ended before it was killed:\n{(work / 'log').read_text()[-3000:]}")
        before = _records(killed)
        statuses = [_start(_recipe(work, killed, args), work).wait(), whole_run.wait()]
        if any(statuses):
            raise SystemExit(f"a run of the recipe ended with status {statuses}:\n{(work / 'log').read_text()[-3000:]}")
        expected, found = _records(whole), _records(killed)
        log = (work / "log").read_text()
        return {
            "equal": expected == found and len(found) == 8,
            "records_at_the_kill": len(before),
            "losses": [record["loss"] for record in expected],
            "losses_resumed": [record["loss"] for record in found],
            "switch": next((line for line in log.splitlines() if "Deterministic:" in line), None),
            "checked": [line for line in log.splitlines() if "Checked before going on" in line],
        }


def _recipe(work: Path, run_dir: Path, args: argparse.Namespace) -> Path:
    from support.recipes import lora_section, recipe_config

    config = recipe_config(
        work / "model",
        work / "squad",
        run_dir,
        deterministic=True,
        step_scheduler={
            "global_batch_size": 16,
            "local_batch_size": 2,
            "num_epochs": 20,
            "max_steps": 8,
            "ckpt_every_steps": 4,
            "val_every_steps": 3,
            "save_checkpoint_every_epoch": False,
        },
        peft={**lora_section(), "dropout": 0.1},
        packed_sequence={"packed_sequence_size": 128 if args.small else 512},
        dataloader={"shuffle": True},
        dist_env={"backend": "nccl" if args.device == "cuda" else "gloo"},
    )
    config["model"]["torch_dtype"] = "bfloat16" if args.device == "cuda" else "float32"
    config["validation_dataset"] = {**config["dataset"], "split": "validation"}
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def _start(config: Path, work: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "NEMO_AUTOMODEL_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    with (work / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "nemo_automodel/recipes/llm/train_ft.py"), "-c", str(config)],
            stdout=log,
            stderr=log,
            env={**env, "PYTHONPATH": path},
        )


def _records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the training records without what the clock decides."""
    lines = (run_dir / "training.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _CLOCK} for line in lines]


if __name__ == "__main__":
    raise SystemExit(main())
