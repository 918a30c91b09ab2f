"""Where files are kept that can be made again: fetched demos, tokenised rows."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(name: str) -> Path:
    """Return ``name`` in $NEMO_AUTOMODEL_CACHE, $XDG_CACHE_HOME/nemo_automodel or ~/.cache/nemo_automodel."""
    if own := os.environ.get("NEMO_AUTOMODEL_CACHE"):
        return Path(own).expanduser() / name
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "nemo_automodel" / name
