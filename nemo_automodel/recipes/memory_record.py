"""``memory.json`` of a run directory: what a run found out about memory, so that a resumed run computes alike.

It holds the policy that ``memory: auto`` chose and the largest micro-batches that a rescue left. On another machine it
counts for nothing. Removing it makes the run find out anew.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemo_automodel.components.checkpoint.disk import replace_file
from nemo_automodel.shared.errors import UserError

MEMORY_FILE = "memory.json"
_FORMAT = 1

logger = logging.getLogger(__name__)


@dataclass
class MemoryRecord:
    """What is known; written to ``path`` whenever it changes, nowhere if that is None."""

    path: Path | None = None
    machine: str = ""
    policy: str | None = None
    """Chosen by ``memory: auto``; None: nothing was chosen."""
    needed_gib: dict[str, float] = field(default_factory=dict)
    """By policy, as planned when it was chosen."""
    most_positions: dict[str, int] = field(default_factory=dict)
    """Rows times length of the largest micro-batch that is tried, by policy; policies that are not there have none."""

    @classmethod
    def open(cls, run_dir: Path, device: torch.device, is_resumed: bool) -> MemoryRecord:
        """Return the record of a run: that of its beginning where it is resumed on the same machine.

        What another run left in the directory is removed.

        Raises:
            UserError: the file is damaged.
        """
        fresh = cls(run_dir / MEMORY_FILE, machine_name(device))
        if not is_resumed:
            (run_dir / MEMORY_FILE).unlink(missing_ok=True)
        if not (run_dir / MEMORY_FILE).is_file():
            return fresh
        found = cls._read(run_dir / MEMORY_FILE)
        if found.machine != fresh.machine:
            logger.info("%s is of another machine (%s), so it does not count.", found.path, found.machine)
            return fresh
        if found.most_positions:
            limits = ", ".join(f"{most:,} (recomputed: {policy})" for policy, most in found.most_positions.items())
            logger.info("Micro-batches are split above so many positions: %s, as %s says.", limits, found.path)
        return found

    @classmethod
    def _read(cls, path: Path) -> MemoryRecord:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                path,
                str(values["machine"]),
                values["policy"],
                {str(name): float(gib) for name, gib in values["needed_gib"].items()},
                {str(name): int(most) for name, most in values["most_positions"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"`{path}` is damaged, so nobody knows how this run was computed. Remove it, and the run finds out "
                "anew what fits; numbers may then differ in their last digits."
            ) from error

    def write(self) -> None:
        """Put it on the disk, all or nothing."""
        if self.path is None:
            return
        values = {
            "format": _FORMAT,
            "machine": self.machine,
            "policy": self.policy,
            "needed_gib": self.needed_gib,
            "most_positions": self.most_positions,
        }
        replace_file(self.path, (json.dumps(values, indent=1) + "\n").encode())


def machine_name(device: torch.device) -> str:
    """Return what must be the same for a record to count."""
    if device.type != "cuda":
        return "CPU"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
