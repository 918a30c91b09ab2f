"""Which linear layers a LoRA configuration means.

Names are dotted module names such as ``model.layers.3.mlp.up_proj``; the child name is the last part. A target matches
when it equals the child name, or when the pattern, with ``*`` standing for anything, covers the whole dotted name. An
exclusion alone means every linear layer but those. ``match_all_linear`` means every linear layer but the output head.
"""

from __future__ import annotations

import logging
import re

from torch import nn

from nemo_automodel.components._peft.config import DEFAULT_TARGET, matches
from nemo_automodel.shared.errors import ConfigError, UserError, did_you_mean

_SHOWN_NAMES = 8

logger = logging.getLogger(__name__)


def is_adaptable(module: nn.Module) -> bool:
    """Tell whether LoRA can sit on this module: a linear layer that its owner calls as a module.

    `nn.MultiheadAttention` reads the weight of its output projection without calling it, so an adapter there would
    never run; torch marks that projection with a class of its own.
    """
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def select_modules(
    model: nn.Module, targets: list[str], exclusions: list[str], match_all_linear: bool, output_head: nn.Module | None
) -> dict[str, nn.Module]:
    """Return the linear layers that the configuration means, by dotted name.

    Raises:
        ConfigError: a pattern is not a regular expression once ``*`` is expanded.
        UserError: nothing matches; some names that exist are listed. One target of several is worth a warning only,
            because lists are shared between families.
    """
    linears = {name: module for name, module in model.named_modules() if is_adaptable(module)}
    _check_patterns(targets or exclusions)
    if match_all_linear:
        chosen = {name: module for name, module in linears.items() if module is not output_head}
    elif exclusions:
        chosen = {n: m for n, m in linears.items() if not any(matches(n, pattern) for pattern in exclusions)}
    else:
        targets = targets or [DEFAULT_TARGET]
        chosen = {n: m for n, m in linears.items() if any(matches(n, pattern) for pattern in targets)}
        if not chosen:
            raise UserError(_nothing_matches(targets, linears))
        for pattern in targets:
            if not any(matches(name, pattern) for name in chosen):
                logger.warning("`peft.target_modules`: `%s` matches no linear layer; the other names do.", pattern)
    if not chosen:
        raise UserError(_nothing_matches(exclusions, linears, excluded=True))
    return chosen


def check_exceptions(key: str, patterns: list[str], names: list[str]) -> None:
    """Refuse patterns of ``peft.<key>`` that mean none of the adapted layers, by dotted name.

    Raises:
        ConfigError: a pattern is not a regular expression once ``*`` is expanded.
        UserError: a pattern matches nothing.
    """
    _check_patterns(patterns)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            children = sorted({name.rpartition(".")[2] for name in names})
            shown = ", ".join(children[:_SHOWN_NAMES]) + (", …" if len(children) > _SHOWN_NAMES else "")
            raise UserError(
                f"`peft.{key}` `{pattern}` matches no layer with an adapter.{did_you_mean(pattern, children)} "
                f"Layers with one: {shown}."
            )


def _check_patterns(patterns: list[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern.replace("*", ".*"))
        except re.error as error:
            raise ConfigError(
                f"`peft` names the module pattern `{pattern}`, which cannot be read ({error}). "
                "Use a module name, with `*` for anything."
            ) from error


def _nothing_matches(patterns: list[str], linears: dict[str, nn.Module], excluded: bool = False) -> str:
    children = sorted({name.rpartition(".")[2] for name in linears})
    shown = ", ".join(children[:_SHOWN_NAMES]) + (", …" if len(children) > _SHOWN_NAMES else "")
    known = f"Linear layers of this model: {shown}." if children else "This model has no linear layers."
    quoted = ", ".join(f"`{pattern}`" for pattern in patterns)
    if excluded:
        return f"`peft.exclude_modules` {quoted} leaves no linear layer to adapt. {known}"
    return f"`peft.target_modules` {quoted} matches no linear layer.{did_you_mean(patterns[0], children)} {known}"
