"""A resume proves itself: the next batch is the one that was to come, and it has the loss it had.

At every save the micro-batch that comes next is looked at and its loss computed with the weights being saved, without
dropout; both go into the checkpoint. At a resume the batch is drawn again, through the restored loader, and the loss
is computed again from the *recorded* batch, so that data and weights are told apart. Nothing of the run changes: random
numbers are put back, and a batch that was drawn is handed out later, in its turn.

The price is the forward pass of one micro-batch at each save and at the start, and the size of that batch on the disk.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel

from nemo_automodel.components.checkpoint.changes import Change, changes_data, changes_loss
from nemo_automodel.components.checkpoint.witness import (
    Witness,
    digest_of,
    read_witness,
    row_digests_of,
    tensors_of,
)
from nemo_automodel.components.datasets.loader import ResumableDataLoader
from nemo_automodel.components.training.rng import ScopedRNG
from nemo_automodel.recipes.engine import EagerEngine, count_label_tokens
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import Batch

_NUM_DIGITS = 12
"""Digits of a digest that are shown."""
_TOLERANCES = {"float32 on the CPU": 1e-4, "float32": 1e-3}
_TOLERANCE_OF_FEWER_BITS = 1e-2
"""Shares of the loss, or of 1 where it is smaller. Under the same surroundings losses come out bit for bit; these bound
what other kernels, libraries and cards make of it."""

logger = logging.getLogger(__name__)


class ResumeCheck:
    """Writes and compares the witnesses of one run.

    Args:
        policy: ``error``, ``warn`` or ``off``, see ``checkpoint.resume_check``.
        engine: computes losses with ``model``.
        model: the live model.
        loader: the training data.
    """

    def __init__(self, policy: str, engine: EagerEngine, model: PreTrainedModel, loader: Any) -> None:
        self.policy, self._engine, self._model, self._loader = policy, engine, model, loader

    def witness(self, last_batches: Sequence[Batch], is_hurried: bool = False) -> Witness | None:
        """Return what a checkpoint saved now should remember; ``last_batches`` are those just trained on.

        ``is_hurried``: the run has to stop, so no worker is waited for. None where the check is off.
        """
        if self.policy == "off":
            return None
        item, numbers = self._next_item(may_draw=not is_hurried)
        batches = list(last_batches) if item is None else item
        labelled = [batch for batch in batches if count_label_tokens([batch])] or batches
        return Witness(
            batch=tensors_of(labelled[0]),
            is_next=item is not None,
            digest=digest_of(batches),
            row_digests=row_digests_of(batches),
            row_numbers=numbers,
            loss=self._loss(labelled[0]),
            surroundings=self._surroundings(),
        )

    def _next_item(self, may_draw: bool = True) -> tuple[list[Batch] | None, list[int] | None]:
        """Return the micro-batches that come next and the numbers of their rows, as far as they can be told."""
        if not isinstance(self._loader, ResumableDataLoader):
            return None, None
        with ScopedRNG(0):  # whatever drawing takes is put back
            found = self._loader.look_ahead(may_draw)
        if found is None:
            return None, None
        item, numbers = found
        return (item if isinstance(item, list) else [item]), numbers

    def _loss(self, batch: Batch) -> float:
        was_training = self._model.training
        self._model.train(False)
        try:
            with ScopedRNG(0):
                loss_sum, num_label_tokens = self._engine.evaluate(batch)
                return loss_sum.item() / num_label_tokens if num_label_tokens else math.nan
        finally:
            self._model.train(was_training)

    def _surroundings(self) -> dict[str, str]:
        device = self._engine.device
        is_cuda = device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(device) if is_cuda else f"CPU, {torch.get_num_threads()} threads",
            "dtype": self._dtype(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _dtype(self) -> str:
        dtypes = {parameter.dtype for parameter in self._model.parameters()}
        if self._engine.autocast_dtype is not None:
            dtypes.add(self._engine.autocast_dtype)
        return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))

    def _tolerance(self) -> float:
        if self._dtype() != "float32":
            return _TOLERANCE_OF_FEWER_BITS
        return _TOLERANCES["float32 on the CPU" if self._engine.device.type == "cpu" else "float32"]

    # At a resume.

    def compare(self, checkpoint: Path, changes: list[Change], is_spread_anew: bool = False) -> None:
        """Compare the run, which was just restored, with what ``checkpoint`` remembers; ``changes`` the user made.

        ``is_spread_anew``: rows are shared out to another number of processes, so that only the first one stays here.

        Raises:
            UserError: they differ although no changed setting explains it, and the policy is ``error``; or what the
                checkpoint remembers is damaged.
        """
        if self.policy == "off":
            return
        witness = read_witness(checkpoint)
        if witness is None:
            logger.info("%s does not say which batch comes next, so that is not checked.", checkpoint)
            return
        self._check_ids(checkpoint, witness)
        said: list[str] = []
        explained: list[str] = []
        wrong: list[str] = []
        for is_same, text, is_explained in (
            (*self._compare_data(witness, is_spread_anew), changes_data(changes) or is_spread_anew),
            (*self._compare_loss(witness), changes_loss(changes)),
        ):
            (said if is_same else explained if is_explained else wrong).append(text)
        if said:
            logger.info("Checked before going on: %s", " ".join(said))
        if explained:
            logger.warning("Not as before, as the changed settings want it: %s", " ".join(explained))
        if not wrong:
            return
        message = f"The run does not go on as it was saved in `{checkpoint}`. {' '.join(wrong)}"
        if self.policy == "error":
            raise UserError(f"{message} Or go on all the same: --checkpoint.resume_check warn")
        logger.warning("%s", message)

    def _check_ids(self, checkpoint: Path, witness: Witness) -> None:
        """Refuse tokens that the model does not have: looking them up would end in a traceback, or worse."""
        ids = witness.batch["input_ids"]
        num_known = len(cast("torch.Tensor", self._model.get_input_embeddings().weight))
        if ids.numel() == 0 or (int(ids.min()) >= 0 and int(ids.max()) < num_known):
            return
        raise UserError(
            f"The batch that `{checkpoint}` remembers has tokens from {int(ids.min())} to {int(ids.max())}, but the "
            f"model knows {num_known}. Go on without it: --checkpoint.resume_check off"
        )

    def _compare_data(self, witness: Witness, is_spread_anew: bool) -> tuple[bool, str]:
        """Return whether the next batch is the recorded one, and a sentence."""
        if not witness.is_next:
            return (
                True,
                "What comes next could not be told at the save (of a stream, at the end of an epoch or at a signal).",
            )
        item, numbers = self._next_item()
        recorded = witness.digest[:_NUM_DIGITS]
        if item is None:
            return False, f"The data has ended, but batch {recorded} was to come. Restore the data."
        digest, rows = digest_of(item), row_digests_of(item)
        if digest == witness.digest:
            return True, f"the next batch is the recorded one ({recorded}, {len(rows)} rows)."
        if is_spread_anew and rows[0] == witness.row_digests[0]:
            return (
                True,
                "the next row is the recorded one; those after it are shared out to other processes than before.",
            )
        num_both = min(len(rows), len(witness.row_digests))
        if rows[:num_both] == witness.row_digests[:num_both]:
            return True, f"the next {num_both} rows are the recorded ones, in batches of another shape."
        if numbers is not None and numbers != witness.row_numbers:
            was = f"row {witness.row_numbers[0]} was" if witness.row_numbers else "another was"
            return False, (
                f"The order of the rows changed: row {numbers[0]} comes next, {was} to come. Take the data and the "
                "version of this program that wrote the checkpoint."
            )
        if numbers is None:
            return False, (
                f"The data changed or comes in another order: the next batch is {digest[:_NUM_DIGITS]}, {recorded} was "
                "to come. Restore the data."
            )
        first = next(i for i in range(num_both) if rows[i] != witness.row_digests[i])
        place = f", the first that differs is row {numbers[first]}" if first < len(numbers) else ""
        return False, (
            f"The data changed: the next batch has the same rows with other tokens or labels{place}. Restore the data, "
            "the tokenizer and the template."
        )

    def _compare_loss(self, witness: Witness) -> tuple[bool, str]:
        """Return whether the recorded batch has the recorded loss, and a sentence."""
        loss, recorded = self._loss(witness.batch), witness.loss
        if not math.isfinite(recorded):  # a sick row comes next, which the loss guard will judge
            return True, f"The recorded batch had no finite loss at the save, so none is compared (now {loss:.6f})."
        if loss == recorded:
            return True, f"The loss of the recorded batch is {recorded:.6f}, bit for bit as at the save."
        here = self._surroundings()
        others = [
            f"{name} {old} → {here.get(name)}" for name, old in witness.surroundings.items() if here.get(name) != old
        ]
        why = f" ({'; '.join(others)})" if others else ""
        bound = self._tolerance() * max(1.0, abs(recorded))
        if abs(loss - recorded) <= bound:  # never of NaN
            return True, (
                f"The loss of the recorded batch is {loss:.6f}, at the save it was {recorded:.6f}: within {bound:.2g}, "
                f"not bit for bit{why}."
            )
        return False, (
            f"The loss of the recorded batch is {loss:.6f}, at the save it was {recorded:.6f}, more than {bound:.2g} "
            f"away{why}. Files in its manifest.json are as they were saved, so the weights below an adapter, the "
            "model's code or the libraries differ. Restore those."
        )
