"""Steps that do not fit, on a real GPU: the weights that come out, the time that is lost, the memory that stays.

    python benchmarks/rescue.py [--cases split,fast,policy,auto,in_backward] [--out results.json]

Every case trains a model with random weights twice through the recipe: with all of the card, and with as little as a
share of what that took, the rest being held by a tensor. **split**: all weights in fp32, the micro-batch must be cut;
weights within 1e-6 of the first run. **fast**: LoRA in bf16 on fast layers of the shape of Llama-3.1-8B, cut as well.
**policy**: one long row, so that more must be computed again. **auto**: `memory: auto` on such a share; the plan is
right when no step fails. **in_backward**: all weights in bf16, updated within the backward pass; the rehearsal of the
first step must find the policy under which it fits. Printed are failures, differences, tokens a second before and
after, and what is allocated at the end of both runs beside the weights.

`--device cpu --small` runs the script itself on any machine, with a model hook in the place of a full card. Exit status
1 when a check fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measuring import environment

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

GIB = 2**30
NUM_STEPS = 6
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "middle": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32},
}
LORA = {"target_modules": "*_proj", "dim": 16, "alpha": 32}
CASES: dict[str, dict[str, Any]] = {
    "split": {"shape": "middle", "rows": 8, "seq_len": 1024, "dtype": "float32", "share": 0.6},
    "fast": {"shape": "8b", "rows": 4, "seq_len": 4096, "dtype": "bfloat16", "share": 0.6, "peft": LORA},
    "policy": {"shape": "8b", "rows": 1, "seq_len": 16384, "dtype": "bfloat16", "share": 0.6, "peft": LORA},
    "auto": {"shape": "8b", "rows": 4, "seq_len": 4096, "dtype": "bfloat16", "share": 0.75, "peft": LORA},
    "in_backward": {"shape": "8b", "rows": 4, "seq_len": 4096, "dtype": "bfloat16", "share": 0.6, "in_backward": True},
}
"""``share``: of what the run takes beside what stays, the weights and the optimizer's state."""


def config_of(case: dict[str, Any], directory: Path, is_small: bool, memory: str) -> ConfigNode:
    """Return the configuration of a run of ``NUM_STEPS`` steps of two micro-batches, one with updates in between."""
    num_micro_batches = 1 if "in_backward" in case else 2
    shape = SHAPES["tiny" if is_small else case["shape"]]
    vocab_size, seq_len = (512, 32) if is_small else (32768, case["seq_len"])
    config = {
        "seed": 1,
        "step_scheduler": {
            "global_batch_size": num_micro_batches * case["rows"], "local_batch_size": case["rows"],
            "max_steps": NUM_STEPS,
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": {
                "_target_": "transformers.LlamaConfig", **shape, "vocab_size": vocab_size,
                "num_key_value_heads": shape["num_attention_heads"] // 4, "max_position_embeddings": 32768,
            },
            "torch_dtype": case["dtype"],
            "kernels": "defaults",
        },
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset",
            "vocab_size": vocab_size, "seq_len": seq_len, "num_samples": 10_000, "batch_size": case["rows"],
        },
        "dataloader": {"_target_": "torch.utils.data.DataLoader", "batch_size": None},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4, "eps": 1e-6},
        "checkpoint": {"enabled": False, "checkpoint_dir": str(directory)},
        "data_check": False,
        "memory": memory,
    }  # fmt: skip
    if "peft" in case:
        config["peft"] = case["peft"]
    if "in_backward" in case:
        config["optimizer"]["in_backward"] = True
        config["clip_grad_norm"] = {"max_norm": None}
    if is_small:
        config["dist_env"] = {"backend": "gloo"}
    return ConfigNode(config)


class _Fault:
    """The CPU's stand-in for a full card: the first layer refuses more than one row, or to keep a row's activations."""

    def __init__(self, recipe: Any, num_rows: int) -> None:
        self._layer, self._num_rows = recipe.model.model.layers[0], num_rows
        self._layer.register_forward_pre_hook(self)

    def __call__(self, layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        is_too_large = args[0].shape[0] > 1 if self._num_rows > 1 else not layer.gradient_checkpointing
        if torch.is_grad_enabled() and is_too_large:
            raise torch.OutOfMemoryError("Out of memory. Tried to allocate 1.00 GiB.")


def train(config: ConfigNode, directory: Path, num_rows: int, is_refused: bool, device: str) -> dict[str, Any]:
    """Train, and return weights, records and memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    recipe = TrainFinetuneRecipeForNextTokenPrediction(config)
    recipe.setup()
    if is_refused and device == "cpu":
        _Fault(recipe, num_rows)
    recipe.run_train_validation_loop()
    records = [json.loads(line) for line in (directory / "training.jsonl").read_text().splitlines()]
    kept = json.loads(found.read_text()) if (found := directory / "memory.json").is_file() else None
    result = {
        "weights": {name: p.detach().cpu() for name, p in recipe.model.named_parameters() if p.requires_grad},
        "losses": [record["loss"] for record in records],
        "tokens_per_s": median(record["tps"] for record in records[2:]),
        "first_steps_s": [record["num_tokens_per_step"] / record["tps"] for record in records[:2]],
        "peak_gib": max(record["mem"] for record in records),
        "record": kept,
        "policy_at_the_end": recipe.engine._policy,
        "allocated_gib": 0.0,
    }
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        result["allocated_gib"] = torch.cuda.memory_allocated() / GIB
    return result


def compare(name: str, device: str, is_small: bool) -> dict[str, Any]:
    """Run a case on all of the card and on a part of it."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as root:
        large_dir, small_dir = Path(root) / "large", Path(root) / "small"
        large = train(config_of(case, large_dir, is_small, "fixed"), large_dir, case["rows"], False, device)
        ballast, left_gib = None, None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            stays = large["allocated_gib"]
            left_gib = stays + case["share"] * (large["peak_gib"] - stays) + 0.8  # libraries, and gaps
            ballast = torch.empty(max(0, int(free - left_gib * GIB)), dtype=torch.uint8, device=device)
        held = 0.0 if ballast is None else ballast.numel() / GIB
        memory = "auto" if name == "auto" else "fixed"
        small = train(config_of(case, small_dir, is_small, memory), small_dir, case["rows"], name != "auto", device)
        del ballast
    weights, others = large.pop("weights"), small.pop("weights")
    return {
        "micro_batch": [case["rows"], case["seq_len"]],
        "left_gib": left_gib,
        "large": large,
        "small": {**small, "allocated_gib": small["allocated_gib"] - held, "peak_gib": small["peak_gib"] - held},
        "weights_max_difference": max(float((weights[key] - others[key]).abs().max()) for key in weights),
        "loss_max_difference": max(abs(a - b) for a, b in zip(large["losses"], small["losses"], strict=True)),
    }


def failed_checks(name: str, found: dict[str, Any], device: str) -> list[str]:
    """Return what is not as it should be."""
    record, wrong = found["small"]["record"] or {}, []
    limits = record.get("most_positions", {})
    if name == "split" and found["weights_max_difference"] > 1e-6:
        wrong.append("the weights differ by more than 1e-6")
    if name == "auto" and limits:
        wrong.append("a step failed although the plan said that it fits")
    if name == "auto" and device == "cuda" and record.get("policy") in (None, "none"):
        wrong.append("nothing was chosen that needs less")
    if name != "auto" and not limits:
        wrong.append("no step failed: lower the share")
    if name in ("policy", "in_backward") and found["small"]["policy_at_the_end"] == "none":
        wrong.append("the policy did not change")
    if abs(found["small"]["allocated_gib"] - found["large"]["allocated_gib"]) > 0.1:
        wrong.append("memory of the failed attempt stayed")
    return wrong


def main() -> int:
    """Run the cases; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": environment(arguments.device), "cases": {}, "failed": []}
    for name in arguments.cases.split(","):
        found = compare(name, arguments.device, arguments.small)
        results["cases"][name] = found
        results["failed"] += [f"{name}: {reason}" for reason in failed_checks(name, found, arguments.device)]
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
