"""The key ``model.fast_layers``. Free of torch."""

from __future__ import annotations

from typing import Any

from nemo_automodel.shared.errors import ConfigError, did_you_mean

FAST_LAYERS = ("auto", "on", "off")


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
