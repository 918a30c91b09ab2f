"""The one loop: train, validate, save. What it needs is made before, in ``run_setup``.

``train_step`` waits for the device once, to read the loss and the gradient norm together, before the update: a step
that is not finite never reaches the weights (see ``sick_runs`` for what happens then).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from nemo_automodel._transformers.layer_graphs import recorded_bytes
from nemo_automodel.components.checkpoint.restore import newest_checkpoint
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.datasets.worker_faults import explained_faults
from nemo_automodel.components.distributed.grad import clip_grad_norm, sum_over_ranks
from nemo_automodel.components.training.garbage_collection import GarbageCollection
from nemo_automodel.components.training.rng import ScopedRNG
from nemo_automodel.components.training.step_scheduler import Step
from nemo_automodel.recipes.engine import count_label_tokens, count_tokens
from nemo_automodel.recipes.joint import heard_by_all
from nemo_automodel.recipes.memory_watch import watch_training
from nemo_automodel.recipes.next_steps import log_what_next
from nemo_automodel.recipes.run_setup import RunSetUp
from nemo_automodel.recipes.saving import save_together
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import Batch, StepMetrics

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 1


@dataclass(frozen=True)
class ValMetrics:
    """One pass over a validation set."""

    loss: float
    """Sum of the token losses divided by ``num_label_tokens``; NaN when there is none."""
    num_label_tokens: int


class BaseRecipe(RunSetUp):
    """Set up with ``setup()``, then train with ``run_train_validation_loop()``."""

    def __init__(self, cfg: ConfigNode) -> None:
        super().__init__(cfg)
        self._last_batches: Sequence[Batch] = []
        self._step_end_s = time.perf_counter()

    @heard_by_all
    def run_train_validation_loop(self) -> None:
        """Train until the schedule ends; validate and save when it says so."""
        if not self.run_directory.finished:
            self._train()
        self.ranks.leave()

    def _train(self) -> None:
        done: tuple[Step, StepMetrics] | None = None
        garbage = GarbageCollection(self.settings.step_scheduler.gc_every_steps)
        self._step_end_s = time.perf_counter()
        loaders, steps = self._worked_loaders(), iter(self.schedule)
        watch = watch_training(self.settings, self.device, self.run_directory.path)
        with watch, self.loggers, self.checkpointer, garbage, explained_faults(loaders), closing(steps):
            for planned, batches in steps:
                if self.data_check is not None:
                    self.data_check.first_step(batches)
                metrics = self.train_step(batches)
                step = self.schedule.poll(planned)
                self.loggers.train(step.index, step.epoch, metrics)
                self._last_batches = batches
                step = self._validate_and_save(step, metrics)
                garbage.after_step(step.index)
                done = step, metrics
            if done is not None and not done[0].saves:
                # the data has no length, so the last step could not know that it was the last
                self._validate_and_save(replace(done[0], validates=True, saves=True, is_last=True), done[1])
        self._say_what_next(done[0] if done else None)

    def train_step(self, batches: Sequence[Batch]) -> StepMetrics:
        """Update the weights once from the micro-batches of a step.

        A step without a single label changes nothing but the learning rate's count.

        Raises:
            UserError: the loss or the gradient norm is not finite and the run is to stop then; the weights are as they
                were before the step.
        """
        self.fake_quantize_at(self.schedule.step - 1)
        num_label_tokens = self.mesh.sum_dp(count_label_tokens(batches))
        if num_label_tokens == 0:
            logger.warning(
                "Step %d has no label to learn, so its update is skipped. Check the data if this happens often.",
                self.schedule.step - 1,
            )
            loss_value = grad_norm_value = 0.0
        else:
            self.sick_runs.begin(self.schedule.step - 1, self.schedule.epoch, batches)
            loss, grad_norm = self._gradients(batches, num_label_tokens)
            loss_value, grad_norm_value = torch.stack([loss, grad_norm]).tolist()  # the step's one device sync
            self._check_in_backward(grad_norm_value)
            instead = self.sick_runs.judge(loss_value, grad_norm_value, num_label_tokens)
            self.checkpointer.wait_for_staging()  # a save in the background may still read the weights
            if instead is None and self._in_backward is None:
                self._update()
            elif instead == "rollback":
                self._roll_back()
            self._zero_grad()
        self.lr_scheduler.step()
        num_tokens = self.mesh.sum_dp(count_tokens(batches))
        step_s = self._take_step_s()
        return StepMetrics(
            loss=loss_value,
            grad_norm=grad_norm_value,
            lr=self.lr_scheduler.lr,
            num_label_tokens=num_label_tokens,
            num_tokens=num_tokens,
            mem_gib=self._take_peak_gib(),
            tps=num_tokens / step_s,
            mfu=self.utilisation.mfu(batches, step_s),
        )

    def _update(self) -> None:
        if not self.ranks.are_several:
            self.optimizer.step()
            return
        # an optimizer that rounds at random must do so alike everywhere
        with ScopedRNG(self.settings.seed + self.schedule.step):
            self.optimizer.step()
        if self._shares is not None:
            self._shares.spread()

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad()
        for parameter in self._trainable if self._shares is not None else ():
            parameter.grad = None  # those of other processes' shares

    def _gradients(self, batches: Sequence[Batch], num_label_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the norm of the gradients; with `optimizer.in_backward` the weights are updated then."""
        if self._in_backward is None:
            loss = self.engine.forward_backward(batches, num_label_tokens)
            loss = sum_over_ranks(self._trainable, loss, self.ranks, self.settings.distributed.bucket_cap_mb)
            return loss, clip_grad_norm(self._trainable, self.settings.max_grad_norm)
        self.checkpointer.wait_for_staging()
        self._in_backward.begin()
        loss = self.engine.forward_backward(batches, num_label_tokens)
        return loss, self._in_backward.finish()

    def _check_in_backward(self, grad_norm: float) -> None:
        """Stop where weights were updated before a gradient was found not to be finite.

        Raises:
            UserError: that is so.
        """
        if self._in_backward is not None and self._in_backward.has_updated and not math.isfinite(grad_norm):
            raise UserError(
                f"Step {self.schedule.step - 1} has gradients that are not finite below the output head, and "
                "`optimizer.in_backward` had updated the weights above them by then. Start again from the last "
                "checkpoint, without it or with a lower `optimizer.lr`."
            )

    def _roll_back(self) -> None:
        """Take weights and optimizer back to the last checkpoint; the data and the count of steps go on."""
        self.checkpointer.finish()
        self.ranks.wait_for_all()  # the first one's last save is on the disk
        checkpoint = newest_checkpoint(self.run_directory.path) or self.run_directory.resume_from
        if checkpoint is None:
            logger.warning("There is no checkpoint to go back to yet, so only the step is left out.")
            return
        self.checkpointer.load_weights(checkpoint, self.state())
        logger.warning("Weights and optimizer are those of %s again; training goes on with the next rows.", checkpoint)

    def _take_step_s(self) -> float:
        """Return the seconds since the last call: data, validation and saving of the time between are in it."""
        now = time.perf_counter()
        elapsed, self._step_end_s = now - self._step_end_s, now
        return elapsed

    def _take_peak_gib(self) -> float:
        """Return the peak of device memory in use since the last call, 0 on the CPU."""
        if self.device.type != "cuda":
            return 0.0
        peak_gib = (torch.cuda.max_memory_allocated(self.device) + recorded_bytes(self.model)) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak_gib

    def validate(self, name: str) -> ValMetrics | None:
        """Return the loss over the validation set ``name``, with dropout off and random numbers of its own.

        None when a signal to stop arrived meanwhile: a pass may take longer than a cluster waits.
        """
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        num_label_tokens = 0
        self.model.eval()  # type: ignore[no-untyped-call]
        with ScopedRNG(_VALIDATION_SEED, ranked=True):
            for batch in self.val_loaders[name]:
                if self.schedule.is_signalled:
                    break
                batch_loss, num_batch_labels = self.engine.evaluate(batch)
                loss_sum += batch_loss
                num_label_tokens += num_batch_labels
        self.model.train()
        is_signalled, sums, counts = zip(
            *self.ranks.gather((self.schedule.is_signalled, loss_sum.item(), num_label_tokens)), strict=True
        )
        if any(is_signalled):
            return None
        num_label_tokens = sum(counts)
        loss = math.fsum(sums) / num_label_tokens if num_label_tokens else math.nan
        return ValMetrics(loss, num_label_tokens)

    def _validate_and_save(self, step: Step, metrics: StepMetrics) -> Step:
        """Do what follows a step, and return the step as it turned out: the last one when a signal broke in."""
        losses = {"train_loss": metrics.loss}
        for name in self.val_loaders if step.validates else ():
            result = self.validate(name)
            if result is None:
                logger.warning("The validation after step %d is broken off and has no result.", step.index)
                break
            if result.num_label_tokens == 0:
                logger.warning("The validation set `%s` has no label, so it has no loss. Check its data.", name)
                continue
            self.loggers.val(
                name,
                step.index,
                step.epoch,
                result.loss,
                self.lr_scheduler.lr,
                result.num_label_tokens,
                self._take_peak_gib(),
            )
            losses["val_loss" if name == "default" else name] = result.loss
        if step.validates:
            step = self.schedule.poll(step)
        if step.saves and self.settings.checkpoint.enabled:
            self._save(step, losses)
        return step

    def _save(self, step: Step, losses: Mapping[str, float]) -> None:
        """Save, and go on without when that fails, unless it was the last chance of this session."""
        self.loggers.sync()
        save_together(
            self.checkpointer,
            self.ranks,
            step,
            losses,
            self.state(),
            lambda: self.resume_check.witness(self._last_batches, step.is_preempted),
        )

    def _say_what_next(self, step: Step | None) -> None:
        log_what_next(self.run_directory.path, step, self.schedule.step)
