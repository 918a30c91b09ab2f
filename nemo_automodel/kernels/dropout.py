"""Dropout whose masks are made where they are used, and made again on the way back, instead of being kept.

Whether element (row, column) of a matrix survives is a function of its place, of a seed that is drawn once for a
layer's forward pass and of a stream, one for each mask of the layer. So forward pass, backward pass and recomputation
agree without a byte of memory, in kernels of any tiling and in plain PyTorch.

The function is a counter hash: two elements that lie side by side, columns 2j and 2j + 1, share the place
``row · ⌈width / 2⌉ + j``, which, shifted by a key, goes through three rounds of xor-shift and multiplication with the
constants of Wellons' *triple32*; a second key is added in the second round. Both keys come from seed and stream through
a two-round hash. The first element of a pair has the lower 16 of the 32 bits and is dropped when they are below
``p · 2¹⁶``, the second the upper ones: p is exact to 2⁻¹⁷ and ``1 / (1 − p)`` belongs to what p then is. Two rounds are
not enough: at some distances of a power of two elements then differ in correlation by up to 2 %
(`tests/kernels/test_dropout.py` measures every distance).

Price on an H100, by arithmetic: 9 instructions a pair on the units for logic and 3 on those for multiplication. An 8B
model at 8192 tokens decides 11.3e9 times in each use of its masks, 3.5 ms, most of it in the shadow of memory. A mask
of one bit an element would cost 1.4 GB and save two thirds of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_automodel.kernels.jit import jit, tl

_LOW_32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


@dataclass(frozen=True)
class Dropout:
    """One mask. ``seed`` is int64 ``[1]`` on the device, ``stream`` tells the masks of one seed apart.

    Of a matrix that is computed in tiles of rows, each is under the mask from its ``first_row`` on.
    """

    seed: torch.Tensor
    stream: int
    probability: float
    first_row: int = 0

    @property
    def threshold(self) -> int:
        """What a 16-bit number must reach for its element to survive."""
        return min(round(self.probability * 2**16), 2**16 - 1)

    @property
    def scale(self) -> float:
        """What survivors are multiplied by."""
        return 1 / (1 - self.threshold / 2**16)

    @property
    def salt(self) -> int:
        """The stream as a 32-bit number that is added to the seed."""
        return (self.stream + 1) * _GOLDEN & _LOW_32

    def keeps(self, num_rows: int, num_cols: int) -> torch.Tensor:
        """Return the mask, bool ``[num_rows, num_cols]``: true where an element survives."""
        low, high = self.seed & _LOW_32, (self.seed >> 32) & _LOW_32
        first = _mix_reference(_mix_reference(low + self.salt & _LOW_32) ^ high)
        second = _mix_reference(_mix_reference(high + self.salt & _LOW_32) ^ first)
        num_pairs = -(-num_cols // 2)
        rows, pairs = (torch.arange(n, device=self.seed.device) for n in (num_rows, num_pairs))
        x = ((rows[:, None] + self.first_row) * num_pairs + pairs + first) & _LOW_32
        x = ((x ^ (x >> 17)) * 0xED5AD4BB + second) & _LOW_32
        x = ((x ^ (x >> 11)) * 0xAC4C1B51) & _LOW_32
        x = ((x ^ (x >> 15)) * 0x31848BAB) & _LOW_32
        halves = torch.stack([x & 0xFFFF, x >> 16], dim=-1).flatten(1)
        return halves[:, :num_cols] >= self.threshold

    def apply(self, x_TN: torch.Tensor) -> torch.Tensor:
        """Return ``x_TN`` with dropped elements zero and the others scaled."""
        return torch.where(self.keeps(*x_TN.shape), x_TN * self.scale, 0.0)


Share = tuple[int, int, Dropout]
"""First rank, last rank + 1, and the mask of what belongs to them."""


def shares_of(parts: Sequence[tuple[int, int]], dropouts: Sequence[Dropout]) -> list[Share]:
    """Return the ranks that share a mask: all of them under one mask, else those of each part that has any."""
    if len(dropouts) == 1:
        return [(parts[0][0], parts[-1][1], dropouts[0])]
    return [(first, to, mask) for (first, to), mask in zip(parts, dropouts, strict=True) if to > first]


def _mix_reference(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _LOW_32
    x = (x ^ (x >> 15)) * 0xD35A2D97 & _LOW_32
    return x ^ (x >> 15)


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@jit
def keeps_tile(
    seed_ptr,
    rows,
    first_col,
    width,
    SALT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STARTS_EVEN: tl.constexpr,
):
    """Return which elements of a matrix ``width`` wide survive, a tile of `Dropout.keeps`.

    The tile holds ``rows`` and ``BLOCK_N`` columns from ``first_col`` on; where that may be odd, pairs are cut in two
    and every element is decided by itself.
    """
    seed = tl.load(seed_ptr)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    first = _mix(_mix(low + SALT) ^ high)
    second = _mix(_mix(high + SALT) ^ first)
    row_at = (rows * ((width + 1) // 2)).to(tl.uint32) + first
    if STARTS_EVEN:
        pairs = (first_col // 2).to(tl.uint32) + tl.arange(0, BLOCK_N // 2).to(tl.uint32)
        x = _scramble(row_at[:, None] + pairs[None, :], second)
        return tl.interleave((x & 0xFFFF) >= THRESHOLD, (x >> 16) >= THRESHOLD)
    cols = first_col.to(tl.uint32) + tl.arange(0, BLOCK_N).to(tl.uint32)
    x = _scramble(row_at[:, None] + (cols >> 1)[None, :], second)
    return tl.where((cols & 1)[None, :] == 0, x & 0xFFFF, x >> 16) >= THRESHOLD


@jit
def _scramble(x, key):
    x = (x ^ (x >> 17)) * 0xED5AD4BB + key
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    return (x ^ (x >> 15)) * 0x31848BAB
