"""What the processes of a run do together beside training: share out the optimizer, save its state, end."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from nemo_automodel.components.checkpoint import dcp
from nemo_automodel.components.distributed.ranks import Ranks
from nemo_automodel.components.distributed.shares import Shares
from nemo_automodel.recipes.settings import RunSettings
from nemo_automodel.shared.errors import LowMemoryStop, UserError

Method = TypeVar("Method", bound=Callable[..., Any])


class JointState:
    """The state of an optimizer that is shared out, written by all processes into one archive, a file each.

    The first process meets the others in the middle of its save, when it has made the directory. Whatever becomes of
    that save, it calls ``end``, so that nobody waits for a meeting that never comes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._have_met = ranks, False

    def write(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Write, in the first process, with the others."""
        self._have_met = True
        self._ranks.share(directory)
        self._write(directory, state)

    def end(self) -> None:
        """Let the others go on where the first process's save failed before it met them."""
        if not self._have_met:
            self._ranks.share(None)

    def join(self, state: Mapping[str, Any]) -> None:
        """Write, in another process, with the first one, which says so where it fails."""
        directory = self._ranks.share()
        if directory is None:
            return
        try:
            self._write(directory, state)
        except dcp.WriteError:
            return

    def _write(self, directory: Path, state: Mapping[str, Any]) -> None:
        with self._ranks.in_company("saving", is_patient=True):
            dcp.write(directory, state, self._ranks.patient_group)


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
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return " ".join("".join(traceback.format_exception_only(error)).split()), 1
