"""Run the playbook's three commands on models of the true sizes, with random weights and no weight files.

    python benchmarks/playbook_shapes.py --tokenizer-from DIR [--data DIR] [--seconds 60] [--out results.json]

Llama-3.1-8B with LoRA, Llama-3-70B with QLoRA and Qwen3-8B with all weights, packed at 1024, by the printed commands.
Each model is a directory with the published config.json and the tokenizer of ``DIR``, which may be any whose ids lie
below the vocabulary. One override makes random weights of it, on the GPU, the 70B in 4 bits layer by layer:
``--model._target_ nemo_automodel.NeMoAutoModelForCausalLM.from_config``. Others point to local data, limit the
validation set, and bound the steps: as many as `automodel plan` expects in ``--seconds``, at most ``--steps``. Without
``--data`` the rows are those of `squad_like`.

A run must end with exit status 0 and leave the playbook's listing. PEFT must read the adapter, with every tensor of
the published shape and every ``lora_B`` away from zero; fine-tuned weights must all be in the safetensors headers, by
name, shape and dtype. Checkpoints go when they are checked. That of Qwen3-8B is 46 GiB, 15 of weights and 31 of Adam's
state: where the disk has less, ``--workplace`` may name a directory in memory (``/dev/shm``).

The record holds what was run, what it did and what the planner had said; the logs lie beside it. A command that
fails is noted and the next one runs; the exit status is 1 then. `--small` takes tiny models of the same
families, with steps of two micro-batches, for a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import squad_like
import yaml
from playbook import COMMANDS, LISTING, REPOSITORY, SCRIPT, machine

FROM_CONFIG = "nemo_automodel.NeMoAutoModelForCausalLM.from_config"
GIB = 2**30
ROWS = 60_000
"""Of training data made here: 100 steps of 64 packed rows."""
LEAST_STEPS = 5
WARMUP_STEPS = 3
"""Of these the rates are not taken: kernels are compiled and layers recorded then."""

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": (
        "Llama-3.1-8B",
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
    ),
    "QLoRA": (
        "Meta-Llama-3-70B",
        {
            **_LLAMA,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "max_position_embeddings": 8192,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
        },
    ),
    "SFT": (
        "Qwen3-8B",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 151936,
        },
    ),
}
"""Command → name of its model, and the config.json as it was published."""
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16}
MODEL_KEY = "model.pretrained_model_name_or_path"


class Failure(Exception):
    """A command did not do what it must."""


def write_model(name: str, workplace: Path, args: argparse.Namespace) -> Path:
    """Write the directory of a model without weights and return it."""
    from transformers import AutoTokenizer

    title, config = CONFIGS[name]
    directory = workplace / "models" / title
    directory.mkdir(parents=True)
    for path in args.tokenizer_from.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
            shutil.copy(path, directory)
    largest_id = max(AutoTokenizer.from_pretrained(directory).get_vocab().values())
    if args.small:
        tokens = {"bos_token_id": None, "eos_token_id": None, "vocab_size": largest_id // 64 * 64 + 64}
        config = {**config, **SMALL, **tokens}
    if largest_id >= config["vocab_size"]:
        raise SystemExit(f"{args.tokenizer_from}: id {largest_id} is not below {title}'s {config['vocab_size']}.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


def words_of(name: str, model: Path, data: Path, args: argparse.Namespace) -> list[str]:
    """Return the printed command with what a machine without the Hub needs, all but the number of steps."""
    words = [*COMMANDS[name], f"--{MODEL_KEY}", str(model), "--packed_sequence.packed_sequence_size", "1024"]
    overrides: dict[str, Any] = {
        "model._target_": FROM_CONFIG,
        "dataset.dataset_name": data,
        "validation_dataset.dataset_name": data,
        "validation_dataset.limit_dataset_samples": args.validation_rows,
    }
    if args.small:
        overrides["step_scheduler.global_batch_size"] = 16 if name == "LoRA" else 2
    words += [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    return words + args.override


def plan(words: list[str], workplace: Path) -> dict[str, Any]:
    """Return what `automodel plan` says of the command."""
    program = [sys.executable, "-m", "nemo_automodel.cli.app", "plan", *words[1:], "--gpu", "h100", "--json"]
    done = subprocess.run(program, cwd=workplace, env=environment(workplace), text=True, capture_output=True)
    if not done.stdout.startswith("{"):
        raise Failure(f"automodel plan: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    keys = ("fits", "needed_gib", "usable_gib", "memory_gib", "load_host_gib", "load_device_gib", "tokens_per_s")
    return {key: found[key] for key in (*keys, "step_s", "checkpoint_gib", "weights", "trainable_weights", "notes")}


def environment(workplace: Path) -> dict[str, str]:
    """Return the environment in which the copy of the package is the one that is imported."""
    path = os.pathsep.join(filter(None, [str(workplace), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def follow(words: list[str], workplace: Path, log: Path) -> tuple[int, list[tuple[float, str]]]:
    """Run the script and return its exit status and its lines with the seconds at which they came."""
    start, lines = time.perf_counter(), []
    with subprocess.Popen(
        [sys.executable, SCRIPT, *words],
        cwd=workplace,
        env=environment(workplace),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip("\n")))
    lines.append((time.perf_counter() - start, ""))
    log.write_text("".join(f"{seconds:8.2f} {line}\n" for seconds, line in lines))
    return process.returncode, lines


def run(name: str, workplace: Path, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one command, check what it leaves behind, remove it, and return its record."""
    model = write_model(name, workplace, args)
    words = words_of(name, model, data, args)
    planned = plan(words, workplace)
    if args.plan_only:
        return {"command": f"{SCRIPT} {' '.join(words)}", "planned": planned}
    steps = max(LEAST_STEPS, min(args.steps, int(args.seconds / planned["step_s"])))
    words += ["--step_scheduler.max_steps", str(steps)]
    print(f"\n=== {name}: {SCRIPT} {' '.join(words)}\nplanned: {json.dumps(planned)}", flush=True)
    free_gib = shutil.disk_usage(workplace).free / GIB
    if free_gib < planned["checkpoint_gib"]:
        raise Failure(f"A checkpoint takes {planned['checkpoint_gib']} GiB, {free_gib:.1f} are free in {workplace}.")
    status, lines = follow(words, workplace, (args.out.parent if args.out else workplace) / f"{name}.log")
    shown = [f"{seconds:8.2f} {line}" for seconds, line in lines]
    print("\n".join(shown[-40:] if status else [line for line in shown if " step " in line][-3:]), flush=True)
    if status:
        raise Failure(f"{name} ended with exit status {status}")
    latest = workplace / "checkpoints" / "LATEST"
    missing = LISTING - {entry.name for entry in latest.iterdir()}
    if missing:
        raise Failure(f"{name}: checkpoints/LATEST lacks {sorted(missing)}")
    found = measured(latest, lines)
    print(json.dumps(found), flush=True)
    found["rate_error"] = planned["tokens_per_s"] / found["tokens_per_s"] - 1
    if found["peak_gib"]:
        found["memory_error"] = planned["needed_gib"] / found["peak_gib"] - 1
    saved = latest / "model"
    found["checked"] = check_weights(saved) if name == "SFT" else check_adapter(saved, name, model)
    return {"command": f"{SCRIPT} {' '.join(words)}", "planned": planned, "measured": found}


def measured(latest: Path, lines: list[tuple[float, str]]) -> dict[str, Any]:
    """Return the times, rates and sizes of a run."""
    train = [json.loads(line) for line in (latest.resolve().parent / "training.jsonl").read_text().splitlines()]
    validation = (latest.resolve().parent / "validation.jsonl").read_text().splitlines()
    sizes = {part.name: sum(f.stat().st_size for f in part.rglob("*") if f.is_file()) for part in latest.iterdir()}
    saved = [number for number, (_, line) in enumerate(lines) if "Saving checkpoint" in line]
    steady = train[WARMUP_STEPS:]
    return {
        "wall_s": round(lines[-1][0], 1),
        "build_s": round(first_time(lines, "Model summary") - first_time(lines, "Data check,"), 1),
        "first_step_after_s": first_time(lines, "| step 0 |"),
        "save_s": round(lines[saved[-1] + 1][0] - lines[saved[-1]][0], 1),
        "steps": len(train),
        "losses": [train[0]["loss"], train[-1]["loss"]],
        "validation_losses": [json.loads(line)["val_loss"] for line in validation],
        "tokens_per_s": statistics.median(record["tps"] for record in steady),
        "peak_gib": max(record["mem"] for record in train),
        "checkpoint_bytes": sum(sizes.values()),
        "optimizer_bytes": sizes["optim"],
        "model_bytes": sizes["model"],
    }


def first_time(lines: list[tuple[float, str]], words: str) -> float:
    return next((round(seconds, 1) for seconds, line in lines if words in line), math.nan)


def check_adapter(saved: Path, name: str, base: Path) -> str:
    """Read an adapter with PEFT and compare it with the sizes of the base and the rank of the YAML file."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    peft = PeftConfig.from_pretrained(saved)
    rank = yaml.safe_load((REPOSITORY / COMMANDS[name][1]).read_text())["peft"]["dim"]
    if (peft.r, Path(peft.base_model_name_or_path)) != (rank, base):
        raise Failure(f"{saved}: rank {peft.r} on {peft.base_model_name_or_path}, not {rank} on {base}")
    weights = load_peft_weights(str(saved), device="cpu")
    found = {key: tuple(value.shape) for key, value in weights.items()}
    wanted = adapter_shapes(json.loads((base / "config.json").read_text()), rank)
    if found != wanted:
        odd = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise Failure(f"{saved}: {len(odd)} tensors differ, the first is {odd[0]}: {found.get(odd[0])}")
    still = [key for key, value in weights.items() if "lora_B" in key and not value.float().norm() > 0]
    if still:
        raise Failure(f"{saved}: {len(still)} of lora_B did not move from zero, the first is {still[0]}")
    return f"PEFT reads {len(found)} tensors of the right names and shapes, rank {rank}; every lora_B moved"


def adapter_shapes(config: dict[str, Any], rank: int) -> dict[str, tuple[int, ...]]:
    """Return what an adapter on every projection holds: name → shape."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    sizes = {"self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv)}
    sizes |= {"self_attn.o_proj": (q, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config["num_hidden_layers"]):
        for path, (num_in, num_out) in {**sizes, "mlp.down_proj": (inner, hidden)}.items():
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            shapes |= {f"{prefix}.lora_A.weight": (rank, num_in), f"{prefix}.lora_B.weight": (num_out, rank)}
    return shapes


def check_weights(saved: Path) -> str:
    """Compare the headers of the weight files with the model that their config.json describes."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(saved)
    with torch.device("meta"):
        wanted = {
            key: tuple(value.shape) for key, value in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    files = sorted(saved.glob("*.safetensors"))
    found, dtypes, held_by = {}, set(), {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, no mapping
                piece = file.get_slice(key)
                found[key], held_by[key] = tuple(piece.get_shape()), path.name
                dtypes.add(piece.get_dtype())
    odd = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if odd:
        raise Failure(f"{saved}: {len(odd)} tensors differ, the first is {odd[0]}: {found.get(odd[0])}")
    index = saved / "model.safetensors.index.json"
    if len(files) > 1 and json.loads(index.read_text())["weight_map"] != held_by:
        raise Failure(f"{index} does not say where every tensor is")
    kinds = ", ".join(sorted(dtypes))
    return f"{len(found)} tensors ({kinds}) in {len(files)} files, all names and shapes as {config.model_type} wants"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer-from", type=Path, required=True, help="a local directory with a real tokenizer")
    parser.add_argument("--data", type=Path, help="local directory with SQuAD-shaped splits")
    parser.add_argument("--seconds", type=float, default=60, help="of training for each command, by the plan")
    parser.add_argument("--steps", type=int, default=100, help="at most, for each command")
    parser.add_argument("--validation-rows", type=int, default=16)
    parser.add_argument("--only", choices=COMMANDS, nargs="+", default=list(COMMANDS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--plan-only", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, help="write the record here as JSON")
    parser.add_argument("--workplace", type=Path, help="an empty directory; a temporary one by default, then removed")
    parser.add_argument("override", nargs="*", default=[], help="after `--`: overrides for all commands")
    args = parser.parse_args()
    args.tokenizer_from = args.tokenizer_from.expanduser()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="playbook_shapes_") as temporary:
        return run_all((args.workplace or Path(temporary)).resolve(), args)


def run_all(workplace: Path, args: argparse.Namespace) -> int:
    """Run the commands, write the record after each, and return the exit status."""
    workplace.mkdir(parents=True, exist_ok=True)
    for folder in ("examples", "nemo_automodel"):
        shutil.copytree(REPOSITORY / folder, workplace / folder, dirs_exist_ok=True)
    data = args.data.resolve() if args.data else workplace / "squad_like"
    if not args.data:
        squad_like.write(data, 2000 if args.small else ROWS, 200)
    record: dict[str, Any] = {"machine": machine(), "argv": sys.argv[1:], "runs": {}}
    for name in args.only:
        try:
            record["runs"][name] = run(name, workplace, data, args)
        except Failure as failure:
            print(f"FAILED {name}: {failure}", flush=True)
            record["runs"][name] = {"failed": str(failure)}
        shutil.rmtree(workplace / "checkpoints", ignore_errors=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return 1 if any("failed" in found for found in record["runs"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
