"""What the doctor says: one finding a check, and the guard that turns a check's own failure into one.

A finding names what was seen, why it matters and the command that mends it. Whoever reads it must be able to act, so a
warning or a problem without a reason and a command cannot be made. Free of torch, as everything here but the probes.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_automodel.shared.memory import GIB as GIB
from nemo_automodel.shared.memory import gib as gib

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
STATUSES = (PROBLEM, WARNING, NOTE, OK)
"""From bad to good: a problem stops training, a warning costs time or fails later, a note is worth knowing."""

_HIDDEN = "(hidden)"
_SHORTEST_SECRET = 8
"""A shorter value is a word like `true`, which may stand anywhere."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    """``topic.name``; stable, for programs that read the JSON."""
    status: str
    what: str
    """What was seen, on one line."""
    why: str = ""
    """Why it matters, and what to do where no command does it."""
    fix: tuple[str, ...] = ()
    """Commands to paste, in order."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The same in values for programs: numbers in bytes, versions as text."""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"{self.check}: `{self.status}` is no status; there are {', '.join(STATUSES)}.")
        if self.status in (WARNING, PROBLEM) and not (self.why and self.fix):
            raise ValueError(f"{self.check}: a {self.status} needs a reason and a command that mends it.")

    @property
    def topic(self) -> str:
        """Return the part of the check's name before the dot."""
        return self.check.partition(".")[0]

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return {**asdict(self), "topic": self.topic, "fix": list(self.fix), "facts": dict(self.facts)}


Check = Callable[[], "Finding | Iterable[Finding]"]


def run_check(name: str, check: Check, *, debug: bool = False) -> list[Finding]:
    """Run one check; whatever it raises becomes a finding, so that the others still run.

    ``debug`` lets the exception through.
    """
    try:
        found = check()
        return [found] if isinstance(found, Finding) else list(found)
    except Exception as error:  # the doctor has to survive any machine; --debug shows the traceback
        if debug:
            raise
        first_line = (str(error).strip().splitlines() or [""])[0]
        return [
            Finding(
                name,
                WARNING,
                f"this check itself failed: {type(error).__name__}: {first_line}",
                "Nothing is known about what it looks at. The other checks are not affected.",
                ("automodel doctor --debug",),
            )
        ]


def hide(finding: Finding, secrets: Iterable[str]) -> Finding:
    """Return the finding with every secret in it replaced: the last net, for texts that other programs wrote."""
    words = [secret for secret in secrets if len(secret) >= _SHORTEST_SECRET]

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for word in words:
                value = value.replace(word, _HIDDEN)
            return value
        if isinstance(value, Mapping):
            return {clean(key): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(clean(item) for item in value)
        return value

    return replace(
        finding,
        what=clean(finding.what),
        why=clean(finding.why),
        fix=clean(tuple(finding.fix)),
        facts=clean(dict(finding.facts)),
    )


def switch_is_on(value: str | None) -> bool:
    """Tell whether the Hugging Face libraries take the value of an environment variable for "on"."""
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def python_command() -> str:
    """Return how to call this Python from a shell; short where it lies below the working directory."""
    # not resolved: the link in a virtual environment is what makes it one
    path = Path(sys.executable)
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here)) if path.is_relative_to(here) else str(path))


def pip_command(words: str, *, has_pip: bool, verb: str = "install") -> str:
    """Return the line that installs into this Python's environment; uv's environments have no pip of their own."""
    if has_pip:
        return f"{python_command()} -m pip {verb} {words}".rstrip()
    return f"uv pip {verb} --python {python_command()} {words}".rstrip()


def in_container(root: Path = Path("/")) -> bool:
    """Tell whether this is a container: Docker and Podman leave a file, Kubernetes a variable."""
    markers = (root / ".dockerenv", root / "run/.containerenv")
    return any(marker.exists() for marker in markers) or "KUBERNETES_SERVICE_HOST" in os.environ
