"""One dumped step once more: the model of its configuration, its weights, its batches, its random numbers.

On the CPU, and on the same GPU under ``deterministic: true``, loss and gradient norm come out bit for bit as they were;
other kernels differ in the last digits. Then every row goes through alone, without dropout, for its own loss and its
own gradient, which says which of them is to blame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_automodel.components.checkpoint.optimizer_state import parameter_names
from nemo_automodel.components.config._arg_parser import load_config, parse_command_line
from nemo_automodel.components.distributed.grad import clip_grad_norm
from nemo_automodel.components.training.step_dump import StepDump, StepFacts, read_dump, restore_random
from nemo_automodel.recipes.kernel_record import read_kernels
from nemo_automodel.recipes.registry import DEFAULT_RECIPE, recipe_path, resolve_recipe
from nemo_automodel.recipes.section_rules import recipe_name
from nemo_automodel.recipes.sick_runs import pieces
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX


@dataclass(frozen=True)
class ReplayedRow:
    """One document by itself."""

    where: str
    num_label_tokens: int
    loss: float
    """Mean over its learned tokens, NaN where it has none."""
    grad_norm: float
    """Norm of its part of the step's gradient, divided by the label tokens of the whole step."""


@dataclass(frozen=True)
class Replay:
    """A step redone."""

    facts: StepFacts
    """What the run saw."""
    loss: float
    grad_norm: float
    rows: list[ReplayedRow]
    has_weights: bool
    """False: the dump has none, so these are the weights that the run began with."""

    @property
    def is_same(self) -> bool:
        """Tell whether loss and gradient norm are those of the run, bit for bit."""
        recorded = (self.facts.loss, self.facts.grad_norm)
        return all(
            a == b or (math.isnan(a) and math.isnan(b))
            for a, b in zip((self.loss, self.grad_norm), recorded, strict=True)
        )


def replay(directory: Path, words: Sequence[str] = ()) -> Replay:
    """Redo the step in ``directory``; ``words`` are overrides of its configuration, as on a command line.

    Raises:
        UserError: no dump, a damaged one, or one of another model.
    """
    dump = read_dump(directory)
    config = load_config(parse_command_line(["-c", str(dump.config_path), *words]))
    recipe = resolve_recipe(recipe_path(recipe_name(config) or DEFAULT_RECIPE))(config)
    recipe.kernel_record = read_kernels(directory.resolve().parent.parent)  # the run directory, if it is still there
    recipe.set_up_model()
    recipe.fake_quantize_at(dump.facts.step)
    names = parameter_names(recipe.model)
    parameters = {names[p]: p for p in recipe.model.parameters() if p.requires_grad}
    if dump.weights is not None:
        _load(directory, dump.weights, parameters)
    trained = list(parameters.values())
    restore_random(dump.random)
    loss = recipe.engine.forward_backward(dump.batches, dump.facts.num_label_tokens)
    grad_norm = clip_grad_norm(trained, None)
    loss_value, grad_norm_value = torch.stack([loss, grad_norm]).tolist()
    rows = _rows(recipe, dump, trained)
    return Replay(dump.facts, loss_value, grad_norm_value, rows, dump.weights is not None)


def _load(directory: Path, weights: Mapping[str, torch.Tensor], live: Mapping[str, torch.nn.Parameter]) -> None:
    different = sorted(weights.keys() ^ live.keys())
    different += sorted(name for name in weights.keys() & live.keys() if weights[name].shape != live[name].shape)
    if different:
        raise UserError(
            f"The weights in `{directory}` are not those of the model in its config.yaml: `{different[0]}` differs "
            f"({len(different)} such). Use the configuration and the model of the run."
        )
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(weights[name])


def _rows(recipe: Any, dump: StepDump, trained: list[torch.nn.Parameter]) -> list[ReplayedRow]:
    places = {(row.micro_batch, row.row, row.document): row.where for row in dump.facts.rows}
    recipe.model.train(False)
    found = []
    for piece in pieces(dump.batches):
        for parameter in trained:
            parameter.grad = None
        where = places[piece.micro_batch, piece.row, piece.document]
        num_label_tokens = int((piece.batch["labels"] != IGNORE_INDEX).sum())
        if num_label_tokens == 0:
            found.append(ReplayedRow(where, 0, math.nan, 0.0))
            continue
        share = recipe.engine.forward_backward([piece.batch], dump.facts.num_label_tokens).item()
        loss = share * dump.facts.num_label_tokens / num_label_tokens
        found.append(ReplayedRow(where, num_label_tokens, loss, clip_grad_norm(trained, None).item()))
    return found
