"""Settings of LoRA: the ``peft:`` section. Free of torch."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nemo_automodel.shared.errors import ConfigError, did_you_mean

DEFAULT_TARGET = "*_proj"
"""What is adapted when a configuration names nothing."""


@dataclass
class PeftConfig:
    """Which layers get an adapter, and what it looks like."""

    target_modules: list[str] = field(default_factory=list)
    """Child names or patterns of dotted names, ``*`` for anything. Nothing given at all: ``*_proj``."""
    exclude_modules: list[str] = field(default_factory=list)
    """Every linear layer but these."""
    match_all_linear: bool = False
    """Every linear layer but the output head."""
    dim: int = 8
    """Rank of the update."""
    alpha: float = 32
    """The update is scaled by ``alpha / dim``."""
    use_dora: bool = False
    """Learn the length of every weight row apart from its direction."""
    dropout: float = 0.0
    dropout_position: str = "post"
    """``pre`` drops inputs of the adapter, as PEFT does; ``post`` its outputs."""
    lora_A_init: str = "xavier"
    """``xavier`` (normal); anything else is Kaiming uniform, PEFT's choice."""
    lora_dtype: str | None = None
    """How adapters are stored; ``null`` is fp32. They compute in the dtype of the layer they sit on."""
    use_memory_efficient_lora: bool = True
    """Accepted; there is one implementation, and it keeps nothing but the layer's input."""
    use_triton: bool = False
    """Ask for the Triton kernels."""
    moe_rank_scaling: bool = False
    """Divide the rank of expert adapters by the number of active experts."""
    use_rslora: bool = False
    """Scale by ``alpha / sqrt(dim)`` instead, which keeps high ranks learning (Kalajdzievski 2023, eq. 6)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Names or patterns, as in ``target_modules``, of layers with another rank than ``dim``; the first match counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for ``alpha``."""

    def __post_init__(self) -> None:
        self.target_modules = _normalise_patterns(self.target_modules, "target_modules")
        self.exclude_modules = _normalise_patterns(self.exclude_modules, "exclude_modules")
        _check_selection(self.target_modules, self.exclude_modules, self.match_all_linear)
        if self.lora_dtype is not None:
            self.lora_dtype = str(self.lora_dtype).removeprefix("torch.")
        self.rank_pattern, self.alpha_pattern = dict(self.rank_pattern or {}), dict(self.alpha_pattern or {})
        for key, rank in {"dim": self.dim, **_under("rank_pattern", self.rank_pattern)}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"`peft.{key}` is {rank!r}, but a rank is a whole number of at least 1. Use 8 or 16.")
        for key, alpha in {"alpha": self.alpha, **_under("alpha_pattern", self.alpha_pattern)}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
                raise ConfigError(f"`peft.{key}` is {alpha!r}, but the scale must be positive. Use twice `dim`.")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ConfigError(f"`peft.dropout` is {self.dropout!r}, but it is a probability below 1. Use 0 or 0.1.")
        if self.dropout_position not in ("pre", "post"):
            raise ConfigError(f"`peft.dropout_position: {self.dropout_position}` is not known. Use pre or post.")

    def rank_of(self, name: str) -> int:
        """Return the rank of the adapter on the layer with this dotted name."""
        return next((rank for pattern, rank in self.rank_pattern.items() if matches(name, pattern)), self.dim)

    def alpha_of(self, name: str) -> float:
        """Return ``alpha`` of the adapter on the layer with this dotted name."""
        return next((alpha for pattern, alpha in self.alpha_pattern.items() if matches(name, pattern)), self.alpha)

    def scaling_of(self, name: str) -> float:
        """Return the factor in front of the update of that layer."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PeftConfig:
        """Build a configuration from plain values.

        Raises:
            ConfigError: unknown keys, or values that a configuration refuses.
        """
        known = [item.name for item in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"`peft.{key}` is not known.{did_you_mean(key, known)} Known keys: {', '.join(known)}."
                )
        return cls(**values)


def matches(name: str, pattern: str) -> bool:
    """Tell whether ``pattern`` means the module with this dotted name."""
    return name.rpartition(".")[2] == pattern or re.fullmatch(pattern.replace("*", ".*"), name) is not None


def _under(key: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{key}.{pattern}": value for pattern, value in values.items()}


def _normalise_patterns(value: str | list[str] | tuple[str, ...] | None, key: str) -> list[str]:
    """Turn one pattern, a list of them or nothing into a list.

    Raises:
        ConfigError: an element is not a string.
    """
    patterns = [value] if isinstance(value, str) else list(value or [])
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"`peft.{key}` holds {pattern!r}, but it is a list of module names. Use names in quotes.")
    return patterns


def _check_selection(targets: list[str], exclusions: list[str], match_all_linear: bool) -> None:
    """Refuse selections that contradict each other.

    Raises:
        ConfigError: targets with exclusions, or ``match_all_linear`` with either.
    """
    if match_all_linear and (targets or exclusions):
        other = "target_modules" if targets else "exclude_modules"
        raise ConfigError(
            f"`peft.match_all_linear: true` already names every linear layer, so `peft.{other}` cannot be given as "
            "well. Leave one of them out."
        )
    if targets and exclusions:
        raise ConfigError(
            "`peft.target_modules` and `peft.exclude_modules` are both given, but only one of them can decide. "
            "Leave one out."
        )
