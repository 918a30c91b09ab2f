"""Turn a run directory into one self-contained HTML page.

The page is made from the run's own record: ``training.jsonl``, ``validation*.jsonl`` and the configuration of its
newest checkpoint. Samples come from ``samples.jsonl`` where the run has left one; otherwise the newest checkpoint
answers a few rows of the validation set. Whatever keeps it from answering is written on the page instead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_automodel.components.checkpoint.layout import (
    CONFIG_FILE,
    MODEL_DIR,
    RUN_CONFIG_FILE,
    complete_checkpoints,
    step_of,
)
from nemo_automodel.components.checkpoint.pointers import LATEST, POINTERS, read_pointer
from nemo_automodel.components.loggers.console import progress
from nemo_automodel.components.loggers.metric_logger import TRAINING_FILE, read_records
from nemo_automodel.components.loggers.report_page import render_page
from nemo_automodel.components.loggers.run_record import RunRecord, Sample, read_run
from nemo_automodel.shared.errors import UserError

DEFAULT_CHECKPOINT_DIR = Path("checkpoints")
SAMPLES_FILE = "samples.jsonl"
MAX_NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``automodel report``."""
    parser.add_argument("run", help="a run directory, one of its checkpoints, or LATEST")
    parser.add_argument("--out", metavar="FILE", help="where to write the page (<run directory>/report.html)")
    parser.add_argument(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="held-out rows to answer where the run has left no samples; 0 for none (%(default)s)",
    )
    parser.add_argument("--device", help="where the samples are made: cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    if args.samples < 0:
        raise UserError(f"`--samples {args.samples}` must be 0 or more.")
    record = read_run_of(args.run)
    fill_samples(record, args.samples, args.device)
    out = Path(args.out) if args.out else record.directory / "report.html"
    page = render_page(record)
    try:
        # A text may hold half a character, which UTF-8 cannot write: it becomes a visible replacement.
        out.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise UserError(f"`{out}` cannot be written: {error.strerror}. Name another file with --out.") from error
    print(out)
    return 0


def read_run_of(name: str) -> RunRecord:
    """Read the run that ``name`` stands for: its directory, one of its checkpoints or a pointer to one.

    Raises:
        UserError: there is no run at that place, or its record is broken.
    """
    directory, checkpoint = find_run(Path(name))
    record = read_run(directory)
    if checkpoint is None:
        checkpoint = next(reversed(complete_checkpoints(directory)), None)
    record.checkpoint = checkpoint
    config_file = checkpoint / CONFIG_FILE if checkpoint is not None else directory / RUN_CONFIG_FILE
    if config_file.is_file():
        record.config_text = config_file.read_text(encoding="utf-8")
        with contextlib.suppress(yaml.YAMLError):  # the text is shown whatever it is
            config = yaml.safe_load(record.config_text)
            record.config = config if isinstance(config, Mapping) else {}
    if checkpoint is not None:
        record.versions = _versions(checkpoint / MODEL_DIR)
    return record


def find_run(path: Path) -> tuple[Path, Path | None]:
    """Return the run's directory and, where ``path`` names one, the checkpoint."""
    if path.name in POINTERS:
        for parent in (path.parent, DEFAULT_CHECKPOINT_DIR) if path == Path(path.name) else (path.parent,):
            target = read_pointer(parent, path.name)
            if target is not None:
                return target.parent, target
    if step_of(path) is not None and path.is_dir():
        return path.resolve().parent, path
    latest = read_pointer(path, LATEST)
    if (path / TRAINING_FILE).is_file():
        if latest is not None and latest.parent.resolve() != path.resolve():
            print(
                f"This page is about the run in {path} itself; the newest one is in {latest.parent}.", file=sys.stderr
            )
        return path, None
    if latest is not None:
        return latest.parent, None
    raise UserError(
        f"`{path}` holds no run: there is no {TRAINING_FILE} and it is no checkpoint. Name the directory a training "
        "wrote to (`checkpoint.checkpoint_dir`, by default `checkpoints`)."
    )


def _versions(model_dir: Path) -> dict[str, str]:
    """Return the library versions that the model's own files name."""
    found = {}
    for file, key, name in (
        ("config.json", "transformers_version", "transformers"),
        ("adapter_config.json", "peft_version", "peft"),
    ):
        if (model_dir / file).is_file():
            version = json.loads((model_dir / file).read_text(encoding="utf-8")).get(key)
            if version:
                found[name] = str(version)
    return found


def fill_samples(record: RunRecord, num_samples: int, device: str | None) -> None:
    """Read or make the samples of ``record``; where that fails, note why in one line."""
    try:
        if (record.directory / SAMPLES_FILE).is_file():
            record.samples = read_samples(record.directory / SAMPLES_FILE)
            record.samples_note = "Left by the run: answers before and after the training."
        elif num_samples > 0:
            record.samples, record.samples_note = make_samples(record, num_samples, device)
        else:
            record.samples_note = "No samples were asked for (--samples 0)."
    except Exception as error:  # models and data sets can fail in any way, and the page must come out all the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        record.samples_note = f"No samples: {reason}"
        print(record.samples_note, file=sys.stderr)


def read_samples(path: Path) -> list[Sample]:
    """Read ``{"prompt", "expected", "before", "after"}`` objects; all but the prompt may be absent.

    Raises:
        UserError: a line is no JSON object.
    """
    return [
        Sample(
            prompt=str(entry.get("prompt", "")),
            **{key: None if entry.get(key) is None else str(entry[key]) for key in ("expected", "before", "after")},
        )
        for entry in read_records(path)
    ]


def make_samples(record: RunRecord, num_samples: int, device: str | None) -> tuple[list[Sample], str]:
    """Let the checkpoint answer evenly spaced rows of the validation set, greedily.

    Returns:
        the samples and a line that says where they come from.

    Raises:
        UserError: there is no checkpoint or no validation set.
    """
    if record.checkpoint is None:
        raise UserError("this run has no complete checkpoint yet.")
    from nemo_automodel.components.config.loader import load_yaml_config

    config = load_yaml_config(record.checkpoint / CONFIG_FILE)
    section = next((key for key in config if key.startswith("validation_dataset") and config[key]), None)
    if section is None:
        raise UserError("the configuration names no validation_dataset.")
    from nemo_automodel._transformers.inference import load_for_inference

    model: Any
    tokenizer: Any
    with progress(f"Loading {record.checkpoint}"):
        model, tokenizer = load_for_inference(str(record.checkpoint), device=device)
        dataset = config[section].instantiate(tokenizer=tokenizer)
    samples, numbers = [], []
    with progress("Answering held-out rows", total=num_samples) as advance:
        for number, row in spread(dataset, num_samples):
            prompt_ids, expected_ids = split_row(row)
            if expected_ids:
                answer_ids = generate_ids(model, tokenizer, prompt_ids, max(MAX_NEW_TOKENS, len(expected_ids)))
                samples.append(
                    Sample(
                        prompt=tokenizer.decode(prompt_ids),
                        expected=tokenizer.decode(expected_ids, skip_special_tokens=True).strip(),
                        before=None,
                        after=tokenizer.decode(answer_ids, skip_special_tokens=True).strip(),
                    )
                )
                numbers.append(str(number))
            advance(1)
    if not samples:
        raise UserError(f"no row of `{section}` has an answer to compare with.")
    return samples, f"{record.checkpoint.name}, greedy, on rows {', '.join(numbers)} of `{section}`."


def spread(dataset: Any, num_rows: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield ``(number, row)`` of evenly spaced rows; of a data set without a length, the first ones."""
    try:
        length = len(dataset)
    except TypeError:
        yield from enumerate(itertools.islice(dataset, num_rows))
        return
    for i in range(min(num_rows, length)):
        number = i * length // min(num_rows, length)
        yield number, dataset[number]


def split_row(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Split a training row at its first answer.

    Labels are shifted: ``labels[s]`` is the token after ``input_ids[s]``, and -100 where nothing is learned. So the
    prompt ends with the position of the first label.

    Returns:
        the prompt's tokens and the answer's; the answer is empty where the row has no label.
    """
    from nemo_automodel.shared.types import IGNORE_INDEX

    labels: Sequence[int] = list(row["labels"])
    start = next((s for s, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    answer = list(itertools.takewhile(lambda label: label != IGNORE_INDEX, labels[start:]))
    return list(row["input_ids"])[: start + 1], answer


def generate_ids(model: Any, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """Return the tokens that ``model`` adds to the prompt, greedily, up to the end of the text."""
    import torch

    input_ids = torch.tensor([prompt_ids], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,  # the model's own sampling settings would only cause warnings
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    answer_ids: list[int] = output[0, len(prompt_ids) :].tolist()
    return list(itertools.takewhile(lambda token: token != tokenizer.eos_token_id, answer_ids))
