"""Measure the small things: how long people wait before anything happens, and what the loop costs beside the model.

    python benchmarks/startup.py [--out benchmarks/results/startup.json] [--steps 12] [--skip-quickstart]

The model is the quickstart's (135M parameters, fetched if it is not cached). Commands are started as a user starts
them, several times, and the median counts. The loop is the recipe's own `run_train_validation_loop`, with its loader,
schedule, checks and JSONL file; beside each of its steps stands a bare step on the same batch: plain Transformers
forward, logits of the labelled positions, cross-entropy, backward, clipping, AdamW, one `.item()`. Exit status 1 when a
limit is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_automodel.cli.fetch_demo import Demo, fetch_demo
from nemo_automodel.cli.quickstart import RECIPE_FILE, overrides, quiet

AUTOMODEL = [sys.executable, "-m", "nemo_automodel.cli.app"]
if (script := Path(sys.executable).with_name("automodel")).is_file():
    AUTOMODEL = [str(script)]


@dataclass
class Result:
    """One measured number and the limit it should keep."""

    name: str
    value: float
    unit: str
    limit: float
    detail: str = ""

    @property
    def is_kept(self) -> bool:
        """Tell whether the limit is kept."""
        return self.value <= self.limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--repeats", type=int, default=5, help="starts of each command; the median counts")
    parser.add_argument("--steps", type=int, default=12, help="steps of the loop, the first two not counted")
    parser.add_argument("--skip-quickstart", action="store_true", help="leave out the whole start of the quickstart")
    args = parser.parse_args()
    demo = fetch_demo()
    with tempfile.TemporaryDirectory() as work:
        results = measure_commands(Path(work), args.repeats)
        if not args.skip_quickstart:
            results.append(measure_first_step(Path(work)))
        results += measure_loop(demo, Path(work) / "loop", args.steps)
    for result in results:
        kept = "ok  " if result.is_kept else "OVER"
        value, limit = f"{result.value:.3g}", f"{result.limit:g} {result.unit}"
        print(f"{kept} {result.name:<44} {value:>7} {result.unit:<5} (limit {limit}) {result.detail}")
    if args.out:
        record = {**machine(), "results": [{**asdict(result), "is_kept": result.is_kept} for result in results]}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(result.is_kept for result in results) else 1


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    import torch

    return {
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
    }


# --- starts ----------------------------------------------------------------------------------------------------------


def measure_commands(work: Path, repeats: int) -> list[Result]:
    """Time the help, a mistake in a config file, and the import of the package."""
    mistaken = work / "mistaken.yaml"
    mistaken.write_text(RECIPE_FILE.read_text().replace("optimizer:", "optimzer:"))
    cases: list[tuple[str, list[str], int, float]] = [
        ("automodel --help", [*AUTOMODEL, "--help"], 0, 0.3),
        ("automodel with a mistyped section", [*AUTOMODEL, str(mistaken)], 2, 1.0),
        ("import nemo_automodel (whole process)", [sys.executable, "-c", "import nemo_automodel"], 0, 0.2),
    ]
    results = []
    for name, command, status, limit in cases:
        seconds = []
        for _ in range(repeats + 1):  # the first start reads the disk
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds.append(time.perf_counter() - start)
            if done.returncode != status:
                raise SystemExit(f"{name}: exit status {done.returncode} instead of {status}\n{done.stderr}")
        results.append(Result(name, statistics.median(seconds[1:]), "s", limit, f"median of {repeats}"))
    return results


def measure_first_step(work: Path) -> Result:
    """Start the quickstart and wait until it reports its first optimizer step."""
    start = time.perf_counter()
    command = [*AUTOMODEL, "quickstart", "--steps", "1", "--dir", str(work / "quickstart")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    shown = []
    for line in process.stdout:
        shown.append(line)
        if "step 0 |" in line:
            seconds = time.perf_counter() - start
            process.terminate()
            process.wait()
            return Result("quickstart, start to end of the first step", seconds, "s", 15.0, "model and data cached")
    raise SystemExit("the quickstart made no step:\n" + "".join(shown[-20:]))


# --- the loop --------------------------------------------------------------------------------------------------------


def measure_loop(demo: Demo, run_dir: Path, num_steps: int) -> list[Result]:
    """Time the recipe's loop against bare steps on the same batches, and count what waits for the device."""
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    class Measured(TrainFinetuneRecipeForNextTokenPrediction):
        """Between the loop's steps, do bare ones; before every second step instead of after it."""

        def train_step(self, batches: Sequence[dict[str, Any]]) -> Any:
            entered = time.perf_counter()
            outside = entered - self.left
            is_first = len(rows) % 2 == 0
            bare = timed(lambda: bare_step(self, batches)) if is_first else 0.0
            start = time.perf_counter()
            metrics = super().train_step(batches)
            inside = time.perf_counter() - start
            bare = bare or timed(lambda: bare_step(self, batches))
            rows.append((outside, inside, bare))
            last.append(batches)
            self.left = time.perf_counter()
            return metrics

    rows: list[tuple[float, float, float]] = []
    last: list[Sequence[dict[str, Any]]] = []
    words = ["--validation_dataset=none", "--checkpoint.enabled=false"]
    words = [word for word in overrides(demo, run_dir, num_steps) if "validation" not in word] + words
    recipe = Measured(parse_args_and_load_config(RECIPE_FILE, words))
    with quiet():
        recipe.setup()
    recipe.left = time.perf_counter()
    recipe.run_train_validation_loop()
    counted = rows[2:]
    overhead = statistics.median((outside + inside) / bare - 1 for outside, inside, bare in counted)
    outside_ms = 1e3 * statistics.median(row[0] for row in counted)
    bare_ms = 1e3 * statistics.median(row[2] for row in counted)
    syncs = count_syncs(recipe, lambda: TrainFinetuneRecipeForNextTokenPrediction.train_step(recipe, last[-1]))
    return [
        Result(
            "loop's overhead on a 135M model's step",
            100 * overhead,
            "%",
            2.0,
            f"median of {len(counted)} steps; bare step {bare_ms:.0f} ms, between steps {outside_ms:.1f} ms",
        ),
        Result("device syncs a step", float(len(syncs)), "", 1.0, ", ".join(syncs)),
    ]


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bare_step(recipe: Any, batches: Sequence[dict[str, Any]]) -> float:
    """Train on one batch with nothing but Transformers and PyTorch; return the loss."""
    import torch

    (batch,) = ({key: value.to(recipe.device) for key, value in whole.items()} for whole in batches)
    learned = batch["labels"] != -100
    hidden = recipe.model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    loss = torch.nn.functional.cross_entropy(recipe.model.lm_head(hidden[learned]), batch["labels"][learned])
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in recipe.model.parameters() if p.requires_grad], 1.0)
    recipe.optimizer.step()
    recipe.optimizer.zero_grad()
    return loss.item()


def count_syncs(recipe: Any, step: Callable[[], object]) -> list[str]:
    """Return what waited for the device during ``step``, by name.

    With CUDA PyTorch itself reports it. On the CPU nothing waits, so values are followed: whatever is computed from a
    weight would live on the device, and reading such a value into Python, or asking it for a shape, would wait.
    """
    import torch

    if recipe.device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    with FollowDevice(recipe.model.parameters()) as follow:
        step()
    return follow.found


def FollowDevice(parameters: Any) -> Any:
    """Return a dispatch mode that notes reads of values that come from ``parameters``; torch is imported late."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    class Follow(TorchDispatchMode):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []
            self.on_device = WeakIdKeyDictionary()
            for parameter in parameters:
                self.on_device[parameter] = True

        def is_followed(self, values: Any) -> bool:
            return any(isinstance(v, torch.Tensor) and v in self.on_device for v in tree_leaves(values))

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if self.is_followed((args, kwargs)):
                name = func.overloadpacket.__name__
                if name in self.waits:
                    self.found.append(name)
                for value in tree_leaves(out):
                    if isinstance(value, torch.Tensor):
                        self.on_device[value] = True
            return out

        def __enter__(self) -> Any:
            original = torch.Tensor.tolist

            def tolist(tensor: torch.Tensor) -> Any:  # reads memory without an operator
                if tensor in self.on_device:
                    self.found.append("tolist")
                return original(tensor)

            self.original, torch.Tensor.tolist = original, tolist
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            torch.Tensor.tolist = self.original
            super().__exit__(*error)

    return Follow()


if __name__ == "__main__":
    raise SystemExit(main())
