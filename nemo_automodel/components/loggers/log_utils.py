"""Console logging: one format, one stream, no secrets.

Log lines go to standard error, above the progress bar while one is shown. On a terminal the level is coloured (NO_COLOR
and FORCE_COLOR are honoured); everywhere else a line is exactly the format below. Of several processes only the first
one speaks.
"""

from __future__ import annotations

import logging
import os
import sys

from nemo_automodel.components.loggers.console import write_line
from nemo_automodel.shared.errors import UserError

LINE_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

_SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
)
_SHORTEST_SECRET = 6
"""Shorter values are not masked: they are no tokens, and replacing them would garble the text."""

_NOISY_LOGGERS = ("httpx", "urllib3", "filelock", "fsspec", "git")
"""Libraries that log every request at INFO; shown from WARNING on, unless DEBUG is asked for."""

_COLOURS = {"DEBUG": "36", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


def setup_logging() -> None:
    """Send log lines of level LOGGING_LEVEL (default INFO) and above to standard error; silence ranks above 0.

    Calling it again replaces the handler of the first call. Handlers of others are left alone.

    Raises:
        UserError: LOGGING_LEVEL names no level.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, ConsoleHandler):
            root.removeHandler(handler)
    level = _level_from_environment()
    root.setLevel(level)
    handler = ConsoleHandler()
    handler.setFormatter(LineFormatter(colour=wants_colour()))
    root.addHandler(handler)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(level, logging.WARNING) if level > logging.DEBUG else level)
    # Libraries bring handlers of their own, so silence has to be general.
    logging.disable(logging.CRITICAL if int(os.environ.get("RANK", "0")) > 0 else logging.NOTSET)


def wants_colour() -> bool:
    """Tell whether log lines are coloured: NO_COLOR forbids it, FORCE_COLOR asks for it, else a terminal decides."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stderr.isatty()


def mask_secrets(text: str) -> str:
    """Replace the values of HF_TOKEN, WANDB_API_KEY and their like in ``text`` by ``***``."""
    for variable in _SECRET_VARIABLES:
        value = os.environ.get(variable, "")
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text


class LineFormatter(logging.Formatter):
    """The contract's line; masks secrets in the whole of it, a traceback included."""

    def __init__(self, colour: bool) -> None:
        super().__init__(LINE_FORMAT, DATE_FORMAT)
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Return the finished line of ``record``."""
        line = mask_secrets(super().format(record))
        if not self.colour:
            return line
        name = record.levelname
        return line.replace(f" {name} ", f" \x1b[{_COLOURS.get(name, '0')}m{name}\x1b[0m ", 1)


class ConsoleHandler(logging.Handler):
    """Writes to standard error, above a progress bar when one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; logging's own error handling applies when the stream is gone."""
        try:
            write_line(self.format(record))
        except Exception:  # the rule for handlers: a log line never stops the program
            self.handleError(record)


def _level_from_environment() -> int:
    value = os.environ.get("LOGGING_LEVEL", "").strip().upper() or "INFO"
    if value.isdigit():
        return int(value)
    level = logging.getLevelName(value)
    if not isinstance(level, int):
        raise UserError(f"LOGGING_LEVEL is `{value}`, which is no level. Use DEBUG, INFO, WARNING, ERROR or CRITICAL.")
    return level
