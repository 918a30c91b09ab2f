"""Older spellings.

Files written for earlier versions of the interface load unchanged: each old form is rewritten to the new one in the
tree, and one line names them all. Where both forms are present the new one wins. Keys that never had an effect, or have
none any more, are removed with a warning each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.shared.errors import ConfigError, did_you_mean

_MANAGERS = {"FSDP2Manager": "fsdp2", "MegatronFSDPManager": "megatron_fsdp", "DDPManager": "ddp"}
_PIPELINES = (
    "nemo_automodel.components.distributed.pipelining.AutoPipeline",
    "nemo_automodel.components.distributed.pipelining.autopipeline.AutoPipeline",
    "nemo_automodel.components.distributed.pipelining.config.PipelineConfig",
)
_PARALLELIZER = "nemo_automodel.components.moe.parallelizer.parallelize_model"
_MOE_KEYS = ("ignore_router_for_ac", "reshard_after_forward", "lm_head_precision", "wrap_outer_model", "mp_policy")
_AUTO_MODEL = "nemo_automodel.NeMoAutoModelForCausalLM"
_MODELS = "nemo_automodel.components.models."
_OLD_BACKEND = "nemo_automodel.components.moe.utils.BackendConfig"
_BACKEND = "nemo_automodel.components.models.common.BackendConfig"
# `build_gpt2_model` took these beside the fields of the model's configuration
_MODEL_KEYWORDS = ("torch_dtype", "attn_implementation", "use_liger_kernel", "use_sdpa_patching", "force_hf")

# dotted key → what to use instead
_DEAD_KEYS = {
    "distributed_config": "Use `distributed`.",
    "autocast": "Use `distributed.autocast_dtype`.",
    "dist_env.init_method": "It is always taken from the environment.",
    "rng.deterministic": "Use the top-level `deterministic`.",
    "benchmark.num_nodes": "Remove it.",
    "distributed.use_hf_tp_plan": "Use `distributed.tp_plan`.",
    "distributed.check_for_nan_in_grad": "Remove it.",
    "packed_sequence.split_across_pack": "Documents are never split.",
    "wandb.save_dir": "Use `wandb.dir`.",
}


def translate_legacy(config: ConfigNode) -> list[str]:
    """Rewrite every old form in ``config`` and remove its dead keys.

    Returns:
        The lines to log: at most one that names the translated forms, and one for each dead key.

    Raises:
        ConfigError: an old form that cannot be read.
    """
    warnings = _drop_dead_keys(config)
    translated: list[str] = []
    steps: tuple[Callable[[ConfigNode, list[str], list[str]], None], ...] = (
        _rng,
        _strategy,
        _manager_keys,
        _pipeline,
        _parallelizer,
        _nested_datasets,
        _model_builder,
        _backends,
        _load_base_model,
    )
    for step in steps:
        step(config, translated, warnings)
    if translated:
        warnings.insert(0, f"older forms were translated: {'; '.join(translated)}. Please write the new ones.")
    return warnings


def _dead(key: str, instead: str) -> str:
    return f"`{key}` has no effect. {instead}"


def _drop_dead_keys(config: ConfigNode) -> list[str]:
    warnings = []
    for key, instead in _DEAD_KEYS.items():
        section, _, name = key.rpartition(".")
        node = _section(config, section) if section else config
        if node is not None and name in node:
            node.remove(name)
            warnings.append(_dead(key, instead))
            if section and len(node) == 0:
                config.remove(section)
    return warnings


def _rng(config: ConfigNode, translated: list[str], warnings: list[str]) -> None:
    rng = _section(config, "rng")
    if rng is None:
        return
    for key in rng:
        if key not in ("_target_", "seed", "ranked"):
            raise ConfigError(
                f"`rng.{key}`: unknown key `{key}`.{did_you_mean(key, ('seed', 'ranked'))} Known: seed, ranked."
            )
    config.remove("rng")
    if "seed" not in rng:
        return
    if config.get("seed") is None:
        config["seed"] = rng.seed
        translated.append("`rng.seed` → `seed`")
    else:
        warnings.append(_dead("rng.seed", "The top-level `seed` wins."))


def _strategy(config: ConfigNode, translated: list[str], warnings: list[str]) -> None:
    distributed = _section(config, "distributed")
    if distributed is None:
        return
    target = distributed.get("_target_")
    for key in ("_target_", "_recursive_", "_convert_"):
        distributed.remove(key)
    if target is None:
        return
    manager = str(target).rpartition(".")[2]
    if not str(target).startswith("nemo_automodel.components.distributed.") or manager not in _MANAGERS:
        raise ConfigError(
            f"`distributed._target_: {target}` is not known.{did_you_mean(manager, _MANAGERS)} "
            "Write `strategy: fsdp2`, megatron_fsdp or ddp instead."
        )
    strategy = _MANAGERS[manager]
    _fill(distributed, "strategy", strategy)
    translated.append(f"`distributed._target_: …{manager}` → `distributed.strategy: {strategy}`")


def _manager_keys(config: ConfigNode, translated: list[str], warnings: list[str]) -> None:
    distributed = _section(config, "distributed")
    if distributed is None:
        return
    if "custom_tp_plan" in distributed:
        _fill(distributed, "tp_plan", distributed.custom_tp_plan)
        distributed.remove("custom_tp_plan")
        translated.append("`distributed.custom_tp_plan` → `distributed.tp_plan`")
    if "backend" in distributed:
        if config.get("dist_env.backend") is None:
            config.set_by_dotted("dist_env.backend", distributed.backend)
        distributed.remove("backend")
        translated.append("`distributed.backend` → `dist_env.backend`")
    if "world_size" in distributed:
        if distributed.world_size not in (None, 1):
            raise ConfigError(
                f"`distributed.world_size` is {distributed.world_size}, but the command line says how many processes "
                f"there are. Remove the key and start the run with --nproc-per-node {distributed.world_size}"
            )
        distributed.remove("world_size")
        translated.append("`distributed.world_size` → the number of processes started")


def _pipeline(config: ConfigNode, translated: list[str], warnings: list[str]) -> None:
    if "autopipeline" not in config:
        return
    old = config["autopipeline"]
    config.remove("autopipeline")
    if old is None:
        return
    if not isinstance(old, ConfigNode) or old.get("_target_", _PIPELINES[0]) not in _PIPELINES:
        warnings.append(_dead("autopipeline", "Use `distributed.pipeline`."))
        return
    if config.get("distributed.pipeline") is None:
        old.remove("_target_")
        config.set_by_dotted("distributed.pipeline", old)
    translated.append("`autopipeline` → `distributed.pipeline`")


def _parallelizer(config: ConfigNode, translated: list[str], warnings: list[str]) -> None:
    for name in ("parallelizer", "parallelize_fn"):
        if name not in config:
            continue
        old = config[name]
        config.remove(name)
        if old is None:
            continue
        keys = ("_target_", "activation_checkpointing", *_MOE_KEYS)
        is_known = isinstance(old, ConfigNode) and all(key in keys for key in old)
        if not is_known or old.get("_target_") != _PARALLELIZER:
            warnings.append(_dead(name, "Use `distributed.moe`."))
            continue
        if "activation_checkpointing" in old and config.get("distributed.activation_checkpointing") is None:
            config.set_by_dotted("distributed.activation_checkpointing", old.activation_checkpointing)
        for key in _MOE_KEYS:
            if key in old and config.get(f"distributed.moe.{key}") is None:
                config.set_by_dotted(f"distributed.moe.{key}", old[key])
        translated.append(f"`{name}` → `distributed.moe`")


def _nested_datasets(config: ConfigNode, translated: list[str], warnings: list[str]) -> None:
    for loader, dataset in (("dataloader", "dataset"), ("validation_dataloader", "validation_dataset")):
        node = _section(config, loader)
        if node is None or "dataset" not in node:
            continue
        if node.dataset is not None:
            _fill(config, dataset, node.dataset)
            translated.append(f"`{loader}.dataset` → `{dataset}`")
        node.remove("dataset")


def _model_builder(config: ConfigNode, translated: list[str], warnings: list[str]) -> None:
    model = _section(config, "model")
    target = model.get("_target_") if model is not None else None
    if model is None or not isinstance(target, str) or not target.startswith(_MODELS):
        return
    name = target.rpartition(".")[2]
    if name in ("from_config", "from_pretrained"):
        new = f"{_AUTO_MODEL}.{name}"
    elif name in ("build_llama_model", "build_qwen2_model"):
        new = f"{_AUTO_MODEL}.from_pretrained"
    elif name == "build_gpt2_model":
        new = f"{_AUTO_MODEL}.from_config"
        _gather_gpt2_fields(model)
    else:
        return
    model["_target_"] = new
    translated.append(f"`model._target_: {target}` → `{new}`")


def _gather_gpt2_fields(model: ConfigNode) -> None:
    fields: dict[str, Any] = {"_target_": "transformers.GPT2Config"}
    for key, value in model.items():
        if key != "_target_" and key not in _MODEL_KEYWORDS:
            fields[key] = value
            model.remove(key)
    model["config"] = fields


def _backends(config: ConfigNode, translated: list[str], warnings: list[str]) -> None:
    for section in ("model", "teacher_model"):
        node = _section(config, section)
        backend = node.get("backend") if node is not None else None
        if not isinstance(backend, ConfigNode):
            continue
        if backend.get("_target_") == _OLD_BACKEND:
            backend["_target_"] = _BACKEND
            translated.append(f"`{section}.backend._target_: {_OLD_BACKEND}` → `{_BACKEND}`")
        if "enable_deepep" in backend:
            if backend.enable_deepep is True:
                _fill(backend, "dispatcher", "deepep")
                _fill(backend, "experts", "gmm")
            backend.remove("enable_deepep")
            translated.append(f"`{section}.backend.enable_deepep` → `{section}.backend.dispatcher` and `experts`")


def _load_base_model(config: ConfigNode, translated: list[str], warnings: list[str]) -> None:
    checkpoint, model = _section(config, "checkpoint"), _section(config, "model")
    if checkpoint is None or "load_base_model" not in checkpoint:
        return
    value = checkpoint.load_base_model
    checkpoint.remove("load_base_model")
    if value is None or model is None:
        return
    if not str(model.get("_target_")).endswith(".from_config"):
        if value is not True:
            warnings.append(_dead("checkpoint.load_base_model", "`from_pretrained` always loads the weights."))
        return
    _fill(model, "load_base_model", value)
    translated.append("`checkpoint.load_base_model` → `model.load_base_model`")


def _section(config: ConfigNode, name: str) -> ConfigNode | None:
    node = config.get(name)
    return node if isinstance(node, ConfigNode) else None


def _fill(node: ConfigNode, key: str, value: Any) -> None:
    """Set a key unless the new form already did."""
    if node.get(key) is None:
        node[key] = value
