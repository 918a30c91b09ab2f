"""One line for a user's mistake, a traceback for ours."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from typing import Any

from nemo_automodel.shared import processes
from nemo_automodel.shared.errors import LowMemoryStop, StoppedEarly, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_DISK_ERRORS = {
    errno.ENOSPC: "no space is left on the device. Free some, or choose another directory",
    errno.EDQUOT: "the disk quota is used up. Free some, or choose another directory",
    errno.EACCES: "permission denied. Change the permissions, or choose another path",
    errno.EPERM: "operation not permitted. Change the permissions, or choose another path",
    errno.EROFS: "the file system is read-only. Choose another directory",
}

_OUT_OF_MEMORY = (
    "The GPU has no memory left{wanted}. Make the run smaller: --step_scheduler.local_batch_size 1, "
    "--distributed.activation_checkpointing full, a smaller --packed_sequence.packed_sequence_size, or 4 bits "
    "(`quantization`); `automodel plan` says what fits, `automodel doctor` who else holds memory. The last checkpoint "
    "is whole."
)

_UNORDERED = re.compile(r"([^\n]+) does not have a deterministic implementation")
_NO_ORDER = (
    "`{operation}` has no form that adds in a fixed order, and `deterministic: true` wants one. Set `deterministic: "
    "false`, or do without what uses it."
)


def run_safely(function: Callable[[], Any], *, debug: bool | None = None) -> int:
    """Call ``function`` and return the exit status of the process.

    A ``UserError``, a full disk, a missing permission, a full GPU or an operation that adds in no fixed order where one
    is wanted prints ``error: …`` on one line of stderr and gives 2; a run stopped before the machine swaps gives 3, one
    that lost one of its processes 4; Ctrl-C gives 130, and another signal before the first step 128 plus its number;
    anything else is a defect and keeps its traceback.

    Args:
        function: what to run; its result, if a whole number, is the status.
        debug: show the traceback of user errors too; by default when ``--debug`` stands on the command line.
    """
    shows_traceback = "--debug" in sys.argv[1:] if debug is None else debug
    try:
        status = function()
    except StoppedEarly as stop:
        if processes.is_first():
            sys.stderr.write(f"{stop}\n")
        return stop.exit_status
    except KeyboardInterrupt:
        if processes.is_first():
            sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except LowMemoryStop as stop:
        _report(str(stop))
        return stop.exit_status
    except UserError as error:
        if shows_traceback:
            raise
        return _report(str(error), error.exit_status)
    except OSError as error:
        if shows_traceback or error.errno not in _DISK_ERRORS:
            raise
        return _report(f"`{error.filename or 'a file'}`: {_DISK_ERRORS[error.errno]}.")
    except RuntimeError as error:
        unordered = _UNORDERED.search(str(error))
        if unordered and not shows_traceback:
            return _report(_NO_ORDER.format(operation=unordered[1]))
        # torch's class, told by its name: most commands never import torch
        if shows_traceback or type(error).__name__ != "OutOfMemoryError":
            raise
        return _report(_OUT_OF_MEMORY.format(wanted=_wanted(str(error))))
    return status if isinstance(status, int) and not isinstance(status, bool) else 0


def _wanted(message: str) -> str:
    found = re.search(r"Tried to allocate ([\d.]+ \w+)", message)
    return f" for another {found[1]}" if found else ""


def _report(message: str, status: int = EXIT_USER_ERROR) -> int:
    """Say what went wrong; of several processes the first one does, also for the others (`peer_watch`)."""
    if processes.is_first():
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return status
