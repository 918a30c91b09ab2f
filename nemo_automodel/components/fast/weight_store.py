"""Linear layers that share an input, as one frozen matrix with their adapters beside it or folded into it.

The layers' inputs meet one matrix W and, stacked, one A and one B (s·B in diagonal blocks, s the scale of the
adapters). `DenseStore` keeps W in the dtype of the model and folds the adapters into the same buffer ::

    [ W   s·B ]   N rows
    [ A    0  ]   R rows
      K     R

A forward pass is ``[x, x·Aᵀ] @ [W, s·B]ᵀ`` and an input gradient ``[dy, dy·(s·B)] @ [W; A]``: the update costs no pass
over the outputs of its own, only R more columns of depth, and it is added in the accumulator of the product, so it is
rounded once. The price is that inputs and gradients live in buffers R wider than they are. `Fp8Store` keeps W in 8 bits
and adds the update afterwards.

Weights of the Hugging Face layers become views of the stored matrix. Whatever gives them other memory (moving the
model, assigning a state dict) is noticed at the next call, and they are packed again. The adapters' own tensors stay
outside, in fp32 as a rule: they are copied in when an optimizer has stepped, an operation has written to them or they
have other memory. Writes through ``.data`` are not seen until one of these happens.

Where the next kernel can add the update itself, a store leaves it to it: `forward_pending` and `dgrad_pending` return
what is still to be added.

Shapes: T tokens, K inputs, N outputs, R ranks of all adapters rounded up to `_RANK_TILE`; M = K + R or N + R where
adapters are folded in, K or N where not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from nemo_automodel.components.fast.names import Adapter, Slot
from nemo_automodel.kernels.copy_many import Copy, copy_many_reference
from nemo_automodel.kernels.dropout import Dropout
from nemo_automodel.kernels.fp8 import Rounded
from nemo_automodel.kernels.lora import Update, low_rank_grads

_RANK_TILE = 64
"""Matrix units read the depth of a product in tiles of 64 sixteen-bit numbers."""

_ALIGNED = 8
"""Rows of so many sixteen-bit numbers, or a multiple, are read at full speed."""


class _Steps:
    """Counts the steps of every optimizer of the process: some write to weights without leaving a trace in them."""

    count = 0

    @classmethod
    def increase(cls, *_: object) -> None:
        cls.count += 1


register_optimizer_step_post_hook(_Steps.increase)


class WeightStore:
    """What all stores share: places of layers and adapters, and the products of low rank.

    Weights and biases of ``slots`` are moved into the store.
    """

    margin: int
    """How much wider than their contents buffers are."""
    is_fresh = False
    """Somebody has looked at the adapters just now and will look again before they change, see `watch`."""
    num_packings = 0
    """How often the weights were moved here: places in memory hold as long as it stays."""
    _a_RK: torch.Tensor
    _b_NR: torch.Tensor

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self.num_in = slots[0].linear.in_features
        self.num_out = sum(slot.linear.out_features for slot in slots)
        rank = sum(slot.adapter.rank for slot in slots if slot.adapter is not None)
        self.rank = rank
        self.rank_width = self._width_of(rank)
        self.dtype = slots[0].linear.weight.dtype
        self._places = self._lay_out()
        self.bias_N: torch.Tensor | None = None
        self._pack_all()

    @staticmethod
    def _width_of(rank: int) -> int:
        """Return how many columns ``rank`` ranks take."""
        return -(-rank // _RANK_TILE) * _RANK_TILE

    def _lay_out(self) -> list[tuple[Slot, slice, slice]]:
        """Return each slot with its output rows and its ranks."""
        places, row, rank = [], 0, 0
        for slot in self.slots:
            num_ranks = 0 if slot.adapter is None else slot.adapter.rank
            places.append((slot, slice(row, row + slot.linear.out_features), slice(rank, rank + num_ranks)))
            row, rank = row + slot.linear.out_features, rank + num_ranks
        return places

    def _pack_all(self) -> None:
        first = self.slots[0].linear
        if first.bias is not None:
            self.bias_N = torch.cat([slot.linear.bias.data for slot in self.slots])
            for slot, rows, _ in self._places:
                slot.linear.bias.data = self.bias_N[rows]
        self._pack()
        self.num_packings += 1
        self._addresses = self._base_addresses()
        self._adapters_seen: list[int] = []
        self._weights: list[torch.Tensor] = []
        self._copied_from: list[int] = []
        self._copies: list[Copy] = []
        self._one_kind: tuple[torch.dtype, torch.dtype, float] | None = None

    def _pack(self) -> None:
        """Store the weights of the slots, and make memory for the adapters."""
        raise NotImplementedError

    @property
    def has_adapters(self) -> bool:
        """Whether anything here learns."""
        return self.rank_width > 0

    def prepare(self) -> None:
        """Copy the adapters in; pack again if the weights were given other memory."""
        if not self.is_fresh:
            refresh((self,))

    def forget_adapters(self) -> None:
        """Copy the adapters in at the next call, changed or not: writes through `.data` leave no trace."""
        self._adapters_seen = []

    def find_changes(self) -> bool:
        """Pack again if the weights were given other memory; tell whether the adapters must be copied in."""
        if self._base_addresses() != self._addresses:
            self._pack_all()
        state = self._adapter_state()
        if state == self._adapters_seen:
            return False
        self._adapters_seen = state
        addresses = [weight.data_ptr() for weight in self._weights]
        if addresses != self._copied_from:
            self._copied_from, self._copies = addresses, list(self._find_copies())
        kinds = {
            (slot.adapter.lora_A.weight.dtype, slot.adapter.lora_B.weight.dtype, slot.adapter.scaling)
            for slot in self.slots
            if slot.adapter is not None
        }
        self._one_kind = kinds.pop() if len(kinds) == 1 else None
        return True

    def copies(self) -> list[Copy]:
        """Return where A and s·B of each adapter go and come from; the same objects while nothing moves."""
        return self._copies

    def _find_copies(self) -> Iterator[Copy]:
        for slot, rows, ranks in self._places:
            if slot.adapter is not None:
                yield self._a_RK[ranks], slot.adapter.lora_A.weight.detach(), 1.0
                yield self._b_NR[rows, ranks], slot.adapter.lora_B.weight.detach(), slot.adapter.scaling

    def _base_addresses(self) -> list[int]:
        linears = [slot.linear for slot in self.slots]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        return [tensor.data_ptr() for tensor in (*(linear.weight for linear in linears), *biases)]

    def _adapter_state(self) -> list[int]:
        """Return numbers that change when the adapters may have changed."""
        weights = self._weights = self._find_parameters()
        return [_Steps.count, *(number for weight in weights for number in (weight.data_ptr(), weight._version))]

    def parameters(self) -> list[torch.Tensor]:
        """Return A, B and, with DoRA, the row lengths of every adapter, in the order of `adapter_grads`."""
        return self._weights if self.is_fresh else self._find_parameters()

    def _find_parameters(self) -> list[torch.Tensor]:
        adapters: list[Adapter] = [slot.adapter for slot in self.slots if slot.adapter is not None]
        found = []
        for adapter in adapters:
            magnitude = adapter.magnitude
            found += [adapter.lora_A.weight, adapter.lora_B.weight, *(() if magnitude is None else (magnitude,))]
        return found

    @property
    def adapters_seen(self) -> list[int]:
        """A list that is another object whenever the adapters have changed."""
        return self._adapters_seen

    # Buffers and products of low rank.

    def input_buffer(self, num_tokens: int) -> torch.Tensor:
        """Return memory for inputs, ``[T, M]``, not initialised."""
        return self._a_RK.new_empty((num_tokens, self.num_in + self.margin))

    def output_buffer(self, num_tokens: int) -> torch.Tensor:
        """Return memory for outputs or their gradients, ``[T, M]``, not initialised."""
        return self._a_RK.new_empty((num_tokens, self.num_out + self.margin))

    def low(self, x_TM: torch.Tensor) -> torch.Tensor | None:
        """Return x·Aᵀ, ``[T, R]``, of an input buffer or of dense inputs; None without adapters."""
        return torch.mm(_first(x_TM, self.num_in), self._a_RK.t()) if self.has_adapters else None

    def low_grad(self, dy_TM: torch.Tensor) -> torch.Tensor | None:
        """Return dy·(s·B), ``[T, R]``, of a gradient buffer; None without adapters."""
        return torch.mm(_first(dy_TM, self.num_out), self._b_NR) if self.has_adapters else None

    def adapter_grads(
        self, x_TM: torch.Tensor, dy_TM: torch.Tensor, low_TR: torch.Tensor | None, dlow_TR: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return the gradients of `parameters`, in their dtypes."""
        if low_TR is None or dlow_TR is None:
            return []
        x_TK, dy_TN = _first(x_TM, self.num_in), _first(dy_TM, self.num_out)
        grads = []
        if self._one_kind is not None:  # all adapters alike, as they nearly always are: few and large operations
            dtype_a, dtype_b, scaling = self._one_kind
            if self.rank % _ALIGNED == 0 and self.rank != self.rank_width:
                low_TR, dlow_TR = low_TR[:, : self.rank], dlow_TR[:, : self.rank]
            da_RK, db_NR = low_rank_grads(x_TK, dy_TN, low_TR, dlow_TR, scaling)
            da_RK, db_NR = da_RK.to(dtype_a), db_NR.to(dtype_b)
            if len(self.slots) == 1 and da_RK.shape[0] == self.rank:
                return [da_RK, db_NR]
            for slot, rows, ranks in self._places:
                if slot.adapter is not None:
                    grads += [da_RK[ranks], db_NR[rows, ranks]]
            return grads
        return self.split_grads(*low_rank_grads(x_TK, dy_TN, low_TR, dlow_TR))

    def split_grads(self, da_RK: torch.Tensor, db_NR: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of `parameters`, in their dtypes, from stacked ones; ``db_NR`` lacks the scales."""
        grads = []
        for slot, rows, ranks in self._places:
            if slot.adapter is not None:
                grads.append(da_RK[ranks].to(slot.adapter.lora_A.weight.dtype))
                grads.append(db_NR[rows, ranks].to(slot.adapter.lora_B.weight.dtype).mul(slot.adapter.scaling))
        return grads

    # What is left to the next kernel.

    @property
    def input_mask(self) -> Dropout | None:
        """What drops the adapter's inputs: nothing, unless `dropout.Dropped` is around the store."""
        return None

    def from_row(self, first_row: int) -> WeightStore:
        """Return what computes the rows of inputs from ``first_row`` on: the same, unless there are masks."""
        return self

    @property
    def output_mask(self) -> Dropout | None:
        """What drops the adapters' outputs: as `input_mask`."""
        return None

    @property
    def rank_parts(self) -> tuple[tuple[int, int], ...]:
        """The ranks of each layer, ``(first, last + 1)``."""
        return tuple((ranks.start, ranks.stop) for _, _, ranks in self._places)

    @property
    def a_RK(self) -> torch.Tensor | None:
        """Stacked A, None without adapters."""
        return self._a_RK if self.has_adapters else None

    @property
    def b_NR(self) -> torch.Tensor | None:
        """s·B in diagonal blocks, None without adapters."""
        return self._b_NR if self.has_adapters else None

    def _update(self, low_TR: torch.Tensor) -> Update:
        return Update(low_TR, self._b_NR.t(), self.rank_parts)

    def _dgrad_update(self, dlow_TR: torch.Tensor) -> Update:
        return Update(dlow_TR, self._a_RK, ((0, self.rank),))

    def pending(self, low_TR: torch.Tensor | None) -> Update | None:
        """Return what `forward_pending` leaves to be added."""
        raise NotImplementedError

    def forward_pending(
        self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None
    ) -> torch.Tensor:
        """Return the outputs as `forward` does, without `pending`."""
        raise NotImplementedError

    def dgrad_pending(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> tuple[torch.Tensor, Update | None]:
        """Return the gradient of the inputs and what is still to be added to it."""
        raise NotImplementedError

    def room_for_rounded(self, num_tokens: int) -> Rounded | None:
        """Return room for inputs in 8 bits, to be given to the products beside the inputs; None if they want none."""
        return None

    # Products with the matrix. Rows of inputs may lie in a buffer of this store or be dense.

    def base_outputs(self, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return what `forward_pending` does, the bias added, as ``[T, N]``."""
        y_TN = self.forward_pending(x_TM, low_TR)[:, : self.num_out]
        return y_TN if self.bias_N is None else y_TN.add_(self.bias_N)

    def forward(self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None) -> torch.Tensor:
        """Return the outputs without bias, as the first N columns of ``[T, M]``; ``low_TR`` is `low` of the inputs.

        Without it, here and below, the adapters' share is left out.
        """
        raise NotImplementedError

    def forward_added(self, residual_TN: torch.Tensor, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return residual + outputs, ``[T, N]``."""
        raise NotImplementedError

    def dgrad(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the inputs, ``[T, K]``; ``dlow_TR`` is `low_grad` of the gradient."""
        raise NotImplementedError


def _first(rows_TM: torch.Tensor, width: int) -> torch.Tensor:
    """Return the first columns, the tensor itself where these are all: a view takes as long as starting a kernel."""
    return rows_TM if rows_TM.shape[1] == width else rows_TM[:, :width]


def refresh(stores: Sequence[WeightStore], copy: Callable[[Sequence[Copy]], None] = copy_many_reference) -> None:
    """Prepare stores: the adapters of all that changed are copied in together."""
    changed = [pair for store in stores if store.find_changes() for pair in store.copies()]
    if changed:
        copy(changed)


class DenseStore(WeightStore):
    """Weights in the dtype of the model, adapters folded in."""

    def _pack(self) -> None:
        self.margin = self.rank_width
        first = self.slots[0].linear.weight
        shape = (self.num_out + self.margin, self.num_in + self.margin)
        self._buffer = torch.empty(shape, dtype=first.dtype, device=first.device)
        self._a_RK, self._b_NR = (
            self._buffer[self.num_out :, : self.num_in],
            self._buffer[: self.num_out, self.num_in :],
        )
        # the parts that products read, made once: in a small model every view made in passing counts
        self._weight_NK = self._buffer[: self.num_out, : self.num_in]
        self._weight_KN, self._b_RN = self._weight_NK.t(), self._b_NR.t()
        self._forward_MN, self._backward_MK = self._buffer[: self.num_out].t(), self._buffer[:, : self.num_in]
        self._a_RK.zero_()
        self._b_NR.zero_()
        for slot, rows, _ in self._places:
            view_NK = self._buffer[rows, : self.num_in]
            view_NK.copy_(slot.linear.weight.data)
            slot.linear.weight.data = view_NK

    def forward(self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None) -> torch.Tensor:
        """Return the outputs; see `WeightStore.forward`. The inputs' margin is overwritten."""
        y_TM = self.output_buffer(x_TM.shape[0])
        y_TN = _first(y_TM, self.num_out)
        if low_TR is None or x_TM.shape[1] == self.num_in:  # dense inputs have no margin for the update
            torch.mm(_first(x_TM, self.num_in), self._weight_KN, out=y_TN)
            if low_TR is not None:
                y_TN.addmm_(low_TR, self._b_RN)
        else:
            x_TM[:, self.num_in :] = low_TR
            torch.mm(x_TM, self._forward_MN, out=y_TN)
        return y_TM

    def low_grad(self, dy_TM: torch.Tensor) -> torch.Tensor | None:
        """Return dy·(s·B); see `WeightStore.low_grad`. It lies in the margin of the gradient, where there is one."""
        if not self.has_adapters or dy_TM.shape[1] == self.num_out:
            return super().low_grad(dy_TM)
        dlow_TR = dy_TM[:, self.num_out :]
        return torch.mm(dy_TM[:, : self.num_out], self._b_NR, out=dlow_TR)

    def pending(self, low_TR: torch.Tensor | None) -> Update | None:
        """Return None: inputs have room for the update."""
        return None

    def forward_pending(
        self, x_TM: torch.Tensor, low_TR: torch.Tensor | None, rounded: Rounded | None = None
    ) -> torch.Tensor:
        """Return the outputs, complete."""
        return self.forward(x_TM, low_TR)

    def dgrad_pending(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> tuple[torch.Tensor, Update | None]:
        """Return the gradient of the inputs; complete if the gradient has a margin for the update."""
        if dlow_TR is None or dy_TM.shape[1] != self.num_out:
            return self.dgrad(dy_TM, dlow_TR), None
        return torch.mm(dy_TM, self._weight_NK), self._dgrad_update(dlow_TR)

    def forward_added(self, residual_TN: torch.Tensor, x_TM: torch.Tensor, low_TR: torch.Tensor | None) -> torch.Tensor:
        """Return residual + outputs, the sum made in the accumulator."""
        if low_TR is None:
            return torch.addmm(residual_TN, _first(x_TM, self.num_in), self._weight_KN)
        x_TM[:, self.num_in :] = low_TR
        return torch.addmm(residual_TN, x_TM, self._forward_MN)

    def dgrad(self, dy_TM: torch.Tensor, dlow_TR: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the inputs; see `WeightStore.dgrad`. The gradient's margin is overwritten."""
        if dlow_TR is None:
            return torch.mm(_first(dy_TM, self.num_out), self._weight_NK)
        if dy_TM.shape[1] == self.num_out:
            return torch.mm(dy_TM, self._weight_NK).addmm_(dlow_TR, self._a_RK)
        margin_TR = dy_TM[:, self.num_out :]
        if dlow_TR.data_ptr() != margin_TR.data_ptr():  # `low_grad` writes there, other kernels do not
            margin_TR.copy_(dlow_TR)
        return torch.mm(dy_TM, self._backward_MK)
