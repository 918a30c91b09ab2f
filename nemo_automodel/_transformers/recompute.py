"""What a model computes again in the backward pass, exchanged while it trains: between two micro-batches.

Fast layers ask their core in every call; Transformers' own are told through their checkpoints. Either way it takes
less than a millisecond, and weights, adapters and their gradients stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nemo_automodel._transformers.assemble import recompute_activations
from nemo_automodel.components.fast.decoder_layer import FastDecoderLayer
from nemo_automodel.components.fast.linear import FusedLinear
from nemo_automodel.components.fast.offload import host_bytes
from nemo_automodel.components.fast.policies import POLICIES
from nemo_automodel.shared.memory_policies import EXACT_POLICIES, PLAIN_POLICIES, RECOMPUTE_POLICIES


def known_policies(is_fast: bool, shares_memory: bool = False) -> tuple[str, ...]:
    """Return the policies of fast or of Transformers' own layers, the fastest and most in need of memory first.

    Under all of them every number is the same. Where GPU and host share memory, moving to the host saves none.
    """
    if not is_fast:
        return PLAIN_POLICIES
    return tuple(name for name in EXACT_POLICIES if not (shares_memory and POLICIES[name].offloads))


def policies_from(model: PreTrainedModel, policy: str) -> tuple[str, ...]:
    """Return ``policy``, under which the model computes, and those that need less memory, the fastest first.

    It is alone where the model cannot change to another.
    """
    is_fast = bool(_fast_layers(model))
    if _is_compiled(model) or not (is_fast or model.supports_gradient_checkpointing):
        return (policy,)
    device = model.device
    is_shared = device.type == "cuda" and bool(torch.cuda.get_device_properties(device).is_integrated)
    leaner = RECOMPUTE_POLICIES[RECOMPUTE_POLICIES.index(policy) + 1 :]
    return (policy, *(name for name in leaner if name in known_policies(is_fast, is_shared)))


def switch_recompute(model: PreTrainedModel, policy: str) -> None:
    """Compute under ``policy``, one of `policies_from`, from the next forward pass on."""
    fast = _fast_layers(model)
    for layer in fast:
        layer.fast_core.recompute = policy
    if fast:
        return
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.fused_core.keeps_products = policy == "selective"
    model._set_gradient_checkpointing(enable=False)
    if policy != "none":
        recompute_activations(model, policy)


def host_bytes_of(model: PreTrainedModel, num_tokens: int) -> int:
    """Return what ``full_offload`` keeps in the host's memory for a micro-batch of ``num_tokens``."""
    token_bytes = model.dtype.itemsize
    return sum(host_bytes(num_tokens, layer.fast_core.spec.hidden_size * token_bytes) for layer in _fast_layers(model))


def _fast_layers(model: PreTrainedModel) -> list[FastDecoderLayer]:
    return [module for module in model.modules() if isinstance(module, FastDecoderLayer)]


def _is_compiled(model: PreTrainedModel) -> bool:
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return any(module._compiled_call_impl is not None for module in (model, *layers))
