"""What a run is: the configuration, checked and frozen.

``load_settings`` is the only reader of the configuration. It refuses whatever can be refused without torch, so that a
mistyped key costs a second and not a model's loading time. Sections with settings of their own become dataclasses;
sections that describe a call stay nodes, already checked against the signature of what they call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.config.later import refuse_later_sections
from nemo_automodel.components.config.legacy import translate_legacy
from nemo_automodel.components.config.loader import ConfigNode, check_loaded
from nemo_automodel.components.config.schema import build, check_keys, check_target, conform, require_mapping, show
from nemo_automodel.components.datasets.config import DataCheckConfig, DataloaderConfig, PackedSequenceConfig
from nemo_automodel.components.distributed.config import DistEnvConfig, DistributedConfig
from nemo_automodel.components.loggers.config import MLflowConfig, TensorBoardConfig, WandbConfig
from nemo_automodel.components.optim.config import LRSchedulerConfig, optimizer_path
from nemo_automodel.components.plan.config import MemoryConfig
from nemo_automodel.components.quantization.config import CompileConfig, FP8Config, QATSettings, QuantizationConfig
from nemo_automodel.components.training.config import (
    BenchmarkConfig,
    LossGuardConfig,
    NeftuneConfig,
    StepSchedulerConfig,
    UnifiedMemoryConfig,
)
from nemo_automodel.recipes import data_rules
from nemo_automodel.recipes import section_rules as rules
from nemo_automodel.recipes.dataset_rules import TOKENIZER_RUNTIME, check_dataset, check_token_budget, single_sets
from nemo_automodel.recipes.memory_rules import memory_settings
from nemo_automodel.recipes.precision_rules import check_fp8, check_qat
from nemo_automodel.shared.errors import ConfigError

DEFAULT_SEED = 42
DEFAULT_MAX_GRAD_NORM = 1.0
_MAX_SEED = 2**32 - 1
_DEFAULT_LOSS = "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"
_DEFAULT_TOKENIZER = "nemo_automodel.NeMoAutoTokenizer.from_pretrained"
_PEFT_CONFIG = "nemo_automodel.components._peft.lora.PeftConfig"
_LOADERS = ("torchdata.stateful_dataloader.StatefulDataLoader", "torch.utils.data.DataLoader")


@dataclass(frozen=True)
class RunSettings:
    """Everything a recipe needs to know, in the order of the house."""

    config: ConfigNode
    """The effective configuration: overrides applied, old forms translated, disabled sections gone."""
    notices: list[str] = field(repr=False)
    """Lines to log once: translated forms, keys without effect."""
    recipe: str | None
    seed: int
    deterministic: bool
    """The same run gives the same bits, at the price of slower kernels."""
    step_scheduler: StepSchedulerConfig
    dist_env: DistEnvConfig
    distributed: DistributedConfig
    model: ConfigNode
    tokenizer: ConfigNode | None
    peft: ConfigNode | None
    quantization: QuantizationConfig | None
    """``None``: the weights keep their dtype."""
    fp8: FP8Config | None
    """``None``: the base is not multiplied in 8 bits."""
    qat: QATSettings | None
    """``None``: nothing is rounded while it learns."""
    freeze_embeddings: bool
    compile: CompileConfig
    loss_fn: ConfigNode
    optimizer: ConfigNode
    lr_scheduler: LRSchedulerConfig | None
    """``None``: a constant learning rate."""
    max_grad_norm: float | None
    """``None``: gradients are not clipped."""
    dataset: ConfigNode
    validation_datasets: dict[str, ConfigNode]
    """Name → section; the plain key is ``default``."""
    dataloader: DataloaderConfig
    validation_dataloader: DataloaderConfig
    packed_sequence: PackedSequenceConfig
    data_check: DataCheckConfig | None
    """``None``: the label gate is off."""
    loss_guard: LossGuardConfig
    memory: MemoryConfig
    noise_alpha: float
    """Of NEFTune; 0: no noise."""
    unified_memory: UnifiedMemoryConfig
    benchmark: BenchmarkConfig
    """Read by the benchmark recipe alone."""
    checkpoint: CheckpointingConfig
    checkpoint_dir_is_default: bool
    """The user named no directory, so runs that differ may share the default one."""
    wandb: WandbConfig | None
    mlflow: MLflowConfig | None
    tensorboard: TensorBoardConfig | None


def load_settings(cfg: ConfigNode) -> RunSettings:
    """Check a configuration and freeze it; ``cfg`` itself is left as it is.

    Raises:
        ConfigError: an unknown section or key, a wrong type or value, a section that is missing.
        NotSupportedYetError: a key whose feature comes in a later version.
    """
    config = cfg.copy()
    check_loaded(config)
    rules.drop_disabled(config)
    recipe = rules.recipe_name(config)
    notices = translate_legacy(config)
    rules.refuse_unknown(config)
    refuse_later_sections(config)
    rules.refuse_missing(config)
    _fill_in(config)
    return _settings(config, recipe, notices)


def effective_yaml(settings: RunSettings) -> dict[str, Any]:
    """Return what a checkpoint saves as ``config.yaml``: placeholders unresolved, secrets masked."""
    return settings.config.to_yaml_dict()


def _settings(config: ConfigNode, recipe: str | None, notices: list[str]) -> RunSettings:
    distributed = build(DistributedConfig, _section(config, "distributed"), "distributed")
    notices += rules.check_distributed(distributed, _section(config, "distributed"))
    notices += rules.check_switches(config)
    validation_datasets = data_rules.validation_datasets(config)
    for node in (config["dataset"], *validation_datasets.values()):
        check_dataset(node)
    step_scheduler = build(StepSchedulerConfig, _section(config, "step_scheduler"), "step_scheduler")
    dataloader = _dataloader(config, "dataloader")
    packed_sequence = data_rules.packed_sequence(_section(config, "packed_sequence"))
    notices += check_token_budget(step_scheduler, dataloader, packed_sequence, config)
    peft = _peft(config)
    checkpoint, is_default = _checkpoint(config, peft, validation_datasets, notices)
    rules.check_in_backward(config["optimizer"], step_scheduler, _max_grad_norm(config))
    compiling = build(CompileConfig, _section(config, "compile"), "compile")
    if compiling.enabled and distributed.enable_compile:
        notices.append("`distributed.enable_compile: true` has no effect: `compile.enabled` compiles the whole model.")
    return RunSettings(
        config=config,
        notices=notices,
        recipe=recipe,
        seed=_seed(config),
        deterministic=rules.deterministic(config),
        step_scheduler=step_scheduler,
        dist_env=_dist_env(config),
        distributed=distributed,
        model=rules.check_model(config["model"], notices),
        tokenizer=_tokenizer(config),
        peft=peft,
        quantization=_quantization(config, peft),
        fp8=check_fp8(build(FP8Config, _section(config, "fp8"), "fp8"), config, notices),
        qat=check_qat(config),
        freeze_embeddings=rules.freeze_embeddings(config),
        compile=compiling,
        loss_fn=_loss_fn(config),
        optimizer=_optimizer(config),
        lr_scheduler=_lr_scheduler(config),
        max_grad_norm=_max_grad_norm(config),
        dataset=config["dataset"],
        validation_datasets=validation_datasets,
        dataloader=dataloader,
        validation_dataloader=_dataloader(config, "validation_dataloader"),
        packed_sequence=packed_sequence,
        data_check=data_rules.data_check(config),
        loss_guard=build(LossGuardConfig, _section(config, "loss_guard"), "loss_guard"),
        memory=memory_settings(config, notices),
        noise_alpha=_noise_alpha(config),
        unified_memory=build(UnifiedMemoryConfig, _section(config, "unified_memory"), "unified_memory"),
        benchmark=build(BenchmarkConfig, _section(config, "benchmark"), "benchmark"),
        checkpoint=checkpoint,
        checkpoint_dir_is_default=is_default,
        wandb=_optional(config, "wandb", lambda node: build(WandbConfig, node, "wandb", open_field="init_kwargs")),
        mlflow=_optional(config, "mlflow", lambda node: build(MLflowConfig, node, "mlflow")),
        tensorboard=_optional(config, "tensorboard", lambda node: build(TensorBoardConfig, node, "tensorboard")),
    )


def _fill_in(config: ConfigNode) -> None:
    """Write out what short forms stand for, so that everybody later reads one form."""
    if config.get("loss_fn") is None:
        config["loss_fn"] = {"_target_": _DEFAULT_LOSS}
    elif isinstance(config["loss_fn"], str):
        config["loss_fn"] = {"_target_": config["loss_fn"]}
    sdpa_method = config.get("sdpa_method")
    config.remove("sdpa_method")
    if sdpa_method is not None and "sdpa_method" not in config["model"]:
        config["model"]["sdpa_method"] = sdpa_method
    peft = _section(config, "peft")
    if peft is not None and "_target_" not in peft:
        peft["_target_"] = _PEFT_CONFIG
    tokenizers = [config.get("tokenizer")]
    for key in config:
        if (key == "dataset" or key.startswith("validation_dataset")) and isinstance(config[key], ConfigNode):
            tokenizers += [node.get("tokenizer") for node in single_sets(config[key])]
    for tokenizer in tokenizers:
        if isinstance(tokenizer, ConfigNode) and "_target_" not in tokenizer:
            tokenizer["_target_"] = _DEFAULT_TOKENIZER


def _section(config: ConfigNode, name: str) -> ConfigNode | None:
    node = config.get(name)
    if node is not None:
        require_mapping(node, name)
    return node


def _optional(config: ConfigNode, name: str, make: Callable[[ConfigNode], Any]) -> Any:
    """Build a section that is off unless it is there."""
    node = _section(config, name)
    return None if node is None else make(node)


def _noise_alpha(config: ConfigNode) -> float:
    neftune = _optional(config, "neftune", lambda node: build(NeftuneConfig, node, "neftune"))
    return 0.0 if neftune is None else neftune.noise_alpha or 0.0


def _seed(config: ConfigNode) -> int:
    if config.get("seed") is None:
        return DEFAULT_SEED
    seed = conform(config, "seed", int, "", DEFAULT_SEED)
    if not 0 <= seed <= _MAX_SEED:
        raise ConfigError(f"`seed` is {seed}, but a seed lies between 0 and {_MAX_SEED}. Use one such as 42.")
    return seed


def _dist_env(config: ConfigNode) -> DistEnvConfig:
    dist_env = build(DistEnvConfig, _section(config, "dist_env"), "dist_env")
    if dist_env.timeout_minutes <= 0:
        raise ConfigError(
            f"`dist_env.timeout_minutes` is {dist_env.timeout_minutes:g}, but a time must be positive. Use 10."
        )
    return dist_env


def _tokenizer(config: ConfigNode) -> ConfigNode | None:
    node = _section(config, "tokenizer")
    if node is not None:
        check_target(node, runtime=TOKENIZER_RUNTIME)
    return node


def _peft(config: ConfigNode) -> ConfigNode | None:
    node = _section(config, "peft")
    if node is None:
        return None
    check_target(node)
    if node["_target_"] == _PEFT_CONFIG:
        PeftConfig(**{key: value for key, value in node.to_dict().items() if key != "_target_"})  # refuses bad values
    return node


def _quantization(config: ConfigNode, peft: ConfigNode | None) -> QuantizationConfig | None:
    quantization = build(QuantizationConfig, _section(config, "quantization"), "quantization")
    if not (quantization.load_in_4bit or quantization.load_in_8bit):
        return None
    for key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        rules.check_dtype(getattr(quantization, key), f"quantization.{key}")
    if peft is None:
        raise ConfigError(
            "`quantization` stores the weights in 4 or 8 bits, where they cannot be trained. "
            "Add a `peft` section (QLoRA), or remove `quantization`."
        )
    if peft.get("use_dora") is True:
        raise ConfigError(
            "`peft.use_dora: true` needs the lengths of the weight rows, which a quantised base does not keep. "
            "Turn off `use_dora` or `quantization`."
        )
    return quantization


def _loss_fn(config: ConfigNode) -> ConfigNode:
    node = config["loss_fn"]
    require_mapping(node, "loss_fn")
    check_target(node)
    return node


def _optimizer(config: ConfigNode) -> ConfigNode:
    node: ConfigNode = config["optimizer"]
    target = node.get("_target_")
    if isinstance(target, str):
        node["_target_"] = optimizer_path(target)
    rules.check_installed(node)
    rules.check_optimizer_numbers(node)
    ours = {key: node.get(key) for key in ("param_group_overrides", "in_backward")}  # not the optimizer's
    for key in ours:
        node.remove(key)
    check_target(node, runtime=("params",))
    for key, value in ours.items():
        if value is not None:
            node[key] = value
    return node


def _lr_scheduler(config: ConfigNode) -> LRSchedulerConfig | None:
    node = _section(config, "lr_scheduler")
    if node is None:
        return None
    scheduler = build(LRSchedulerConfig, node, "lr_scheduler")
    lr = config["optimizer"].get("lr")
    max_lr = scheduler.max_lr if scheduler.max_lr is not None else lr
    if scheduler.min_lr is not None and isinstance(max_lr, int | float) and scheduler.min_lr > max_lr:
        name = "optimizer.lr" if scheduler.max_lr is None else "lr_scheduler.max_lr"
        raise ConfigError(
            f"`lr_scheduler.min_lr` is {scheduler.min_lr:g}, but it cannot exceed `{name}` = {max_lr:g}. "
            f"Set it to {max_lr / 10:g}, or raise `{name}`."
        )
    return scheduler


def _max_grad_norm(config: ConfigNode) -> float | None:
    node = _section(config, "clip_grad_norm")
    if node is None:
        return DEFAULT_MAX_GRAD_NORM
    check_keys(node, "clip_grad_norm", ("max_norm",))
    if "max_norm" not in node:
        return DEFAULT_MAX_GRAD_NORM
    norm = conform(node, "max_norm", float | None, "clip_grad_norm", DEFAULT_MAX_GRAD_NORM)
    if norm is not None and norm < 0:
        raise ConfigError(f"`clip_grad_norm.max_norm` is {norm:g}, but a norm is not negative. Use 0 to turn it off.")
    return norm or None


def _dataloader(config: ConfigNode, name: str) -> DataloaderConfig:
    node = _section(config, name)
    if node is not None:
        target = node.get("_target_")
        if target is not None and target not in _LOADERS:
            raise ConfigError(f"`{name}._target_` is {show(target)}, but it must be {_LOADERS[0]} or left out.")
        if target is not None:
            node = node.copy()
            node.remove("_target_")
    loader = build(DataloaderConfig, node, name)
    data_rules.check_dataloader(loader, name)
    return loader


def _checkpoint(
    config: ConfigNode, peft: ConfigNode | None, validation_datasets: dict[str, ConfigNode], notices: list[str]
) -> tuple[CheckpointingConfig, bool]:
    node = _section(config, "checkpoint")
    is_default = node is None or node.get("checkpoint_dir") is None
    if node is not None and "checkpoint_dir" in node and node["checkpoint_dir"] is None:
        node.remove("checkpoint_dir")
    if node is not None and node.get("save_consolidated") is True:
        node["save_consolidated"] = "every"
    if node is not None and node.get("model_save_format") == "torch_save" and peft is not None:
        node["model_save_format"] = "safetensors"
        notices.append(
            "`checkpoint.model_save_format: torch_save` has no effect with `peft`: adapters are safetensors."
        )
    checkpoint = build(CheckpointingConfig, node, "checkpoint")
    notices += checkpoint.notices()
    named = node is not None and node.get("best_metric_key") is not None
    if named and validation_datasets and checkpoint.best_metric_key not in validation_datasets:
        raise ConfigError(
            f"`checkpoint.best_metric_key: {checkpoint.best_metric_key}` names no validation set. "
            f"Known: {', '.join(validation_datasets)}."
        )
    return checkpoint, is_default
