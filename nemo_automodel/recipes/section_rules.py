"""Rules of single sections that need more than a type: what is required, what stands together, what has no effect."""

from __future__ import annotations

from typing import Any

from nemo_automodel.components.config.later import LATER_SECTIONS, refuse_later_recipe
from nemo_automodel.components.config.loader import ConfigNode, is_unread
from nemo_automodel.components.config.schema import check_keys, check_target, conform, require_mapping, show
from nemo_automodel.components.distributed.config import DistributedConfig
from nemo_automodel.components.fast.config import parse_cuda_graphs, parse_fast_layers, parse_kernels
from nemo_automodel.components.training.config import StepSchedulerConfig
from nemo_automodel.recipes.data_rules import is_validation
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError, did_you_mean
from nemo_automodel.shared.imports import is_available, require

SECTIONS = (
    "recipe",
    "seed",
    "deterministic",
    "step_scheduler",
    "dist_env",
    "distributed",
    "model",
    "tokenizer",
    "peft",
    "quantization",
    "freeze_config",
    "compile",
    "loss_fn",
    "optimizer",
    "lr_scheduler",
    "clip_grad_norm",
    "dataset",
    "validation_dataset",
    "dataloader",
    "validation_dataloader",
    "packed_sequence",
    "data_check",
    "loss_guard",
    "memory",
    "neftune",
    "unified_memory",
    "benchmark",
    "checkpoint",
    "wandb",
    "mlflow",
    "tensorboard",
    "fp8",
    "qat",
    "nvtx",
    "sdpa_method",
)
_REQUIRED = {
    "model": "Add `model:` with `_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained` and "
    "`pretrained_model_name_or_path`.",
    "dataset": "Add `dataset:` with `_target_`, such as "
    "nemo_automodel.components.datasets.llm.squad.make_squad_dataset.",
    "optimizer": "Add `optimizer:` with `_target_: torch.optim.AdamW` and `lr`.",
}
_SIZES = ("dp_size", "dp_replicate_size", "tp_size", "pp_size", "cp_size", "ep_size")
_PIPELINE_KEYS = (
    "pp_schedule",
    "pp_schedule_csv",
    "pp_microbatch_size",
    "pp_batch_size",
    "layers_per_stage",
    "round_virtual_stages_to_pp_multiple",
    "module_fqns_per_model_part",
    "patch_inner_model",
    "patch_causal_lm_model",
    "patch_stage_backward_maybe_with_nosync",
    "dtype",
    "scale_grads_in_schedule",
    "loss_fn",
    "pp_seq_len",
)
_MOE_KEYS = ("ignore_router_for_ac", "reshard_after_forward", "lm_head_precision", "wrap_outer_model", "mp_policy")
_MP_POLICY_KEYS = ("_target_", "param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")
_FREEZE_KEYS = (
    "freeze_vision_tower",
    "freeze_audio_tower",
    "freeze_language_model",
    "freeze_video_embedder",
    "freeze_embeddings",
)
# keyword of the Python call → the section that sets it in a file
_MODEL_KEYS_ELSEWHERE = {
    "activation_checkpointing": "distributed.activation_checkpointing",
    "autocast_dtype": "distributed.autocast_dtype",
    "compile_config": "compile",
    "compile_layers": "distributed.enable_compile",
    "device_mesh": "distributed",
    "distributed_config": "distributed",
    "distributed_setup": "distributed",
    "fp8_config": "fp8",
    "freeze_config": "freeze_config",
    "kernel_record": "kernels.json of the run directory",
    "memory_floor_gib": "unified_memory.floor_gib",
    "moe_config": "distributed.moe",
    "moe_mesh": "distributed",
    "peft_config": "peft",
    "pipeline_config": "distributed.pipeline",
    "qat_config": "qat",
    "quantization_config": "quantization",
    "row_shape": "packed_sequence.packed_sequence_size",
    "tp_plan": "distributed.tp_plan",
}
# keywords that the auto classes pass on and that everybody uses
_COMMON_MODEL_KEYS = (
    "attn_implementation",
    "backend",
    "cache_dir",
    "cuda_graphs",
    "embeddings_on_host",
    "fast_layers",
    "has_packed_sequence",
    "kernels",
    "local_files_only",
    "revision",
    "subfolder",
    "text_config",
    "token",
    "trust_remote_code",
    "use_cache",
)
# shared/dtypes.py has the dtypes themselves and needs torch; a test keeps the two alike
DTYPE_NAMES = ("bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32", "float", "fp64", "float64")
_STORAGE_DTYPE_NAMES = ("uint8", "int8")


# --- the whole file --------------------------------------------------------------------------------------------------


def drop_disabled(config: ConfigNode) -> None:
    """Remove sections with ``enable: false``, and the key ``enable`` from the others.

    Raises:
        ConfigError: ``enable`` is neither true nor false.
    """
    for section in config:
        node = config[section] if not is_unread(section) else None
        if not isinstance(node, ConfigNode) or "enable" not in node:
            continue
        if not isinstance(node["enable"], bool):
            raise ConfigError(f"`{section}.enable` is {show(node['enable'])}, but it must be true or false. Change it.")
        if node["enable"]:
            node.remove("enable")
        elif section == "data_check":
            config[section] = False  # the one section that is on without being there
        else:
            config.remove(section)


def refuse_unknown(config: ConfigNode) -> None:
    """Refuse top-level sections nobody knows.

    Raises:
        ConfigError: the first one, with the nearest known name.
    """
    known = (*SECTIONS, *LATER_SECTIONS)
    for section in config:
        if section in known or is_unread(section) or is_validation(section):
            continue
        near = did_you_mean(section, known) or f" Known sections: {', '.join(SECTIONS)}."
        raise ConfigError(f"`{section}`: unknown section `{section}`.{near} Correct or remove it.")


def refuse_missing(config: ConfigNode) -> None:
    """Refuse a file without one of the sections every run needs.

    Raises:
        ConfigError: the first missing section, and how it begins.
    """
    for section, remedy in _REQUIRED.items():
        if config.get(section) is None:
            raise ConfigError(f"the section `{section}` is missing. {remedy}")
        require_mapping(config[section], section)


def recipe_name(config: ConfigNode) -> str | None:
    """Return ``recipe:``, a name or a mapping with ``_target_``, as a name.

    Raises:
        ConfigError: it is something else.
        NotSupportedYetError: a recipe of a later version.
    """
    value = config.get("recipe")
    if isinstance(value, ConfigNode):
        check_keys(value, "recipe", ("_target_",))
        value = value.get("_target_")
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(f"`recipe` is {show(value)}, but it must be a recipe's name. Write its class name.")
    refuse_later_recipe(value)
    return value


# --- devices ---------------------------------------------------------------------------------------------------------


def check_distributed(distributed: DistributedConfig, node: ConfigNode | None) -> list[str]:
    """Refuse what splits a model over devices; return a line for each key that has no effect otherwise.

    Raises:
        ConfigError: a size below 1, an unknown key or dtype below ``distributed``.
        NotSupportedYetError: a size above 1, CPU offload, options for multimodal models.
    """
    for key in _SIZES:
        size = getattr(distributed, key)
        if size is not None and size < 1:
            raise ConfigError(f"`distributed.{key}` is {size}, but a size is at least 1. Set it to 1.")
        if size is not None and size > 1 and not key.startswith("dp_"):
            raise NotSupportedYetError(
                f"`distributed.{key}` is {size}: splitting a model over devices is not supported yet. Set it to 1."
            )
    for key in ("offload_policy", "multimodal"):
        if getattr(distributed, key) is not None:
            raise NotSupportedYetError(f"`distributed.{key}` is not supported yet. Remove it or set it to null.")
    if node is None:
        return []
    notices = []
    for key, known in (("pipeline", _PIPELINE_KEYS), ("moe", _MOE_KEYS), ("mp_policy", _MP_POLICY_KEYS)):
        inner = node.get(key)
        if inner is not None:
            check_keys(inner, f"distributed.{key}", known)
    if distributed.pipeline is not None:
        notices.append("`distributed.pipeline` has no effect at pp_size 1.")
    if distributed.mp_policy is not None:
        for key in _MP_POLICY_KEYS[1:4]:
            check_dtype(node.get(f"mp_policy.{key}"), f"distributed.mp_policy.{key}")
        notices.append(
            "`distributed.mp_policy` has no effect on one process: the model computes in its `torch_dtype`. "
            "For mixed precision set `distributed.autocast_dtype`."
        )
    if distributed.sequence_parallel:
        notices.append("`distributed.sequence_parallel: true` has no effect at tp_size 1.")
    check_dtype(distributed.autocast_dtype, "distributed.autocast_dtype")
    return notices


def check_switches(config: ConfigNode) -> list[str]:
    """Return a line for each switch that is on without effect.

    Raises:
        ConfigError: ``nvtx`` is neither true nor false.
    """
    nvtx = conform(config, "nvtx", bool | None, "") if "nvtx" in config else None
    return ["`nvtx: true` has no effect yet."] if nvtx else []


def deterministic(config: ConfigNode) -> bool:
    """Return ``deterministic``; false is removed, so that it is the same run as one that does not say it.

    Raises:
        ConfigError: it is neither true nor false, or something else wants kernels to be measured at every start.
    """
    value = conform(config, "deterministic", bool | None, "") if "deterministic" in config else None
    if not value:
        config.remove("deterministic")
        return False
    mode = config.get("compile.mode")
    if isinstance(mode, str) and mode.startswith("max-autotune"):
        raise ConfigError(
            f"`compile.mode: {mode}` measures kernels at every start, and `deterministic: true` wants the same ones. "
            "Use `compile.mode: default`."
        )
    if config.get("model.kernels.attention") == "cudnn":
        raise ConfigError(
            "`model.kernels.attention: cudnn` adds in no fixed order, and `deterministic: true` wants one. Use flash, "
            "or leave it out."
        )
    return True


def check_dtype(value: Any, place: str) -> None:
    """Refuse a name that is no dtype; ``None`` passes.

    Raises:
        ConfigError: the name is not known.
    """
    known = (*DTYPE_NAMES, *_STORAGE_DTYPE_NAMES) if place.endswith("storage") else DTYPE_NAMES
    if value is not None and str(value).removeprefix("torch.") not in known:
        raise ConfigError(
            f"`{place}: {value}` is not a dtype.{did_you_mean(str(value), known)} Use bfloat16, float16 or float32."
        )


def check_installed(node: ConfigNode) -> None:
    """Refuse a target whose package is not installed, before anything heavy is imported.

    Raises:
        UserError: the package is missing; the message holds the pip line.
    """
    target = node.get("_target_")
    package = target.partition(".")[0] if isinstance(target, str) and ":" not in target else "nemo_automodel"
    if package.isidentifier() and not is_available(package):
        require(package, f"`{node.place}._target_: {target}`")


# --- model -----------------------------------------------------------------------------------------------------------


def check_model(node: ConfigNode, notices: list[str]) -> ConfigNode:
    """Check the model's call; keys it does not know are overrides of the model's own configuration.

    Raises:
        ConfigError: a keyword that belongs to another section, a slip in one of ours, or a name that is no dtype.
    """
    for key, elsewhere in _MODEL_KEYS_ELSEWHERE.items():
        if key in node:
            raise ConfigError(f"`model.{key}`: in a file this is `{elsewhere}`. Move it there.")
    check_installed(node)
    check_target(node, own_keywords=_COMMON_MODEL_KEYS)
    _check_one_config(node)
    for key in ("torch_dtype", "dtype"):
        if node.get(key) not in (None, "auto"):
            check_dtype(node[key], f"model.{key}")
    if node.get("embeddings_on_host") not in (None, True, False):
        raise ConfigError(f"`model.embeddings_on_host: {node['embeddings_on_host']}` is not known. Use true or false.")
    if "fast_layers" in node:
        parse_fast_layers(node["fast_layers"], node.get("force_hf") is True)
    if "cuda_graphs" in node:
        parse_cuda_graphs(node["cuda_graphs"])
    if "kernels" in node:
        kernels = node["kernels"]
        parse_kernels(kernels.to_dict() if isinstance(kernels, ConfigNode) else kernels)
    if node.get("backend.rope_fusion") is True:
        notices.append("`model.backend.rope_fusion: true` has no effect.")
    return node


def _check_one_config(node: ConfigNode) -> None:
    target = str(node.get("_target_"))
    given = [key for key in ("config", "pretrained_model_name_or_path") if node.get(key) is not None]
    if "NeMoAutoModel" in target and target.endswith(".from_config") and len(given) != 1:
        which = "both are" if given else "neither is"
        raise ConfigError(
            f"`model` with {target} takes `config` or `pretrained_model_name_or_path`, and {which} given. Keep one: a "
            "directory with config.json, a Hub name, or what a config.json holds."
        )


def freeze_embeddings(config: ConfigNode) -> bool:
    """Return ``freeze_config.freeze_embeddings``; the towers of other models need no freezing here.

    Raises:
        ConfigError: an unknown key or a value that is neither true nor false.
        NotSupportedYetError: ``freeze_language_model``, which would leave a language model nothing to train.
    """
    node = config.get("freeze_config")
    if node is None:
        return False
    check_keys(node, "freeze_config", _FREEZE_KEYS)
    values = {key: conform(node, key, bool | None, "freeze_config") for key in node}
    if values.get("freeze_language_model"):
        raise NotSupportedYetError(
            "`freeze_config.freeze_language_model: true` is for models with other parts, which are not supported yet. "
            "Set it to false."
        )
    return bool(values.get("freeze_embeddings"))


def check_optimizer_numbers(node: ConfigNode) -> None:
    """Refuse rates that are no numbers or negative: torch accepts a Tensor there, so its signature says nothing.

    Raises:
        ConfigError: the first such value.
    """
    for key in ("lr", "weight_decay", "eps"):
        if key not in node:
            continue
        value = conform(node, key, float, "optimizer")
        if value < 0:
            raise ConfigError(f"`optimizer.{key}` is {value:g}, but it cannot be negative. Use 0 or more.")


def check_in_backward(optimizer: ConfigNode, steps: StepSchedulerConfig, max_grad_norm: float | None) -> None:
    """Refuse ``optimizer.in_backward`` where a step needs all gradients at once.

    Raises:
        ConfigError: it is no boolean, steps have several micro-batches, or gradients are clipped.
    """
    if "in_backward" not in optimizer or not conform(optimizer, "in_backward", bool, "optimizer"):
        return
    if steps.local_batch_tokens is not None or steps.global_batch_size != steps.local_batch_size:
        raise ConfigError(
            "`optimizer.in_backward: true` updates weights in the backward pass, so a step has one micro-batch. Set "
            "`step_scheduler.local_batch_size` to `step_scheduler.global_batch_size`, without `local_batch_tokens`."
        )
    if max_grad_norm is not None:
        raise ConfigError(
            "`optimizer.in_backward: true` never has all gradients at once, and clipping is by the norm of all. Set "
            "`clip_grad_norm.max_norm: null`, or leave `in_backward` out."
        )
