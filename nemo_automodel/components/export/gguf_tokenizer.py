"""A tokenizer as GGUF holds it, written and read.

GGUF names a way to split text (``tokenizer.ggml.pre``) instead of holding the regular expression, so a tokenizer can be
written only where its splitting is one that llama.cpp has a name for; any other is refused, since a near one would cut
some texts differently and nobody would see it. Two kinds are known: byte-level BPE (Llama 3, Qwen, SmolLM, GPT-2,
Mistral NeMo) and the BPE of SentencePiece with byte fallback (Llama 2, Mistral 7B, TinyLlama), whose order of merges
GGUF holds as scores.

`read_tokenizer` builds a tokenizer back from what stands in the file, and from nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.imports import require

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens in GGUF."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2, "tekken": _TEKKEN}
"""llama.cpp's name of a way to split → its expression; GPT-2's own is built into the tokenizers package."""
_SPACE = "▁"


@dataclass
class GGUFVocabulary:
    """What is written about a tokenizer."""

    model: str
    """``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece's BPE)."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space: bool = False
    special: dict[str, int] = field(default_factory=dict)
    """``bos``, ``eos``, ``unk``, ``pad``, ``eot`` → token."""


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_tokens: list[int] | None = None
) -> GGUFVocabulary:
    """Return what GGUF needs to know of ``tokenizer``, filled up to the ``vocab_size`` rows of the embedding.

    ``end_tokens`` are the tokens that end an answer beside the tokenizer's own.

    Raises:
        UserError: no fast tokenizer, or one that llama.cpp has no name for.
    """
    if not tokenizer.is_fast:
        raise UserError("GGUF needs the parts of a fast tokenizer (tokenizer.json), and this model has none.")
    core: Any = tokenizer.backend_tokenizer
    parts = json.loads(core.to_str())
    if parts["model"]["type"] != "BPE":
        raise UserError(f"The tokenizer is of type {parts['model']['type']}, and only BPE can be written as GGUF.")
    is_sentencepiece = bool(parts["model"].get("byte_fallback"))
    added = {token["id"]: token for token in parts["added_tokens"]}
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    types = [_type_of(number, tokens[number], names, added, parts, is_sentencepiece) for number in range(vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    ids = tokenizer("a")["input_ids"]
    made = GGUFVocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre="default" if is_sentencepiece else _pre_of(parts),
        tokens=tokens,
        types=types,
        merges=[] if is_sentencepiece else merges,
        scores=_scores(tokens, merges) if is_sentencepiece else [],
        adds_bos=bool(ids) and ids[0] == tokenizer.bos_token_id,
        adds_eos=bool(ids) and ids[-1] == tokenizer.eos_token_id,
        adds_space=is_sentencepiece and core.encode("a", add_special_tokens=False).tokens == [f"{_SPACE}a"],
    )
    for key in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{key}_token_id")
        if number is not None:
            made.special[key] = number
    others = [token for token in end_tokens or [] if token != made.special.get("eos")]
    if others:
        made.special["eot"] = others[0]
    return made


def _type_of(
    number: int, token: str, names: dict[int, str], added: dict[int, Any], parts: Any, is_sentencepiece: bool
) -> int:
    if number not in names:
        return UNUSED
    if is_sentencepiece and token == parts["model"].get("unk_token"):
        return UNKNOWN
    if is_sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    return NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return SentencePiece's scores: the earlier a piece is merged, the higher."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return [-float(rank[token]) if token in rank else -1e6 for token in tokens]


def _pre_of(parts: Any) -> str:
    """Return llama.cpp's name for how the tokenizer splits text before BPE.

    Raises:
        UserError: it has none.
    """
    splitter = parts["pre_tokenizer"]
    steps = splitter["pretokenizers"] if splitter and splitter["type"] == "Sequence" else [splitter]
    kinds = [step["type"] for step in steps if step]
    byte_level = next((step for step in steps if step and step["type"] == "ByteLevel"), None)
    if byte_level is not None and not byte_level.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and byte_level.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and byte_level.get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not byte_level.get("use_regex", True):
            pattern = steps[0]["pattern"].get("Regex")
            for name, known in _PATTERNS.items():
                if pattern == known:
                    return name
    raise UserError(
        "The tokenizer splits text in a way that llama.cpp has no name for, so a GGUF file would cut it differently. "
        "Use --to hf, or llama.cpp's own converter on that directory."
    )


def write_vocabulary(writer: Any, vocabulary: GGUFVocabulary, chat_template: str | None) -> None:
    """Put the tokenizer into a GGUF file's header."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    for key, number in vocabulary.special.items():
        getattr(writer, f"add_{key}_token_id")(number)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


# ------------------------------------------------------------------------------------------------------------- reading


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a GGUF file describes, with its chat template.

    Raises:
        UserError: a way of splitting that is not one of those that are written here.
    """
    reader = require("gguf", "Reading a GGUF file").GGUFReader(file)

    def value(key: str, default: Any = None) -> Any:
        found = reader.get_field(f"tokenizer.{key}")
        return default if found is None else found.contents()

    tokens, types = value("ggml.tokens"), value("ggml.token_type")
    numbers = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    core = _sentencepiece(numbers, value) if value("ggml.model") == "llama" else _byte_level(numbers, value)
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == CONTROL]
    )
    core.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED])
    special = {key: value(f"ggml.{name}_token_id") for key, name in _SPECIAL.items()}
    named = {key: tokens[number] for key, number in special.items() if number is not None}
    _add_borders(core, value, tokens)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core, **named)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = value("chat_template")
    made: PreTrainedTokenizerFast = tokenizer
    return made


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _byte_level(numbers: dict[str, int], value: Any) -> Any:
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges", [])]
    pre = value("ggml.pre")
    core = tokenizers.Tokenizer(models.BPE(vocab=numbers, merges=merges, ignore_merges=pre == "llama-bpe"))
    bytes_by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        core.pre_tokenizer = bytes_by_gpt2
    elif pre == "smollm":
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_by_gpt2])
    elif pre in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        raise UserError(f"`tokenizer.ggml.pre` is `{pre}`, which is not known here.")
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(numbers: dict[str, int], value: Any) -> Any:
    """SentencePiece merges the pair with the highest score: every way to cut a piece in two is a merge of its rank."""
    scores = value("ggml.scores")
    ranked = sorted((token for token, n in numbers.items() if scores[n] > -1e6), key=lambda t: -scores[numbers[t]])
    merges = [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in numbers and token[cut:] in numbers
    ]
    unknown = value("ggml.unknown_token_id")
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab=numbers,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else value("ggml.tokens")[unknown],
        )
    )
    prepend = [normalizers.Prepend(_SPACE)] if value("ggml.add_space_prefix") else []
    core.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    core.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


def _add_borders(core: Any, value: Any, tokens: list[str]) -> None:
    first = [value("ggml.bos_token_id")] * bool(value("ggml.add_bos_token"))
    last = [value("ggml.eos_token_id")] * bool(value("ggml.add_eos_token"))
    if first or last:
        border = [f"{tokens[number]}" for number in first], [f"{tokens[number]}" for number in last]
        core.post_processor = processors.TemplateProcessing(
            single=[*border[0], "$A", *border[1]],
            special_tokens=[(tokens[number], number) for number in dict.fromkeys([*first, *last])],
        )
