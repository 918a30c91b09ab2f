"""Ways to compute the same layer that differ only in speed, and by how much depends on the GPU and on the shapes.

The defaults are what was fastest on an H100 with the shape of Llama-3.1-8B at 8192 tokens a micro-batch: 15,803 tokens
a second against 15,496 without ``swiglu_products`` and 15,444 with ``down_in_depth`` (`benchmarks/results`).
`benchmarks/fast_core.py` times any other (``--cases fast:swiglu_products=0``). On a GPU a run measures which are best
there, see `dispatch`.
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
