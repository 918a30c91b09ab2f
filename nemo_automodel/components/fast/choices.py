"""Ways to compute the same layer that differ only in speed, and by how much depends on the GPU and on the shapes.

The defaults hold where nothing is measured. On a GPU a run measures which are best there, see `dispatch`: on an H100
that is ``swiglu_products`` for large models, and ``down_in_depth`` for the shapes of Llama 8B and 70B, not of Qwen 7B
and 8B (`benchmarks/results/kernel_table_h100.json`). `benchmarks/fast_core.py` times any of them
(``--cases fast:swiglu_products=0``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Choices:
    """``swiglu_products``: SwiGLU makes the products of low rank on both sides of it, instead of plain products.

    ``down_in_depth``: the down projection's adapters are folded into the depth of its input gradient (16-bit weights
    only), instead of being added by SwiGLU's backward pass; costs a copy of the layer's output gradient.

    ``attention``: the SDPA backend of whole causal rows, ``cudnn``, ``flash`` or ``efficient``; the others follow where
    it cannot run.
    """

    swiglu_products: bool = True
    down_in_depth: bool = False
    attention: str = "cudnn"

    @classmethod
    def from_names(cls, names: Mapping[str, str]) -> Choices:
        """Return the choices that ``config.KERNELS`` gives names to; what is not named is the default."""
        named: dict[str, Any] = {key: name if key == "attention" else name == "on" for key, name in names.items()}
        return cls(**named)

    def names(self) -> dict[str, str]:
        """Return the choices by name."""
        return {k: v if isinstance(v, str) else ("on" if v else "off") for k, v in asdict(self).items()}


DEFAULT = Choices()
DETERMINISTIC = Choices(attention="flash")
"""What holds where the same bits are wanted every time: cuDNN's backward pass adds in no fixed order."""
