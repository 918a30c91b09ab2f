"""Which configuration values are secrets.

A key is judged by its whole words, so that ``tokenizer`` and ``pad_token_id`` are not taken for a ``token``. The price
of a word list is that a secret under an innocent key is missed; values in the well-known shapes of access tokens and
passwords inside addresses are therefore masked wherever they stand.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from nemo_automodel.components.config.env import is_one_placeholder

MASK = "******"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SECRET_WORDS = _words(
    "password passwd pwd passphrase secret secrets credential credentials apikey auth authorization bearer"
)
# `<word>_key` is a secret for these words only: `source_key` and `best_metric_key` are not
_KEY_OWNERS = _words("api access secret private wandb comet hf ssh encryption signing account storage")
# `<word>_token` is always a secret for these words …
_TOKEN_OWNERS = _words(
    "hf hub huggingface access api auth bearer refresh session github gh gitlab wandb mlflow comet aws "
    "azure gcp identity login personal security service"
)
# … and never for these, which belong to vocabularies
_VOCABULARY = _words(
    "pad bos eos eot eom unk sep cls mask image video audio start end turn begin of special added extra "
    "new stop prefix suffix user assistant system tool think thinking boi eoi vision num max min per"
)
_TOKEN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abpr]-[\w-]{10,}|AKIA[A-Z0-9]{16})|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
_OPAQUE = re.compile(r"[A-Za-z0-9_\-.=+/]{16,}")


def words_of(key: str) -> list[str]:
    """Split ``hfToken``, ``hf-token`` and ``hf_token`` into lower-case words."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]


def is_secret_key(key: str) -> bool:
    """Tell whether a value under ``key`` is a secret whatever it looks like."""
    words = words_of(key)
    if _SECRET_WORDS.intersection(words) or words in (["token"], ["tokens"]):
        return True
    pairs = set(itertools.pairwise(words))
    return any(
        (owner in _KEY_OWNERS and noun in ("key", "keys")) or (owner in _TOKEN_OWNERS and noun in ("token", "tokens"))
        for owner, noun in pairs
    )


def redact(key: str, value: Any) -> Any:
    """Return ``value`` as it may be printed or saved under ``key``.

    Numbers under ``password`` are masked too; booleans and nulls tell nothing and stay.
    """
    if value is None or isinstance(value, bool):
        return value
    if is_secret_key(key):
        return MASK
    if not isinstance(value, str):
        return value
    words = words_of(key)
    is_credential_like = words[-1:] in (["token"], ["tokens"]) and not _VOCABULARY.intersection(words[:-1])
    if is_credential_like and _OPAQUE.fullmatch(value):
        return MASK
    return _TOKEN_SHAPES.sub(MASK, value)


def redact_text(key: str, text: str) -> str:
    """Return a text with environment placeholders as it may be saved: a name is no secret, a default may be one."""
    if is_secret_key(key) and not is_one_placeholder(text):
        return MASK
    return _TOKEN_SHAPES.sub(MASK, text)
