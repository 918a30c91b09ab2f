"""How long the isolation proof of packed rows takes with a large model, in the recipe's own way.

    python benchmarks/proof_time.py [--shape llama3_1_8b] [--out record.json]

The model has random weights, LoRA r 16 on all projections and the packed attention of the run; the proof runs as before
the first step, twice: what is compiled and planned for the small rows counts in the first time only.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measuring import LORA_ALPHA, LORA_RANK, SHAPES, dtype_of, environment, make_config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.isolation_proof import ROW_LEN, prove_isolation
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes.engine import EagerEngine
from nemo_automodel.recipes.packing_proof import pack_documents

LIMIT_S = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3_1_8b", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny shape")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = NeMoAutoModelForCausalLM.from_config(
        make_config(args.shape, small=args.small),
        torch_dtype=str(dtype_of(args.device)).removeprefix("torch."),
        device=args.device,
        peft_config=PeftConfig(target_modules="*_proj", dim=LORA_RANK, alpha=LORA_ALPHA),
        kernels="defaults",
    )
    engine = EagerEngine(model, MaskedCrossEntropy(), model.device)
    cfg = PackedSequenceConfig(packed_sequence_size=ROW_LEN)
    proofs = [prove_isolation(engine.forward, lambda documents: pack_documents(documents, cfg), ROW_LEN) for _ in "12"]
    record = {"environment": environment(args.device), "argv": sys.argv[1:], "proofs": [asdict(one) for one in proofs]}
    record["lines"] = [str(one) for one in proofs]
    print("\n".join(record["lines"]))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(one.is_conclusive for one in proofs) and proofs[-1].seconds < LIMIT_S else 1


if __name__ == "__main__":
    raise SystemExit(main())
