"""Which of several ways an operation is computed: measured on this machine, accepted by its numbers, written down.

Ways that give the same numbers differ in speed by GPU, shape and library version, so a run asks the machine: each
`Candidate` is compared with a reference and timed on the shapes of the model, and the fastest that computes right is
taken. It must beat the default by `_LEAST_GAIN`, so that noise changes nothing. What was found is a `Table`: printed,
kept in a cache for the next run with the same GPU and versions, and saved with the run, which goes on with it when it
is resumed on the same machine. Nothing changes while a run lasts. What the user asks for is taken or refused, never
replaced.

The price is a second or two at the first start on a machine, and a cache file that may be deleted at any time.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_automodel.components.fast.config import KERNELS, KernelWishes
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when kernels change so much that old measurements mislead."""
_LEAST_GAIN = 0.02
"""How much faster than the default, as a share of its time, another way must be."""


class UnavailableError(Exception):
    """A candidate cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute an operation. Both raise `UnavailableError` where it cannot run."""

    run: Callable[[], Any]
    """What is timed."""
    error: Callable[[], float]
    """How far its numbers are from the reference."""


@dataclass(frozen=True)
class Question:
    """An operation, the ways to compute it, and how much error is accepted."""

    operation: str
    subject: str
    """Architecture, dtype and shapes."""
    default: str
    candidates: Mapping[str, Candidate]
    tolerance: float


@dataclass(frozen=True)
class Trial:
    """What was found out about a candidate; ``failure`` says why it cannot be taken."""

    ms: float | None = None
    error: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Entry:
    """The answer to a question."""

    operation: str
    subject: str
    implementation: str
    reason: str
    trials: Mapping[str, Trial] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """The answers to all questions about a model, and the machine on which they hold."""

    machine: Mapping[str, str]
    entries: tuple[Entry, ...]

    def names(self) -> dict[str, str]:
        """Return operation → implementation."""
        return {entry.operation: entry.implementation for entry in self.entries}

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return {"format": FORMAT, "machine": dict(self.machine), "entries": [asdict(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, values: Any) -> Table:
        """Read what `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']}, not {FORMAT}")
            entries = tuple(_read_entry(item) for item in values["entries"])
            return cls({str(k): str(v) for k, v in values["machine"].items()}, entries)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a table of kernels ({type(error).__name__}: {error})") from error

    def lines(self) -> list[str]:
        """Return the table as text, an operation a line."""
        width = max((len(entry.operation) for entry in self.entries), default=0)
        found = []
        for entry in self.entries:
            others = [f"{name} {_short(trial)}" for name, trial in entry.trials.items() if name != entry.implementation]
            chosen = entry.trials.get(entry.implementation)
            numbers = f" {_short(chosen)}" if chosen is not None else ""
            instead = f"; {', '.join(others)}" if others else ""
            found.append(
                f"  {entry.operation:{width}}  {entry.implementation}{numbers}  ({entry.reason}{instead})".rstrip()
            )
        return found


def _read_entry(values: Mapping[str, Any]) -> Entry:
    operation, implementation = values["operation"], values["implementation"]
    if implementation not in KERNELS.get(operation, ()):
        raise ValueError(f"`{operation}: {implementation}` is not known")
    trials = {str(name): Trial(**trial) for name, trial in values["trials"].items()}
    return Entry(operation, str(values["subject"]), implementation, str(values["reason"]), trials)


def _short(trial: Trial) -> str:
    if trial.failure is not None:
        return f"cannot: {trial.failure}"
    return f"{trial.ms:.3f} ms" if trial.ms is not None else "not timed"


class KernelCache:
    """Tables of earlier runs on this machine, in one file; a file that cannot be used is as good as none."""

    def __init__(self, path: Path, machine: Mapping[str, str]) -> None:
        self.path = path
        self.machine = machine
        self._entries: dict[tuple[str, str], Entry] = {}
        if not path.is_file():
            return
        try:
            table = Table.from_json(json.loads(path.read_text(encoding="utf-8")))
            if table.machine != machine:
                raise ValueError("it is of another machine")
        except (OSError, ValueError) as error:
            logger.warning(
                "The kernels measured earlier cannot be used (%s: %s), so they are measured anew.", path, error
            )
            return
        self._entries = {(entry.operation, entry.subject): entry for entry in table.entries}

    def get(self, question: Question) -> Entry | None:
        """Return what was found earlier, None when nothing was."""
        return self._entries.get((question.operation, question.subject))

    def add(self, entries: Iterable[Entry]) -> None:
        """Keep measured entries, in a file that is whole at every moment."""
        self._entries |= {(entry.operation, entry.subject): entry for entry in entries}
        text = json.dumps(Table(self.machine, tuple(self._entries.values())).to_json(), indent=1) + "\n"
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            logger.warning("The measured kernels cannot be kept for the next run: %s.", error)


class Dispatcher:
    """Answers questions one after the other. ``measure`` returns the milliseconds that a call takes."""

    def __init__(
        self,
        wishes: KernelWishes,
        measure: Callable[[Callable[[], Any]], float],
        cache: KernelCache | None = None,
        saved: Table | None = None,
    ) -> None:
        self.wishes, self.measure, self.cache = wishes, measure, cache
        self.saved = {} if saved is None else {(e.operation, e.subject): e for e in saved.entries}
        self.measured: list[Entry] = []

    def answer(self, question: Question) -> Entry:
        """Return the way to take: what was asked for, what the run began with, what is known, what is measured.

        Raises:
            UserError: what was asked for cannot run or computes something else, or nothing computes right.
        """
        operation, subject = question.operation, question.subject
        asked = self.wishes.asked.get(operation)
        if asked is not None:
            return Entry(operation, subject, asked, "asked for", {asked: self._accepted(question, asked)})
        before = self.saved.get((operation, subject))
        if before is not None and before.implementation in question.candidates:
            return Entry(operation, subject, before.implementation, "as the run began", before.trials)
        if not self.wishes.measures:
            return Entry(operation, subject, question.default, "default, `kernels: defaults`")
        known = None if self.cache is None else self.cache.get(question)
        if known is not None and known.implementation in question.candidates:
            return Entry(operation, subject, known.implementation, "measured earlier", known.trials)
        trials = {name: self._try(question, name) for name in question.candidates}
        entry = Entry(operation, subject, _fastest(question, trials), "measured now", trials)
        self.measured.append(entry)
        return entry

    def _accepted(self, question: Question, name: str) -> Trial:
        trial = self._try(question, name)
        if trial.failure is not None:
            raise UserError(
                f"`model.kernels.{question.operation}: {name}` cannot be: {trial.failure}. Leave it out, and the "
                "fastest that can run is taken."
            )
        return trial

    def _try(self, question: Question, name: str) -> Trial:
        candidate = question.candidates.get(name)
        if candidate is None:
            return Trial(failure="this model does not offer the choice")
        try:
            error = candidate.error()
            if not error <= question.tolerance:  # NaN is refused as well
                return Trial(error=error, failure=f"error {error:.1e}, accepted {question.tolerance:.1e}")
            return Trial(self.measure(candidate.run), error)
        except UnavailableError as unavailable:
            return Trial(failure=str(unavailable))


def _fastest(question: Question, trials: Mapping[str, Trial]) -> str:
    times = {name: trial.ms for name, trial in trials.items() if trial.failure is None and trial.ms is not None}
    if not times:
        reasons = "; ".join(f"{name}: {trial.failure}" for name, trial in trials.items())
        raise UserError(
            f"No way to compute `{question.operation}` gives the right numbers here ({reasons}). "
            "Set `model.force_hf: true` and tell us what machine this is."
        )
    best = min(times, key=lambda name: times[name])
    default_ms = times.get(question.default)
    return best if default_ms is None or times[best] < (1 - _LEAST_GAIN) * default_ms else question.default


def default_table(machine: Mapping[str, str], subject: str, names: Mapping[str, str], reason: str) -> Table:
    """Return the table of what is taken without a measurement."""
    return Table(machine, tuple(Entry(operation, subject, name, reason) for operation, name in names.items()))
