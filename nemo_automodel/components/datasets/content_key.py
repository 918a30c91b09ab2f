"""What decides the tokens of a data set, as one key: the name of its place in the token cache.

Everything a tokenised set is made of is written down: the rows by their content, the tokenizer by its whole definition,
every option of encoder and layout, and the source files of this folder. Only objects of our own are understood. A
set with anything else in it has no key and is not kept, since a key that misses something would serve stale tokens for
ever, and nothing would show it.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.rows import Rows
from nemo_automodel.components.datasets.token_cache import key_of

_PACKAGE = "nemo_automodel"


class _NoKeyError(Exception):
    """Something that is not understood."""


def is_ours(cls: type) -> bool:
    """Tell whether a class is one of this package itself, so that what it does is known."""
    return cls.__module__.partition(".")[0] == _PACKAGE


def key_of_dataset(dataset: TokenizedRows[Any]) -> str | None:
    """Return the key of a data set, None when something in it is not ours to describe."""
    try:
        content = _described(dataset)
    except _NoKeyError:
        return None
    # templates may write the day into the text (Llama 3's do)
    today = datetime.date.today().isoformat() if "strftime_now" in str(content) else ""
    versions = [transformers.__version__, tokenizers.__version__, _code_digest()]
    return key_of([content, today, *versions])


def _described(value: Any) -> Any:
    """Turn a value into what JSON can write.

    Raises:
        _NoKeyError: it is of a kind that is not known.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, set | frozenset):
        return ["set", *sorted(map(str, value))]
    if isinstance(value, dict):
        return [[_described(key), _described(item)] for key, item in value.items()]
    if isinstance(value, functools.partial):
        return ["partial", _described(value.func), _described(value.args), _described(value.keywords)]
    if inspect.isfunction(value):
        return _function(value)
    if isinstance(value, Rows):
        key = value.content_key()
        if key is None:
            raise _NoKeyError
        return ["rows", key]
    if isinstance(value, PreTrainedTokenizerBase):
        return _tokenizer(value)
    if not is_ours(type(value)):
        raise _NoKeyError
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        fields = {name: item for name, item in vars(value).items() if not _is_state(type(value), name)}
    return [f"{type(value).__module__}.{type(value).__qualname__}", _described(fields)]


def _is_state(cls: type, name: str) -> bool:
    """Tell whether an attribute counts, remembers or refuses, and so decides nothing about tokens."""
    return (
        name.startswith("num_")
        or name == "bears_unlearned"
        or isinstance(inspect.getattr_static(cls, name, None), functools.cached_property)
    )


def _function(function: Any) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    if not name.startswith(f"{_PACKAGE}.") or "<" in name:  # a lambda or a closure does not say what it does
        raise _NoKeyError
    return name


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    if not tokenizer.is_fast:
        raise _NoKeyError
    core: Any = tokenizer.backend_tokenizer
    core.no_truncation()  # what its last call has left there; encoding does the same
    core.no_padding()
    return [
        "tokenizer",
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        hashlib.blake2b(core.to_str().encode(), digest_size=16).hexdigest(),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        tokenizer.split_special_tokens,
        str(tokenizer.chat_template),
    ]


@functools.cache
def _code_digest() -> str:
    """Return the digest of all source files that have a say: those of this folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
