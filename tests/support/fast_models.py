"""Pairs of equal models, with adapters or with all weights to learn: one of Transformers' layers, one of the fast ones.

In float64 or fp32.
"""

from __future__ import annotations

import types

import torch
import transformers
from support.tiny import tiny_config

from nemo_automodel._transformers.fast_layers import FastRequest, use_fast_layers
from nemo_automodel.components._peft.lora import PeftConfig, apply_lora, lora_layers

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _exact_norm(self, x: torch.Tensor) -> torch.Tensor:
    """Compute RMSNorm in the dtype of its input: Transformers' own computes in fp32 even between float64 layers."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def plain_model(
    family: str, peft: PeftConfig, dtype: torch.dtype = torch.float64, **overrides: object
) -> transformers.PreTrainedModel:
    """Return a model with adapters that matter, the same for the same arguments."""
    torch.manual_seed(0)
    config = tiny_config(family, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    apply_lora(model, peft)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(_exact_norm, module)
    return model.train()


def fast_model(
    family: str,
    peft: PeftConfig,
    dtype: torch.dtype = torch.float64,
    recompute: str = "none",
    mlp_tile_tokens: int | None = None,
    **overrides: object,
) -> transformers.PreTrainedModel:
    """Return the model that `plain_model` returns, with fast layers."""
    model = plain_model(family, peft, dtype, **overrides)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    assert use_fast_layers(model, FastRequest("on", peft, recompute, mlp_tile_tokens))
    return model


def full_model(family: str, dtype: torch.dtype = torch.float64, frozen: str = "", **overrides: object):
    """Return a model of which every weight learns but those whose names hold a word of ``frozen``."""
    torch.manual_seed(0)
    config = tiny_config(family, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
        parameter.requires_grad_(not any(word in name for word in frozen.split()))
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(_exact_norm, module)
    return model.train()


def trained_model(
    family: str,
    dtype: torch.dtype = torch.float64,
    recompute: str = "none",
    mlp_tile_tokens: int | None = None,
    **more: object,
):
    model = full_model(family, dtype, **more)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    assert use_fast_layers(model, FastRequest("on", None, recompute, mlp_tile_tokens))
    return model


def adapters_of(targets: str | list[str] = "*_proj", dtype: str = "float64", **settings: object) -> PeftConfig:
    return PeftConfig(target_modules=targets, **{"dim": 3, "alpha": 5, "lora_dtype": dtype, **settings})


def tokens(num_rows: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 448, (num_rows, seq_len), generator=torch.Generator().manual_seed(seed))


def assert_same_step(plain, fast, tolerance: float, **inputs: torch.Tensor) -> None:
    """Compare the logits and every gradient of one step."""
    found = []
    for model in (plain, fast):
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
        (logits * weights).sum().backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (logits, grads), (fast_logits, fast_grads) = found
    assert grads.keys() == fast_grads.keys()
    for name, expected in {"logits": logits, **grads}.items():
        value = fast_logits if name == "logits" else fast_grads[name]
        assert value is not None, f"{name} has no gradient"
        error = (value - expected).norm() / expected.norm().clamp_min(1e-3)
        assert error <= tolerance, f"{name} differs by {error:.1e} of its norm"
