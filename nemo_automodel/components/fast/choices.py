"""Ways to compute the same layer that differ only in speed, and by how much depends on the GPU and on the shapes.

The defaults are what was fastest on an H100 with the shape of Llama-3.1-8B at 8192 tokens a micro-batch: 15,803 tokens
a second against 15,496 without ``swiglu_products`` and 15,444 with ``down_in_depth`` (`benchmarks/results`).
`benchmarks/fast_core.py` times any other (``--cases fast:swiglu_products=0``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choices:
    """``swiglu_products``: SwiGLU makes the products of low rank on both sides of it, instead of plain products.

    ``down_in_depth``: the down projection's adapters are folded into the depth of its input gradient (16-bit weights
    only), instead of being added by SwiGLU's backward pass; costs a copy of the layer's output gradient.
    """

    swiglu_products: bool = True
    down_in_depth: bool = False


DEFAULT = Choices()
