"""Where the weights of a fast layer lie in the Hugging Face layer that it stands for.

The modules stay: their weights become views of the packed matrices, so every name in a state dict, a checkpoint or an
adapter is Hugging Face's, and the modules still compute, from the same memory, where the fast form does not apply.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Packed matrix → the linear layers in it, from top to bottom."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: ``y += scaling · x·Aᵀ·Bᵀ``. Modules and not tensors, because loading may exchange the tensors."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    scaling: float
    owner: nn.Module | None = None
    """With DoRA, the module that holds ``lora_magnitude_vector``, the lengths of the rows."""

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's row lengths ``[N]``, None without it."""
        if self.owner is None:
            return None
        vector = self.owner.lora_magnitude_vector
        assert isinstance(vector, nn.Parameter)
        return vector

    @property
    def rank(self) -> int:
        """Rows of ``A``."""
        return self.lora_A.out_features


@dataclass(frozen=True)
class Slot:
    """One linear layer of a packed matrix."""

    name: str
    linear: nn.Linear
    adapter: Adapter | None


def slots_of(layer: nn.Module, adapters: dict[nn.Module, Adapter]) -> dict[str, list[Slot]]:
    """Return the linear layers of each packed matrix with their adapters, which ``adapters`` holds by linear layer."""
    found: dict[str, list[Slot]] = {}
    for group, paths in GROUPS.items():
        linears = [layer.get_submodule(path) for path in paths]
        found[group] = [
            Slot(path.rpartition(".")[2], linear, adapters.get(linear))
            for path, linear in zip(paths, linears, strict=True)
            if isinstance(linear, nn.Linear)
        ]
        assert len(found[group]) == len(paths), f"{paths} are linear layers"
    return found
