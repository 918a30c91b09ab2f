"""Everything before the first step, in named steps.

A recipe fills in ``build_data``, ``build_model`` and ``model_name``; everything a run needs besides is here: settings,
device, random numbers, run directory, optimizer, schedule, checkpoints and loggers. What is cheap to check is checked
before the model is loaded: the settings, the run directory, the names of the optimizer and the loss, the data, the
trackers. The price is an order that matters; ``RunSetUp.setup`` is that order and nothing else.

Where there are several processes, the first one goes ahead with whatever writes, downloads or measures, and the others
take over what it found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nemo_automodel._transformers.fast_layers import kernel_table
from nemo_automodel._transformers.forward import LossFn
from nemo_automodel._transformers.fp8_base import write_report
from nemo_automodel._transformers.frozen_head import tied_weights
from nemo_automodel._transformers.model_files import ModelFiles
from nemo_automodel._transformers.model_source import hide_bars_without_terminal
from nemo_automodel._transformers.neftune import add_embedding_noise
from nemo_automodel.components.checkpoint.changes import changes_since, consequences, world_size_line
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer, estimate_num_bytes
from nemo_automodel.components.checkpoint.layout import num_ranks
from nemo_automodel.components.checkpoint.parts import Parts
from nemo_automodel.components.checkpoint.run_directory import RunDirectory, choose_run_directory
from nemo_automodel.components.config import targets
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.datasets.loader import ResumableDataLoader
from nemo_automodel.components.datasets.token_budget import MicroBatches
from nemo_automodel.components.datasets.worker_faults import explained_faults
from nemo_automodel.components.distributed.grad import copy_from_first
from nemo_automodel.components.distributed.init_utils import DistInfo, initialize_distributed
from nemo_automodel.components.distributed.mesh import Mesh, build_mesh
from nemo_automodel.components.distributed.ranks import ALONE, Ranks
from nemo_automodel.components.distributed.shares import Shares
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
from nemo_automodel.components.training.early_signals import stop_in_words
from nemo_automodel.components.training.rng import ScopedRNG, StatefulRNG
from nemo_automodel.components.training.step_scheduler import StepScheduler, TrainLoader
from nemo_automodel.kernels.weight_grad import sum_afterwards
from nemo_automodel.recipes.banner import log_experiment, log_model, log_plan
from nemo_automodel.recipes.data_check import DataCheck
from nemo_automodel.recipes.joint import heard_by_all, shares_of
from nemo_automodel.recipes.kernel_record import read_kernels, write_kernels
from nemo_automodel.recipes.memory_choice import choose_policy
from nemo_automodel.recipes.memory_record import MemoryRecord
from nemo_automodel.recipes.memory_rescue import RescuingEngine, build_engine
from nemo_automodel.recipes.memory_watch import watch_set_up
from nemo_automodel.recipes.packing_proof import prove_packing
from nemo_automodel.recipes.resume_check import ResumeCheck
from nemo_automodel.recipes.saving import check_room
from nemo_automodel.recipes.settings import RunSettings, effective_yaml, load_settings
from nemo_automodel.recipes.several import check_several, refuse_stream
from nemo_automodel.recipes.sick_runs import SickRuns
from nemo_automodel.recipes.utilisation import Utilisation
from nemo_automodel.shared.processes import num_processes
from nemo_automodel.shared.types import Batch, Stateful

logger = logging.getLogger(__name__)


class ResumableLoader(TrainLoader, Stateful, Protocol):
    """A training loader whose position a checkpoint holds."""


class RunSetUp:
    """What a run consists of, and how it comes about; attributes are in the order in which they are set."""

    settings: RunSettings
    effective: dict[str, Any]
    """The configuration as a checkpoint saves it."""
    dist: DistInfo
    device: torch.device
    ranks: Ranks = ALONE
    """The processes of the run."""
    mesh: Mesh
    rng: StatefulRNG
    loss_fn: LossFn
    run_directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase | None
    train_loader: ResumableLoader
    val_loaders: Mapping[str, Iterable[Batch]]
    data_check: DataCheck | None = None
    """The label gate; None where it is off."""
    schedule: StepScheduler
    loggers: RunLoggers
    kernel_record: dict[str, Any] | None = None
    """How the run began to compute its fast layers; None for a fresh run."""
    memory_record: MemoryRecord | None = None
    """What the run knows of memory; None where only one step is done again."""
    model: PreTrainedModel
    model_files: ModelFiles
    engine: RescuingEngine
    utilisation: Utilisation
    optimizer: torch.optim.Optimizer
    lr_scheduler: OptimizerParamScheduler
    checkpointer: Checkpointer
    sick_runs: SickRuns
    resume_check: ResumeCheck

    _fake_quantization: DelayedStart | None
    """Rounds the weights in forward passes; None without ``qat:``."""
    _shares: Shares | None
    """Who updates what; None where every process updates everything."""
    _in_backward: StepInBackward | None
    """Updates weights while gradients come; None unless ``optimizer.in_backward`` asks for it."""
    _trainable: list[torch.nn.Parameter]
    """Walking through a model's modules takes a millisecond, so it is not done in every step."""

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

    # The order of things.

    @heard_by_all
    def setup(self) -> None:
        """Prepare everything up to the first step; nothing is loaded for a run that is already finished.

        Raises:
            UserError: anything the user has to mend, before the first step.
        """
        setup_logging()
        self._read_settings()
        with stop_in_words(self.settings.step_scheduler.preemption_signals()):
            self._set_up()

    def _set_up(self) -> None:
        self._find_devices()
        log_experiment(type(self).__name__, self.model_name(), self.dist, self.effective)
        self._read_callables()
        self._choose_run_directory()
        if self.run_directory.finished:
            return
        self._load_data()
        self._open_loggers()
        memory_record = self._open_records()
        with watch_set_up(self.settings, self.device), ExitStack() as on_failure:
            on_failure.callback(self.loggers.close, succeeded=False)
            self._load_model(memory_record)
            self._build_engine()
            prove_packing(self.engine, self.settings)
            self.utilisation = Utilisation(self.model, self.settings, self.device)
            self._build_optimizer()
            self._build_lr_scheduler()
            self._prepare_saving()
            self._restore()
            self.ranks.wait_for_all()
            on_failure.pop_all()
        log_model(self.model)
        log_plan(self.settings, self.optimizer, self.lr_scheduler.plan, self.schedule)

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

    # Settings, processes, run directory.

    def _read_settings(self) -> None:
        self.settings = load_settings(self.cfg)
        for notice in self.settings.notices:
            logger.warning(notice)
        self.effective = effective_yaml(self.settings)

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
        self.loss_fn = self.settings.loss_fn.instantiate()
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
        self.run_directory = self.ranks.share(chosen)
        logger.info(self.run_directory.message)

    # Data and schedule.

    def _load_data(self) -> None:
        """Make the loaders and the schedule, and look at the labels."""
        # not ranked, here and for the model: all processes read the same rows and begin with the same weights
        with ScopedRNG(self.settings.seed), self.ranks.first_alone():
            self.build_data()
        self._refuse_streams()
        self.schedule = StepScheduler(
            self.settings.step_scheduler, self.train_loader, self.mesh.dp_size, self.ranks.largest
        )
        if self.data_check is not None:
            self.data_check.before_model(self.schedule.grad_accum)

    def _refuse_streams(self) -> None:
        for section, loader in self._loaders():
            if self.ranks.are_several and not (isinstance(loader, ResumableDataLoader) and loader.has_numbers):
                raise refuse_stream(section, self.ranks.size)

    def _worked_loaders(self) -> list[ResumableDataLoader]:
        """Return the loaders that may have processes of their own."""
        return [loader for _, loader in self._loaders() if isinstance(loader, ResumableDataLoader)]

    def _loaders(self) -> Iterator[tuple[str, Any]]:
        """Yield (section, loader) of all data, without what cuts the items of a loader into micro-batches."""
        loaders: dict[str, Any] = {"dataset": self.train_loader}
        for name, loader in self.val_loaders.items():
            loaders["validation_dataset" if name == "default" else f"validation_dataset_{name}"] = loader
        for section, loader in loaders.items():
            yield section, loader.loader if isinstance(loader, MicroBatches) else loader

    # What the run directory keeps from the beginning: logs, and how the run computes.

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

    def _open_records(self) -> MemoryRecord:
        """Set both records to what a resumed run knows of its kernels and of memory, and return that of memory."""
        is_resumed = self.run_directory.resume_from is not None
        if is_resumed:
            self.kernel_record = read_kernels(self.run_directory.path)
        with self.ranks.first_alone():
            record = self.memory_record = MemoryRecord.open(self.run_directory.path, self.device, is_resumed)
        if not self.ranks.is_first:
            record.path = None
        return record

    # Model, engine, optimizer.

    def _load_model(self, memory_record: MemoryRecord) -> None:
        """Choose the memory policy and build the model; what the first process measured and chose counts for all."""
        if not self.ranks.is_first:
            memory_record.policy, self.kernel_record = self.ranks.share()
        statistics = None if self.data_check is None else self.data_check.statistics
        self.settings = choose_policy(self.settings, self.device, memory_record, statistics)
        with ScopedRNG(self.settings.seed):
            self.build_model()
        if self.ranks.is_first:
            kernels = kernel_table(self.model)
            self.ranks.share((memory_record.policy, kernels))
            write_kernels(self.run_directory.path, kernels, self.kernel_record)
            write_report(self.model, self.run_directory.path)
        self.model.train()
        self.model_files = ModelFiles(self.model, self.tokenizer)

    def _build_engine(self) -> None:
        self._fake_quantization = None
        if self.settings.qat is not None:
            self._fake_quantization = DelayedStart(self.model, self.settings.qat.fake_quant_after_n_steps)
            self.fake_quantize_at(0)
        if self.settings.noise_alpha:
            add_embedding_noise(self.model, self.settings.noise_alpha)
            logger.info("NEFTune: noise on the embeddings, alpha %g.", self.settings.noise_alpha)
        self.engine = build_engine(self.model, self.settings, self.loss_fn, self.device, self.memory_record)

    def fake_quantize_at(self, step: int) -> None:
        """Make the model round, or not, as it does in a step; `qat.fake_quant_after_n_steps` says when it begins."""
        if self._fake_quantization is not None:
            self._fake_quantization.at_step(step)

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
        self._in_backward = None
        if self._steps_in_backward:
            self._in_backward = StepInBackward(self.optimizer, tied_weights(self.model))
            self.engine.step_in_backward(self._in_backward)
        self._trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self._shares is not None:
            self._trainable = trained
        copy_from_first(self._trainable, self.ranks)

    def _build_lr_scheduler(self) -> None:
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

    # Saving, and going on from what was saved.

    def state(self) -> Parts:
        """Return everything a checkpoint holds, by name."""
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
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            is_share=self._shares is not None,
        )

    def _prepare_saving(self) -> None:
        """Make what writes checkpoints, dumps of sick steps and witnesses, once there is room for them."""
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
            check_room(self.run_directory.path, num_bytes, self.settings, self.schedule)
        self.resume_check = ResumeCheck(
            self.settings.checkpoint.resume_policy, self.engine, self.model, self.train_loader
        )

    def _restore(self) -> None:
        if self.run_directory.resume_from is not None:
            self._go_on_from(self.run_directory.resume_from)
        self.loggers.truncate_after(self.schedule.step - 1)

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
