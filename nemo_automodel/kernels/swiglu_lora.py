"""SwiGLU, ``h = silu(gate) · up`` (Shazeer 2020), with the LoRA products around it.

Gate and up are the halves of one matrix, as the fused projection writes it. The backward pass overwrites them with
their own gradients and ``dh`` with ``h``, which the weight gradients of the next layer need: no new memory, but it runs
once. The forward pass leaves them alone, unless their update is under a mask: then it writes the sums over them, and
the backward pass needs neither update nor mask.

Between the projections of an MLP lie four products of low rank that each cost a pass over the widest matrices of the
model when they stand alone: the update of gate and up, ``low·(s·B)ᵀ``; the next projection's ``h·Aᵀ``; on the way back
the update of dh, ``dlow·A``; and ``d(gate, up)·(s·B)``. SwiGLU reads and writes those matrices anyway, so it does all
four on the matrix units, tile by tile, and each can be left out. Arithmetic is fp32, every result is rounded once.

The kernels are in `swiglu_lora_triton`.

Shapes: T tokens, F intermediate size, G = 2F, R ranks.
"""

from __future__ import annotations

import torch

from nemo_automodel.kernels.dropout import Dropout
from nemo_automodel.kernels.dropped_products import dropped_low
from nemo_automodel.kernels.jit import runs_triton
from nemo_automodel.kernels.lora import MAX_BLOCK_R, Update, add_update_reference
from nemo_automodel.kernels.swiglu_lora_triton import swiglu_lora_backward_triton, swiglu_lora_triton


def swiglu_lora(
    gate_up_TG: torch.Tensor,
    out_TF: torch.Tensor,
    update: Update | None,
    a_RF: torch.Tensor | None,
    a_rank: int,
    a_dropout: Dropout | None = None,
) -> torch.Tensor | None:
    """Write ``silu(gate) · up`` to ``out_TF``, the update added to gate and up first; return ``out·Aᵀ`` ``[T, R]``.

    ``gate_up_TG`` stays as it is, unless the update is under a mask, one for gate and up: then it becomes the sum.
    Without ``a_RF`` the result is None. Rows may lie in wider buffers. ``a_rank`` is how many rows of ``a_RF`` are in
    use; the others are zero. ``a_dropout`` drops what A multiplies; only one of both is under a mask.
    """
    if not runs_triton(gate_up_TG):
        return swiglu_lora_reference(gate_up_TG, out_TF, update, a_RF, a_rank, a_dropout)
    if a_RF is None or a_rank <= MAX_BLOCK_R:
        return swiglu_lora_triton(gate_up_TG, out_TF, update, a_RF, a_rank, a_dropout)
    swiglu_lora_triton(gate_up_TG, out_TF, update, None, 0)
    # more ranks than a tile holds: a product of its own reads h once more
    return torch.mm(out_TF, a_RF.t()) if a_dropout is None else _product(out_TF, a_RF.t(), a_rank, a_dropout)


def swiglu_lora_backward(
    dh_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    update: Update | None,
    dh_update: Update | None,
    b_GR: torch.Tensor | None,
    parts: tuple[tuple[int, int], ...],
) -> torch.Tensor | None:
    """Overwrite gate and up with their gradients and ``dh_TF`` with ``h``; return ``d(gate, up)·B`` ``[T, R]``.

    ``update`` is the one of `swiglu_lora`, ``dh_update`` is added to dh first. ``b_GR`` holds the blocks of gate and up
    at the ranks ``parts`` and zero elsewhere; without it the result is None.
    """
    if not runs_triton(gate_up_TG):
        return swiglu_lora_backward_reference(dh_TF, gate_up_TG, update, dh_update, b_GR, parts)
    if b_GR is None or max(to - first for first, to in parts) <= MAX_BLOCK_R:
        return swiglu_lora_backward_triton(dh_TF, gate_up_TG, update, dh_update, b_GR, parts)
    swiglu_lora_backward_triton(dh_TF, gate_up_TG, update, dh_update, None, parts)
    return torch.mm(gate_up_TG, b_GR)


def _product(x_TN: torch.Tensor, factor_NR: torch.Tensor, rank: int, dropout: Dropout) -> torch.Tensor:
    return dropped_low(x_TN, factor_NR, ((0, rank),), (dropout,))


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def swiglu_lora_reference(
    gate_up_TG: torch.Tensor,
    out_TF: torch.Tensor,
    update: Update | None,
    a_RF: torch.Tensor | None,
    a_rank: int,
    a_dropout: Dropout | None = None,
) -> torch.Tensor | None:
    """Do what `swiglu_lora` says in plain operations."""
    math_dtype = torch.promote_types(gate_up_TG.dtype, torch.float32)
    if update is not None and update.dropouts:
        add_update_reference(gate_up_TG, update, None)
    elif update is not None:
        gate_up_TG = gate_up_TG.to(math_dtype) + update.product(math_dtype)
    gate, up = gate_up_TG.to(math_dtype).chunk(2, dim=-1)
    out_TF.copy_(torch.nn.functional.silu(gate) * up)
    if a_RF is None:
        return None
    return torch.mm(out_TF if a_dropout is None else a_dropout.apply(out_TF), a_RF.t())


def swiglu_lora_backward_reference(
    dh_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    update: Update | None,
    dh_update: Update | None,
    b_GR: torch.Tensor | None,
    parts: tuple[tuple[int, int], ...],
) -> torch.Tensor | None:
    """Do what `swiglu_lora_backward` says in plain operations."""
    math_dtype = torch.promote_types(gate_up_TG.dtype, torch.float32)
    dh, gate_up = dh_TF.to(math_dtype), gate_up_TG.to(math_dtype)
    if update is not None:
        gate_up = gate_up + update.product(math_dtype)
    if dh_update is not None:
        dh = dh + dh_update.product(math_dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate, dup = dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * silu
    dh_TF.copy_(silu * up)  # dh and gate may be views of what is overwritten here
    gate_up_TG.copy_(torch.cat([dgate, dup], dim=-1))
    if b_GR is None:
        return None
    return torch.mm(gate_up_TG, b_GR)
