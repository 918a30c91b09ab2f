"""From an optimizer's class and the YAML's values to an optimizer over the trainable parameters.

Any class works that torch would accept: its signature is the schema.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_automodel.components.optim.rounding import warn_of_vanishing_updates
from nemo_automodel.shared.dtypes import parse_dtype
from nemo_automodel.shared.errors import ConfigError, UserError, did_you_mean

_OFFLOADING = "CPUOffloadOptimizer"
_DTYPE_KEYS = ("master_weight_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


@dataclass(frozen=True)
class ParamGroupOverride:
    """Other multipliers for the parameters whose name the pattern finds; the first override that finds one has it."""

    pattern: str
    """A regular expression, searched for anywhere in the parameter's name."""
    lr_mult: float = 1.0
    wd_mult: float = 1.0


def parse_overrides(entries: Sequence[Mapping[str, Any]] | None) -> list[ParamGroupOverride]:
    """Read ``optimizer.param_group_overrides``.

    Raises:
        ConfigError: an unknown key, a missing or an invalid pattern.
    """
    overrides = []
    for i, entry in enumerate(entries or []):
        where = f"`optimizer.param_group_overrides.{i}`"
        for key in entry:
            if key not in ("pattern", "lr_mult", "wd_mult"):
                raise ConfigError(
                    f"{where}: unknown key `{key}`.{did_you_mean(key, ('pattern', 'lr_mult', 'wd_mult'))} "
                    "Known: pattern, lr_mult, wd_mult."
                )
        if "pattern" not in entry:
            raise ConfigError(f"{where} has no `pattern`. Give a regular expression that parameter names contain.")
        try:
            re.compile(entry["pattern"])
        except re.error as error:
            raise ConfigError(
                f"{where}: `{entry['pattern']}` is not a regular expression ({error}). A name such as `lm_head` is one."
            ) from error
        overrides.append(ParamGroupOverride(**entry))
    return overrides


def prepare_kwargs(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Check the YAML's values against the optimizer's signature and turn them into what it expects.

    Costs nothing, so a recipe calls it before the model is loaded.

    Raises:
        ConfigError: a keyword that the optimizer does not take, or a dtype that is none.
    """
    if getattr(target, "__name__", "") == _OFFLOADING:
        raise ConfigError(
            f"`optimizer._target_`: {_OFFLOADING} keeps copies of weights and gradients of its own, which clipping and "
            "checkpoints do not see. Use `paged_adamw8bit`, whose state moves to host memory when the GPU is full."
        )
    parameters = inspect.signature(target).parameters
    if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        known = [name for name in parameters if name not in ("self", "params")]
        for key in kwargs:
            if key not in known:
                raise ConfigError(
                    f"`optimizer.{key}`: {_name(target)} takes no `{key}`.{did_you_mean(key, known)} "
                    f"Known: {', '.join(known)}."
                )
    prepared = dict(kwargs)
    if isinstance(prepared.get("betas"), list):
        prepared["betas"] = tuple(prepared["betas"])
    for key in _DTYPE_KEYS:
        if isinstance(prepared.get(key), str):
            prepared[key] = parse_dtype(prepared[key], f"optimizer.{key}")
    return prepared


def build_optimizer(
    model: torch.nn.Module,
    target: Callable[..., torch.optim.Optimizer],
    kwargs: Mapping[str, Any],
    overrides: Sequence[ParamGroupOverride] = (),
    is_mine: Callable[[torch.nn.Parameter], bool] | None = None,
) -> torch.optim.Optimizer:
    """Make the optimizer of the model's trainable parameters, with a group for each override.

    ``is_mine`` leaves out parameters that another process updates; groups stay, even if nothing is left in them.

    Raises:
        UserError: nothing is trainable, an override's pattern finds nothing, or the optimizer refuses its arguments.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise UserError(
            "No parameter of the model is trainable, but training needs at least one. Check `peft.target_modules`, "
            "`freeze_config` and `quantization` (a quantised model needs `peft`)."
        )
    groups = _groups(trainable, overrides)
    if is_mine is not None:
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if is_mine(parameter)]
    prepared = prepare_kwargs(target, kwargs)
    if _can_fuse(target, prepared, trainable):
        prepared["fused"] = True
    try:
        optimizer = target(params=groups, **prepared)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # every optimizer has its own way to say no
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"`optimizer`: {_name(target)} refuses its arguments: {reason}. Change that key.") from error
    warn_of_vanishing_updates(optimizer, trainable)
    return optimizer


def _can_fuse(
    target: Callable[..., Any], kwargs: Mapping[str, Any], trainable: list[tuple[str, torch.nn.Parameter]]
) -> bool:
    """Tell whether torch can update all parameters in one pass, with the same formula, and nobody chose otherwise.

    torch's own choice is one parameter after the other on a CPU and several passes on a GPU. For the 168 small tensors
    of an adapter on a CPU core the fused pass took a fifth of the time.
    """
    if target not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    if any(kwargs.get(key) is not None for key in ("fused", "foreach", "capturable", "differentiable")):
        return False
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in trainable)


def _groups(
    trainable: list[tuple[str, torch.nn.Parameter]], overrides: Sequence[ParamGroupOverride]
) -> list[dict[str, Any]]:
    """Return the optimizer's groups, the one without an override first."""
    members: dict[ParamGroupOverride | None, list[torch.nn.Parameter]] = {None: []}
    members.update({override: [] for override in overrides})
    for name, parameter in trainable:
        owner = next((override for override in overrides if re.search(override.pattern, name)), None)
        members[owner].append(parameter)
    groups: list[dict[str, Any]] = []
    for override, parameters in members.items():
        if override is None:
            if parameters:
                groups.append({"params": parameters})
            continue
        if not parameters:
            raise UserError(
                f"`optimizer.param_group_overrides`: the pattern `{override.pattern}` finds no trainable parameter. "
                f"Names look like `{trainable[0][0]}`."
            )
        groups.append({"params": parameters, "lr_mult": override.lr_mult, "wd_mult": override.wd_mult})
    return groups


def _name(target: Callable[..., Any]) -> str:
    return getattr(target, "__qualname__", repr(target))
