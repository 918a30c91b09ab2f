"""Settings of what a run does about memory. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_automodel.shared.errors import ConfigError, did_you_mean

_POLICIES = ("fixed", "auto")


@dataclass(frozen=True)
class MemoryConfig:
    """The ``memory:`` section; ``memory: auto`` stands for ``memory: {policy: auto}``."""

    policy: str = "fixed"
    """What is computed again in the backward pass: ``fixed`` is what ``distributed.activation_checkpointing`` says,
    ``auto`` the fastest that fits this GPU by the planner."""
    rescue: bool = True
    """Redo a step that does not fit with smaller micro-batches, or with more computed again; ``false`` ends the run."""

    def __post_init__(self) -> None:
        if self.policy not in _POLICIES:
            raise ConfigError(
                f"`memory.policy: {self.policy}` is not known.{did_you_mean(self.policy, _POLICIES)} "
                f"Use {' or '.join(_POLICIES)}."
            )
