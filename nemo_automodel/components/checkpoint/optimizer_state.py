"""The optimizer's state by parameter name.

An optimizer numbers its parameters; a checkpoint names them, so that it outlives another order of parameters:
``state.<parameter>.<key>`` for what the optimizer keeps of a parameter, ``param_groups.<parameter>.<key>`` for the
settings of its group. A state in 8 or 4 bits is a tensor or an object of its library's, made of plain tensors: those
are kept, ``state.<parameter>.<key>:<part>``.

State is read straight into the optimizer's own tensors. Its own tensors have the right dtype, device and kind (8-bit
states are no plain tensors), which ``Optimizer.load_state_dict`` would change, and nothing is held twice. An optimizer
makes them in its first step, so one is taken with zero gradients and zero learning rate; the model's weights are loaded
afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nemo_automodel.components.checkpoint.dcp import Archive, Place
from nemo_automodel.shared.errors import UserError

OPTIM_KEY = "optim"

_STATE, GROUP_PREFIX = "state.", "param_groups."
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Parts of a parameter's name that torch.compile and activation checkpointing add."""
_HOW_IT_RUNS = {"params", "foreach", "fused", "capturable", "differentiable"}
"""Group settings that say how a step is computed on this machine, not what it computes."""
_NUM_LISTED = 10


def parameter_names(model: nn.Module) -> dict[torch.Tensor, str]:
    """Return the name of every parameter, free of wrappers."""
    names: dict[torch.Tensor, str] = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        names[parameter] = name
    return names


def optimizer_entries(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state as one flat dictionary; tensors are the live ones."""
    names = parameter_names(model)
    entries: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            entries |= _state_entries(name, optimizer.state.get(parameter, {}))
            entries |= {f"{GROUP_PREFIX}{name}.{key}": value for key, value in group.items() if key != "params"}
    return entries


class OptimizerRestore:
    """Takes the state of an optimizer out of a checkpoint, in two steps: check everything, then change it.

    Raises:
        UserError: parameters, keys, shapes or dtypes differ between the checkpoint and the optimizer.
    """

    def __init__(self, archive: Archive, model: nn.Module, optimizer: Optimizer, is_share: bool = False) -> None:
        """``is_share``: other processes have the rest of the model's trained parameters in their optimizers."""
        self._archive = archive
        self._optimizer = optimizer
        names = parameter_names(model)
        self._parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
        self._saved = {str(place[1]): value for place, value in archive.describe().items() if place[0] == OPTIM_KEY}
        group_keys = {key.removeprefix(GROUP_PREFIX) for key in self._saved if key.startswith(GROUP_PREFIX)}
        trained = {name for p, name in names.items() if is_share and p.requires_grad} | set(self._parameters)
        self._require_same("parameters", {_name_in(key) for key in group_keys}, trained)
        self._of_others = trained - set(self._parameters)
        self._saved_state = {
            key for key in self._saved if not key.startswith(GROUP_PREFIX) and not self.skips((OPTIM_KEY, key))
        }

    def skips(self, place: Place) -> bool:
        """Tell whether something in the archive is of a parameter that another process updates."""
        if place[0] != OPTIM_KEY:
            return False
        key = str(place[1])
        return _name_in(key.removeprefix(GROUP_PREFIX).removeprefix(_STATE)) in self._of_others

    def prepare(self) -> dict[Place, torch.Tensor]:
        """Make the optimizer's tensors and return those that the checkpoint fills, by their place in it."""
        with_state = {_name_in(key.removeprefix(_STATE)) for key in self._saved_state}
        _make_state(self._optimizer, [p for name, p in self._parameters.items() if name in with_state])
        live: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            live |= _state_entries(name, self._optimizer.state.get(parameter, {}))
        self._require_same("optimizer states", self._saved_state, set(live))
        tensors = {key: value for key, value in live.items() if isinstance(value, torch.Tensor)}
        for key, value in tensors.items():
            described = (value.size(), value.dtype)
            if self._saved[key] != described:
                raise UserError(
                    f"`{self._archive.directory}` does not fit this run: `{key}` is {_shape_of(self._saved[key])} "
                    f"there and {_shape_of(described)} here. Use the model, the dtype and the optimizer of the "
                    "checkpoint."
                )
        return {(OPTIM_KEY, key): value for key, value in tensors.items()}

    def apply(self, entries: Mapping[str, Any], changed: Collection[str] = ()) -> None:
        """Take over what is no tensor: counters, and the settings of the groups except those ``changed`` on purpose."""
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            for key in state:
                if not _parts(state[key]):  # parts were read where they lie
                    state[key] = entries[f"{_STATE}{name}.{key}"]
        names = {parameter: name for name, parameter in self._parameters.items()}
        for group in self._optimizer.param_groups:
            for key in [key for key in group if key not in _HOW_IT_RUNS and key not in changed]:
                self._apply_setting(group, key, [f"{GROUP_PREFIX}{names[p]}.{key}" for p in group["params"]], entries)

    def _apply_setting(
        self, group: dict[str, Any], key: str, saved_keys: list[str], entries: Mapping[str, Any]
    ) -> None:
        values = [entries[saved] for saved in saved_keys if saved in entries]
        if not values:
            return  # a setting that another version of the optimizer did not have
        if any(value != values[0] for value in values):
            raise UserError(
                f"`{self._archive.directory}` has different values of `{key}` for parameters that are one group here. "
                "Use the optimizer settings of the checkpoint (`param_group_overrides`)."
            )
        if isinstance(group[key], torch.Tensor):
            group[key].fill_(values[0])
        else:
            group[key] = values[0].item() if isinstance(values[0], torch.Tensor) else values[0]

    def _require_same(self, what: str, saved: set[str], live: set[str]) -> None:
        for extra, problem in (
            (sorted(live - saved), f"lacks {what} of this run"),
            (sorted(saved - live), f"holds {what} that this run does not have"),
        ):
            if extra:
                more = f" and {len(extra) - _NUM_LISTED} more" if len(extra) > _NUM_LISTED else ""
                raise UserError(
                    f"`{self._archive.directory}` {problem}: {', '.join(extra[:_NUM_LISTED])}{more}. Use the model, "
                    "the adapter and the optimizer of the checkpoint."
                )


def _state_entries(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of one parameter, tensors that are made of others taken apart."""
    entries: dict[str, Any] = {}
    for key, value in state.items():
        parts = _parts(value)
        entries |= {f"{_STATE}{name}.{key}:{part}": tensor for part, tensor in parts.items()}
        if not parts:
            entries[f"{_STATE}{name}.{key}"] = value
    return entries


def _parts(value: Any) -> dict[str, torch.Tensor]:
    """Return the plain tensors that a quantised state consists of, by name; empty for a plain tensor or a number."""
    if is_traceable_wrapper_subclass(value):
        return {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dict__"):
        return {}
    return {part: tensor for part, tensor in vars(value).items() if isinstance(tensor, torch.Tensor)}


def _name_in(key: str) -> str:
    """Return ``model.norm.weight`` for ``model.norm.weight.exp_avg``."""
    return key.rpartition(".")[0]


def _shape_of(described: tuple[torch.Size, torch.dtype] | None) -> str:
    return "no tensor" if described is None else f"{tuple(described[0])} {str(described[1]).removeprefix('torch.')}"


def _make_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Let the optimizer make the state of ``parameters``, and of these only.

    A parameter that never had a gradient has no state, and must have none after a resume either.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    optimizer.step()
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate
    for parameter in parameters:
        parameter.grad = None
