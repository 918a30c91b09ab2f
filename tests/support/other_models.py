"""Tiny models of families without fast decoder layers, and the same models under PEFT."""

from __future__ import annotations

import torch
import transformers

from nemo_automodel.components._peft.lora import PeftConfig, apply_lora, lora_layers

BASE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS = {
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "olmo2": ("Olmo2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon": ("FalconConfig", {"bias": True, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "cohere": ("CohereConfig", {"logit_scale": 1.0}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "starcoder2": ("Starcoder2Config", {"embedding_dropout": 0.0, "residual_dropout": 0.0}),
    "nemotron": ("NemotronConfig", {}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 8, "sliding_window": 8, **EXPERTS}),
    "mixtral": ("MixtralConfig", EXPERTS),
}
"""Family → configuration class and what its tiny model needs besides `BASE`."""

RANK, ALPHA = 3, 5.0
EVERY_LINEAR = PeftConfig(match_all_linear=True, dim=RANK, alpha=ALPHA)


def other_config(family: str, **overrides: object) -> transformers.PretrainedConfig:
    name, extra = OTHERS[family]
    return getattr(transformers, name)(**{**BASE, **extra, **overrides})


def base_model(family: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Return a model whose weights are away from zero, biases and norms too; the same for the same arguments."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(other_config(family), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def model_with_adapters(family: str, peft: PeftConfig = EVERY_LINEAR) -> transformers.PreTrainedModel:
    """Return `base_model` with adapters that matter."""
    model = base_model(family)
    apply_lora(model, peft)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model


def under_peft(family: str, ours: transformers.PreTrainedModel) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return the PEFT model that starts from the adapters of ``ours``, and its adapters by our names."""
    import peft

    names = sorted(lora_layers(ours))
    model = peft.get_peft_model(base_model(family), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))
    live = dict(ours.named_parameters())
    adapters = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            our_name = name.removeprefix("base_model.model.").replace(".default.", ".")
            parameter.data.copy_(live[our_name].detach())
            adapters[our_name] = parameter
    assert len(adapters) == 2 * len(names)
    return model, adapters


def adapters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}
