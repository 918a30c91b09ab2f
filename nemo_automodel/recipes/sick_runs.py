"""What a run does about a step that went wrong: name its rows, keep the step on disk, and go on or not.

Which rows are to blame is asked only when a step is sick: every document of its batches goes through the model once
more, alone and without dropout, which costs one forward pass of the step. Their places in the data are found by
content, so a collate function may sort or drop rows; where the data cannot tell, rows are named by their place in the
step.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from nemo_automodel.components.checkpoint.optimizer_state import parameter_names
from nemo_automodel.components.datasets.document_view import DocumentView, documents_of, rows_of
from nemo_automodel.components.datasets.loader import ResumableDataLoader
from nemo_automodel.components.distributed.ranks import ALONE, Ranks
from nemo_automodel.components.training.config import LossGuardConfig
from nemo_automodel.components.training.loss_guard import Finding, LossGuard
from nemo_automodel.components.training.rng import ScopedRNG
from nemo_automodel.components.training.step_dump import RowLoss, StepFacts, capture_random, write_dump
from nemo_automodel.recipes.engine import EagerEngine
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import SEQ_LENS_PADDING, Batch

DEBUG_DIR = "debug"

_NUM_NAMED = 3
_MAX_SPIKES_NAMED = 20
_GIB = 2**30

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """One document of a step as a batch of its own."""

    micro_batch: int
    row: int
    document: int
    batch: Batch


def pieces(batches: Sequence[Batch]) -> Iterator[Piece]:
    """Yield every document of a step's micro-batches as a batch of one row; padding at the end of packed rows goes."""
    for number, batch in enumerate(batches):
        num_rows = len(batch["input_ids"])
        for row in range(num_rows):
            tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
            one = {key: value[row : row + 1] for key, value in tensors.items() if len(value) == num_rows}
            if "seq_lens" not in one:
                yield Piece(number, row, 0, one)
                continue
            width, start = one["input_ids"].shape[1], 0
            lengths = [length for length in one.pop("seq_lens")[0].tolist() if length != SEQ_LENS_PADDING]
            for document, length in enumerate(lengths):
                cut = {
                    key: value[:, start : start + length]
                    for key, value in one.items()
                    if value.dim() > 1 and value.shape[1] == width
                }
                yield Piece(number, row, document, {**cut, "seq_lens": torch.tensor([[length]])})
                start += length


def row_losses(
    engine: EagerEngine, model: PreTrainedModel, batches: Sequence[Batch], places: list[str]
) -> list[RowLoss]:
    """Return the loss of every document of a step, in order; ``places`` names them. Nothing of the run changes."""
    found = []
    was_training = model.training
    model.train(False)
    try:
        for piece, where in zip(pieces(batches), places, strict=True):
            loss_sum, num_label_tokens = engine.evaluate(piece.batch)
            found.append(
                RowLoss(where, piece.micro_batch, piece.row, piece.document, loss_sum.item(), num_label_tokens)
            )
    finally:
        model.train(was_training)
    return found


def default_places(batches: Sequence[Batch]) -> list[str]:
    """Name every document of a step by its place in it, counted from 1."""
    return [
        f"micro-batch {piece.micro_batch + 1}, row {piece.row + 1}"
        + (f", document {piece.document + 1}" if "seq_lens" in piece.batch else "")
        for piece in pieces(batches)
    ]


class SickRuns:
    """Watches the steps of one run.

    Call ``begin`` before a step's forward pass and ``judge`` once its numbers are known, before the update.

    Args:
        config: the ``loss_guard:`` section.
        engine: computes losses with ``model``.
        model: the live model.
        loader: the training data.
        items_are_steps: an item of the loader is all of a step, not one micro-batch.
        run_dir: dumps go to ``debug/`` below it.
        config_yaml: the effective configuration.
        num_bytes_reserved: room that a dump must leave on the disk, for the next checkpoint.
        ranks: the processes of the run. They see the same loss and decide alike; each names its own rows, and the one
            with the sickest row writes the dump, of its share of the step.
    """

    def __init__(
        self,
        config: LossGuardConfig,
        engine: EagerEngine,
        model: PreTrainedModel,
        loader: Any,
        *,
        items_are_steps: bool,
        run_dir: Path,
        config_yaml: dict[str, Any],
        num_bytes_reserved: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.guard = config, LossGuard(config)
        self._engine, self._model, self._loader = engine, model, loader
        self._items_are_steps, self._run_dir, self._config_yaml = items_are_steps, run_dir, config_yaml
        self._num_bytes_reserved, self._ranks = num_bytes_reserved, ranks
        self._step = self._epoch = self._num_items = self._num_items_before = 0
        self._batches: Sequence[Batch] = []
        self._random: dict[str, torch.Tensor] = {}
        self._num_dumps = self._num_spikes_named = 0
        self._own_rows: list[RowLoss] = []

    def begin(self, step: int, epoch: int, batches: Sequence[Batch]) -> None:
        """Note a step that is about to be computed, and the random numbers it will draw."""
        self._num_items_before = self._num_items if epoch == self._epoch else 0
        self._num_items = self._num_items_before + (1 if self._items_are_steps else len(batches))
        self._step, self._epoch, self._batches = step, epoch, batches
        self._random = capture_random()

    def judge(self, loss: float, grad_norm: float, num_label_tokens: int) -> str | None:
        """Return None for a step whose update may be applied, else what to do instead: ``skip`` or ``rollback``.

        Raises:
            UserError: the run stops here.
        """
        median = self.guard.median
        finding = self.guard.judge(loss, grad_norm)
        if finding is Finding.HEALTHY:
            return None
        if finding is Finding.SPIKE:
            self._tell_of_spike(loss, grad_norm, num_label_tokens, median)
            return None
        facts = StepFacts(self._step, self._epoch, finding.value, loss, grad_norm, num_label_tokens)
        rows, owner = self._rows(lambda row: (math.isfinite(row.loss_sum), -row.loss_sum))  # the sick ones first
        said = (
            f"Step {self._step} is not finite (loss {loss}, grad_norm {grad_norm}); its update was not applied. "
            f"{_sick_rows(rows)} {self._dump(facts, owner)}"
        )
        if self.config.on_nonfinite == "stop":
            raise UserError(
                f"{said} The run stops; the last checkpoint is untouched. Lower `optimizer.lr`, lengthen the warm-up, "
                "set `model.torch_dtype: float32`, mend the rows, or go on without such steps: "
                "--loss_guard.on_nonfinite skip"
            )
        if self.guard.is_over_limit:
            raise UserError(
                f"{said} The run stops: that was the {self.guard.num_nonfinite}th such step, and "
                f"`loss_guard.max_nonfinite` is {self.config.max_nonfinite}. Lower `optimizer.lr`, or raise the limit."
            )
        logger.warning("%s", said)
        return self.config.on_nonfinite

    def _tell_of_spike(self, loss: float, grad_norm: float, num_label_tokens: int, median: float) -> None:
        self._num_spikes_named += 1
        if self._num_spikes_named > _MAX_SPIKES_NAMED:
            logger.warning(
                "Step %d: the loss %.4f is a spike (the last ones lie around %.4f).", self._step, loss, median
            )
            return
        # what a row adds beyond a row of its length at the usual loss
        rows, owner = self._rows(lambda row: median * row.num_label_tokens - row.loss_sum)
        total = sum(row.loss_sum for row in rows) or 1.0
        named = "; ".join(
            f"{row.loss_sum / total:.0%} {row.where} (loss {row.loss:.4f} over {row.num_label_tokens} tokens)"
            for row in rows[:_NUM_NAMED]
        )
        dumped = ""
        if self.config.dump_spikes:
            facts = StepFacts(self._step, self._epoch, "spike", loss, grad_norm, num_label_tokens)
            dumped = f" {self._dump(facts, owner)}"
        logger.warning(
            "Step %d: the loss %.4f is a spike (the last ones lie around %.4f). Largest shares: %s.%s",
            *(self._step, loss, median, named, dumped),
        )

    def _rows(self, key: Callable[[RowLoss], Any]) -> tuple[list[RowLoss], int]:
        """Return the documents of the step in all processes, sorted, and the process that has the first one."""
        self._own_rows = sorted(row_losses(self._engine, self._model, self._batches, self._places()), key=key)
        by_rank = self._ranks.gather(self._own_rows)
        found = [(row, rank) for rank, rows in enumerate(by_rank) for row in rows]
        found.sort(key=lambda item: key(item[0]))
        return [row for row, _ in found], found[0][1] if found else 0

    def _places(self) -> list[str]:
        """Name every document of the step, by file and line where the data can tell."""
        fallback = default_places(self._batches)
        known: dict[tuple[int, ...], list[DocumentView]] = {}
        for document in self._documents():
            known.setdefault(tuple(document.input_ids), []).append(document)
        places = []
        for piece, place in zip(pieces(self._batches), fallback, strict=True):
            same = known.get(tuple(documents_of(piece.batch, place)[0].input_ids), [])
            if not same:
                places.append(place)
                continue
            found = same.pop(0) if len(same) > 1 else same[0]
            places.append(found.where if found.row_id is None else f"{found.where} (id {found.row_id})")
        return places

    def _documents(self) -> list[DocumentView]:
        """Return the documents of the step's rows as the data set has them; none where rows have no numbers."""
        if not isinstance(self._loader, ResumableDataLoader):
            return []
        with ScopedRNG(0):  # whatever the data draws is put back
            items = self._loader.peek(self._num_items)
            indices = [index for item in (items or [])[self._num_items_before :] for index in item]
            try:
                return [document for row in rows_of(self._loader.dataset, indices) for document in row]
            except UserError as error:
                logger.warning("The rows of step %d cannot be read again to name them: %s", self._step, error)
                return []

    def _dump(self, facts: StepFacts, owner: int) -> str:
        """Let process ``owner`` write the step to the disk, and return what to say of it."""
        is_mine = self._ranks.rank == owner
        return str(self._ranks.gather(self._write(replace(facts, rows=self._own_rows)) if is_mine else "")[owner])

    def _write(self, facts: StepFacts) -> str:
        directory = self._run_dir / DEBUG_DIR / f"step_{facts.step}"
        if self._num_dumps >= self.config.max_dumps:
            return f"It is not dumped: `loss_guard.max_dumps` is {self.config.max_dumps}."
        names = parameter_names(self._model)
        weights: dict[str, torch.Tensor] | None = {n: p for p, n in names.items() if p.requires_grad}
        num_bytes = sum(p.numel() * p.element_size() for p in (weights or {}).values())
        note = ""
        if shutil.disk_usage(self._run_dir).free < num_bytes + self._num_bytes_reserved:
            weights, note = None, f", without its weights ({num_bytes / _GIB:.2f} GiB), for which the disk has no room"
        try:
            write_dump(directory, facts, self._batches, weights, self._random, self._config_yaml)
        except (OSError, SafetensorError) as error:
            return f"It could not be dumped: {error}."
        self._num_dumps += 1
        return f"The step is in `{directory}`{note}; redo it with: automodel replay {directory}"


def _sick_rows(rows: list[RowLoss]) -> str:
    sick = [row for row in rows if not math.isfinite(row.loss_sum)]
    if rows and len(sick) == len(rows):
        return "The loss of every row is not finite: the weights are at fault, or the dtype."
    if not sick:
        worst = f" the highest is {rows[0].loss:.4f}, {rows[0].where}." if rows else ""
        return f"Every row has a finite loss by itself;{worst}"
    more = f" and {len(sick) - _NUM_NAMED} more" if len(sick) > _NUM_NAMED else ""
    return f"Rows whose loss is not finite: {'; '.join(row.where for row in sick[:_NUM_NAMED])}{more}."
