"""Adapters of models without fast decoder layers: each on its linear layer, as one fused function.

No family has code here. Whatever Transformers' layers are made of, an adapter sits on a linear layer, fused q, k and v
or gate and up included, and that layer's class is exchanged. A linear class of the model's own counts if it computes
the same, which it is asked on two rows. What is no linear layer, such as GPT-2's `Conv1D` and the three-dimensional
weights of experts, gets no adapters in the first place (`components/_peft`).
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel.components._peft.lora import LinearLoRA, lora_layers
from nemo_automodel.components.fast.dropout import AdapterDropout
from nemo_automodel.components.fast.linear import FusedLinear, fuse_linear
from nemo_automodel.components.fast.names import Adapter
from nemo_automodel.components.fast.watch import Watch

logger = logging.getLogger(__name__)


def fuse_adapters(model: PreTrainedModel, recompute: str = "none", dropout: AdapterDropout | None = None) -> int:
    """Give every adapter that can have it its fused form, log how many got it, and return that number.

    The model must be on its device. ``recompute`` is the policy under which Transformers runs its layers: ``none``,
    ``selective`` or ``full``. ``dropout`` is on the adapters.
    """
    adapters = {name: layer for name, layer in lora_layers(model).items() if not isinstance(layer, FusedLinear)}
    reasons = {name: reason for name, layer in adapters.items() if (reason := _obstacle(layer)) is not None}
    for name, layer in adapters.items():
        if name not in reasons:
            adapter = Adapter(layer.lora_A, layer.lora_B, layer.scaling)
            fuse_linear(layer, adapter, keeps_products=recompute == "selective", dropout=dropout)
    Watch(model, [layer.fused_core.store for layer in adapters.values() if isinstance(layer, FusedLinear)])
    num_fused, total = len(adapters) - len(reasons), len(adapters)
    rest = ""
    if reasons:
        first = next(iter(reasons))
        rest = f"; plain: {len(reasons)}, the first is `{first}`, {reasons[first]}"
    variant = "" if dropout is None else f"; {dropout}"
    logger.info("Adapters: fused on %d of %d linear layers%s%s.", num_fused, total, variant, rest)
    return num_fused


def _obstacle(layer: LinearLoRA) -> str | None:
    """Return why a layer's adapter stays as it is, None when it can be fused."""
    kind = f"which is a {_own_class(layer).__name__}"
    if not layer.weight.is_floating_point() or layer.weight.shape != (layer.out_features, layer.in_features):
        return f"{kind} with packed weights"
    if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
        return "which is trained besides its adapter"
    return None if _is_linear(layer) else f"{kind} and computes more than a product and a bias"


def _own_class(layer: LinearLoRA) -> type[nn.Module]:
    """Return the class that the layer had before its adapter."""
    bases = type(layer).__mro__
    return bases[bases.index(LinearLoRA) + 1]


def _is_linear(layer: LinearLoRA) -> bool:
    """Tell whether the layer's own class computes what `nn.Linear` does; classes of models are asked, on two rows."""
    if _own_class(layer) is nn.Linear:
        return True
    weight = layer.weight
    x = torch.linspace(-1, 1, 2 * layer.in_features, dtype=weight.dtype, device=weight.device).view(2, -1)
    with torch.no_grad():
        found, expected = super(LinearLoRA, layer).forward(x), nn.functional.linear(x, weight, layer.bias)
    tolerance = 2e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
