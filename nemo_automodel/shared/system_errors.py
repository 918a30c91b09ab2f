"""The system's own error inside what a library raises: writers in other languages tell it only in words."""

from __future__ import annotations

import os
import re

_IN_WORDS = re.compile(r"\(os error (\d+)\)")


def system_error(error: BaseException | None) -> OSError | None:
    """Return the first error of the system in a chain of causes, as safetensors' writer tells it too; None: no such."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        in_words = _IN_WORDS.search(str(error))
        if in_words:
            return OSError(int(in_words[1]), os.strerror(int(in_words[1])))
        error = error.__cause__ or error.__context__
    return None
