"""Adapters on disk, in the names and files that PEFT loads.

``adapter_model.safetensors`` holds ``base_model.model.<layer>.lora_A.weight``, ``….lora_B.weight`` and, for DoRA,
``….lora_magnitude_vector``; ``adapter_config.json`` says how to build the layers around them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from nemo_automodel.components._peft.config import PeftConfig
from nemo_automodel.components._peft.lora import lora_layers
from nemo_automodel.shared.errors import UserError

PREFIX = "base_model.model."
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# suffix of the architecture's name → PEFT's name of the task
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}


def _live_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model).items():
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight
        if layer.lora_magnitude_vector is not None:
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    return found


def adapter_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return every adapter tensor under PEFT's name, contiguous and on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in _live_parameters(model).items()}


def load_adapter_state_dict(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copy adapter tensors, under PEFT's names, into the live layers.

    Raises:
        UserError: the names or shapes are not those of the model's adapters.
    """
    live = _live_parameters(model)
    different = sorted(live.keys() ^ tensors.keys())
    if different:
        side = "lacks" if different[0] in live else "has, and the model has not,"
        raise UserError(
            f"The adapter does not fit this model: it {side} `{different[0]}` ({len(different)} such names). "
            "Use the model and the `peft` settings it was trained with."
        )
    for name, parameter in live.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(
                f"The adapter does not fit this model: `{name}` is {list(tensors[name].shape)}, the model has "
                f"{list(parameter.shape)}. Use the model and the `peft.dim` it was trained with."
            )
        with torch.no_grad():  # not through `.data`: whoever keeps a copy of the adapters sees that they changed
            parameter.copy_(tensors[name])


def adapter_config(model: PreTrainedModel, cfg: PeftConfig, base_name: str) -> dict[str, Any]:
    """Return the contents of ``adapter_config.json``: what PEFT needs to build the same layers on ``base_name``."""
    names = sorted(lora_layers(model))
    return {
        "task_type": task_type(model.config),
        "peft_type": "LORA",
        "r": cfg.dim,
        "lora_alpha": cfg.alpha,
        # whole names: patterns mean other things to PEFT
        "rank_pattern": {name: cfg.rank_of(name) for name in names if cfg.rank_of(name) != cfg.dim},
        "alpha_pattern": {name: cfg.alpha_of(name) for name in names if cfg.alpha_of(name) != cfg.alpha},
        "lora_dropout": cfg.dropout,
        "use_dora": cfg.use_dora,
        "use_rslora": cfg.use_rslora,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": base_name,
    }


def task_type(config: PretrainedConfig) -> str:
    """Return PEFT's name of the model's task, by the suffix of its architecture."""
    architecture = (config.architectures or [""])[0]
    if config.is_encoder_decoder and architecture.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), "CAUSAL_LM")


def automodel_peft_config(cfg: PeftConfig) -> dict[str, Any]:
    """Return the contents of ``automodel_peft_config.json``: our settings without ``dim`` and ``alpha``."""
    return {key: value for key, value in cfg.to_dict().items() if key not in ("dim", "alpha")}


def config_from_adapter(
    adapter_config: dict[str, Any], automodel_config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> PeftConfig:
    """Return settings that put adapters exactly where ``tensors`` sit.

    ``automodel_config`` is empty for an adapter that PEFT wrote.

    Raises:
        UserError: the adapter uses something that these layers do not have.
    """
    for key in ("modules_to_save", "target_parameters", "trainable_token_indices"):
        if adapter_config.get(key):
            raise UserError(
                f"The adapter sets `{key}` in adapter_config.json, which this version cannot read. "
                "Merge it into its base first: automodel merge, or PEFT."
            )
    if adapter_config.get("peft_type") != "LORA" or adapter_config.get("bias", "none") != "none":
        raise UserError(
            f"The adapter is of type {adapter_config.get('peft_type')} with `bias: {adapter_config.get('bias')}`, but "
            "only LoRA without biases can be read. Merge it into its base with PEFT first."
        )
    names = sorted(
        {
            name.removeprefix(PREFIX).removesuffix(f".{part}")
            for name in tensors
            for part in _PARTS
            if name.endswith(f".{part}")
        }
    )
    return PeftConfig(
        target_modules=names,
        dim=adapter_config["r"],
        alpha=adapter_config["lora_alpha"],
        rank_pattern=_own_values(adapter_config.get("rank_pattern"), names),
        alpha_pattern=_own_values(adapter_config.get("alpha_pattern"), names),
        use_dora=adapter_config.get("use_dora", False),
        use_rslora=adapter_config.get("use_rslora", False),
        lora_dtype=automodel_config.get("lora_dtype"),
    )


def _own_values(pattern: dict[str, Any] | None, names: list[str]) -> dict[str, Any]:
    """Return the values of layers that have their own, by whole name; PEFT's patterns are ends of names."""
    found: dict[str, Any] = {}
    for name in names:
        for key, value in (pattern or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                found[name] = value
                break
    return found
