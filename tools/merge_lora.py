"""Merge a LoRA adapter into its base: ``tools/merge_lora.py -m BASE -a ADAPTER -o OUT``.

The older spelling of ``automodel merge ADAPTER --base BASE -o OUT``, which takes the same further options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_automodel.cli.app import main as automodel

_NAMES = {"-m": "--base", "--base-model": "--base", "--model": "--base", "--output": "--out"}
_ADAPTER = ("-a", "--adapter")


def main(argv: Sequence[str] | None = None) -> int:
    """Translate the options and merge; return the exit status."""
    words = [_NAMES.get(word, word) for word in (sys.argv[1:] if argv is None else argv)]
    places = [place for place, word in enumerate(words) if word in _ADAPTER]
    for place in places[:1]:
        words[place : place + 2] = words[place + 1 : place + 2]
    return automodel(["merge", *words])


if __name__ == "__main__":
    raise SystemExit(main())
