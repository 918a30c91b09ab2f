"""SwiGLU, ``h = silu(gate) · up`` (Shazeer 2020), and its gradient in place.

Gate and up are the halves of one matrix, as the fused projection writes it. The backward pass overwrites them with
their own gradients and overwrites ``dh`` with ``h``, which the weight gradients of the next layer need: no new memory.
The price is that it can run once. Arithmetic is fp32, every result is rounded once.

Rows may lie in wider buffers. Shapes: T tokens, F intermediate size, G = 2F.
"""

from __future__ import annotations

import torch

from nemo_automodel.kernels.jit import jit, next_power_of_2, num_warps_for, runs_triton, tl

_BLOCK = 1024


def swiglu(gate_up_TG: torch.Tensor, out_TF: torch.Tensor) -> torch.Tensor:
    """Write ``silu(gate) · up`` to ``out_TF`` and return it."""
    run = swiglu_triton if runs_triton(gate_up_TG) else swiglu_reference
    run(gate_up_TG, out_TF)
    return out_TF


def swiglu_backward(dh_TF: torch.Tensor, gate_up_TG: torch.Tensor) -> None:
    """Overwrite gate and up with their gradients, and ``dh_TF`` with ``silu(gate) · up``."""
    run = swiglu_backward_triton if runs_triton(gate_up_TG) else swiglu_backward_reference
    run(dh_TF, gate_up_TG)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def swiglu_reference(gate_up_TG: torch.Tensor, out_TF: torch.Tensor) -> None:
    """Do what `swiglu` says in plain operations."""
    gate, up = gate_up_TG.to(torch.promote_types(gate_up_TG.dtype, torch.float32)).chunk(2, dim=-1)
    out_TF.copy_(torch.nn.functional.silu(gate) * up)


def swiglu_backward_reference(dh_TF: torch.Tensor, gate_up_TG: torch.Tensor) -> None:
    """Do what `swiglu_backward` says in plain operations."""
    math_dtype = torch.promote_types(gate_up_TG.dtype, torch.float32)
    gate, up = gate_up_TG.to(math_dtype).chunk(2, dim=-1)
    dh = dh_TF.to(math_dtype)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate, dup = dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * silu
    dh_TF.copy_(silu * up)
    gate_up_TG.copy_(torch.cat([dgate, dup], dim=-1))


# --- Triton ----------------------------------------------------------------------------------------------------------


@jit
def _swiglu_forward_kernel(gate_up_ptr, out_ptr, num_cols, in_row, out_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    at = gate_up_ptr + row * in_row + cols
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + num_cols, mask=mask, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_row + cols, h.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(dh_ptr, gate_up_ptr, num_cols, dh_row, in_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    at = gate_up_ptr + row * in_row + cols
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + num_cols, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + row * dh_row + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dtype = gate_up_ptr.dtype.element_ty
    tl.store(at, (dh * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype), mask=mask)
    tl.store(at + num_cols, (dh * silu).to(dtype), mask=mask)
    tl.store(dh_ptr + row * dh_row + cols, (silu * up).to(dtype), mask=mask)


def _grid(num_rows: int, num_cols: int) -> tuple[tuple[int, int], int]:
    block = min(_BLOCK, next_power_of_2(num_cols))
    return (num_rows, -(-num_cols // block)), block


def swiglu_triton(gate_up_TG: torch.Tensor, out_TF: torch.Tensor) -> None:
    """Do what `swiglu` says, one program for a piece of a row."""
    num_rows, num_cols = out_TF.shape
    grid, block = _grid(num_rows, num_cols)
    _swiglu_forward_kernel[grid](
        gate_up_TG,
        out_TF,
        num_cols,
        gate_up_TG.stride(0),
        out_TF.stride(0),
        BLOCK=block,
        num_warps=num_warps_for(2 * block),
    )


def swiglu_backward_triton(dh_TF: torch.Tensor, gate_up_TG: torch.Tensor) -> None:
    """Do what `swiglu_backward` says, one program for a piece of a row."""
    num_rows, num_cols = dh_TF.shape
    grid, block = _grid(num_rows, num_cols)
    _swiglu_backward_kernel[grid](
        dh_TF,
        gate_up_TG,
        num_cols,
        dh_TF.stride(0),
        gate_up_TG.stride(0),
        BLOCK=block,
        num_warps=num_warps_for(2 * block),
    )
