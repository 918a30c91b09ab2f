"""What the sections beside ``model:`` ask of the model."""

from __future__ import annotations

from typing import Any

from nemo_automodel.recipes.settings import RunSettings


def model_wishes(settings: RunSettings, peft: Any) -> dict[str, Any]:
    """Return what the settings ask of the model beyond its own section, as keywords of `NeMoAutoModelForCausalLM`."""
    wishes: dict[str, Any] = {}
    if peft is not None:
        wishes["peft_config"] = peft
    if settings.quantization is not None:
        wishes["quantization_config"] = settings.quantization
    if settings.fp8 is not None:
        wishes["fp8_config"] = settings.fp8
    if settings.qat is not None:
        scheme = settings.qat.quantizer if settings.qat.quantizer is not None else settings.qat.qat_config
        wishes["qat_config"] = scheme.instantiate()
    if settings.compile.enabled or settings.distributed.enable_compile:
        wishes["compile_config"] = settings.compile
    if settings.distributed.enable_compile:
        wishes["compile_layers"] = True
    if settings.freeze_embeddings:
        wishes["freeze_config"] = {"freeze_embeddings": True}
    if settings.distributed.recompute_policy() != "none":
        wishes["activation_checkpointing"] = settings.distributed.recompute_policy()
    if settings.distributed.mlp_tile_tokens is not None:
        wishes["mlp_tile_tokens"] = settings.distributed.mlp_tile_tokens
    return wishes
