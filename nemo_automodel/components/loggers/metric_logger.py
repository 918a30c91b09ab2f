"""The run's own record: one JSON object a line, safe on disk as soon as it is logged.

A file of lines survives what a training run meets. Every record goes to the operating system in the call that logs it,
so a killed process loses nothing it has finished; a record cut short by a power failure is only ever the last line, and
the next writer removes it. A disk that is full for a while does not end a run: records wait in memory, which is said
once, and closing the file is the last attempt. A run that goes on from a checkpoint first drops the records of the
steps it is about to repeat, so that a step appears once. The price is one small write a record.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_automodel.shared.errors import UserError

TRAINING_FILE = "training.jsonl"

logger = logging.getLogger(__name__)


def validation_file(name: str) -> str:
    """Return the file name of the validation set ``name``; the set of the plain key is called ``default``."""
    return "validation.jsonl" if name == "default" else f"validation_{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.jsonl"


def utc_timestamp() -> str:
    """Return the time as ``2026-01-31T12:00:00.123Z``."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file in order; a last line cut short, still being written perhaps, is left out.

    Raises:
        UserError: a line is no JSON object; the message names it.
    """
    for _, record in _read_lines(path):
        yield record


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise UserError(f"`{path}`, line {number} is not a JSON object. Mend or delete the line.")
            yield line, record


class MetricLogger:
    """Appends records to a JSONL file, one write a record, and continues a file that is there.

    Raises:
        UserError: the file cannot be opened or written (no space, no permission).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: nothing of ours is left to lose, and closing cannot fail after a failed write.
            self._file = self.path.open("ab", buffering=0)
            _drop_torn_tail(self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._waiting = b""

    def log(self, record: Mapping[str, Any]) -> None:
        """Append ``record`` as one line; numbers that are not finite become ``null``: JSON has no word for them."""
        values = {key: _finite_or_none(value) for key, value in record.items()}
        was_waiting = bool(self._waiting)
        self._waiting += json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        error = self._write_waiting()
        if error is not None and not was_waiting:
            logger.error("%s The run goes on; its records wait until there is room.", _cannot_write(self.path, error))
        elif error is None and was_waiting:
            logger.info("The log `%s` can be written again; nothing is missing.", self.path)

    def _write_waiting(self) -> OSError | None:
        """Write what waits, and return what stopped it."""
        try:
            while self._waiting:  # a raw write may take only a part
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def sync(self) -> None:
        """Bring all records to the disk, as far as there is room."""
        if self._write_waiting() is None:
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop the records of steps later than ``step``; the file is replaced in one move, never half written."""
        kept_path = self.path.with_name(self.path.name + ".tmp")
        try:
            with kept_path.open("wb") as kept:
                kept.writelines(line for line, record in _read_lines(self.path) if record["step"] <= step)
            self._file.close()
            os.replace(kept_path, self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file; a second call does nothing.

        Raises:
            UserError: records are still waiting, and there is no room for them.
        """
        error = None if self._file.closed else self._write_waiting()
        self._file.close()
        if error is not None:
            raise _cannot_write(self.path, error) from error

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_torn_tail(path: Path) -> None:
    """Cut the file back to its last complete line, so that the next record does not run into a broken one."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 4096)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"The log `{path}` cannot be written: {error.strerror}. Free some space or set `checkpoint.checkpoint_dir` "
        "to a directory you may write to."
    )
