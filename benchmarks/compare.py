"""Time this project beside what one would use instead, one after the other on the same card.

    python benchmarks/compare.py [--shape llama3_1_8b] [--cases ours,hf_peft,...] [--dropout 0.1] [--out compare.json]

| case | what runs |
|---|---|
| ours | `NeMoAutoModelForCausalLM.from_config` with `peft_config`, the recipe's engine, loss and clipping, bf16 |
| ours_fp8 | the same with the base in 8 bits |
| ours_packed | the same as ours on rows cut into documents of about 170 tokens |
| ours_plain | the same as ours with `force_hf` |
| hf_peft | Transformers and PEFT, SDPA, the model's own loss |
| hf_peft_liger | the same with Liger's kernels |
| hf_peft_compile | the same as hf_peft, every decoder layer compiled |
| unsloth | unsloth's model and adapters, from files that are written first |

Everybody gets the same shape with random weights from one seed, the same random tokens over the full vocabulary, LoRA
of one rank, alpha and input dropout on all seven projections, clipping at 1, AdamW, and a step of as many tokens.
PEFT's adapters are kept in bf16, which is the faster choice for it. A case that runs out of memory gets its rows one by
one, then recomputation of activations; the table says which it was. Every case runs in a process of its own and is
timed over whole steps for at least ``--seconds`` after a warm-up, clocks and power read once a second. All start from
the same weights with adapters that change nothing, so the first losses must agree; the table shows them.

A package that is missing is reported as not installed. A rate above the device's peak is refused. With ``ours_packed``
among the cases its rate over that of ours must be at least 0.97, or the exit status is 1.

``--device cpu --small`` runs the script itself on any machine.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CASES = {
    "ours": "this project, bf16",
    "ours_fp8": "this project, FP8 base",
    "ours_packed": "this project, packed documents",
    "ours_plain": "this project, `force_hf`",
    "hf_peft": "Transformers + PEFT",
    "hf_peft_liger": "Transformers + PEFT + Liger",
    "hf_peft_compile": "Transformers + PEFT + per-layer compile",
    "unsloth": "unsloth",
}
DEFAULT_CASES = "ours,ours_fp8,hf_peft,hf_peft_liger,hf_peft_compile,unsloth"
NEEDS = {"hf_peft": ["peft"], "hf_peft_liger": ["peft", "liger_kernel"], "hf_peft_compile": ["peft"]}
NEEDS |= {"unsloth": ["unsloth"]}
ROWS = {"smollm2_135m": (8, 1024, 1)}
"""Shape → rows of a micro-batch, tokens of a row, micro-batches of a step; others 2, 4096, 16."""
DOCUMENT_LEN = (170, 60)
LEAST_PACKED_RATIO = 0.97
LOSS_TOLERANCE = 0.005
Built = tuple[Callable[[int], float], str]
"""A step over so many micro-batches that returns its loss, and whose decoder layers compute."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ("llama3_1_8b", "qwen2_5_7b", "qwen3_8b", "smollm2_135m")
    parser.add_argument("--shape", default="llama3_1_8b", choices=shapes)
    parser.add_argument("--cases", default=DEFAULT_CASES, help="comma-separated, in the order they run")
    parser.add_argument("--packed", action="store_true", help="short for --cases ours,ours_packed")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--grad-accum", type=int, help="micro-batches of a step")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the inputs of the adapters")
    parser.add_argument("--seconds", type=float, default=30, help="least timed window of a case")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a case is given up")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, help="write the record as JSON, and the table beside it as .md")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the case that this process runs
    parser.add_argument("--rung", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows, seq_len, grad_accum = (2, 64, 2) if args.small else ROWS.get(args.shape, (2, 4096, 16))
    args.rows = args.rows or rows
    args.seq_len = args.seq_len or seq_len
    args.grad_accum = args.grad_accum or grad_accum
    if args.packed:
        args.cases = "ours,ours_packed"
    unknown = [case for case in args.cases.split(",") if case not in CASES]
    if unknown:
        parser.error(f"unknown cases {unknown}; there are {', '.join(CASES)}")
    return args


# --- one case, in its own process ------------------------------------------------------------------------------------


def rungs(case: str, rows: int) -> list[tuple[int, bool]]:
    """Return (rows of a micro-batch, whether activations are recomputed), in the order they are tried."""
    if case == "ours_packed" or rows == 1:
        return [(rows, False), (rows, True)]
    return [(rows, False), (1, False), (rows, True)]


def run_case(args: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers of ``args.run`` on one rung of its ladder."""
    import torch
    from measuring import lora_work, make_config, packed_batches, random_batches, split_rows, time_steps

    from nemo_automodel.components.training.flops import check_rate, device_peak, step_size

    config = make_config(args.shape, args.layers, args.small)
    rows, recomputes = rungs(args.run, args.rows)[args.rung]
    if args.run == "ours_packed":
        batches = packed_batches(config.vocab_size, rows, args.seq_len, args.grad_accum, *DOCUMENT_LEN)
    else:
        batches = split_rows(random_batches(config.vocab_size, args.rows, args.seq_len, args.grad_accum), rows)
    torch.manual_seed(0)
    build = build_ours if args.run.startswith("ours") else build_unsloth if args.run == "unsloth" else build_peer
    step, layers = build(args, config, batches, recomputes)
    first_loss = step(min(4, len(batches) * rows // args.rows) * args.rows // rows)  # the same tokens on every rung
    step(min(2, len(batches)))
    window = time_steps(lambda: step(len(batches)), args.seconds, args.device)
    size = step_size(batches)
    rate = window.num_steps / window.seconds
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    tflops = lora_work(config, "all" if recomputes else "none").hardware(size) * rate / 1e12
    peak = device_peak(torch.device(args.device), with_fp8=args.run == "ours_fp8")
    check_rate(tflops, peak, name)
    return {
        "tokens_per_s": size.num_tokens * rate,
        "supervised_tokens_per_s": size.num_label_tokens * rate,
        "hardware_tflops": tflops,
        "peak_tflops": peak,
        "peak_gib": window.peak_gib,
        "seconds": window.seconds,
        "steps": window.num_steps,
        "rows_of_a_micro_batch": rows,
        "micro_batches_of_a_step": len(batches),
        "recomputes_activations": recomputes,
        "layers": layers,
        "first_loss": first_loss,
        "last_loss": window.losses[-1],
        "clocks": window.clocks,
    }


def build_ours(args: argparse.Namespace, config: Any, batches: list[Any], recomputes: bool) -> Built:
    """Return a step of this project, as its recipe does one."""
    import torch
    from measuring import LORA_ALPHA, LORA_RANK, dtype_of

    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components._peft.lora import PeftConfig
    from nemo_automodel.components.distributed.grad import clip_grad_norm
    from nemo_automodel.components.fast.decoder_layer import FastDecoderLayer
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    from nemo_automodel.recipes.engine import EagerEngine, count_label_tokens

    is_plain = args.run == "ours_plain"
    choice: dict[str, Any] = {"force_hf": True} if is_plain else {}
    if args.device == "cpu" and not is_plain and args.dropout == 0:
        choice["fast_layers"] = "on"
    if args.run == "ours_fp8":
        choice["fp8_config"] = {"enabled": True}
    dropout = {"dropout": args.dropout, "dropout_position": "pre"}
    model = NeMoAutoModelForCausalLM.from_config(
        config,
        torch_dtype=dtype_of(args.device),
        device=args.device,
        peft_config=PeftConfig(target_modules="*_proj", dim=LORA_RANK, alpha=LORA_ALPHA, **dropout),  # type: ignore[arg-type]
        activation_checkpointing="full" if recomputes else "none",
        **choice,
    )
    model.train()
    engine = EagerEngine(model, MaskedCrossEntropy(), model.device, joins_frozen_head=not is_plain)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(num_batches: int) -> float:
        taken = batches[:num_batches]
        loss = engine.forward_backward(taken, count_label_tokens(taken))
        norm = clip_grad_norm(parameters, 1.0)
        value: float = torch.stack([loss, norm]).tolist()[0]
        optimizer.step()
        optimizer.zero_grad()
        return value

    is_fast = any(isinstance(module, FastDecoderLayer) for module in model.modules())
    return step, "fast" if is_fast else "Transformers'"


def build_peer(args: argparse.Namespace, config: Any, batches: list[Any], recomputes: bool) -> Built:
    """Return a step of Transformers and PEFT, with Liger or compiled layers where the case says so."""
    from measuring import LORA_ALPHA, LORA_RANK, PROJECTIONS, random_model
    from peft import LoraConfig, get_peft_model

    model = random_model(config, args.device)
    if args.run == "hf_peft_liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=args.dropout, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    layers = model.model.layers
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.run == "hf_peft_compile":
        for layer in layers:
            layer.compile()
    return step_of_peer(adapted, batches, args.device), "their own"


def build_unsloth(args: argparse.Namespace, config: Any, batches: list[Any], recomputes: bool) -> Built:
    """Return a step of unsloth, which loads its models from files."""
    from unsloth import FastLanguageModel  # before everything else: it changes Transformers when it is imported

    import torch  # isort: skip
    from measuring import LORA_ALPHA, LORA_RANK, PROJECTIONS, write_model_directory

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        write_model_directory(config, Path(folder), args.device)
        gc.collect()
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=args.seq_len, dtype=torch.bfloat16, load_in_4bit=False
        )
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=args.dropout,
        target_modules=PROJECTIONS,
        bias="none",
        use_gradient_checkpointing="unsloth" if recomputes else False,
    )
    return step_of_peer(FastLanguageModel.for_training(adapted), batches, args.device), "their own"


def step_of_peer(model: Any, batches: list[Any], device: str) -> Callable[[int], float]:
    """Return a step as Transformers' trainer does one: the model shifts the labels and computes its own loss."""
    import torch

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(num_batches: int) -> float:
        taken = [batch["input_ids"].to(device, non_blocking=True) for batch in batches[:num_batches]]
        num_labels = sum(ids.numel() - len(ids) for ids in taken)
        total = torch.zeros((), device=device)
        for ids in taken:
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=num_labels, use_cache=False).loss
            loss.backward()
            total += loss.detach().float()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        value: float = torch.stack([total, norm]).tolist()[0]
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def child(args: argparse.Namespace) -> int:
    import torch

    if not args.run.startswith("ours"):
        torch.backends.cuda.matmul.allow_tf32 = True  # what is fp32 in a peer may use the tensor cores
    try:
        result = run_case(args)
    except torch.OutOfMemoryError as error:
        result = {"out_of_memory": str(error).splitlines()[0][:200]}
    args.out.write_text(json.dumps(result))
    return 0


# --- all cases -------------------------------------------------------------------------------------------------------


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a case in a process of its own, with less memory each time it does not fit, and return its numbers."""
    missing = [name for name in NEEDS.get(case, ()) if importlib.util.find_spec(name) is None]
    if missing:
        return {"not_installed": missing}
    tried = []
    for rung, (rows, recomputes) in enumerate(rungs(case, args.rows)):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            words = [sys.executable, __file__, "--run", case, "--rung", str(rung), "--out", str(out)]
            for key in ("shape", "rows", "seq_len", "grad_accum", "layers", "dropout", "seconds", "device"):
                if (value := getattr(args, key)) is not None:
                    words += [f"--{key.replace('_', '-')}", str(value)]
            words += ["--small"] if args.small else []
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=args.timeout, check=False)
            except subprocess.TimeoutExpired:
                return {"failed": f"no result after {args.timeout:g} s", "tried": tried}
            if done.returncode or not out.is_file():
                return {"failed": done.stderr.strip().splitlines()[-1][:500] if done.stderr else "?", "tried": tried}
            result = json.loads(out.read_text())
        if "out_of_memory" not in result:
            return {**result, "tried": tried}
        tried.append({"rows": rows, "recomputes": recomputes, **result})
        print(f"  {case}: out of memory with {rows} rows{', recomputing' if recomputes else ''}", flush=True)
    return {"failed": "out of memory on every rung", "tried": tried}


def table(record: dict[str, Any]) -> str:
    """Return the results as markdown."""
    lines = [
        "| case | layers | tokens/s | peak GiB | hardware TFLOP/s | rows, recomputed | s | SM MHz | W | first loss |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for case, result in record["cases"].items():
        name = CASES[case]
        if "tokens_per_s" not in result:
            missing = result.get("not_installed")
            what = f"not installed: {', '.join(missing)}" if missing else f"failed: {result['failed']}"
            lines.append(f"| {name} | | {what} | | | | | | | |")
            continue
        clocks = result["clocks"]
        mhz, watts = (f"{clocks[key]['mean']:,.0f}" if clocks else "" for key in ("sm_mhz", "watts"))
        gib = "" if result["peak_gib"] is None else f"{result['peak_gib']:.1f}"
        how = f"{result['rows_of_a_micro_batch']}, {'all' if result['recomputes_activations'] else 'none'}"
        lines.append(
            f"| {name} | {result['layers']} | {result['tokens_per_s']:,.0f} | {gib} | "
            f"{result['hardware_tflops']:.3g} | {how} | {result['seconds']:.1f} | {mhz} | {watts} | "
            f"{result['first_loss']:.4f} |"
        )
    return "\n".join(lines)


def judge(cases: dict[str, Any]) -> list[str]:
    """Return what is wrong with the results."""
    failures = []
    rates = {case: result["tokens_per_s"] for case, result in cases.items() if "tokens_per_s" in result}
    if "ours" in rates and "ours_packed" in rates:
        ratio = rates["ours_packed"] / rates["ours"]
        print(f"packed over unpacked: {ratio:.3f} (at least {LEAST_PACKED_RATIO})")
        if ratio < LEAST_PACKED_RATIO:
            failures.append(f"packed rows reach {ratio:.3f} of the unpacked rate")
    losses = {case: cases[case]["first_loss"] for case in rates if case not in ("ours_packed", "unsloth")}
    if losses and max(losses.values()) / min(losses.values()) > 1 + LOSS_TOLERANCE:
        failures.append(f"the first losses differ: {losses}")
    failures += [f"{case}: {result['failed']}" for case, result in cases.items() if "failed" in result]
    return failures


def main() -> int:
    args = parse()
    if args.run is not None:
        return child(args)
    from measuring import environment

    packages = ("peft", "accelerate", "liger-kernel", "unsloth")
    command = "python benchmarks/compare.py " + " ".join(sys.argv[1:])
    record: dict[str, Any] = {
        "command": command.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(args.device, *packages),
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("run", "rung")},
        "cases": {},
    }
    print(json.dumps(record["environment"]), flush=True)
    for case in args.cases.split(","):
        result = record["cases"][case] = measure(case, args)
        shown = {key: value for key, value in result.items() if key not in ("clocks", "tried")}
        print(f"{case}: {json.dumps(shown)}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(f"`{command.strip()}`, {record['date']}\n\n{table(record)}\n")
    print(table(record))
    failures = judge(record["cases"])
    print("\n".join(f"FAILED {line}" for line in failures) or "all cases ran")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
