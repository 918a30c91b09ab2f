"""What the processes of a run do together beside training and saving: share out the optimizer, end."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from nemo_automodel.components.distributed.ranks import Ranks
from nemo_automodel.components.distributed.shares import Shares
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.errors import LowMemoryStop, StoppedEarly, UserError

Method = TypeVar("Method", bound=Callable[..., Any])


def shares_of(settings: RunSettings, parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> Shares | None:
    """Return who updates what, None where every process updates everything."""
    if not ranks.are_several or settings.distributed.strategy != "fsdp2" or len(parameters) < ranks.size:
        return None
    return Shares(parameters, ranks)


def heard_by_all(method: Method) -> Method:
    """Let a method of a recipe tell the other processes when it ends with an error, and why.

    They would wait for this process otherwise, until the connection breaks or a clock runs out.
    """

    @functools.wraps(method)
    def told(recipe: Any, *args: Any, **keywords: Any) -> Any:
        try:
            return method(recipe, *args, **keywords)
        except BaseException as error:
            lost = recipe.ranks.loss_of_another()
            if lost is not None and isinstance(error, RuntimeError):
                raise lost from error  # what a device makes of it
            recipe.ranks.say_last_words(*_last_words(error))
            raise

    return told  # type: ignore[return-value]


def _last_words(error: BaseException) -> tuple[str, int]:
    if isinstance(error, UserError):
        return str(error), error.exit_status
    if isinstance(error, LowMemoryStop):
        return str(error), LowMemoryStop.exit_status
    if isinstance(error, StoppedEarly):
        return str(error), error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return " ".join("".join(traceback.format_exception_only(error)).split()), 1
