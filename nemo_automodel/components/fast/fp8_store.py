"""Linear layers that share an input, as one frozen matrix in 8 bits with their adapters beside it.

W is stored in E4M3 with a scale for each output channel; inputs are rounded to E4M3 with a scale for each token, and
matrix units multiply the two at twice the rate of 16 bits. On the way back the same bytes are used, transposed: the
scale of an output channel is not constant along the depth of that product, so it is moved into the gradient before the
gradient takes scales of its own. Both directions therefore multiply by exactly the same matrix.

Two copies keep the transposed bytes as well, one copy makes them when they are needed, in memory that all layers share:
the same numbers for half the memory and the time to move the bytes. Where the card has no product with scales of rows,
every operand has one scale (`Fp8Scheme.by_rows`).

`Fp8Products` are the products, for weights that learn as well (`fp8_trained`), `Fp8Store` keeps weights that do not.
Adapters stay in the dtype of the model, and their update is added afterwards, by the next kernel where it can.
Whatever gives the layers' weights other memory is noticed as in `WeightStore`, and they are packed again.

Shapes as in `weight_store`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from nemo_automodel.components.fast.fp8_linear import E4M3, Fp8Linear
from nemo_automodel.components.fast.nf4_store import Scratch
from nemo_automodel.components.fast.weight_store import WeightStore
from nemo_automodel.kernels import fp8
from nemo_automodel.kernels.lora import Update, add_update_

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Fp8Scheme:
    """How weights are stored and multiplied."""

    by_rows: bool = True
    """A scale for each token and each output channel, or one for a whole matrix."""
    copies: int = 2
    """2 keeps the bytes both ways round, 1 transposes them in every backward pass, 0 keeps none (`fp8_trained`)."""
    emulate: bool = False
    """Round in the same places and multiply in fp32, on any device."""
    rounds_in_norm: bool = True
    """Norms round their outputs as they write them, instead of a pass over them: 1.5 of 388 ms by the bytes saved, with
    scales of rows only. SwiGLU cannot: a row of it is wider than a program holds, so it would be read again anyway."""
    weight_grads: bool = False
    """Gradients of weights that learn are products in 8 bits as well."""


class Fp8Products(WeightStore):
    """The products of all stores in 8 bits; where the bytes come from is theirs."""

    scheme: ClassVar[Fp8Scheme] = Fp8Scheme()
    _scale_N1: torch.Tensor
    _ones_K1: torch.Tensor

    @classmethod
    def under(cls, scheme: Fp8Scheme) -> type[Self]:
        """Return the store of a scheme, named after it."""
        names = ["Rows" if scheme.by_rows else "Matrix", *["Emulated"] * scheme.emulate, *["Gw"] * scheme.weight_grads]
        return type(f"{cls.__name__}{scheme.copies}{''.join(names)}", (cls,), {"scheme": scheme})

    def forward_bytes(self) -> torch.Tensor:
        """Return the weights in E4M3, ``[N, K]``."""
        raise NotImplementedError

    def backward_bytes(self) -> torch.Tensor:
        """Return the same bytes as ``[K, N]``; they may lie in memory that the next call overwrites."""
        raise NotImplementedError

    @property
    def _is_plain(self) -> bool:
        return self.scheme.emulate or not self._scale_N1.is_cuda

    def room_for_rounded(self, num_tokens: int) -> fp8.Rounded | None:
        """Return room for inputs in 8 bits; None under another scheme, or where the GPU cannot make E4M3."""
        scheme = self.scheme
        if not (scheme.by_rows and scheme.rounds_in_norm) or (scheme.emulate and self._scale_N1.is_cuda):
            return None
        return fp8.Rounded.room(num_tokens, self.num_in, self._scale_N1.device)

    def _product(self, x_TM: torch.Tensor, rounded: fp8.Rounded | None = None) -> torch.Tensor:
        """Return x·Wᵀ; ``rounded`` is x in 8 bits where somebody made it already."""
        weight_NK = self.forward_bytes()
        if self.scheme.by_rows:
            if rounded is None:
                rounded = fp8.Rounded(*fp8.quantize_rows(x_TM, emulate=self.scheme.emulate))
            x, scale, w_scale = rounded.data_MK, rounded.scale_M1, self._scale_N1
        else:
            x, scale = fp8.quantize_matrix(x_TM, emulate=self.scheme.emulate)
            w_scale = self._scale_N1[:1]
        return fp8.scaled_product(x, scale, weight_NK, w_scale, self.dtype, self._is_plain)

    def _back_product(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """Return dy·W."""
        if self.scheme.by_rows:
            dy, scale = fp8.quantize_rows(dy_TN, self._scale_N1.view(-1), emulate=self.scheme.emulate)
            w_scale = self._ones_K1
        else:
            dy, scale = fp8.quantize_matrix(dy_TN, emulate=self.scheme.emulate)
            w_scale = self._scale_N1[:1]
        return fp8.scaled_product(dy, scale, self.backward_bytes(), w_scale, self.dtype, self._is_plain)

    def pending(self, low_TR: torch.Tensor | None) -> Update | None:
        """Return the update."""
        return None if low_TR is None else self._update(low_TR)

    def forward_pending(
        self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: fp8.Rounded | None = None
    ) -> torch.Tensor:
        """Return the outputs of the base weights."""
        return self._product(x_TM, rounded)

    def dgrad_pending(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> tuple[torch.Tensor, Update | None]:
        """Return the gradient through the base weights, and the adapters' share."""
        return self._back_product(dy_TM), None if dlow_TR is None else self._dgrad_update(dlow_TR)

    def forward(
        self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: fp8.Rounded | None = None
    ) -> torch.Tensor:
        """Return the outputs; see `WeightStore.forward`."""
        y_TN = self._product(x_TM, rounded)
        return y_TN if low_TR is None else y_TN.addmm_(low_TR, self._b_NR.t())

    def forward_added(self, residual_TN: torch.Tensor, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return residual + outputs."""
        y_TN = self._product(x_TM)
        return y_TN.add_(residual_TN) if low_TR is None else add_update_(y_TN, self._update(low_TR), residual_TN)

    def dgrad(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the inputs; see `WeightStore.dgrad`."""
        dx_TK = self._back_product(dy_TM)
        return dx_TK if dlow_TR is None else dx_TK.addmm_(dlow_TR, self._a_RK)


class Fp8Store(Fp8Products):
    """Frozen weights in E4M3; the layers become `Fp8Linear` with views of the packed bytes."""

    def _pack(self) -> None:
        self.margin = 0
        linears = [Fp8Linear.attach(slot.linear) for slot in self.slots]
        device = linears[0].weight.device
        self.dtype = linears[0].dense_dtype
        self._weight_NK = torch.empty((self.num_out, self.num_in), dtype=E4M3, device=device)
        self._scale_N1 = torch.empty((self.num_out, 1), dtype=torch.float32, device=device)
        self._fill(linears)
        for linear, (_, rows, _) in zip(linears, self._places, strict=True):
            linear.hold(self._weight_NK[rows], self._scale_N1[rows])
        self._ones_K1 = torch.ones((self.num_in, 1), dtype=torch.float32, device=device)
        self._transposed_KN: torch.Tensor | None = None
        if self.scheme.copies == 2 and not self._is_plain:
            self._transposed_KN = torch.empty((self.num_in, self.num_out), dtype=E4M3, device=device)
            fp8.transpose_bytes(self._weight_NK, self._transposed_KN)
        self._scratch = Scratch.of(device)
        self._a_RK = torch.zeros((self.rank_width, self.num_in), dtype=self.dtype, device=device)
        self._b_NR = torch.zeros((self.num_out, self.rank_width), dtype=self.dtype, device=device)

    def _fill(self, linears: list[Fp8Linear]) -> None:
        """Write bytes and scales, of bytes that are there already or of dense weights."""
        emulate = self.scheme.emulate
        shared = None if self.scheme.by_rows else self._shared_scale(linears)
        for linear, (_, rows, _) in zip(linears, self._places, strict=True):
            if linear.is_packed and (shared is None or torch.equal(linear.scale_N1, shared.expand_as(linear.scale_N1))):
                weight_NK, scale = linear.weight.data, linear.scale_N1
            else:
                dense_NK = linear.dequantized(torch.float32) if linear.is_packed else linear.weight.data
                if shared is None:
                    weight_NK, scale = fp8.quantize_rows(dense_NK, emulate=emulate)
                else:
                    weight_NK, scale = fp8.quantize_by(dense_NK, shared, emulate=emulate), shared
            self._weight_NK[rows] = weight_NK
            self._scale_N1[rows] = scale

    @staticmethod
    def _shared_scale(linears: list[Fp8Linear]) -> torch.Tensor:
        """Return the one scale ``[1, 1]`` under which all weights fit."""
        scales = [x.scale_N1.amax().view(1, 1) if x.is_packed else fp8.scale_of(fp8.largest(x.weight)) for x in linears]
        return torch.cat(scales).amax().view(1, 1)

    def _base_addresses(self) -> list[int]:
        # other bytes may be written into the same memory, and the copy of them must follow
        linears = [slot.linear for slot in self.slots]
        marks = [number for x in linears if isinstance(x, Fp8Linear) for number in (x.weight._version, id(x.scale_N1))]
        return [*super()._base_addresses(), *marks]

    def forward_bytes(self) -> torch.Tensor:
        """Return the bytes of the layers."""
        return self._weight_NK

    def backward_bytes(self) -> torch.Tensor:
        """Return the bytes transposed; without a copy of their own, in memory that the next call overwrites."""
        if self._is_plain:
            return self._weight_NK.t()
        if self._transposed_KN is not None:
            return self._transposed_KN
        bytes_KN = self._scratch.matrix(self.num_in, self.num_out, E4M3)
        fp8.transpose_bytes(self._weight_NK, bytes_KN)
        return bytes_KN
