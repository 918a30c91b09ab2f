"""Measure the small things: how long people wait before anything happens, and what the loop costs beside the model.

    python benchmarks/startup.py [--out benchmarks/results/startup.json] [--steps 12] [--skip-quickstart]

The model is the quickstart's (135M parameters, fetched if it is not cached). Commands are started as a user starts
them, several times, and the median counts. The loop is the recipe's own `run_train_validation_loop`, with its loader,
schedule, checks and JSONL file; beside each of its steps stands a bare step on the same batch: plain Transformers
forward, logits of the labelled positions, cross-entropy, backward, clipping, AdamW, one `.item()`. Exit status 1 when a
limit is missed.

    python benchmarks/startup.py --large llama3_1_8b [--layers 32] [--model-dir DIR] [--out record.json]

times a large model instead: random weights of its shape are written once as a directory of safetensors, and `automodel`
is started on it until it reports its first step, first with empty caches of compiled kernels, then with full ones. The
files are dropped from memory before every start, so that all are read from the disk; the limit is the time that reading
them takes by itself, plus 20 s and 8 s. ``--device cpu --small`` runs the script itself on any machine.
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
    parser.add_argument("--large", help="time the start of a model of this shape alone, such as llama3_1_8b")
    parser.add_argument("--layers", type=int, help="layers of the large model (default: all)")
    parser.add_argument("--model-dir", type=Path, help="where its files are kept (default: a temporary directory)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="of the large model")
    parser.add_argument("--small", action="store_true", help="tiny matrices in the large model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if args.large is not None:
            results = measure_large(args, Path(work))
        else:
            demo = fetch_demo()
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


# --- a large model ---------------------------------------------------------------------------------------------------


def measure_large(args: argparse.Namespace, work: Path) -> list[Result]:
    """Time the start of a large model from files on the disk, with cold and with warm compiler caches."""
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    directory = args.model_dir or work / "model"
    if not (directory / "config.json").is_file():
        # in a process of its own, so that no memory of the device stays taken
        code = (
            "import sys; from pathlib import Path; from measuring import make_config, write_model_directory\n"
            f"config = make_config({args.large!r}, {args.layers!r}, {args.small!r})\n"
            f"write_model_directory(config, Path(sys.argv[1]), {args.device!r})"
        )
        here = Path(__file__).resolve().parent
        path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(directory)], check=True, env={**os.environ, "PYTHONPATH": path})
        print(f"wrote {directory} in {time.perf_counter() - start:.1f} s", flush=True)
    config = json.loads((directory / "config.json").read_text())
    recipe = work / "large.yaml"
    recipe.write_text(json.dumps(recipe_of_large(directory, work / "run", config["vocab_size"], args.small)))
    disk_s, gigabytes = read_from_disk(directory)
    caches = {name: str(work / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    results = []
    for state, seconds in (("cold", 20.0), ("warm", 8.0)):
        drop_from_memory(directory)
        moments = moments_of_start([*AUTOMODEL, str(recipe)], {**os.environ, **caches})
        detail = f"{gigabytes:.1f} GB in {disk_s:.1f} s by itself; {moments}"
        name = f"{args.large} ({config['num_hidden_layers']} layers), command to first step, {state}"
        results.append(Result(name, moments["step 0 |"], "s", disk_s + seconds, detail))
    return results


def recipe_of_large(directory: Path, run_dir: Path, vocab_size: int, small: bool) -> dict[str, Any]:
    """Return a recipe of one LoRA step of 2 x 4096 tokens."""
    dataset = "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset"
    seq_len = 64 if small else 4096
    return {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(directory),
        },
        "peft": {"target_modules": "*_proj", "dim": 16, "alpha": 32},
        "step_scheduler": {"global_batch_size": 2, "local_batch_size": 2, "max_steps": 1},
        "dataset": {"_target_": dataset, "vocab_size": vocab_size, "seq_len": seq_len, "batch_size": 2},
        "dataloader": {"batch_size": None},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4},
        "checkpoint": {"enabled": False, "checkpoint_dir": str(run_dir)},
    }


def drop_from_memory(directory: Path) -> None:
    """Tell the system to forget the files of a directory, as if they had never been read."""
    os.sync()  # pages that are not written yet would stay
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_disk(directory: Path) -> tuple[float, float]:
    """Return the seconds that reading the weights takes, and how many GB they are."""
    drop_from_memory(directory)
    buffer = bytearray(2**24)
    num_bytes, start = 0, time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                num_bytes += read
    return time.perf_counter() - start, num_bytes / 1e9


def moments_of_start(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Start a run and return after how many seconds it said what; it is over with its first step."""
    waited_for = ("Experiment_details", "Decoder layers", "Model summary", "step 0 |")
    moments: dict[str, float] = {}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    shown = []
    for line in process.stdout:
        shown.append(line)
        for words in waited_for:
            if words in line:
                moments.setdefault(words, round(time.perf_counter() - start, 1))
    if process.wait() or "step 0 |" not in moments:
        raise SystemExit("the large model made no step:\n" + "".join(shown[-20:]))
    return moments


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
