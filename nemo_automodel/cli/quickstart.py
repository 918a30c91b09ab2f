"""Teach a small real model a real task in a few minutes, on a GPU or a CPU, and show what it learned.

Everything here is the ordinary road: the recipe file ``examples/quickstart/smollm2_sentiment_lora.yaml`` with a few
overrides, the recipe class, a checkpoint, a report. What is added are answers and measurements before and after. The
three answers shown are the first three held-out rows and the numbers are over all held-out rows; none was trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_automodel.cli import report
from nemo_automodel.cli.demo_sentences import QUESTION
from nemo_automodel.cli.fetch_demo import MANIFEST, Demo, default_directory, fetch_demo
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
from nemo_automodel.shared.errors import UserError

if TYPE_CHECKING:
    from nemo_automodel.cli.held_out import Question, Score
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE_FILE = EXAMPLES / "quickstart" / "smollm2_sentiment_lora.yaml"
OWN_DATA_FILE = EXAMPLES / "llm_finetune" / "own_data" / "smollm2_135m_chat_peft.yaml"
NUM_SHOWN = 3
MAX_NEW_TOKENS = 24
"""Of the answers shown: the base model likes to talk, and the first sentence is enough to see it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--dir", type=Path, help="where the run is written (default: a new directory below runs/)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps (default: what the recipe file says)")


def run(args: argparse.Namespace) -> int:
    """Fetch, train, measure, report."""
    started = time.monotonic()
    if args.steps is not None and args.steps < 1:
        raise UserError(f"`--steps {args.steps}` must be at least 1.")
    run_dir = choose_directory(args.dir)
    if not RECIPE_FILE.is_file():
        raise UserError(f"{RECIPE_FILE} is missing. The quickstart runs from a checkout of the repository: clone it.")
    heading(f"1/3 Model and data ({time.strftime('%H:%M')})")
    with ThreadPoolExecutor(max_workers=1) as pool:
        fetching = pool.submit(fetch_demo)
        if (default_directory() / MANIFEST).is_file():
            load_libraries()  # while half a gigabyte is hashed
        demo = fetching.result()
    config = parse_args_and_load_config(RECIPE_FILE, overrides(demo, run_dir, args.steps))
    load_libraries()
    set_num_threads()
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    recipe = TrainFinetuneRecipeForNextTokenPrediction(config)
    with quiet():
        recipe.setup()
    train_and_compare(recipe, demo.data / "validation.jsonl")
    page = make_report(run_dir)
    say_what_next(run_dir, page, demo.model)
    print(f"The quickstart took {time.monotonic() - started:.0f} s in all.")
    return 0


def choose_directory(given: Path | None) -> Path:
    """Return the directory of the new run, absolute.

    Raises:
        UserError: a directory was named that is not empty.
    """
    directory = (given or Path("runs") / f"quickstart-{datetime.now():%Y%m%d-%H%M%S}").expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"`--dir {directory}` is there already and not empty. Name a new directory, or leave it out.")
    return directory


def overrides(demo: Demo, run_dir: Path, num_steps: int | None) -> list[str]:
    """Return the words that a user would add to ``automodel smollm2_sentiment_lora.yaml`` for this run."""
    words = [
        f"--model.pretrained_model_name_or_path={demo.model}",
        f"--dataset.path_or_dataset_id={demo.data}",
        f"--validation_dataset.path_or_dataset_id={demo.data}",
        f"--checkpoint.checkpoint_dir={run_dir}",
    ]
    return words if num_steps is None else [*words, f"--step_scheduler.max_steps={num_steps}"]


def load_libraries() -> None:
    """Import what a run needs, which takes seconds; only the first call does anything."""
    if "nemo_automodel.recipes.llm.train_ft" not in sys.modules:
        print("Loading PyTorch and Transformers ...", flush=True)
        importlib.import_module("nemo_automodel.recipes.llm.train_ft")


def set_num_threads() -> None:
    """Compute with the number of threads that is fastest now: on a busy machine all of them can be slower than one.

    OMP_NUM_THREADS, where it is set, is left to decide.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return
    candidates = sorted({max(1, torch.get_num_threads() // share) for share in (1, 2, 4, 8)})
    rounds = [[_matmul_s(num_threads) for num_threads in candidates] for _ in range(5)]
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    fastest = candidates[seconds.index(min(seconds))]
    torch.set_num_threads(fastest)
    print(f"Computing on the CPU with {fastest} of {os.cpu_count()} threads (OMP_NUM_THREADS overrides).", flush=True)


def _matmul_s(num_threads: int) -> float:
    """Return the seconds of a few products of the model's size: 512 tokens through one matrix of its MLP."""
    import torch

    torch.set_num_threads(num_threads)
    x, w = torch.ones(512, 576), torch.ones(576, 1536)
    x @ w  # the first product starts the threads
    start = time.perf_counter()
    for _ in range(8):
        x @ w
    return time.perf_counter() - start


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what a run says about itself in set-up off the screen, warnings excepted, unless LOGGING_LEVEL is set.

    The same text is in the run's own files, and `automodel <recipe file>` shows it.
    """
    if "LOGGING_LEVEL" in os.environ:
        yield
        return
    os.environ["LOGGING_LEVEL"] = "WARNING"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        del os.environ["LOGGING_LEVEL"]
    logging.getLogger().setLevel(logging.INFO)


def train_and_compare(recipe: TrainFinetuneRecipeForNextTokenPrediction, held_out_file: Path) -> None:
    """Train, then compare answers and numbers with those of the model as it was; leave ``samples.jsonl`` in the run.

    With its adapters switched off the model is exactly what it was before, so nothing has to be measured twice, and
    the training begins at once.
    """
    from nemo_automodel.cli.held_out import HeldOut, without_adapter, write_samples

    assert recipe.tokenizer is not None
    held_out = HeldOut(held_out_file, recipe.tokenizer)
    questions = held_out.questions(NUM_SHOWN)
    heading(f"2/3 Training: {recipe.schedule.total_steps} steps")
    start = time.monotonic()
    recipe.run_train_validation_loop()
    print(f"Training took {time.monotonic() - start:.0f} s.", flush=True)
    heading(f"3/3 Before and after, on {len(held_out)} held-out rows, none of them trained on")
    with without_adapter(recipe.model):
        before = held_out.answers(recipe.model, NUM_SHOWN, MAX_NEW_TOKENS)
        base = held_out.score(recipe.engine.forward, "Measuring the base model")
    after = held_out.answers(recipe.model, NUM_SHOWN, MAX_NEW_TOKENS)
    tuned = held_out.score(recipe.engine.forward, "Measuring the trained model")
    write_samples(recipe.run_directory.path / "samples.jsonl", questions, before, after)
    show_scores(base, tuned)
    print(f"The first {NUM_SHOWN} of them:", flush=True)
    show_answers(questions, {"before": before, "after": after})


def heading(text: str) -> None:
    """Print the line that begins a part."""
    print(f"\n== {text}", flush=True)


def show_answers(questions: Sequence[Question], answers: dict[str, Sequence[str]]) -> None:
    """Print the answers beside what people said; the question, the same for all rows, stands above."""
    asked = QUESTION.partition("{")[0]
    print(asked.strip(), flush=True)
    table = _table("held-out row", "people say", *answers)
    for i, question in enumerate(questions):
        table.add_row(
            question.prompt.removeprefix(asked),
            question.expected,
            *(answers[when][i] for when in answers),
            end_section=True,
        )
    _print(table)


def show_scores(before: Score, after: Score) -> None:
    """Print the numbers before and after."""
    table = _table("on the held-out rows", "before", "after")
    table.add_row("loss of an answer token", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("right word likelier than the wrong one", f"{before.preferred:.1%}", f"{after.preferred:.1%}")
    table.add_row("answer is the right word and nothing else", f"{before.exact:.1%}", f"{after.exact:.1%}")
    _print(table)


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    console = Console(markup=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def make_report(run_dir: Path) -> Path:
    """Write the run's page beside its checkpoints and return its path."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    page = run_dir / "report.html"
    report.run(parser.parse_args([str(run_dir), "--out", str(page)]))
    return page


def say_what_next(run_dir: Path, page: Path, model: Path) -> None:
    """Print what was made and three commands to go on with."""
    from nemo_automodel.components.checkpoint.restore import newest_checkpoint

    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None, "a finished run has a checkpoint"
    here = Path.cwd()
    shown = checkpoint.relative_to(here) if checkpoint.is_relative_to(here) else checkpoint
    program = program_name()
    review = "Is this review positive or negative? I forgot the time, and so did everybody around me."
    print(
        f"""
checkpoint  {shown}
report      {page}

Go on with
  {program} generate {shlex.quote(str(shown))} --prompt {shlex.quote(review)}
  {program} chat {shlex.quote(str(shown))}
  {program} {os.path.relpath(OWN_DATA_FILE)} --model.pretrained_model_name_or_path {shlex.quote(str(model))}
(the last one trains on the rows of a small JSONL file: put your own there)
""",
        flush=True,
    )


def program_name() -> str:
    """Return how this program is called here: ``automodel``, its path where it is not on PATH, or the module."""
    if shutil.which("automodel"):
        return "automodel"
    script = Path(sys.executable).parent / "automodel"
    return os.path.relpath(script) if script.is_file() else f"{sys.executable} -m nemo_automodel.cli.app"
