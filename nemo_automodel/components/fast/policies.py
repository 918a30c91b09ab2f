"""What a fast layer keeps for its backward pass, and in how many pieces its MLP runs.

| policy | keeps | bytes a token | made again |
|---|---|---|---|
| none | input, middle, q/k/v, attention's output, gate and up | 4h + 2(q + 2k) + 2q + 4f | nothing |
| fp8_gate_up | the same, gate and up in E4M3 | 2f less | nothing; noise in gradients that use them |
| selective, sac2 | all but gate and up | 4f less | gate and up |
| sac1 | input, middle, attention's output | 4h + 2q | gate and up, q/k/v |
| full | input | 2h | everything but the last product |
| full_offload | nothing on the GPU, the input on the host | 2h there | as full |

In 16 bits; h hidden size, q and k widths of queries and keys, f intermediate size; a few numbers a token and the
products of low rank (R a token and pack) come on top, except where all is made again. An 8B model has 92, 64, 36, 24, 8
and 0 KB a token and layer.

The MLP of a long row works on 3f numbers a token; in tiles of tokens it needs them for one tile. Gradients of adapters
and weights are summed tile by tile, in order. A weight matrix is read, and a packed one unpacked, once a tile.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from nemo_automodel.components.fast.offload import HostCopies
from nemo_automodel.kernels.fp8 import Rounded, dequantize_rows, quantize_rows
from nemo_automodel.shared.memory_policies import tile_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """What is kept."""

    keeps_layer: bool = True
    """Anything but the input."""
    keeps_qkv: bool = True
    keeps_gate_up: bool = True
    rounds_gate_up: bool = False
    """Gate and up are kept in 8 bits."""
    offloads: bool = False
    """The input waits in the host's memory."""


POLICIES = {
    "none": Policy(),
    "fp8_gate_up": Policy(rounds_gate_up=True),
    "selective": Policy(keeps_gate_up=False),
    "sac2": Policy(keeps_gate_up=False),
    "sac1": Policy(keeps_gate_up=False, keeps_qkv=False),
    "full": Policy(keeps_layer=False),
    "full_offload": Policy(keeps_layer=False, offloads=True),
}


class Tiles:
    """How the MLP of a model divides tokens."""

    def __init__(self, asked: int | None = None) -> None:
        self.asked = asked
        self._has_told = False

    def of(self, num_tokens: int, recompute: str) -> list[slice]:
        """Return the tiles of so many tokens under a policy."""
        size = tile_tokens(self.asked, recompute, num_tokens)
        if self.asked is None and size < num_tokens and not self._has_told:
            self._has_told = True
            logger.info(
                "A micro-batch has %d tokens: the MLP works on tiles of %d. `distributed.mlp_tile_tokens` sets "
                "another size.",
                num_tokens,
                size,
            )
        return [slice(first, min(first + size, num_tokens)) for first in range(0, max(num_tokens, 1), size)]


@dataclass(frozen=True)
class Memory:
    """How the layers of a model keep what they need again. One for all of them."""

    recompute: str = "none"
    """A name of `POLICIES`."""
    tiles: Tiles = field(default_factory=Tiles)
    host: HostCopies = field(default_factory=HostCopies)


@dataclass(frozen=True)
class RoundedHalves:
    """Gate and up in E4M3, each with a scale for every token."""

    gate: Rounded
    up: Rounded

    @classmethod
    def of(cls, gate_up_TM: torch.Tensor, num_out: int) -> RoundedHalves:
        """Round gate and up, the first ``num_out`` columns."""
        emulate = gate_up_TM.is_cuda and torch.cuda.get_device_capability(gate_up_TM.device) < (8, 9)
        halves = gate_up_TM[:, : num_out // 2], gate_up_TM[:, num_out // 2 : num_out]
        gate, up = (Rounded(*quantize_rows(half, emulate=emulate)) for half in halves)
        return cls(gate, up)

    def write_to(self, gate_up_TM: torch.Tensor) -> torch.Tensor:
        """Write them into the first columns of a buffer and return it."""
        width = self.gate.data_MK.shape[1]
        dequantize_rows(self.gate, gate_up_TM[:, :width])
        dequantize_rows(self.up, gate_up_TM[:, width : 2 * width])
        return gate_up_TM
