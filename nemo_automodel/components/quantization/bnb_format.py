"""4-bit matrices as bitsandbytes names them in state dicts and safetensors files.

Beside ``weight``, which holds the codes, there are ``weight.absmax``, ``weight.quant_map`` (the 16 values), with double
quantisation ``weight.nested_absmax`` and ``weight.nested_quant_map`` (the 256 values), and what is no tensor as JSON in
bytes, ``weight.quant_state.bitsandbytes__nf4``. Files that use other values than the ones this project computes with
are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from nemo_automodel.kernels.nf4 import NESTED_BLOCK_SIZE, QUANT_TYPES, Packed, dynamic_map, values_of
from nemo_automodel.shared.dtypes import dtype_name, parse_dtype
from nemo_automodel.shared.errors import UserError

_STATE = "quant_state.bitsandbytes__"
STATE_KEYS = (
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    *(_STATE + quant_type for quant_type in QUANT_TYPES),
)
"""Behind ``weight.``, all that may be there beside the codes."""


def state_of(packed: Packed, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return all but the codes, by the names behind ``weight.``; ``dtype`` is that of the matrix once unpacked."""
    device = packed.codes.device
    facts: dict[str, Any] = {
        "quant_type": packed.quant_type,
        "blocksize": packed.block_size,
        "dtype": dtype_name(dtype),
        "shape": list(packed.shape),
    }
    state = {"absmax": packed.absmax_Q, "quant_map": values_of(packed.quant_type, device)}
    if packed.nested_absmax is not None and packed.offset is not None:
        state |= {"nested_absmax": packed.nested_absmax, "nested_quant_map": dynamic_map(device).clone()}
        facts |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(packed.offset),
        }
    text = json.dumps(facts).encode()
    state[_STATE + packed.quant_type] = torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()
    return state


def packed_of(
    codes: torch.Tensor, state: Mapping[str, torch.Tensor], name: str, device: torch.device
) -> tuple[Packed, torch.dtype]:
    """Return the matrix on ``device`` and its dtype once unpacked. ``name`` is the weight's, for errors.

    Raises:
        UserError: something is missing, or it was stored with values or blocks that are not bitsandbytes' own.
    """
    keys = [key for key in state if key.startswith(_STATE)]
    if len(keys) != 1 or "absmax" not in state:
        raise UserError(
            f"`{name}` is stored in 4 bits, but `{name}.absmax` or `{name}.{_STATE}nf4` is missing. Save the model "
            "again with Transformers and bitsandbytes, or load the original weights."
        )
    facts = json.loads(bytes(state[keys[0]].cpu().tolist()))
    is_nested = "nested_absmax" in state
    quant_type = str(facts["quant_type"])
    if not _is_known(facts, state):
        raise UserError(
            f"`{name}` is stored in 4 bits with values or blocks of its own ({json.dumps(facts)}). Use weights that "
            "bitsandbytes saved with nf4 or fp4, or the original ones."
        )
    nested = state["nested_absmax"].to(device, torch.float32) if is_nested else None
    offset = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=device) if is_nested else None
    rows, columns = facts["shape"]
    packed = Packed(
        codes=codes.detach().contiguous().view(torch.uint8).flatten().to(device),
        absmax_Q=state["absmax"].to(device),
        nested_absmax=nested,
        offset=offset,
        shape=(rows, columns),
        quant_type=quant_type,
        block_size=int(facts["blocksize"]),
    )
    return packed, parse_dtype(facts["dtype"])


def _is_known(facts: dict[str, Any], state: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether the values and the blocks of the magnitudes are those that `kernels/nf4.py` computes with."""
    cpu = torch.device("cpu")
    if facts["quant_type"] not in QUANT_TYPES or facts.get("nested_blocksize", NESTED_BLOCK_SIZE) != NESTED_BLOCK_SIZE:
        return False
    tables = {"quant_map": values_of(str(facts["quant_type"]), cpu), "nested_quant_map": dynamic_map(cpu)}
    return all(
        torch.allclose(state[key].cpu().float(), table, rtol=0, atol=1e-6)
        for key, table in tables.items()
        if key in state
    )
