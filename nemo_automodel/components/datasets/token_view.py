"""Rows as a person reads them: every token, whether it is learned, and where its document begins and ends.

The same tokens are drawn on a terminal here and as a page in ``token_page``. With colour, what is learned stands on
green, and neighbouring tokens have two shades, so that their borders show. Without colour, ``[brackets]`` stand round
what is learned and bars part the tokens. Text comes from data, so nothing of it may move the cursor or turn the line
around: control and format characters are spelled out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from nemo_automodel.components.datasets.document_view import DocumentView

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_SHOWN = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}
_CONTINUED = "‥"
_MOST_TOKENS_OF_A_CHARACTER = 8
_NUMBER_WIDTH = 6


class Kind(Enum):
    """What becomes of a token."""

    GIVEN = "given"
    LEARNED = "learned"
    CUT = "cut"


@dataclass(frozen=True)
class Token:
    """One token of a document."""

    position: int
    """Its ``position_id``: counted from 0 in every document."""
    token_id: int
    text: str
    """What it spells, with nothing hidden; a token that only continues a character is two dots."""
    kind: Kind
    ends_line: bool


@dataclass(frozen=True)
class ShownDocument:
    """One document and its tokens, those that truncation cut off at the end."""

    heading: str
    tokens: list[Token]


@dataclass(frozen=True)
class ShownRow:
    """One row of a batch: one document, or the documents packed into it."""

    heading: str
    documents: list[ShownDocument]


def show_row(number: int, documents: Sequence[DocumentView], tokenizer: PreTrainedTokenizerBase | None) -> ShownRow:
    """Return row ``number`` (from 1) as it is to be shown."""
    num_tokens = sum(len(document.ids) for document in documents)
    num_learned = sum(document.num_learned for document in documents)
    parts = [f"row {number}", f"{num_tokens:,} tokens, {num_learned:,} learned"]
    if len(documents) == 1:
        parts.insert(1, documents[0].where)
        return ShownRow(" · ".join(parts), [ShownDocument("", _tokens(documents[0], tokenizer))])
    parts.insert(1, f"{len(documents)} documents")
    shown = []
    for index, document in enumerate(documents, start=1):
        heading = f"document {index} · {document.where}"
        if document.num_shared:
            heading += f" · its first {document.num_shared:,} tokens are those above, stored once"
        shown.append(ShownDocument(heading, _tokens(document, tokenizer)[document.num_shared :]))
    return ShownRow(" · ".join(parts), shown)


def _tokens(document: DocumentView, tokenizer: PreTrainedTokenizerBase | None) -> list[Token]:
    ids = [*document.ids, *document.cut_ids]
    learned = [*document.learned, *[False] * len(document.cut_ids)]
    num_kept = len(document.ids)
    tokens = []
    for position, (token_id, text) in enumerate(zip(ids, token_texts(ids, tokenizer), strict=True)):
        kind = Kind.CUT if position >= num_kept else Kind.LEARNED if learned[position] else Kind.GIVEN
        tokens.append(Token(position, token_id, visible(text), kind, "\n" in text))
    return tokens


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return what each token spells; of several that only together make a character, the first has it.

    Without a tokenizer the numbers themselves are returned.
    """
    if tokenizer is None:
        return [f" {token_id}" for token_id in ids]
    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        for num_tokens in range(1, min(_MOST_TOKENS_OF_A_CHARACTER, len(ids) - start) + 1):
            text = _decode(ids[start : start + num_tokens], tokenizer)
            if "\ufffd" not in text:
                texts += [text, *[_CONTINUED] * (num_tokens - 1)]
                break
        else:
            texts.append(str(tokenizer.convert_ids_to_tokens(ids[start])))
    return texts


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    # SentencePiece's own decoding takes the space before a first word away
    if str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁") and not text.startswith(" "):
        return f" {text}"
    return text


def visible(text: str) -> str:
    """Spell out what would not be seen, or would act on a terminal."""
    return "".join(
        _SHOWN.get(char) or (_escape(char) if unicodedata.category(char) in _HIDDEN_CATEGORIES else char)
        for char in text
    )


def _escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}"


# --- the terminal -----------------------------------------------------------------------------------------------------

_STYLES = {
    Kind.GIVEN: ("grey74", "grey54"),
    Kind.LEARNED: ("bold black on green3", "bold black on spring_green2"),
    Kind.CUT: ("strike red3", "strike indian_red"),
}
_MARKS = {Kind.GIVEN: ("", "|"), Kind.LEARNED: ("[", "]"), Kind.CUT: ("{", "}")}


def legend(has_colour: bool) -> Text:
    """Return the line that explains the marks."""
    from rich.text import Text

    line = Text("position  ")
    words = (
        (Kind.GIVEN, "given"), (Kind.LEARNED, "learned"), (Kind.CUT, "cut off by truncation")
    )  # fmt: skip
    for kind, word in words:
        line.append(_marked(word, kind, has_colour), _STYLES[kind][0] if has_colour else "")
        line.append("  ")
    return line


def row_lines(row: ShownRow, width: int, has_colour: bool) -> list[Text]:
    """Return a row as lines of at most ``width`` columns, each with the position of its first token."""
    from rich.text import Text

    lines = [Text(row.heading, style="bold" if has_colour else "")]
    for document in row.documents:
        if document.heading:
            lines.append(Text(f"── {document.heading}", style="cyan" if has_colour else ""))
        lines += _token_lines(document.tokens, width, has_colour)
    return lines


def _token_lines(tokens: Sequence[Token], width: int, has_colour: bool) -> list[Text]:
    from rich.cells import cell_len
    from rich.text import Text

    lines: list[Text] = []
    line, is_new = Text(), True
    for token in tokens:
        text = _marked(token.text, token.kind, has_colour)
        if not is_new and line.cell_len + cell_len(text) > width:
            lines.append(line)
            is_new = True
        if is_new:
            line, is_new = Text(), False
            line.append(f"{token.position:>{_NUMBER_WIDTH},}  ", "dim" if has_colour else "")
        line.append(text, _STYLES[token.kind][token.position % 2] if has_colour else "")
        if token.ends_line:
            lines.append(line)
            is_new = True
    return lines if is_new else [*lines, line]


def _marked(text: str, kind: Kind, has_colour: bool) -> str:
    if has_colour:
        return text
    before, after = _MARKS[kind]
    return f"{before}{text}{after}"
