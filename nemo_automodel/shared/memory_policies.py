"""The names of what decoder layers keep for the backward pass. Free of torch."""

from __future__ import annotations

RECOMPUTE_POLICIES = ("none", "fp8_gate_up", "selective", "sac2", "sac1", "full", "full_offload")
"""From the one that keeps most to the one that keeps least; on fast layers `selective` and `sac2` are one."""
PLAIN_POLICIES = ("none", "selective", "full")
"""Those that Transformers' own layers know; the others need the fast decoder layers."""
