"""From text to a training sample: tokens, which of them are learned, and labels that are already shifted.

The border between what is given and what is learned is a place in the *text*. The text is tokenised once, as a whole,
and character offsets say which token holds the first character of the answer. Tokenising the prompt apart and counting
its tokens looks the same and is wrong: tokens merge across the border, so a prompt that ends in a space hides the first
token of the answer, and a short answer such as "Paris" is then not learned at all. A token that straddles the border
belongs to the answer.

Stages of this module: ``(prompt, answer)`` → ``Encoded`` (ids and learned ranges) → sample (``input_ids``, ``labels``,
``attention_mask``, ``___PAD_TOKEN_IDS___``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nemo_automodel.shared.errors import UserError, did_you_mean
from nemo_automodel.shared.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

PAD_TOKEN_IDS = "___PAD_TOKEN_IDS___"
"""The key of a sample that tells a collate function what to fill each field with."""

Sample = dict[str, Any]

_FP8_MULTIPLE = 16
_PADDING = {False: None, None: None, "do_not_pad": None, True: "longest", "longest": "longest", "max_length": "max"}
_TRUNCATION = {
    False: False,
    None: False,
    "do_not_truncate": False,
    True: True,
    "longest_first": True,
    "only_first": True,
}


class Encoded(NamedTuple):
    """A tokenised row."""

    ids: list[int]
    learned: list[tuple[int, int]]
    """Ranges of positions in ``ids`` that are learned, in order and apart: ``[start, end)``."""


class PromptAnswer(NamedTuple):
    """A prompt and the answer to be learned; the model sees one directly after the other."""

    prompt: str
    answer: str


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot tell which characters a token covers.

    Raises:
        UserError: the tokenizer is a slow one.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer `{tokenizer.name_or_path or type(tokenizer).__name__}` has no character offsets, which "
            "decide what is learned. Use one with a tokenizer.json file (a fast tokenizer)."
        )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding id, or the end-of-sequence id where there is none.

    Raises:
        UserError: the tokenizer has neither.
    """
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if found is None:
        raise UserError(
            "The tokenizer has neither a pad nor an eos token. Set `pad_token` in its tokenizer_config.json."
        )
    return int(found)


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the end-of-sequence id.

    Raises:
        UserError: the tokenizer has none, so the model could not learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has no eos token, so the model would never learn to stop. "
            "Set `eos_token` in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


class PromptAnswerEncoder:
    """Tokenise prompt and answer as one text; learn the answer and the end of sequence.

    BOS and EOS come as the tokenizer adds them to plain text by default; a missing EOS is appended, a doubled BOS is
    not. With ``answer_only=False`` every token is learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer_only: bool = True) -> None:
        require_fast(tokenizer)
        self._tokenizer, self._answer_only = tokenizer, answer_only
        self._eos_id = eos_token_id(tokenizer)

    def encode(self, items: Sequence[PromptAnswer], where: Sequence[str]) -> list[Encoded]:
        """Tokenise a list of items at once; ``where`` names each for messages.

        Raises:
            UserError: an answer is empty.
        """
        for item, place in zip(items, where, strict=True):
            if not item.answer.strip():
                raise UserError(
                    f"{place}: the answer is empty, so there is nothing to learn. Fill it or remove the row."
                )
        texts = [item.prompt + item.answer for item in items]
        encodings = tokenize(self._tokenizer, texts, add_special_tokens=True)
        return [
            self._encoded(encoding.ids, first_token_of(encoding, len(item.prompt), len(text)))
            for item, text, encoding in zip(items, texts, encodings, strict=True)
        ]

    def _encoded(self, ids: list[int], border: int) -> Encoded:
        bos_id = self._tokenizer.bos_token_id
        if bos_id is not None and ids[:2] == [bos_id, bos_id] and border > 1:
            ids, border = ids[1:], border - 1  # the text brought its own
        if ids[-1] != self._eos_id:
            ids = [*ids, self._eos_id]
        return Encoded(ids, [(border if self._answer_only else 0, len(ids))])


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[Encoding]:
    """Tokenise texts, neither cut nor padded; each result has ``ids`` and knows which characters a token covers.

    The library's own call does the same and then turns every token into Python objects several times, which takes half
    as long again as the tokenising. So it is called for one text, which sets the tokenizer up, and the rest goes to the
    core directly, except where the tokenizer's class has an encoding of its own.
    """
    if not texts:
        return []
    options: dict[str, Any] = {
        "add_special_tokens": add_special_tokens,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,
    }
    is_plain = type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
    batch = tokenizer(texts[:1] if is_plain else texts, **options)
    if not is_plain:
        return list(batch.encodings or [])
    core: Any = tokenizer.backend_tokenizer
    encodings: list[Encoding] = core.encode_batch(texts, add_special_tokens=add_special_tokens)
    return encodings


def first_token_of(encoding: Encoding, start: int, end: int) -> int:
    """Return the index of the first token that covers a character of ``text[start:end]``, or the number of tokens.

    Characters may belong to no token (normalisers drop some), so the next ones are asked too.
    """
    for char in range(start, end):
        token = encoding.char_to_token(char)
        if token is not None:
            return int(token)
    return len(encoding)


@dataclass(frozen=True)
class Layout:
    """How a tokenised row is cut, shifted and padded: the keys ``seq_length``, ``padding`` and ``truncation``."""

    pad_id: int
    seq_length: int | None = None
    """Positions of a sample, after the shift."""
    pads_to_length: bool = False
    cuts: bool = False
    shifted: bool = True
    """False leaves every label on its own token."""
    multiple: int = 1
    """Every sample is padded to a multiple of this many positions."""

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        seq_length: int | None,
        padding: bool | str | None,
        truncation: bool | str | None,
        shifted: bool = True,
        fp8: bool = False,
    ) -> Layout:
        """Read the keys as users write them; ``fp8`` asks for lengths that FP8 matrix products take.

        ``padding: true`` (or ``longest``) is what every batch does anyway; only ``max_length`` pads each sample.

        Raises:
            UserError: an unknown word, or a word that needs ``seq_length`` without one.
        """
        pads = _lookup(_PADDING, "padding", padding) == "max"
        cuts = _lookup(_TRUNCATION, "truncation", truncation)
        if seq_length is None and (pads or cuts):
            key = f"padding: {padding}" if pads else f"truncation: {truncation}"
            raise UserError(f"`dataset.{key}` needs a length. Set `dataset.seq_length`.")
        if seq_length is not None and seq_length < 2:
            raise UserError(f"`dataset.seq_length` is {seq_length}, but it must be at least 2.")
        if seq_length is not None and not (pads or cuts):
            logger.warning(
                "`dataset.seq_length: %d` has no effect without `truncation: true` or `padding: max_length`.",
                seq_length,
            )
        return cls(pad_token_id(tokenizer), seq_length, pads, cuts, shifted, _FP8_MULTIPLE if fp8 else 1)

    @property
    def max_tokens(self) -> int | None:
        """Tokens of the text that fit in a sample: one more than its positions, since the last is only a label."""
        if not self.cuts or self.seq_length is None:
            return None
        return self.seq_length + 1 if self.shifted else self.seq_length

    def sample(self, encoded: Encoded) -> Sample:
        """Cut, shift and pad. All lists of the result have one length; padding and what is given have label -100."""
        ids, learned = encoded.ids[: self.max_tokens], encoded.learned
        labels = [IGNORE_INDEX] * len(ids)
        for start, end in learned:
            labels[start:end] = ids[start:end]
        if self.shifted:
            ids, labels = ids[:-1], labels[1 : len(ids)]
        length = max(self.seq_length or 0, len(ids)) if self.pads_to_length else len(ids)
        num_padding = -(-length // self.multiple) * self.multiple - len(ids)
        return {
            "input_ids": ids + [self.pad_id] * num_padding,
            "labels": labels + [IGNORE_INDEX] * num_padding,
            "attention_mask": [1] * len(ids) + [0] * num_padding,
            PAD_TOKEN_IDS: {"input_ids": self.pad_id, "labels": IGNORE_INDEX, "attention_mask": 0},
        }

    def arrays(self, encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
        """Return what ``sample`` does as int32 ``input_ids`` and ``labels``, without padding."""
        tokens = np.array(encoded.ids[: self.max_tokens], dtype=np.int32)
        labels = np.full(len(tokens), IGNORE_INDEX, dtype=np.int32)
        for start, end in encoded.learned:
            labels[start:end] = tokens[start:end]
        return (tokens[:-1], labels[1:]) if self.shifted else (tokens, labels)

    def num_cut(self, encoded: Encoded) -> tuple[int, int]:
        """Return how many learned tokens are kept and how many are cut off."""
        limit = len(encoded.ids) if self.max_tokens is None else self.max_tokens
        total = sum(end - start for start, end in encoded.learned)
        kept = sum(max(min(end, limit) - start, 0) for start, end in encoded.learned)
        return kept, total - kept


def _lookup(table: dict[Any, Any], key: str, value: Any) -> Any:
    if value not in table:
        words = [word for word in table if isinstance(word, str)]
        raise UserError(
            f"`dataset.{key}: {value}` is not known.{did_you_mean(str(value), words)} "
            f"Known: true, false, {', '.join(words)}."
        )
    return table[value]
