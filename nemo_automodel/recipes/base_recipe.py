"""The one loop, and the set-up around it in named steps.

A recipe fills in ``build_data``, ``build_model`` and ``model_name``; everything a run needs besides is here: settings,
device, random numbers, run directory, optimizer, schedule, checkpoints and loggers. What is cheap to check is checked
before the model is loaded: the settings, the run directory, the names of the optimizer and the loss, the data, the
trackers.

``train_step`` waits for the device once, to read the loss and the gradient norm together, before the update: a step
that is not finite never reaches the weights (see ``sick_runs`` for what happens then).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nemo_automodel._transformers.fast_layers import kernel_table
from nemo_automodel._transformers.forward import LossFn
from nemo_automodel._transformers.fp8_base import write_report
from nemo_automodel._transformers.frozen_head import tied_weights
from nemo_automodel._transformers.layer_graphs import recorded_bytes
from nemo_automodel._transformers.model_files import ModelFiles
from nemo_automodel._transformers.model_source import hide_bars_without_terminal
from nemo_automodel._transformers.neftune import add_embedding_noise
from nemo_automodel.components.checkpoint.changes import changes_since, consequences, world_size_line
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer, SaveError, estimate_num_bytes
from nemo_automodel.components.checkpoint.disk import check_writable, warn_if_crowded
from nemo_automodel.components.checkpoint.layout import num_ranks
from nemo_automodel.components.checkpoint.optimizer_state import OPTIM_KEY, optimizer_entries
from nemo_automodel.components.checkpoint.parts import Parts, files_of_rank
from nemo_automodel.components.checkpoint.restore import newest_checkpoint
from nemo_automodel.components.checkpoint.run_directory import RunDirectory, choose_run_directory
from nemo_automodel.components.checkpoint.witness import Witness
from nemo_automodel.components.config import targets
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.datasets.loader import ResumableDataLoader
from nemo_automodel.components.datasets.token_budget import MicroBatches
from nemo_automodel.components.datasets.worker_faults import explained_faults
from nemo_automodel.components.distributed.grad import clip_grad_norm, copy_from_first, sum_over_ranks
from nemo_automodel.components.distributed.init_utils import initialize_distributed
from nemo_automodel.components.distributed.mesh import build_mesh
from nemo_automodel.components.distributed.ranks import ALONE, Ranks
from nemo_automodel.components.loggers.log_utils import setup_logging
from nemo_automodel.components.loggers.run_loggers import RunLoggers
from nemo_automodel.components.optim.in_backward import StepInBackward
from nemo_automodel.components.optim.optimizer import (
    ParamGroupOverride,
    build_optimizer,
    parse_overrides,
    prepare_kwargs,
)
from nemo_automodel.components.optim.scheduler import OptimizerParamScheduler, SchedulePlan, plan_schedule
from nemo_automodel.components.quantization.qat import DelayedStart
from nemo_automodel.components.training.determinism import switch_determinism
from nemo_automodel.components.training.garbage_collection import GarbageCollection
from nemo_automodel.components.training.rng import ScopedRNG, StatefulRNG
from nemo_automodel.components.training.step_scheduler import Step, StepScheduler, TrainLoader
from nemo_automodel.kernels.weight_grad import sum_afterwards
from nemo_automodel.recipes.banner import log_experiment, log_model
from nemo_automodel.recipes.data_check import DataCheck
from nemo_automodel.recipes.engine import count_label_tokens, count_tokens
from nemo_automodel.recipes.joint import JointState, heard_by_all, shares_of
from nemo_automodel.recipes.kernel_record import read_kernels, write_kernels
from nemo_automodel.recipes.memory_choice import choose_policy
from nemo_automodel.recipes.memory_record import MemoryRecord
from nemo_automodel.recipes.memory_rescue import build_engine
from nemo_automodel.recipes.memory_watch import watch_set_up, watch_training
from nemo_automodel.recipes.next_steps import log_what_next
from nemo_automodel.recipes.packing_proof import prove_packing
from nemo_automodel.recipes.resume_check import ResumeCheck
from nemo_automodel.recipes.settings import effective_yaml, load_settings
from nemo_automodel.recipes.several import check_several, refuse_stream
from nemo_automodel.recipes.sick_runs import SickRuns
from nemo_automodel.recipes.utilisation import Utilisation
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.processes import num_processes
from nemo_automodel.shared.types import Batch, Stateful, StepMetrics

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 1


class ResumableLoader(TrainLoader, Stateful, Protocol):
    """A training loader whose position a checkpoint holds."""


@dataclass(frozen=True)
class ValMetrics:
    """One pass over a validation set."""

    loss: float
    """Sum of the token losses divided by ``num_label_tokens``; NaN when there is none."""
    num_label_tokens: int


class BaseRecipe:
    """Set up with ``setup()``, then train with ``run_train_validation_loop()``."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    train_loader: ResumableLoader
    val_loaders: Mapping[str, Iterable[Batch]]
    data_check: DataCheck | None = None
    """The label gate; None where it is off."""
    kernel_record: dict[str, Any] | None = None
    """How the run began to compute its fast layers; None for a fresh run."""
    memory_record: MemoryRecord | None = None
    """What the run knows of memory; None where only one step is done again."""
    ranks: Ranks = ALONE
    """The processes of the run."""

    def __init__(self, cfg: ConfigNode) -> None:
        self.cfg = cfg

    # What a recipe fills in.

    def model_name(self) -> str:
        """Return the name of the model for logs and trackers."""
        raise NotImplementedError

    def build_data(self) -> None:
        """Set ``tokenizer``, ``train_loader`` and ``val_loaders``, and ``data_check`` unless it is off."""
        raise NotImplementedError

    def build_model(self) -> None:
        """Set ``model``, on ``device``."""
        raise NotImplementedError

    # Set-up.

    @heard_by_all
    def setup(self) -> None:
        """Prepare everything up to the first step; nothing is loaded for a run that is already finished.

        Raises:
            UserError: anything the user has to mend, before the first step.
        """
        setup_logging()
        self.settings = load_settings(self.cfg)
        for notice in self.settings.notices:
            logger.warning(notice)
        self.effective = effective_yaml(self.settings)
        self._set_up_process()
        self._read_callables()
        self._choose_run_directory()
        if self.run_directory.finished:
            return
        # not ranked, here and below: all processes read the same rows and begin with the same weights
        with ScopedRNG(self.settings.seed), self.ranks.first_alone():
            self.build_data()
        self._refuse_streams()
        self.schedule = StepScheduler(
            self.settings.step_scheduler, self.train_loader, self.mesh.dp_size, self.ranks.largest
        )
        if self.data_check is not None:
            self.data_check.before_model(self.schedule.grad_accum)
        self._open_loggers()
        is_resumed = self.run_directory.resume_from is not None
        if is_resumed:
            self.kernel_record = read_kernels(self.run_directory.path)
        with self.ranks.first_alone():
            self.memory_record = MemoryRecord.open(self.run_directory.path, self.device, is_resumed)
        if not self.ranks.is_first:
            self.memory_record.path = None
        with watch_set_up(self.settings, self.device), ExitStack() as on_failure:
            on_failure.callback(self.loggers.close, succeeded=False)
            statistics = None if self.data_check is None else self.data_check.statistics
            if not self.ranks.is_first:  # what the first one measured and chose counts for all
                self.memory_record.policy, self.kernel_record = self.ranks.share()
            self.settings = choose_policy(self.settings, self.device, self.memory_record, statistics)
            with ScopedRNG(self.settings.seed):
                self.build_model()
            if self.ranks.is_first:
                self.ranks.share((self.memory_record.policy, kernel_table(self.model)))
                write_kernels(self.run_directory.path, kernel_table(self.model), self.kernel_record)
                write_report(self.model, self.run_directory.path)
            self.model.train()
            self.model_files = ModelFiles(self.model, self.tokenizer)
            self._build_engine()
            prove_packing(self.engine, self.settings)
            self.utilisation = Utilisation(self.model, self.settings, self.device)
            self._build_optimizer()
            self._restore()
            self.ranks.wait_for_all()
            on_failure.pop_all()
        log_model(self.model)
        logger.info("Optimizer: %s", self.optimizer)
        logger.info("LR scheduler: %s", self.lr_scheduler.plan)
        logger.info(
            "Step scheduler: %s, %s a step, starting at step %d of epoch %d",
            self.schedule.describe(),
            self._micro_batches_of_a_step(),
            self.schedule.step,
            self.schedule.epoch,
        )

    def _refuse_streams(self) -> None:
        for section, loader in (("dataset", self.train_loader), *self.val_loaders.items()):
            inner = loader.loader if isinstance(loader, MicroBatches) else loader
            if self.ranks.are_several and not (isinstance(inner, ResumableDataLoader) and inner.has_numbers):
                raise refuse_stream(section, self.ranks.size)

    def _micro_batches_of_a_step(self) -> str:
        max_tokens = self.settings.step_scheduler.local_batch_tokens
        if max_tokens is None:
            return f"{self.schedule.grad_accum} micro-batches"
        return f"micro-batches of at most {max_tokens:,} tokens"

    def set_up_model(self) -> None:
        """Prepare the model and its loss alone, without data, run directory or optimizer, to redo a dumped step.

        Raises:
            UserError: as ``setup``.
        """
        self.settings = load_settings(self.cfg)
        self._find_devices()
        self._read_callables()
        with ScopedRNG(self.settings.seed, ranked=True):
            self.build_model()
        self.model.train()
        self._build_engine()

    def _set_up_process(self) -> None:
        self._find_devices()
        log_experiment(type(self).__name__, self.model_name(), self.dist, self.effective)

    def _find_devices(self) -> None:
        hide_bars_without_terminal()
        switch_determinism(self.settings.deterministic)  # before CUDA starts
        for notice in check_several(self.settings, num_processes()):
            logger.warning(notice)
        self.dist = initialize_distributed(self.settings.dist_env)
        self.device, self.ranks = self.dist.device, self.dist.ranks
        self.mesh = build_mesh(self.settings.distributed, self.ranks)
        if self.ranks.are_several:
            sum_afterwards()
        self.rng = StatefulRNG(self.settings.seed, ranked=True)

    def _read_callables(self) -> None:
        """Find the loss and the optimizer by name and check their arguments."""
        self.loss_fn: LossFn = self.settings.loss_fn.instantiate()
        values = self.settings.optimizer.to_dict()
        target = targets.resolve(values.pop("_target_"), "optimizer._target_")
        self._optimizer_target: Callable[..., torch.optim.Optimizer] = target
        self._steps_in_backward: bool = values.pop("in_backward", False)
        self._overrides: list[ParamGroupOverride] = parse_overrides(values.pop("param_group_overrides", None))
        self._optimizer_kwargs = prepare_kwargs(target, values)

    def _choose_run_directory(self) -> None:
        chosen = None
        if self.ranks.is_first:
            chosen = choose_run_directory(
                self.settings.checkpoint.checkpoint_dir, self.settings.checkpoint_dir_is_default, self.effective
            )
        self.run_directory: RunDirectory = self.ranks.share(chosen)
        logger.info(self.run_directory.message)

    def _open_loggers(self) -> None:
        self.loggers = RunLoggers(
            self.run_directory.path,
            total_steps=self.schedule.most_steps,
            wandb=self.settings.wandb,
            mlflow=self.settings.mlflow,
            tensorboard=self.settings.tensorboard,
            log_remote_every_steps=self.settings.step_scheduler.log_remote_every_steps,
            config=self.effective,
            run_name=self.model_name(),
        )

    def fake_quantize_at(self, step: int) -> None:
        """Make the model round, or not, as it does in a step; `qat.fake_quant_after_n_steps` says when it begins."""
        if self._fake_quantization is not None:
            self._fake_quantization.at_step(step)

    def _build_engine(self) -> None:
        self._fake_quantization: DelayedStart | None = None
        if self.settings.qat is not None:
            self._fake_quantization = DelayedStart(self.model, self.settings.qat.fake_quant_after_n_steps)
            self.fake_quantize_at(0)
        if self.settings.noise_alpha:
            add_embedding_noise(self.model, self.settings.noise_alpha)
            logger.info("NEFTune: noise on the embeddings, alpha %g.", self.settings.noise_alpha)
        self.engine = build_engine(self.model, self.settings, self.loss_fn, self.device, self.memory_record)

    def _build_optimizer(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._shares = shares_of(self.settings, trained, self.ranks)
        self.optimizer = build_optimizer(
            self.model,
            self._optimizer_target,
            self._optimizer_kwargs,
            self._overrides,
            is_mine=None if self._shares is None else self._shares.is_mine,
        )
        self._in_backward: StepInBackward | None = None
        if self._steps_in_backward:
            self._in_backward = StepInBackward(self.optimizer, tied_weights(self.model))
            self.engine.step_in_backward(self._in_backward)
        # walking through a model's modules takes a millisecond, so it is not done in every step
        self._trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self._shares is not None:
            self._trainable = trained
        copy_from_first(self._trainable, self.ranks)
        config = self.settings.lr_scheduler
        self.lr_scheduler = OptimizerParamScheduler(
            self.optimizer,
            self._plan_schedule(),
            keeps_saved_plan=config is not None and config.use_checkpoint_opt_param_scheduler is True,
        )

    def _plan_schedule(self) -> SchedulePlan:
        config = self.settings.lr_scheduler
        # without a section nothing depends on the length, so nobody waits for it
        return plan_schedule(config, self.optimizer, None if config is None else self.schedule.total_steps)

    def _restore(self) -> None:
        self.checkpointer = Checkpointer(self.settings.checkpoint, self.run_directory.path)
        num_bytes = estimate_num_bytes(self.model, saves_whole_model=self.settings.peft is None)
        self.sick_runs = SickRuns(
            self.settings.loss_guard,
            self.engine,
            self.model,
            self.train_loader,
            items_are_steps=self.settings.step_scheduler.local_batch_tokens is not None,
            run_dir=self.run_directory.path,
            config_yaml=self.effective,
            num_bytes_reserved=num_bytes if self.settings.checkpoint.enabled else 0,
            ranks=self.ranks,
        )
        if self.settings.checkpoint.enabled and self.ranks.is_first:
            check_writable(self.run_directory.path, num_bytes)
            warn_if_crowded(self.run_directory.path, num_bytes, self._most_checkpoints())
        self.resume_check = ResumeCheck(
            self.settings.checkpoint.resume_policy, self.engine, self.model, self.train_loader
        )
        if self.run_directory.resume_from is not None:
            self._go_on_from(self.run_directory.resume_from)
        self.loggers.truncate_after(self.schedule.step - 1)
        self._step_end_s = time.perf_counter()

    def _go_on_from(self, checkpoint: Path) -> None:
        changes = changes_since(checkpoint, self.effective)
        self.checkpointer.load(checkpoint, self.state())
        self.fake_quantize_at(self.schedule.step - 1)  # as when it was saved, for the check of the resume
        if self.schedule.realign():
            self.lr_scheduler.replan(self._plan_schedule())
        said = consequences(changes)
        other_size = world_size_line(num_ranks(checkpoint), self.ranks.size, self.settings.dataloader.group_by_length)
        for line in said if other_size is None else [*said, other_size]:
            logger.warning("Changed since %s was saved: %s", checkpoint.name, line)
        if self.ranks.is_first:
            with explained_faults(self._worked_loaders()):
                self.resume_check.compare(checkpoint, changes, is_spread_anew=other_size is not None)

    def _most_checkpoints(self) -> int:
        """Return how many checkpoints will be there at once, as far as that is known; at least 1."""
        num_steps, every = self.schedule.most_steps, self.settings.step_scheduler.ckpt_every_steps
        num_saves = 1 if num_steps is None or every is None else -(-(num_steps - self.schedule.step) // every)
        kept = self.settings.checkpoint.max_recent_checkpoints
        # the best one is kept beside the newest, and a new one is whole before an old one goes
        return max(1, num_saves if kept is None else min(num_saves, kept + 2))

    def state(self, witness: Witness | None = None) -> Parts:
        """Return everything a checkpoint holds, by name; ``witness`` is what a resume compares itself with."""
        return Parts(
            model_files=self.model_files,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            schedule=self.schedule,
            train_loader=self.train_loader,
            rng=self.rng,
            config_yaml=self.effective,
            loss_guard=self.sick_runs.guard,
            witness=witness,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            is_share=self._shares is not None,
        )

    # The loop.

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

    def _worked_loaders(self) -> list[ResumableDataLoader]:
        """Return the loaders that may have processes of their own."""
        loaders = (self.train_loader, *self.val_loaders.values())
        inner = [loader.loader if isinstance(loader, MicroBatches) else loader for loader in loaders]
        return [loader for loader in inner if isinstance(loader, ResumableDataLoader)]

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
        files = self.ranks.gather(
            files_of_rank(self.ranks.rank, self.train_loader, self.rng) if self.ranks.are_several else {}
        )
        joint = None if self._shares is None else JointState(self.ranks)
        if self.ranks.is_first:
            self._write(step, losses, files[1:], joint)
        elif joint is not None:
            joint.join({OPTIM_KEY: optimizer_entries(self.model, self.optimizer)})
        self.ranks.wait_for_all()

    def _write(
        self,
        step: Step,
        losses: Mapping[str, float],
        files: Sequence[Mapping[str, bytes]],
        joint: JointState | None,
    ) -> None:
        state = self.state(self.resume_check.witness(self._last_batches, step.is_preempted))
        for files_of_other in files:
            state.files_of_others |= files_of_other
        if joint is not None:
            state.write_state = joint.write
        try:
            self.checkpointer.save(step.index, step.epoch, state, losses, is_last_step=step.is_last)
            if step.is_last or step.is_preempted:
                self.checkpointer.finish()
        except SaveError as error:
            if step.is_last or step.is_preempted:
                raise
            logger.error("%s The run goes on, and the next save tries again.", error)
        finally:
            if joint is not None:
                joint.end()

    def _say_what_next(self, step: Step | None) -> None:
        log_what_next(self.run_directory.path, step, self.schedule.step)
