"""A micro-batch that does not fit in memory is cut in two and the step done again, with the same result.

The loss of a step is a sum over its rows, divided by a number that is known before the first forward pass. So a
micro-batch may be cut between any two rows: loss and gradients stay what they are, up to the order of their sums. Where
a row does not fit by itself, more of its activations are computed again in the backward pass.

When memory runs out in a backward pass, the layers it has passed have added to their gradients and the others have not.
So all gradients of the step are dropped, the random numbers of its beginning are put back, and it is done again from
its first micro-batch. That costs a second at the failure and nothing before: in a step that fits, nothing is kept for
it but the state of the random numbers. What did not fit is remembered, by the number of positions, so that later
batches are cut before they fail; a shorter row is computed as before.

With updates inside the backward pass a step cannot be done again once a weight has changed. So a step with more
positions than any before is rehearsed first (see `StepInBackward`), and what does not fit there has changed nothing.
Its micro-batch is computed under leaner policies before it is cut, since its parts keep gradients of all weights.

Exact up to the order of sums: loss, gradients, their norm, the update. Not the numbers of a larger device: dropout and
NEFTune's noise, of which the parts of a micro-batch draw their own, as likely as any others and the same again in a
resumed run; and FP8 where one scale is made for a whole micro-batch.
"""

from __future__ import annotations

import gc
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from nemo_automodel._transformers.forward import LossFn
from nemo_automodel._transformers.layer_graphs import forget_recordings
from nemo_automodel._transformers.recompute import host_bytes_of, policies_from, switch_recompute
from nemo_automodel.components.optim.in_backward import StepInBackward
from nemo_automodel.components.training.step_dump import capture_random, restore_random
from nemo_automodel.recipes.engine import EagerEngine, count_label_tokens
from nemo_automodel.recipes.memory_advice import MemoryAdvice, Misfit
from nemo_automodel.recipes.memory_record import MemoryRecord
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.dtypes import parse_dtype
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.memory import lockable_bytes, read_memory
from nemo_automodel.shared.types import Batch

logger = logging.getLogger(__name__)

_GIB = 2**30


@dataclass(frozen=True)
class Part:
    """Whole rows of a micro-batch, and what is computed again in their backward pass."""

    batch: Batch
    policy: str
    ends_step: bool = False
    """After it the gradients of the step are complete."""

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.batch["input_ids"])

    @property
    def row_len(self) -> int:
        """Positions of a row, padding included."""
        return self.batch["input_ids"].shape[1]


class Limits:
    """The largest micro-batches that are tried, in positions, under each of ``policies``; the fastest comes first.

    ``known`` are limits to begin with; it is kept up to date. With ``cuts_last`` a micro-batch is cut only where it
    fits under no policy.
    """

    def __init__(self, policies: Sequence[str], known: dict[str, int] | None = None, cuts_last: bool = False) -> None:
        self.policies = tuple(policies)
        self.most = {} if known is None else known
        self.cuts_last = cuts_last

    def choose(self, num_rows: int, row_len: int) -> tuple[str, int]:
        """Return the policy for a micro-batch, and into how many parts it is cut."""
        for policy in self.policies:
            most = self.most.get(policy)
            if most is None:
                return policy, 1
            if row_len <= most and (num_rows * row_len <= most or self._may_cut(policy)):
                return policy, -(-num_rows // (most // row_len))
        return self.policies[-1], num_rows  # did not fit, but memory may have become free

    def _may_cut(self, policy: str) -> bool:
        return not self.cuts_last or policy == self.policies[-1]

    def lower(self, num_rows: int, row_len: int, policy: str) -> bool:
        """Note what did not fit; return whether anything is left to try."""
        if not self._may_cut(policy):
            self.most[policy] = num_rows * row_len - 1
            return True
        if num_rows > 1:
            self.most[policy] = -(-num_rows // 2) * row_len
            return True
        self.most[policy] = row_len - 1
        return policy != self.policies[-1]


def split_rows(batch: Batch, num_parts: int) -> list[Batch]:
    """Cut a batch of ``[B, ...]`` tensors into at most ``num_parts`` of whole rows, in order and as even as can be."""
    num_rows = len(batch["input_ids"])
    num_parts = min(num_parts, num_rows)
    borders = [num_rows * i // num_parts for i in range(num_parts + 1)]
    return [
        {key: value[start:end] if len(value) == num_rows else value for key, value in batch.items()}
        for start, end in itertools.pairwise(borders)
    ]


class RescuingEngine(EagerEngine):
    """An engine that does a step again, in smaller parts, when memory runs out.

    Gradients must be gone before `forward_backward`. ``advice`` words what is said; ``record`` holds what is known at
    the start and is written when more is found out; without ``rescues`` the first failure ends the run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *more: Any,
        advice: MemoryAdvice,
        record: MemoryRecord,
        policy: str = "none",
        rescues: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__(model, *more, **keywords)
        self._model, self._advice, self._record, self._rescues = model, advice, record, rescues
        self._policy = policy
        self._limits = Limits(policies_from(model, policy), record.most_positions)
        self._eval_limits = Limits(("none",))
        self._has_advised = False
        self._locked_bytes = 0
        self._in_backward: StepInBackward | None = None
        self._rehearsed: dict[str, int] = {}
        """Positions of the largest step that fits, under each policy that was rehearsed."""

    def step_in_backward(self, steps: StepInBackward) -> None:
        """Have the weights updated within backward passes; a step is one micro-batch then."""
        self._in_backward = steps
        self._limits.cuts_last = True

    def forward_backward(self, batches: Sequence[Batch], num_label_tokens: int) -> torch.Tensor:
        """Leave the gradients of a step's micro-batches in the parameters' ``grad``; see `EagerEngine`.

        Raises:
            UserError: a single row does not fit under any policy.
        """
        random = capture_random()

        def run(part: Part) -> torch.Tensor:
            self._compute_under(part.policy)
            self._check_host(part)
            if self._in_backward is not None:
                self._in_backward.hold(not part.ends_step)
            return super(RescuingEngine, self).forward_backward([part.batch], num_label_tokens)

        def begin_again() -> None:
            self._drop_gradients()
            restore_random(random)

        if self._in_backward is not None and self._rescues:
            self._rehearse(batches, self._in_backward, run, begin_again)
        return self._sum_of_parts(batches, self._limits, run, begin_again)

    def _rehearse(
        self,
        batches: Sequence[Batch],
        steps: StepInBackward,
        run: Callable[[Part], torch.Tensor],
        begin_again: Callable[[], None],
    ) -> None:
        """Find out how a step larger than those before fits, while nothing of it is lasting."""
        num_positions = sum(batch["input_ids"].numel() for batch in batches)
        if num_positions <= self._rehearsed.get(next(self._parts(batches, self._limits)).policy, 0):
            return

        def run_to_the_end(part: Part) -> torch.Tensor:
            loss = run(part)
            if part.ends_step:
                steps.finish()
            return loss

        with steps.rehearsal():
            self._sum_of_parts(batches, self._limits, run_to_the_end, begin_again)
        begin_again()
        if not self._rehearsed:
            logger.info(
                "Memory: `optimizer.in_backward` cannot take its updates back, so steps larger than any before are "
                "rehearsed first."
            )
        self._rehearsed[self._policy] = num_positions

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Return the sum of a batch's token losses and the number of its label tokens; see `EagerEngine`.

        Raises:
            UserError: a single row does not fit.
        """

        def run(part: Part) -> torch.Tensor:
            return super(RescuingEngine, self).evaluate(part.batch)[0]

        return self._sum_of_parts([batch], self._eval_limits, run, lambda: None), count_label_tokens([batch])

    def _sum_of_parts(
        self,
        batches: Sequence[Batch],
        limits: Limits,
        run: Callable[[Part], torch.Tensor],
        begin_again: Callable[[], None],
    ) -> torch.Tensor:
        """Return the sum of what ``run`` makes of all parts, from the first on again until all of them fit."""
        while True:
            total = torch.zeros((), dtype=torch.float32, device=self.device)
            failed: Part | None = None
            for part in self._parts(batches, limits):
                try:
                    total += run(part)
                except torch.OutOfMemoryError as error:
                    failed, words = part, str(error)
                    break
            if failed is None:
                return total
            # the error is gone by now, and with its traceback the frames that held the activations
            self._make_room(failed, words, limits)
            begin_again()

    def _parts(self, batches: Sequence[Batch], limits: Limits) -> Iterator[Part]:
        for number, batch in enumerate(batches, 1):
            policy, num_parts = limits.choose(*batch["input_ids"].shape)
            *first, last = [batch] if num_parts == 1 else split_rows(batch, num_parts)
            yield from (Part(part, policy) for part in first)
            yield Part(last, policy, ends_step=number == len(batches))

    def _compute_under(self, policy: str) -> None:
        if policy != self._policy:
            switch_recompute(self._model, policy)
            self._policy = policy

    def _check_host(self, part: Part) -> None:
        """Refuse what the host cannot hold before it is page-locked, since the machine would not survive that.

        Raises:
            torch.OutOfMemoryError: the inputs of all layers do not fit in the host's memory.
        """
        if part.policy != "full_offload":
            return
        needed = host_bytes_of(self._model, part.num_rows * part.row_len)
        more = needed - self._locked_bytes
        if more > 0 and more > lockable_bytes(read_memory()):
            raise torch.OutOfMemoryError(f"Tried to allocate {more / _GIB:.2f} GiB of the host's memory")
        self._locked_bytes = max(needed, self._locked_bytes)  # it is kept for the next micro-batch

    def _drop_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None
        if self._in_backward is not None:
            self._in_backward.begin()

    def _make_room(self, failed: Part, words: str, limits: Limits) -> None:
        """Free what the failed attempt held, remember the limit, and say so.

        Raises:
            UserError: nothing is left to try.
        """
        misfit = Misfit(failed.num_rows, failed.row_len, failed.policy, _asked_for(words), self._memory_in_use())
        self.forward.forget_sizes()
        forget_recordings(self.forward.model)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if limits is self._limits and self._in_backward is not None and self._in_backward.has_updated:
            raise UserError(self._advice.updated_already(misfit))
        may_go_on = limits.lower(failed.num_rows, failed.row_len, failed.policy) and self._rescues
        if not may_go_on:
            raise UserError(self._advice.last_words(misfit, self._rescues))
        policy, num_parts = limits.choose(failed.num_rows, failed.row_len)
        next_rows = -(-failed.num_rows // num_parts)
        logger.warning("%s", self._advice.on_rescue(misfit, policy, next_rows, is_first=not self._has_advised))
        self._has_advised = True
        if limits is self._limits:
            self._record.write()

    def _memory_in_use(self) -> str:
        if self.device.type != "cuda":
            return ""
        peak, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        return f"{peak / _GIB:.1f} GiB allocated at the peak, {reserved / _GIB:.1f} reserved, of {total / _GIB:.1f}"


def _asked_for(words: str) -> str:
    found = re.search(r"Tried to allocate ([\d.]+ \w+(?: of the host's memory)?)", words)
    return found[1] if found else ""


def build_engine(
    model: PreTrainedModel, settings: RunSettings, loss_fn: LossFn, device: torch.device, record: MemoryRecord | None
) -> RescuingEngine:
    """Return the engine that the settings ask for."""
    name = settings.distributed.autocast_dtype
    return RescuingEngine(
        model,
        loss_fn,
        device,
        None if name is None else parse_dtype(name, "distributed.autocast_dtype"),
        settings.packed_sequence.attention,
        joins_frozen_head=not settings.model.get("force_hf", False),
        advice=MemoryAdvice(settings),
        record=record or MemoryRecord(),
        policy=settings.distributed.recompute_policy(),
        # where the same bits are wanted every time: a run that is resumed may run out of memory at another step
        rescues=settings.memory.rescue and not settings.deterministic,
    )
