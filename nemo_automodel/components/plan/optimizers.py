"""What an optimizer keeps for a weight, and what its step needs for a moment. Free of torch.

An optimizer of `torch.optim` keeps numbers in the dtype of the weight. On a GPU those that are not fused work on all
weights at once, each operation a list of tensors, so whatever the formula has in between is there for all weights
together: as much again as the weights, or twice. The step comes when activations are gone, so that matters where
weights are many, which is full training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NUMBERS = {"SGD": 0, "Adagrad": 1, "RMSprop": 1, "ASGD": 1, "Lion": 1}
"""Kept for a weight; all others keep two, as Adam does."""
_MORE_NUMBERS = {"SGD": ("momentum",), "RMSprop": ("momentum", "centered"), "Adam": ("amsgrad",), "AdamW": ("amsgrad",)}
"""Options that each ask for one more."""
_IN_BETWEEN = {"Adagrad": 2, "Adadelta": 2}
_IN_BETWEEN |= dict.fromkeys(("Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop"), 1)
"""Numbers for a weight that a step over all weights holds at its worst, unless it is fused."""
_QUANTIZED_BYTES = {
    **dict.fromkeys(("Adam8bit", "AdamW8bit", "PagedAdamW8bit", "adamw8bit", "AdamFp8", "AdamWFp8"), 2.03),
    **dict.fromkeys(("Adam4bit", "AdamW4bit"), 1.06),
    "FlashAdamW": 3.13,
}
"""Of state that has the same size whatever the weight's dtype, with its scales."""
_FUSED = ("Adam", "AdamW")
"""What this project fuses unless told otherwise."""


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes for each weight that learns."""

    state: float
    step: float = 0
    """Needed in the step beside the state."""
    is_known: bool = True
    """False: taken to be like Adam's."""


def bytes_of(target: str, options: Mapping[str, Any], weight_bytes: int) -> OptimizerBytes:
    """Return what the optimizer at the dotted path ``target`` needs for a weight of ``weight_bytes``."""
    name = target.rpartition(".")[2]
    if name in _QUANTIZED_BYTES:
        return OptimizerBytes(_QUANTIZED_BYTES[name])
    more = sum(1 for option in _MORE_NUMBERS.get(name, ()) if options.get(option))
    state = (_NUMBERS.get(name, 2) + more) * weight_bytes
    is_known = name in _NUMBERS or "ada" in name.lower() or name in _IN_BETWEEN
    return OptimizerBytes(state, _step_numbers(target, name, options) * weight_bytes, is_known)


def _step_numbers(target: str, name: str, options: Mapping[str, Any]) -> int:
    """Return how many numbers for a weight the step holds in between."""
    if not target.startswith("torch.optim.") or options.get("foreach") is False or options.get("fused"):
        return 0
    is_fused = name in _FUSED and options.get("fused") is None and options.get("foreach") is None
    return 0 if is_fused else _IN_BETWEEN.get(name, 0)
