"""Train a real small model on real text by the fast path and by Transformers' layers, and compare the loss curves.

    python benchmarks/parity.py [--steps 300] [--cases fast,fp8] [--unpacked] [--out parity.json]

The model is SmolLM2-135M from `automodel fetch-demo`, the text its reviews, turned round: asked for a positive or a
negative review, the model learns to write it, so every token of prose is learned. Each case is the ordinary recipe with
LoRA r 16 on all projections; weights, data, order and seed are the same, and only the path differs:

| case | path | compared with | tolerance |
|---|---|---|--:|
| plain | `force_hf: true`, fp32 | | |
| plain_bf16 | `force_hf: true`, bf16 | plain | 1 % |
| fast | fast layers, joined head, bf16 | plain | 0.2 % |
| fp8 | fast layers over a base in 8 bits | plain | 1 % |
| nf4_plain | `force_hf: true` over a base in 4 bits, fp32 | | |
| nf4 | fast layers over a base in 4 bits, bf16 | nf4_plain | 0.2 % |
| sft_plain | all weights learn, `force_hf: true`, bf16 | | |
| sft | all weights learn, fast layers, bf16 | sft_plain | 0.2 % |
| sft_kept | the same, and the optimizer keeps 24 bits of each weight | | |
| sft_fp8 | that with products in 8 bits | sft_kept | 1 % |

The oracle of LoRA is fp32. Transformers' layers in bf16 add an adapter's output to a base's output that is rounded
already: while adapters are small, most of what they add is less than half a step of bf16 and gets lost, so that case
learns less in its first steps than fp32 and than fast layers, which round the sum once. Where all weights learn nothing
of that kind is added, and what counts is that both paths round the same weights the same way. AdamW over weights in
bf16 rounds nearly every update of this run away, so that what 8 bits did to the base is never learned back: what FP8
costs a training run is seen where updates are kept (`flash_adamw`, package flashoptim).

Two gates for each: the loss smoothed over a sixth of the run never differs by more than the tolerance, and neither does
the loss on held-out rows after the last step. Exit status 1 when a gate is missed or a case does not run. Beside the
record lies a chart of the curves.

``--steps 5 --device cpu`` runs the script itself on any machine, in fp32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FULL = {"peft": None, "optimizer": {"_target_": "torch.optim.AdamW", "lr": 2e-5, "weight_decay": 0.0}}
# a copy of 24 bits: of a bfloat16 alone nearly every update of 2e-5 is rounded away
FULL_KEPT = {"peft": None, "optimizer": {"_target_": "flash_adamw", "lr": 2e-5, "weight_decay": 0.0}}
NF4 = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
COLOURS = ("#555555", "#0a7f3f", "#c2410c", "#1d4ed8", "#7e22ce", "#92400e", "#0e7490", "#be123c")


@dataclass(frozen=True)
class Case:
    """One path, and what it must agree with."""

    is_fast: bool
    sections: dict[str, Any]
    other: str | None = None
    tolerance: float = 0.0
    dtype: str = "bfloat16"


CASES = {
    "plain": Case(False, {}, dtype="float32"),
    "plain_bf16": Case(False, {}, "plain", 0.01),
    "fast": Case(True, {}, "plain", 0.002),
    "fp8": Case(True, {"fp8": {"enabled": True}}, "plain", 0.01),
    "nf4_plain": Case(False, {"quantization": NF4}, dtype="float32"),
    "nf4": Case(True, {"quantization": NF4}, "nf4_plain", 0.002),
    "sft_plain": Case(False, FULL),
    "sft": Case(True, FULL, "sft_plain", 0.002),
    "sft_kept": Case(True, FULL_KEPT),
    "sft_fp8": Case(True, {**FULL_KEPT, "fp8": {"enabled": True}}, "sft_kept", 0.01),
}


def turn_round(source: Path, target: Path, num_rows: int | None = None) -> None:
    """Write rows that ask for a review and answer with it."""
    with source.open(encoding="utf-8") as rows, target.open("w", encoding="utf-8") as out:
        for number, line in enumerate(rows):
            if number == num_rows:
                return
            question, answer = json.loads(line)["messages"]
            review = question["content"].partition("\n\n")[2]
            asked = {"role": "user", "content": f"Write a {answer['content']} review."}
            out.write(json.dumps({"messages": [asked, {"role": "assistant", "content": review}]}) + "\n")


def config_of(case: Case, args: argparse.Namespace, model: Path, work: Path, name: str) -> dict[str, Any]:
    """Return the recipe of one case."""
    is_cpu = args.device == "cpu"
    choice: dict[str, Any] = {"force_hf": True}
    if case.is_fast:
        choice = {"fast_layers": "on"}
    sections = {key: None if value is None else dict(value) for key, value in case.sections.items()}
    if is_cpu and case.sections.get("optimizer") == FULL_KEPT["optimizer"]:  # weights are fp32 there
        sections["optimizer"] = FULL["optimizer"]
    if is_cpu and "fp8" in sections:
        sections["fp8"]["emulate"] = True
    dtype = "float32" if is_cpu else case.dtype
    if "quantization" in sections:
        sections["quantization"]["bnb_4bit_compute_dtype"] = dtype
    data = {"_target_": "nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset"}
    data |= {"path_or_dataset_id": str(work / "data")}
    return {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": args.seed,
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(model),
            "torch_dtype": dtype,
            **choice,
        },
        "peft": {"target_modules": "*_proj", "dim": 16, "alpha": 32},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": args.lr, "weight_decay": 0.0},
        **sections,
        "step_scheduler": {
            "global_batch_size": args.rows,
            "local_batch_size": args.rows,
            "num_epochs": None,
            "max_steps": args.steps,
            "save_checkpoint_every_epoch": False,
            "ckpt_every_steps": args.steps + 1,
        },
        "dataset": {**data, "split": "train"},
        "validation_dataset": {**data, "split": "validation"},
        "validation_dataloader": {"batch_size": 50},
        "packed_sequence": {"packed_sequence_size": 0 if args.unpacked else args.seq_len},
        "checkpoint": {"enabled": False, "checkpoint_dir": str(work / name)},
    }


def train(name: str, args: argparse.Namespace, model: Path, work: Path) -> dict[str, Any]:
    """Train one case and return its curve and its held-out loss."""
    import yaml

    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
    from nemo_automodel.shared.errors import UserError

    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config_of(CASES[name], args, model, work, name)))
    started = time.perf_counter()
    try:
        recipe = TrainFinetuneRecipeForNextTokenPrediction(load_yaml_config(path))
        recipe.setup()
        if recipe.utilisation.has_fast_layers != CASES[name].is_fast:
            return {"failed": "the other layers were chosen; LOGGING_LEVEL=INFO shows why"}
        recipe.run_train_validation_loop()
    except UserError as error:
        return {"failed": str(error)}
    if not (work / name / "validation.jsonl").exists():
        return {"failed": "the run was stopped by a signal"}
    losses, held_out = (
        [json.loads(line)[key] for line in (work / name / file).read_text().splitlines()]
        for file, key in (("training.jsonl", "loss"), ("validation.jsonl", "val_loss"))
    )
    return {"losses": losses, "held_out_loss": held_out[-1], "seconds": time.perf_counter() - started}


def smoothed(losses: list[float]) -> list[float]:
    """Return the means over windows of a sixth of the run."""
    size = max(1, len(losses) // 6)
    return [sum(losses[end - size : end]) / size for end in range(size, len(losses) + 1)]


def gates(name: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the two gates of a case."""
    case = CASES[name]
    if case.other is None:
        return []
    ours, theirs = results[name], results[case.other]
    pairs = zip(smoothed(ours["losses"]), smoothed(theirs["losses"]), strict=True)
    found = {
        "smoothed training loss": max(abs(a / b - 1) for a, b in pairs),
        "held-out loss": abs(ours["held_out_loss"] / theirs["held_out_loss"] - 1),
    }
    return [
        {
            "gate": f"{name} against {case.other}, {what}",
            "gap": gap,
            "limit": case.tolerance,
            "holds": gap <= case.tolerance,
        }
        for what, gap in found.items()
    ]


def chart(results: dict[str, Any]) -> str:
    """Return the curves as an SVG file."""
    from nemo_automodel.components.loggers.charts import Series, line_chart

    lines = [
        Series(name, list(enumerate(result["losses"])), smooth=True)
        for name, result in results.items()
        if "losses" in result
    ]
    drawn = line_chart(lines, label="training loss of " + ", ".join(line.name for line in lines))
    rules = ["svg { font: 11px sans-serif; background: #fff }", ".grid { stroke: #ddd }", ".tick { fill: #666 }"]
    rules += [".line { fill: none; stroke-width: 1.5 }", ".raw { opacity: .25 }", ".at { opacity: 0 }"]
    rules += [f".s{index} {{ stroke: {colour} }}" for index, colour in enumerate(COLOURS)]
    names = [
        f'<text x="{60 + 80 * index}" y="18" fill="{COLOURS[index]}">{line.name}</text>'
        for index, line in enumerate(lines)
    ]
    own = f"><style>{' '.join(rules)}</style>{''.join(names)}"
    drawn = drawn.replace('<svg class="chart"', '<svg xmlns="http://www.w3.org/2000/svg" class="chart"', 1)
    return drawn.replace(">", own, 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cases", default="fast,fp8", help="with what they are compared with")
    parser.add_argument("--rows", type=int, help="rows of a step (default: 4 packed ones, or 32)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--unpacked", action="store_true", help="one review a row")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="write the record as JSON, and the chart beside it as .svg")
    args = parser.parse_args()
    args.rows = args.rows or (32 if args.unpacked else 4)
    unknown = [name for name in args.cases.split(",") if name not in CASES]
    if unknown:
        parser.error(f"unknown cases {unknown}; there are {', '.join(CASES)}")
    return args


def main() -> int:
    args = parse()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from nemo_automodel.cli.fetch_demo import fetch_demo
    from nemo_automodel.cli.quickstart import quiet

    demo = fetch_demo()
    asked = args.cases.split(",")
    names = list(dict.fromkeys(name for case in asked for name in (CASES[case].other, case) if name is not None))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "data").mkdir()
        turn_round(demo.data / "train.jsonl", work / "data" / "train.jsonl")
        turn_round(demo.data / "validation.jsonl", work / "data" / "validation.jsonl", args.steps * 10)
        for name in names:
            with quiet():
                results[name] = train(name, args, demo.model, work)
            shown = {key: value for key, value in results[name].items() if key != "losses"}
            first, last = (results[name]["losses"][i] for i in (0, -1)) if "losses" in results[name] else ("", "")
            print(f"{name}: {shown}, loss {first} -> {last}", flush=True)
            if args.out:  # after every case: whoever is cut off keeps what there is
                write_record(args, results)
    judged = judge(results)
    for gate in judged:
        print(f"{'ok  ' if gate['holds'] else 'MISS'} {gate['gate']}: {gate['gap']:.3%} (limit {gate['limit']:.1%})")
    failed = [name for name in names if "failed" in results[name]]
    for name in failed:
        print(f"MISS {name} did not run: {results[name]['failed']}")
    return 1 if failed or not all(gate["holds"] for gate in judged) else 0


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the gates of all cases that ran and whose other one ran."""
    return [
        gate
        for name, result in results.items()
        if "losses" in result and "losses" in results.get(CASES[name].other or name, {})
        for gate in gates(name, results)
    ]


def write_record(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write what is known so far, and the chart."""
    from measuring import environment

    record = {
        "command": ("python benchmarks/parity.py " + " ".join(sys.argv[1:])).strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(args.device, "bitsandbytes"),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "gates": judge(results),
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    if any("losses" in result for result in results.values()):
        args.out.with_suffix(".svg").write_text(chart(results) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
