"""``kernels.json`` of a run directory: how the fast layers were computed, so that a resumed run computes them alike."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nemo_automodel.components.checkpoint.disk import replace_file
from nemo_automodel.components.loggers.run_record import KERNELS_FILE
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)


def read_kernels(run_dir: Path) -> dict[str, Any] | None:
    """Return the record of a run, None if it has none.

    Raises:
        UserError: the file is damaged; going on with other kernels would not be the same run.
    """
    path = run_dir / KERNELS_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(_damaged(path)) from error
    if not isinstance(record, dict) or not {"format", "machine", "entries"} <= record.keys():
        raise UserError(_damaged(path))
    return record


def write_kernels(run_dir: Path, record: dict[str, Any] | None, before: dict[str, Any] | None) -> None:
    """Write the record of a run, unless it says what ``before``, the record that the run began with, says."""
    if record is None or (before is not None and _essence(record) == _essence(before)):
        return
    replace_file(run_dir / KERNELS_FILE, (json.dumps(record, indent=1) + "\n").encode())


def _essence(record: dict[str, Any]) -> Any:
    chosen = [(entry["operation"], entry["subject"], entry["implementation"]) for entry in record["entries"]]
    return record["machine"], chosen


def _damaged(path: Path) -> str:
    return (
        f"`{path}` is damaged, so nobody knows how this run was computed. Remove it, and kernels are measured anew; "
        "numbers may then differ in their last digits."
    )
