"""The errors a user can cause.

Every mistake a user can make reaches them as one line that names the value, the rule and the remedy. Code raises one of
these where the value enters; the command line prints the message and exits with status 2, without a traceback unless
``--debug`` asks for one. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: value, rule, remedy."""

    exit_status = 2


class ConfigError(UserError):
    """A mistake in the YAML file or in a command-line override."""


class NotSupportedYetError(UserError):
    """A key or recipe that is known but comes in a later version."""


class RankLostError(UserError):
    """Another process of the run is gone, or has ended with this message and status."""

    default_status = 4

    def __init__(self, message: str, exit_status: int = default_status) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class LowMemoryStop(BaseException):
    """The machine is about to swap. No ``Exception``: whoever handles those must not go on after this one.

    It may be raised anywhere in the main thread, as Ctrl-C may. The message is one line, as a `UserError`'s.
    """

    exit_status = 3


class StoppedEarly(KeyboardInterrupt):
    """A signal that asks a run to save and stop came before there was anything to save. The message is one line."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean `x`?"`` for the nearest known word, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""
