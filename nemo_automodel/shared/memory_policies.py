"""The names of what decoder layers keep for the backward pass. Free of torch."""

from __future__ import annotations

RECOMPUTE_POLICIES = ("none", "fp8_gate_up", "selective", "sac2", "sac1", "full", "full_offload")
"""From the one that keeps most to the one that keeps least; on fast layers `selective` and `sac2` are one."""
EXACT_POLICIES = ("none", "selective", "sac1", "full", "full_offload")
"""Those under which every number is the same, each of them once."""
PLAIN_POLICIES = ("none", "selective", "full")
"""Those that Transformers' own layers know; the others need the fast decoder layers."""

LONG_TOKENS, TILE_TOKENS = 32768, 16384
"""Where fast layers make everything again, MLPs of more tokens than these run in tiles of so many by themselves."""


def tile_tokens(asked: int | None, recompute: str, num_tokens: int) -> int:
    """Return how many of ``num_tokens`` tokens the MLP of a fast layer works on at a time."""
    if asked is None and recompute.startswith("full") and num_tokens > LONG_TOKENS:
        asked = TILE_TOKENS
    return max(1, min(asked or num_tokens, num_tokens))
