"""One step on disk with everything that redoing it takes: batches, trained weights, random numbers, configuration.

    debug/step_57/
      step.json            step, loss, gradient norm, and every row with its place and its own loss
      batches.safetensors  the micro-batches, `<number>.<field>`
      weights.safetensors  the trained weights before the step, by parameter name; not there where there was no room
      random.safetensors   state of torch's generators before the step
      config.yaml          the configuration that ran

Tensors are safetensors and the rest is JSON or YAML, so a dump from elsewhere is only data. It gets its name when all
of it is written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import Batch

STEP_FILE = "step.json"
CONFIG_FILE = "config.yaml"
_BATCHES, _WEIGHTS, _RANDOM = "batches.safetensors", "weights.safetensors", "random.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class RowLoss:
    """One document of a step and its own loss, computed without dropout."""

    where: str
    """File and line where the data can tell, else its place in the step."""
    micro_batch: int
    row: int
    document: int
    """Number of the document in a packed row, 0 elsewhere."""
    loss_sum: float
    num_label_tokens: int

    @property
    def loss(self) -> float:
        """Mean over its learned tokens, NaN where it has none."""
        return self.loss_sum / self.num_label_tokens if self.num_label_tokens else math.nan


@dataclass(frozen=True)
class StepFacts:
    """What is known of a dumped step beside its tensors."""

    step: int
    epoch: int
    finding: str
    loss: float
    grad_norm: float
    num_label_tokens: int
    rows: list[RowLoss] = field(default_factory=list)


@dataclass(frozen=True)
class StepDump:
    """A dump read back."""

    facts: StepFacts
    batches: list[Batch]
    weights: dict[str, torch.Tensor] | None
    random: dict[str, torch.Tensor]
    config_path: Path


def capture_random() -> dict[str, torch.Tensor]:
    """Return the state of torch's generators, on the CPU and on the device in use; takes microseconds."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: Mapping[str, torch.Tensor]) -> None:
    """Go back to what ``capture_random`` returned, as far as this machine has the device."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_dump(
    directory: Path,
    facts: StepFacts,
    batches: Sequence[Batch],
    weights: Mapping[str, torch.Tensor] | None,
    random: Mapping[str, torch.Tensor],
    config_yaml: Mapping[str, Any],
) -> None:
    """Write a dump; one that is there, of the same step before a resume, is replaced.

    Raises:
        OSError: no space, no permission; nothing of the dump is left then.
        SafetensorError: likewise, as safetensors says it.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        # copies: safetensors refuses tensors that share their memory, as slices of one batch may
        named = {
            f"{number}.{key}": value.clone()
            for number, batch in enumerate(batches)
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)  # the engine reads nothing else; a packed batch names its format
        }
        _save(named, partial / _BATCHES)
        _save(random, partial / _RANDOM)
        if weights is not None:
            _save(weights, partial / _WEIGHTS)
        (partial / CONFIG_FILE).write_text(yaml.safe_dump(dict(config_yaml), sort_keys=False, allow_unicode=True))
        content = {"format": _FORMAT, **asdict(facts)}
        (partial / STEP_FILE).write_text(json.dumps(_words_for_nan(content), indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_dump(directory: Path) -> StepDump:
    """Read what ``write_dump`` wrote.

    Raises:
        UserError: no dump, or a damaged one.
    """
    if not (directory / STEP_FILE).is_file():
        raise UserError(
            f"`{directory}` is no dump of a step ({STEP_FILE}). Name one such as checkpoints/debug/step_57."
        )
    try:
        content = json.loads((directory / STEP_FILE).read_text())
        if content.pop("format") != _FORMAT:
            raise UserError(f"`{directory}` was written by another version. Use that one to replay it.")
        rows = [RowLoss(**{**row, "loss_sum": float(row["loss_sum"])}) for row in content.pop("rows")]
        content |= {key: float(content[key]) for key in ("loss", "grad_norm")}
        facts = StepFacts(**content, rows=rows)
        named = load_file(directory / _BATCHES)
        batches: list[Batch] = [{} for _ in range(1 + max(int(name.partition(".")[0]) for name in named))]
        for name, value in named.items():
            number, _, key = name.partition(".")
            batches[int(number)][key] = value
        has_weights = (directory / _WEIGHTS).is_file()
        weights = load_file(directory / _WEIGHTS) if has_weights else None
        return StepDump(facts, batches, weights, load_file(directory / _RANDOM), directory / CONFIG_FILE)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"`{directory}` is damaged ({type(error).__name__}: {error}). Copy it again from where it was written."
        ) from error


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _words_for_nan(value: Any) -> Any:
    """Return JSON without numbers that it has no word for: ``"nan"``, ``"inf"``; ``float`` reads them back."""
    if isinstance(value, dict):
        return {key: _words_for_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_words_for_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
