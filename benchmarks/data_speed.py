"""Measure how fast text becomes packed rows, and whether a loader keeps up with training.

    python benchmarks/data_speed.py --tokenizer DIR [--rows 87599] [--out benchmarks/results/data_speed_cpu.json]

``DIR`` holds a fast tokenizer (tokenizer.json); without it the quickstart's is taken, fetched if it is not cached. The
rows are SQuAD-shaped (``squad_like.py``, with contexts of SQuAD's mean length), as many as SQuAD's training set has.
Measured are:

* the whole set tokenised and packed, with an empty cache and from the cache, reading the file included;
* the first packed row after the data set is asked for, with an empty cache, while the rest is still text;
* in whole runs of the recipe with a tiny model (``recipe_start.py``), how long after the model is there step 0 is done:
  of a stream, of a packed stream, and of the packed set while it is tokenised;
* what share of the time a consumer of 20,000 tokens a second waits for the loader, while rows are tokenised behind it
  and when all are cached, and the tokens a second that the loader could deliver;
* the share of padding that each packing strategy leaves.

Exit status 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import squad_like
from recipe_start import time_of_step_0, tiny_model
from transformers import PreTrainedTokenizerBase

from nemo_automodel._transformers.auto_tokenizer import NeMoAutoTokenizer
from nemo_automodel.cli.fetch_demo import fetch_demo
from nemo_automodel.components.datasets.config import DataloaderConfig, PackedSequenceConfig
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.components.datasets.loader import ResumableDataLoader, build_dataloader
from nemo_automodel.components.datasets.packed_rows import PackedRows, pack_dataset
from nemo_automodel.components.datasets.utils import packed_sequence_thd_collater

SQUAD_ROWS = 87_599
SQUAD_CONTEXT_CHARS = 754  # the mean of SQuAD 1.1's training set
TOKENS_PER_S = 20_000
ROW_TOKENS = 2048


@dataclass
class Result:
    """One measured number and the limit it should keep, if there is one."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    detail: str = ""

    @property
    def is_kept(self) -> bool:
        """Tell whether the limit is kept."""
        return self.limit is None or self.value <= self.limit


def write_rows(path: Path, num_rows: int) -> None:
    """Write SQuAD-shaped rows whose contexts are as long as SQuAD's on average: neighbouring paragraphs joined."""
    rng = random.Random(0)
    paragraphs = squad_like.paragraphs()
    rng.shuffle(paragraphs)
    done, num_chars, num_contexts = 0, 0, 0
    with path.open("w", encoding="utf-8") as file:
        while done < num_rows:
            context = paragraphs[num_contexts % len(paragraphs)]
            number = num_contexts
            while num_chars + len(context) < SQUAD_CONTEXT_CHARS * (num_contexts + 1) - 300:
                number += 1
                context += " " + paragraphs[number % len(paragraphs)]
            num_contexts, num_chars = num_contexts + 1, num_chars + len(context)
            for row in squad_like.questions(context, rng, rng.choice(squad_like.QUESTIONS_PER_PARAGRAPH)):
                if done < num_rows:
                    file.write(json.dumps({"id": str(done), **row}) + "\n")
                    done += 1


def packed(tokenizer: PreTrainedTokenizerBase, data: Path, **options: Any) -> PackedRows:
    """Open the data and begin to pack it."""
    dataset = make_squad_dataset(tokenizer, dataset_name=str(data))
    config = PackedSequenceConfig(packed_sequence_size=ROW_TOKENS, **options)
    rows = pack_dataset(dataset, config, pad_token_id=tokenizer.pad_token_id or 0, seed=1, shuffle=True)
    assert isinstance(rows, PackedRows)
    return rows


def loader_of(rows: PackedRows) -> ResumableDataLoader:
    """Return the loader a recipe would make."""
    return build_dataloader(
        rows,
        DataloaderConfig(),
        local_batch_size=1,
        collate_fn=packed_sequence_thd_collater,
        seed=1,
        is_training=True,
    )


def waiting_share(batches: Iterator[dict[str, Any]], num_batches: int) -> float:
    """Take batches at the pace of training; return the share of the time that went into waiting for them."""
    next(batches)  # step 0 is measured on its own
    waited, begin = 0.0, time.perf_counter()
    for _ in range(num_batches):
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        time.sleep(max(0.0, batch["input_ids"].numel() / TOKENS_PER_S - (time.perf_counter() - start)))
    return waited / (time.perf_counter() - begin)


def measure(tokenizer: PreTrainedTokenizerBase, data: Path, num_batches: int) -> list[Result]:
    """Measure everything; the cache directory must be empty."""
    results = []
    start = time.perf_counter()
    rows = packed(tokenizer, data)
    next(iter(loader_of(rows)))
    results.append(Result("first batch, empty cache", time.perf_counter() - start, "s", 3.0))
    len(rows)
    seconds = time.perf_counter() - start
    report, used = rows.report, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = used.ru_utime + used.ru_stime
    detail = f"{report.num_documents:,} rows, {report.num_tokens:,} tokens, {cpu_s:.1f} CPU seconds of tokenising"
    results.append(Result("tokenise and pack, empty cache", seconds, "s", 20.0, detail))

    start = time.perf_counter()
    rows = packed(tokenizer, data)
    len(rows)
    results.append(Result("the same from the cache", time.perf_counter() - start, "s", 2.0))
    share = waiting_share(iter(loader_of(rows)), num_batches)
    results.append(Result("waiting for a full set at 20,000 tokens/s", 100 * share, "%", 1.0))
    start, taken = time.perf_counter(), 0
    for batch in loader_of(rows):
        taken += batch["input_ids"].numel()
    rate = taken / (time.perf_counter() - start)
    results.append(Result("the loader as fast as it can", rate, "tokens/s", None))

    fresh = packed(tokenizer, data, cache=False)
    share = waiting_share(iter(loader_of(fresh)), num_batches)
    results.append(Result("waiting while rows are tokenised, 20,000 tokens/s", 100 * share, "%", 1.0))

    for strategy in ("thd", "best_fit", "neat"):
        for size in (1024, ROW_TOKENS):
            dataset = make_squad_dataset(tokenizer, dataset_name=str(data))
            config = PackedSequenceConfig(packed_sequence_size=size, packing_strategy=strategy)
            rows = pack_dataset(dataset, config, pad_token_id=0, seed=1, shuffle=True)
            len(rows)
            share = 100 * rows.report.padding_share
            results.append(Result(f"padding of {strategy}, rows of {size:,}", share, "%", None, str(rows.report)))
    return results


def measure_runs(tokenizer: PreTrainedTokenizerBase, data: Path, work: Path) -> list[Result]:
    """Start the recipe on the data in several ways; each has an empty cache."""
    model = tiny_model(work / "model", tokenizer)
    results = []
    for name, dataset, packing in (
        ("stream", {"streaming": True}, {}),
        ("packed stream", {"streaming": True}, {"packed_sequence_size": ROW_TOKENS}),
        ("packed set", {}, {"packed_sequence_size": ROW_TOKENS}),
    ):
        run = work / name.replace(" ", "_")
        os.environ["NEMO_AUTOMODEL_CACHE"] = str(run / "cache")
        times = time_of_step_0(model, data, run, dataset, packing)
        detail = (
            f"{times.waiting_s:.2f} s of it waiting for rows; before that {times.setup_s:.1f} s from the start of the "
            "recipe until the model was there"
        )
        # the set's processes share the cores with a model on the CPU, which says nothing about the data
        limit = 3.0 if "stream" in name else None
        results.append(Result(f"run of a {name}: model ready to end of step 0", times.first_step_s, "s", limit, detail))
    return results


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python benchmarks/data_speed.py " + " ".join(arg for arg in sys.argv[1:] if arg[:1] == "-"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "machine": platform.machine(),
        "packages": {name: version(name) for name in packages},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="directory of a fast tokenizer (default: the quickstart's)")
    parser.add_argument("--name", default="", help="what to call the tokenizer in the record")
    parser.add_argument("--keeps-template", action="store_true", help="write rows with the tokenizer's chat template")
    parser.add_argument("--rows", type=int, default=SQUAD_ROWS, help="rows of the data")
    parser.add_argument("--batches", type=int, default=200, help="batches taken at the pace of training")
    parser.add_argument("--runs-only", action="store_true", help="measure the runs of the recipe alone")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = NeMoAutoTokenizer.from_pretrained(str(args.tokenizer or fetch_demo().model))
    if not args.keeps_template:
        tokenizer.chat_template = None
    record = machine()
    with tempfile.TemporaryDirectory() as work:
        os.environ["NEMO_AUTOMODEL_CACHE"] = str(Path(work) / "cache")
        data = Path(work) / "train.jsonl"
        write_rows(data, args.rows)
        num_bytes = data.stat().st_size
        results = [] if args.runs_only else measure(tokenizer, data, args.batches)
        results += measure_runs(tokenizer, data, Path(work))
    for result in results:
        kept = "    " if result.limit is None else "ok  " if result.is_kept else "OVER"
        limit = "" if result.limit is None else f"(limit {result.limit:g})"
        print(f"{kept} {result.name:<52} {result.value:>12,.3f} {result.unit:<9} {limit} {result.detail}")
    if args.out:
        record |= {
            "tokenizer": {"name": args.name or "the quickstart's", "tokens": len(tokenizer)},
            "form": "chat template" if args.keeps_template else "prompt and answer",
            "rows": args.rows,
            "bytes": num_bytes,
            "results": [{**asdict(result), "is_kept": result.is_kept} for result in results],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(result.is_kept for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
