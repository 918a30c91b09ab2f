"""Check on a GPU that fast and plain models train alike, as users get them: by default, and with `force_hf: true`.

    python benchmarks/fast_product.py [--families llama,qwen2] [--steps 30] [--out record.json]

For each family a four-layer model of random weights learns 64 fixed documents with LoRA in bf16, three ways: unpacked
rows padded at the end, packed rows, and packed rows with everything recomputed. Both models start from the same weights
and see the same batches, and so does a third, plain and in fp32, which tells how far rounding alone carries a run. The
log says which layers, which packed attention and which loss each took; the first must be fast. Its losses may lie 0.2 %
further from those in fp32 than the plain model's do, in the worst step and on average over the second half, and its
last loss must be below its first. Then the adapters are saved by both and loaded by the other, and greedy answers with
a cache are compared with the most likely tokens without one. Exit status 1 when anything fails.

`--device cpu` runs the script itself, in fp32 and with `fast_layers: on`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.model_files import ModelFiles
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes.engine import EagerEngine, count_label_tokens

FAMILIES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
SIZES = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
WAYS = {"padded": "none", "packed": "none", "packed, recomputed": "full"}
KINDS = ("fast", "plain", "fp32")
ROW_LEN = 512
TOLERANCE = 2e-3


def documents(num: int = 64) -> list[torch.Tensor]:
    """Return documents of 20 to 250 tokens with a pattern that can be learned."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(num):
        length = int(torch.randint(20, 250, (1,), generator=generator))
        start, stride = torch.randint(4, 200, (2,), generator=generator).tolist()
        made.append((start + stride * torch.arange(length)) % 300 + 4)
    return made


def padded(group: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    size = max(map(len, group))
    batch = {
        k: torch.full((len(group), size), v) for k, v in (("input_ids", 3), ("labels", -100), ("attention_mask", 0))
    }
    for row, document in enumerate(group):
        batch["input_ids"][row, : len(document)] = document
        batch["labels"][row, : len(document) - 1] = document[1:]
        batch["attention_mask"][row, : len(document)] = 1
    return batch


def packed(group: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return one row that holds the first documents of a group which fit."""
    batch = {
        "input_ids": torch.full((1, ROW_LEN), 3),
        "labels": torch.full((1, ROW_LEN), -100),
        "position_ids": torch.arange(ROW_LEN).unsqueeze(0),
    }
    start, lengths = 0, []
    for document in group:
        end = start + len(document)
        if end > ROW_LEN:
            break
        batch["input_ids"][0, start:end] = document
        batch["labels"][0, start : end - 1] = document[1:]
        batch["position_ids"][0, start:] = torch.arange(ROW_LEN - start)
        start, lengths = end, [*lengths, len(document)]
    return {**batch, "seq_lens": torch.tensor([lengths])}


def build(
    family: str, recompute: str, args: argparse.Namespace, fast: bool, in_fp32: bool
) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    is_cpu = args.device == "cpu"
    choice: dict[str, Any] = {"fast_layers": "on" if is_cpu else "auto"} if fast else {"force_hf": True}
    sizes = {**SIZES, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96} if is_cpu else SIZES
    model = NeMoAutoModelForCausalLM.from_config(
        getattr(transformers, FAMILIES[family])(**sizes),
        torch_dtype="float32" if is_cpu or in_fp32 else "bfloat16",
        device=args.device,
        peft_config=PeftConfig(target_modules="*_proj", dim=16, alpha=32),
        activation_checkpointing=recompute,
        **choice,
    )
    assert type(model.model.layers[0]).__name__.startswith("Fast") == fast, "the other layers were chosen; see the log"
    return model.train()


def train(model: transformers.PreTrainedModel, way: str, fast: bool, args: argparse.Namespace) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    engine = EagerEngine(model, MaskedCrossEntropy(), model.device, joins_frozen_head=fast)
    data = documents()
    groups = [data[i : i + 8] for i in range(0, len(data), 8)]
    losses = []
    for step in range(args.steps):
        group = groups[step % len(groups)]
        make = padded if way == "padded" else packed
        batches = [make(group[:4]), make(group[4:])]
        losses.append(engine.forward_backward(batches, count_label_tokens(batches)))
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).tolist()


def distances(losses: list[float], wanted: list[float]) -> tuple[float, float]:
    """Return the largest relative gap of a step, and that of the means over the second half."""
    half = len(losses) // 2
    mean = abs(sum(losses[half:]) / sum(wanted[half:]) - 1)
    return max(abs(a - b) / b for a, b in zip(losses, wanted, strict=True)), mean


def exchange_files(fast: Any, plain: Any) -> bool:
    """Tell whether each model's adapter loads into the other and counts there."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        ModelFiles(fast, None).write(place / "fast")
        ModelFiles(plain, None).write(place / "plain")
        ids = padded(documents(4))["input_ids"][:, :20].to(fast.device)
        with torch.no_grad():
            expected = plain(input_ids=ids, use_cache=False).logits.float()
            ModelFiles(fast, None).read(place / "plain")
            found = fast(input_ids=ids, use_cache=False).logits.float()
    return float((found - expected).norm() / expected.norm()) < 2e-2


def answers_agree(model: Any) -> bool:
    """Tell whether generation with a cache takes the tokens that the fast layers find likely, but for near ties."""
    ids = documents(2)[0][:12].unsqueeze(0).to(model.device)
    model.eval()
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        logits = model(input_ids=answer, use_cache=False).logits[0, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, answer[0, ids.shape[1] :].unsqueeze(1)).squeeze(1)
    return bool((logits.amax(1) - chosen <= 0.05 * logits.std()).all())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="which families, comma-separated")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="    %(message)s")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    record: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "cases": {}}
    failures = []
    for family in args.families.split(","):
        for way, recompute in WAYS.items():
            name = f"{family}, {way}"
            print(name, flush=True)
            models = {key: build(family, recompute, args, key == "fast", key == "fp32") for key in KINDS}
            losses = {key: train(model, way, key == "fast", args) for key, model in models.items()}
            gaps = {key: distances(losses[key], losses["fp32"]) for key in ("fast", "plain")}
            checks = {
                "learns": losses["fast"][-1] < losses["fast"][0],
                "every step": gaps["fast"][0] <= gaps["plain"][0] + TOLERANCE,
                "on average": gaps["fast"][1] <= gaps["plain"][1] + TOLERANCE,
                "files": exchange_files(models["fast"], models["plain"]),
                "answers": answers_agree(models["fast"]),
            }
            record["cases"][name] = {**losses, "gaps": gaps, "checks": checks}
            print("  losses " + ", ".join(f"{key} {curve[0]:.4f} -> {curve[-1]:.4f}" for key, curve in losses.items()))
            print("  from fp32: " + ", ".join(f"{k} {a:.2%} at most, {b:.3%} on average" for k, (a, b) in gaps.items()))
            print(f"  {checks}", flush=True)
            failures += [f"{name}: {check}" for check, holds in checks.items() if not holds]
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("FAILED: " + "; ".join(failures) if failures else "all checks hold")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
