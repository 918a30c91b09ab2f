"""The keys ``model.fast_layers``, ``model.cuda_graphs`` and ``model.kernels``. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.shared.errors import ConfigError, did_you_mean

FAST_LAYERS = CUDA_GRAPHS = ("auto", "on", "off")
KERNEL_MODES = ("measure", "defaults")
KERNELS = {
    "swiglu_products": ("on", "off"),
    "down_in_depth": ("on", "off"),
    "attention": ("cudnn", "flash", "efficient"),
}
"""Operation → its implementations, see `choices.Choices`."""


@dataclass(frozen=True)
class KernelWishes:
    """What the user says of the ways to compute a fast layer."""

    measures: bool = True
    """Take what is fastest on this machine; False takes the defaults."""
    asked: Mapping[str, str] = field(default_factory=dict)
    """Operation → implementation that it must be."""


def parse_fast_layers(value: Any, force_hf: bool = False) -> str:
    """Return ``auto``, ``on`` or ``off``; YAML reads the last two as booleans.

    Raises:
        ConfigError: it is something else, or ``on`` beside ``force_hf``.
    """
    wish = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    if wish not in FAST_LAYERS:
        raise ConfigError(
            f"`model.fast_layers: {value}` is not known.{did_you_mean(wish, FAST_LAYERS)} Use {', '.join(FAST_LAYERS)}."
        )
    if wish == "on" and force_hf:
        raise ConfigError(
            "`model.fast_layers: on` and `model.force_hf: true` exclude each other. Leave one of them out."
        )
    return wish


def parse_cuda_graphs(value: Any) -> str:
    """Return ``auto``, ``on`` or ``off``; YAML reads the last two as booleans.

    Raises:
        ConfigError: it is something else.
    """
    wish = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    if wish not in CUDA_GRAPHS:
        raise ConfigError(
            f"`model.cuda_graphs: {value}` is not known.{did_you_mean(wish, CUDA_GRAPHS)} Use {', '.join(CUDA_GRAPHS)}."
        )
    return wish


def parse_kernels(value: Any) -> KernelWishes:
    """Return the wishes of ``measure``, ``defaults``, or a mapping from operations to implementations.

    YAML reads ``on`` and ``off`` as booleans. Operations that a mapping leaves out are measured.

    Raises:
        ConfigError: an operation or implementation that there is not.
    """
    if value is None:
        return KernelWishes()
    if isinstance(value, KernelWishes):
        return value
    if not isinstance(value, Mapping):
        if value not in KERNEL_MODES:
            raise ConfigError(
                f"`model.kernels: {value}` is not known.{did_you_mean(str(value), KERNEL_MODES)} Use "
                f"{', '.join(KERNEL_MODES)}, or a mapping such as `{{attention: flash}}`."
            )
        return KernelWishes(measures=value == "measure")
    asked = {}
    for operation, wish in value.items():
        if operation not in KERNELS:
            raise ConfigError(
                f"`model.kernels.{operation}` is not known.{did_you_mean(str(operation), KERNELS)} "
                f"Known: {', '.join(KERNELS)}."
            )
        name = {True: "on", False: "off"}[wish] if isinstance(wish, bool) else str(wish)
        if name not in KERNELS[operation]:
            raise ConfigError(
                f"`model.kernels.{operation}: {name}` is not known.{did_you_mean(name, KERNELS[operation])} Use "
                f"{', '.join(KERNELS[operation])}."
            )
        asked[operation] = name
    return KernelWishes(asked=asked)
