"""Make the figures that the documentation quotes and that no other script records, and print them.

    python benchmarks/docs_figures.py [--gigabytes 4.3] [--out record.json]

The manifest of a checkpoint (writing it, checking it with the file in memory and after its pages were dropped), the
report line of prefix sharing, and the line of the isolation proof. Model and tokenizer are the quickstart's, fetched if
they are not cached.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from nemo_automodel import NeMoAutoModelForCausalLM, NeMoAutoTokenizer
from nemo_automodel._transformers.forward import LabelledForward
from nemo_automodel._transformers.isolation_proof import ROW_LEN, Document, prove_isolation
from nemo_automodel.cli.fetch_demo import fetch_demo
from nemo_automodel.components.checkpoint import manifest
from nemo_automodel.components.datasets.config import PackedSequenceConfig
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.packed_rows import pack_dataset
from nemo_automodel.components.datasets.utils import packed_sequence_thd_collater

sys.path.insert(0, str(Path(__file__).parent))
import squad_like


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_manifest(directory: Path, gigabytes: float) -> dict[str, float]:
    """Write random bytes as a checkpoint's weights, its manifest, and check it."""
    file = directory / "model" / "model.safetensors"
    file.parent.mkdir()
    piece = os.urandom(2**26)
    with file.open("wb") as out:
        for _ in range(round(gigabytes * 1e9 / len(piece))):
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    found = {"write_manifest_s": seconds(lambda: manifest.write_manifest(directory))}
    found["verify_in_memory_s"] = seconds(lambda: manifest.verify(directory))
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found["verify_from_disk_s"] = seconds(lambda: manifest.verify(directory))
    return {"gigabytes": file.stat().st_size / 1e9, **found}


def share_prefixes(tokenizer: Any, directory: Path) -> str:
    """Return the report of packing 2,000 rows with shared prefixes."""
    squad_like.write(directory, 2000, 8)
    dataset = make_squad_dataset(tokenizer, dataset_name=str(directory))
    config = PackedSequenceConfig(packed_sequence_size=2048, share_prefix=True, cache=False)
    rows = pack_dataset(dataset, config, pad_token_id=0, seed=1, shuffle=False)
    len(rows)
    return str(rows.report)


def prove(model: Any) -> str:
    """Return what the proof of isolation says of a model."""
    config = PackedSequenceConfig(packed_sequence_size=ROW_LEN, cache=False)

    def pack(documents: list[Document]) -> Any:
        rows = pack_dataset(
            [{"input_ids": ids, "labels": labels} for ids, labels in documents],
            config, pad_token_id=0, seed=0, shuffle=False,
        )  # fmt: skip
        return packed_sequence_thd_collater([rows[i] for i in range(len(rows))])

    return str(prove_isolation(LabelledForward(model), pack, ROW_LEN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.3, help="size of the checkpoint")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    demo = fetch_demo()
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "checkpoint").mkdir()
        record = {
            "command": f"python benchmarks/docs_figures.py --gigabytes {args.gigabytes:g}",
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "torch": torch.__version__,
            "manifest": time_manifest(Path(work) / "checkpoint", args.gigabytes),
            "prefix_sharing": share_prefixes(NeMoAutoTokenizer.from_pretrained(str(demo.model)), Path(work) / "rows"),
            "isolation": prove(NeMoAutoModelForCausalLM.from_pretrained(str(demo.model), device="cpu")),
        }
    print(json.dumps(record, indent=2))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
