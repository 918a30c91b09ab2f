"""What an adapter makes of the weights it sits on, tensor by tensor.

LoRA's layer computes ``W x + s·B A x``, which is one layer with the weight ``W + s·B A``; DoRA's has the weight
``(m / |W + s·B A|)·(W + s·B A)``, the norm taken per output row. Added tokens come as whole embeddings
(``modules_to_save``, embedding layers that PEFT saves when the vocabulary grew) or as rows of them
(``trainable_token_indices``). Everything is computed in float64 over blocks of rows and rounded once, so that the only
error of a merge is that of the dtype it is stored in, and the memory is that of a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_automodel.components._peft.adapter_state import PREFIX
from nemo_automodel.shared.errors import UserError

_ROWS_AT_ONCE = 2048

# ends of the names in an adapter file; what stands before them is the layer
_ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".token_adapter.trainable_tokens_delta": "rows",
    ".base_layer.weight": "whole",
    ".modules_to_save.weight": "whole",
    ".original_module.weight": "original",  # PEFT writes it beside the trained one when the vocabulary has grown
    ".weight": "whole",
}


@dataclass
class WeightUpdate:
    """What becomes of one weight ``[M, N]``: first it is replaced, then rows of it, then it is updated."""

    whole: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    row_indices: list[int] = field(default_factory=list)
    a: torch.Tensor | None = None
    """``[R, N]``; of an embedding ``B`` transposed, so that ``b @ a`` is the update of the weight as it is stored."""
    b: torch.Tensor | None = None
    """``[M, R]``; of an embedding ``A`` transposed."""
    scaling: float = 1.0
    magnitude: torch.Tensor | None = None
    is_transposed: bool = False
    """The weight is stored ``[in, out]`` (GPT-2's Conv1D)."""

    @property
    def is_inert(self) -> bool:
        """Tell whether it is a low-rank update with a factor of zeros, as an adapter is before its first step."""
        if self.a is None or self.b is None or self.whole is not None or self.rows is not None:
            return False
        return self.magnitude is None and not (bool(self.a.any()) and bool(self.b.any()))

    def shape_of(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the weight afterwards, given the one before.

        Raises:
            ValueError: this update is of a weight with another shape; the message says which.
        """
        shape = tuple(self.whole.shape) if self.whole is not None else old
        if self.whole is not None and shape[1:] != old[1:]:
            raise ValueError(f"{list(shape)}")
        if self.a is not None and self.b is not None:
            update = (self.b.shape[0], self.a.shape[1])
            if (update[::-1] if self.is_transposed else update) != shape:
                raise ValueError(f"{list(update)}")
        if self.rows is not None and (self.rows.shape[1:] != shape[1:] or max(self.row_indices) >= shape[0]):
            raise ValueError(f"rows up to {max(self.row_indices)} of length {self.rows.shape[1]}")
        return shape

    def applied(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the new weight, computed in float64 and rounded once to ``dtype``."""
        if self.whole is not None:
            weight = self.whole
        if self.rows is not None:
            weight = weight.clone()
            weight[self.row_indices] = self.rows.to(weight.dtype)
        if self.a is None or self.b is None:
            return weight.to(dtype)
        if self.is_transposed:
            return self._updated(weight.T, dtype).T.contiguous()
        return self._updated(weight, dtype)

    def _updated(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert self.a is not None
        assert self.b is not None
        made = torch.empty(weight.shape, dtype=dtype)
        a = self.a.double()
        for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            merged = weight[rows].double() + self.scaling * (self.b[rows].double() @ a)
            if self.magnitude is not None:
                merged *= (self.magnitude[rows].double() / torch.linalg.norm(merged, dim=1))[:, None]
            made[rows] = merged.to(dtype)
        return made


def read_updates(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, WeightUpdate]:
    """Return the update of every weight, by its name in the model (``model.layers.0.self_attn.q_proj.weight``).

    ``config`` is the content of ``adapter_config.json``, ``tensors`` that of ``adapter_model.safetensors``.

    Raises:
        UserError: it is not LoRA, or has something that changes more than weights.
    """
    _refuse_others(config)
    updates: dict[str, WeightUpdate] = {}
    for name, tensor in tensors.items():
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is None or not name.startswith(PREFIX):
            raise UserError(
                f"The adapter holds `{name}`, which is no part of LoRA that can be merged. Merge it with the program "
                "that wrote it."
            )
        if _ENDS[end] == "original":
            continue
        layer = name.removeprefix(PREFIX).removesuffix(end)
        update = updates.setdefault(f"{layer}.weight", WeightUpdate())
        match _ENDS[end]:
            case "a":
                update.a = tensor
            case "b":
                update.b = tensor
            case "magnitude":
                update.magnitude = tensor
            case "embedding_a":
                update.b = tensor.T
            case "embedding_b":
                update.a = tensor.T
            case "rows":
                update.rows, update.row_indices = tensor, _row_indices(config, layer)
            case _:
                update.whole = tensor
    for name, update in updates.items():
        if (update.a is None) != (update.b is None):
            raise UserError(f"The adapter has only one of the two factors of `{name}`. Copy or save it again.")
        if update.a is not None:
            update.scaling = _scaling(config, name.removesuffix(".weight"), update.a.shape[0])
            update.is_transposed = bool(config.get("fan_in_fan_out"))
    return updates


def _refuse_others(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise UserError(
            f"The adapter is of type {config.get('peft_type')} with `bias: {config.get('bias')}`, but only LoRA "
            "without biases can be merged. Merge it with PEFT's merge_and_unload."
        )
    for key in ("target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"):
        if config.get(key):
            raise UserError(
                f"The adapter sets `{key}` in adapter_config.json, which changes more than single weights. Merge it "
                "with PEFT's merge_and_unload."
            )
    if config.get("use_dora") and config.get("fan_in_fan_out"):
        raise UserError(
            "The adapter is DoRA on transposed layers, which cannot be merged. Use PEFT's merge_and_unload."
        )


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return what the update is multiplied with; patterns give single layers a rank or an alpha of their own."""
    alpha = _of_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
    if rank != _of_pattern(config.get("rank_pattern"), layer, config["r"]):
        raise UserError(
            f"The adapter has rank {rank} at `{layer}`, but its adapter_config.json says {config['r']}. The two files "
            "are not of one training: copy or save them again."
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, default)


def _row_indices(config: Mapping[str, Any], layer: str) -> list[int]:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((value for key, value in indices.items() if layer.endswith(key)), None)
    if not indices:
        raise UserError(f"The adapter holds rows of `{layer}` and does not say which (`trainable_token_indices`).")
    return [int(index) for index in indices]
