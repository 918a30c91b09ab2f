"""Weights in 4 bits under the fast layers: unpacked before every product, into one piece of memory that all share.

A group of layers has its codes and nothing else. A product unpacks them (`kernels/nf4.py`) into the scratch memory of
the device, which is as large as the largest group of the model, 0.94 GB for a 70B model in 16 bits, and the next
product of any layer overwrites it: the stream of the device keeps them in order. Forward and backward each unpack once:
at 2048 tokens a micro-batch that is 9 % of a 70B step on an H100, at 8192 tokens 3 %.

`Nf4Store` unpacks to the dtype of the computation and then is `DenseStore`, adapters folded into the same product.
`Nf4Fp8Store` unpacks to E4M3 with a scale per output channel and multiplies in 8 bits. The matrix units of 8 bits want
both operands along their inner dimension, so the way back unpacks the transposed matrix; there the channel scales lie
along the inner dimension, where a product cannot apply them, so they are folded into the gradient before its rows are
quantised.

Shapes as in `weight_store`.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakValueDictionary

import torch

from nemo_automodel.components.fast.weight_store import DenseStore, WeightStore
from nemo_automodel.kernels.fp8 import Rounded, quantize_rows, scaled_product
from nemo_automodel.kernels.jit import next_power_of_2
from nemo_automodel.kernels.lora import Update, add_update_
from nemo_automodel.kernels.nf4 import Packed, channel_scales, dequantize, dequantize_e4m3


def _narrow_width_of(rank: int) -> int:
    """Return 16, 32 or multiples of 64.

    The copies of the adapters are what a layer keeps beside its codes: at rank 16, 0.7 GB of a 70B model, not 1.4.
    """
    return 0 if rank == 0 else max(16, next_power_of_2(rank)) if rank <= 64 else -(-rank // 64) * 64


class PackedLinear(Protocol):
    """A linear layer with codes in the place of its weight."""

    packed: Packed
    compute_dtype: torch.dtype


class Scratch:
    """Memory of a device that is overwritten again and again. It lives as long as a store that uses it."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    @classmethod
    def of(cls, device: torch.device) -> Scratch:
        """Return the one of ``device``."""
        scratch = _SCRATCHES.get(device)
        if scratch is None:
            scratch = _SCRATCHES[device] = cls(device)
        return scratch

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory for ``[rows, columns]``, not initialised, until the next call."""
        num_bytes = rows * columns * dtype.itemsize
        if num_bytes > self._memory.numel():
            device = self._memory.device
            del self._memory  # before the larger one is made
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._memory[:num_bytes].view(dtype).view(rows, columns)


_SCRATCHES: WeakValueDictionary[torch.device, Scratch] = WeakValueDictionary()


class Nf4Store(DenseStore):
    """Weights in 4 bits, multiplied in the compute dtype, adapters folded in."""

    _packed: tuple[Packed, ...]
    _scratch: Scratch
    _width_of = staticmethod(_narrow_width_of)

    def _pack(self) -> None:
        linears: list[PackedLinear] = [slot.linear for slot in self.slots]  # type: ignore[misc]
        self.margin, self.dtype = self.rank_width, linears[0].compute_dtype
        self._packed = tuple(linear.packed for linear in linears)
        device = self._packed[0].codes.device
        self._a_RK = torch.zeros((self.rank_width, self.num_in), dtype=self.dtype, device=device)
        self._b_NR = torch.zeros((self.num_out, self.rank_width), dtype=self.dtype, device=device)
        self._scratch = Scratch.of(device)
        self._scratch.matrix(self.num_out + self.margin, self.num_in + self.margin, self.dtype)

    def _unpacked(self) -> torch.Tensor:
        """Return weights and adapters as `DenseStore` lays them out, good until the next product of any layer."""
        shape = (self.num_out + self.margin, self.num_in + self.margin)
        buffer = self._scratch.matrix(*shape, self.dtype)
        for packed, (_, rows, _) in zip(self._packed, self._places, strict=True):
            dequantize(packed, buffer[rows, : self.num_in])
        buffer[self.num_out :, : self.num_in] = self._a_RK
        buffer[: self.num_out, self.num_in :] = self._b_NR
        return buffer

    # What `DenseStore` keeps as views is unpacked anew each time that it is asked for: once a product.

    @property
    def _weight_NK(self) -> torch.Tensor:  # type: ignore[override]
        return self._unpacked()[: self.num_out, : self.num_in]

    @property
    def _weight_KN(self) -> torch.Tensor:  # type: ignore[override]
        return self._weight_NK.t()

    @property
    def _forward_MN(self) -> torch.Tensor:  # type: ignore[override]
        return self._unpacked()[: self.num_out].t()

    @property
    def _backward_MK(self) -> torch.Tensor:  # type: ignore[override]
        return self._unpacked()[:, : self.num_in]

    @property
    def _b_RN(self) -> torch.Tensor:  # type: ignore[override]
        return self._b_NR.t()


class Nf4Fp8Store(WeightStore):
    """Weights in 4 bits, multiplied in 8. The adapters' update is added afterwards, by the next kernel where it can."""

    _packed: tuple[Packed, ...]
    _scale_N1: torch.Tensor
    _ones_K1: torch.Tensor
    _scratch: Scratch
    _width_of = staticmethod(_narrow_width_of)

    def _pack(self) -> None:
        linears: list[PackedLinear] = [slot.linear for slot in self.slots]  # type: ignore[misc]
        self.margin, self.dtype = 0, linears[0].compute_dtype
        self._packed = tuple(linear.packed for linear in linears)
        device = self._packed[0].codes.device
        self._scale_N1 = torch.cat([channel_scales(packed) for packed in self._packed]).unsqueeze(1)
        self._ones_K1 = torch.ones((self.num_in, 1), dtype=torch.float32, device=device)
        self._a_RK = torch.zeros((self.rank_width, self.num_in), dtype=self.dtype, device=device)
        self._b_NR = torch.zeros((self.num_out, self.rank_width), dtype=self.dtype, device=device)
        self._scratch = Scratch.of(device)
        self._scratch.matrix(self.num_out, self.num_in, torch.float8_e4m3fn)

    def _product(self, x_TM: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ."""
        x, x_scale = quantize_rows(x_TM)
        weight_NK = self._scratch.matrix(self.num_out, self.num_in, torch.float8_e4m3fn)
        for packed, (_, rows, _) in zip(self._packed, self._places, strict=True):
            dequantize_e4m3(packed, self._scale_N1[rows, 0], weight_NK[rows])
        return scaled_product(x, x_scale, weight_NK, self._scale_N1, self.dtype)

    def _back_product(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """Return dy·W."""
        dy, dy_scale = quantize_rows(dy_TN, self._scale_N1[:, 0])
        weight_KN = self._scratch.matrix(self.num_in, self.num_out, torch.float8_e4m3fn)
        for packed, (_, rows, _) in zip(self._packed, self._places, strict=True):
            dequantize_e4m3(packed, self._scale_N1[rows, 0], weight_KN[:, rows], is_transposed=True)
        return scaled_product(dy, dy_scale, weight_KN, self._ones_K1, self.dtype)

    def pending(self, low_TR: torch.Tensor | None) -> Update | None:
        """Return the update."""
        return None if low_TR is None else self._update(low_TR)

    def forward_pending(
        self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None
    ) -> torch.Tensor:
        """Return the outputs of the base weights."""
        return self._product(x_TM)

    def dgrad_pending(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> tuple[torch.Tensor, Update | None]:
        """Return the gradient through the base weights, and the adapters' share."""
        return self._back_product(dy_TM), None if dlow_TR is None else self._dgrad_update(dlow_TR)

    def forward(self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None) -> torch.Tensor:
        """Return the outputs; see `WeightStore.forward`."""
        y_TN = self._product(x_TM)
        return y_TN if low_TR is None else y_TN.addmm_(low_TR, self._b_NR.t())

    def forward_added(self, residual_TN: torch.Tensor, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return residual + outputs."""
        y_TN = self._product(x_TM)
        return y_TN.add_(residual_TN) if low_TR is None else add_update_(y_TN, self._update(low_TR), residual_TN)

    def dgrad(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the inputs; see `WeightStore.dgrad`."""
        dx_TK = self._back_product(dy_TM)
        return dx_TK if dlow_TR is None else dx_TK.addmm_(dlow_TR, self._a_RK)
