"""The ``backend:`` block of a model: which kernels the reference's own model classes should use.

Models here are Hugging Face's own classes, so nothing of it changes what runs; it is accepted so that YAML files load,
and whoever builds the model names the keys that do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass
class BackendConfig:
    """The ``model.backend:`` block."""

    attn: str = "sdpa"
    """Use ``model.attn_implementation`` to choose."""
    linear: str = "torch"
    rms_norm: str = "torch"
    rope_fusion: bool = False
    experts: str = "torch"
    dispatcher: str = "torch"
    fake_balanced_gate: bool = False
    fake_gate_noise: float = 0.0
    enable_hf_state_dict_adapter: bool = True
    enable_fsdp_optimizations: bool = False
    te_fp8: Any = None
    gate_precision: Any = None
    compile_attn: bool = False
    cuda_graph: Any = None
    enable_deepep: bool | None = None

    def inert_keys(self) -> list[str]:
        """Return the keys that ask for something and get nothing."""
        return [item.name for item in fields(self) if getattr(self, item.name) != item.default]
