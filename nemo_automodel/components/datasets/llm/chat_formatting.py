"""From a conversation to tokens: what the chat template writes for the assistant is learned, nothing else is.

Which characters those are is asked of the template itself. A template with ``{% generation %}`` blocks says so. For any
other, each assistant turn is rendered twice: everything before it, with the generation prompt, as a server would send
it, and the same with the turn. What the second adds is the turn.

With either kind of template, what a server would send before a turn must be the unchanged beginning of the whole
conversation, and the turn must stand there as the model would have to write it. Templates that take the reasoning out
of earlier turns, or move the tools to the last question, break that for earlier turns: such turns are context, not
learned, and counted. A conversation of which no turn is left is refused, since training would teach something that
serving never shows. The price is one rendering a turn, two without blocks.

Role headers, the generation prompt and the empty think block some templates put before an answer are not learned; the
token that ends the turn is, also where a template's blocks leave it out. White space after it is not. Text is
tokenised once, without special tokens, since the template writes them.

Stages of this module: text and turns (``chat_turns``) → learned character ranges → ``Encoded`` (ids and learned ranges
of positions).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from nemo_automodel.components.datasets.llm.chat_turns import Conversation, Message, Span, Turn, TurnReader
from nemo_automodel.components.datasets.llm.formatting import (
    Encoded,
    eos_token_id,
    first_token_of,
    require_fast,
    tokenize,
)
from nemo_automodel.shared.errors import UserError

__all__ = ["ChatEncoder", "Conversation", "Message", "use_chat_template"]

logger = logging.getLogger(__name__)

_THINK_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def use_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str | None:
    """Return the template to train with; one that is given also becomes the tokenizer's own.

    The tokenizer is changed so that the checkpoint, and whoever serves it, has the template it was trained with.

    ``chat_template`` is the template's text, or the path of a ``.jinja`` or ``.json`` file; None takes the tokenizer's.

    Raises:
        UserError: the file is missing or holds no template.
    """
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer.get_chat_template() if tokenizer.chat_template else None


def _read_template(given: str) -> str:
    if "{" in given or "\n" in given:
        return given
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"`dataset.chat_template: {given}` cannot be read: {error.strerror}. "
            "Give the template's text, or the path of a .jinja or .json file."
        ) from None
    if path.suffix != ".json":
        return text
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}.") from None
    if isinstance(content, dict):
        content = content.get("chat_template")
    if not isinstance(content, str):
        raise UserError(f"{path} holds no chat template. Put its text under the key `chat_template`.")
    return content


class ChatEncoder:
    """Render conversations with a chat template and learn the assistant's turns."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        *,
        answer_only: bool = True,
        mask_history: bool = False,
        mask_reasoning: bool = False,
    ) -> None:
        """Choose what is learned.

        All assistant turns, or with ``mask_history`` the last one; with ``mask_reasoning`` not the text of the
        reasoning, whose delimiters stay learned; without ``answer_only`` everything.
        """
        require_fast(tokenizer)
        self._tokenizer, self._reader = tokenizer, TurnReader(tokenizer, template, needs_order=mask_history)
        self._answer_only, self._mask_history, self._mask_reasoning = answer_only, mask_history, mask_reasoning
        self._eos_id = eos_token_id(tokenizer)
        self.num_turns_without_reasoning = 0
        self.num_context_turns = 0
        """Assistant turns rendered so far that are context only, because the template rewrites them."""

    def encode(self, items: Sequence[Conversation], where: Sequence[str]) -> list[Encoded]:
        """Render and tokenise conversations; ``where`` names each for messages.

        Raises:
            UserError: no assistant turn, the template refuses a conversation, or it rewrites earlier turns so that
                training and serving would differ.
        """
        rendered = [self._learned_spans(item, place) for item, place in zip(items, where, strict=True)]
        texts = [text for text, _ in rendered]
        encodings = tokenize(self._tokenizer, texts, add_special_tokens=False)
        encoded = []
        for encoding, (text, spans) in zip(encodings, rendered, strict=True):
            ids = encoding.ids
            learned = [_token_range(encoding, span, len(text)) for span in spans]
            if spans[-1][1] >= len(text.rstrip()) and not text.rstrip().endswith(self._reader.special_tokens):
                ids = [*ids, self._eos_id]  # the template ends a turn with nothing a server could stop at
                learned[-1] = (learned[-1][0], len(ids))
            if not self._answer_only:
                learned = [(0, len(ids))]
            encoded.append(Encoded(ids, [(start, end) for start, end in learned if start < end]))
        return encoded

    def _learned_spans(self, item: Conversation, where: str) -> tuple[str, list[Span]]:
        """Return the rendered text and the character ranges that are learned, in order."""
        text, found = self._reader.read(item, where)
        turns = [turn for turn in found if turn.message.get("train") is not False]
        if self._mask_history:
            turns = turns[-1:]
        if not turns:
            raise UserError(f"{where}: no assistant turn is to be learned (`train: false` on all of them).")
        true_turns = [turn for turn in turns if turn.drift is None]
        self._count_context(len(turns) - len(true_turns), turns, where)
        if not true_turns:
            drift = turns[0].drift
            assert drift is not None
            raise UserError(f"{where}: {drift.reason} {drift.remedy}")
        spans = []
        for turn in true_turns:
            self._check_written(text, turn, where)
            spans += self._without_reasoning(text, turn) if self._mask_reasoning else [turn.span]
        if not spans:
            raise UserError(f"{where}: the assistant's turns hold nothing but reasoning, which is masked.")
        return text, spans

    def _check_written(self, text: str, turn: Turn, where: str) -> None:
        """Refuse a template that leaves out a tool call; tell of one that leaves out reasoning."""
        written = text[slice(*turn.span)]
        names = [name for call in turn.message.get("tool_calls") or () if (name := _name_of_call(call)) is not None]
        for name in names:
            if written.count(name) < names.count(name):
                raise UserError(
                    f"{where}: the chat template writes {written.count(name)} of the {names.count(name)} calls of the "
                    f"tool `{name}` in one turn. Use a template that writes them all, or leave such rows out."
                )
        reasoning = turn.message.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip() and reasoning.strip() not in text:
            self.num_turns_without_reasoning += 1
            if _is_told(self.num_turns_without_reasoning):
                logger.warning(
                    "%s: the chat template does not write `reasoning_content`, so it is not learned (%d such turns so "
                    "far). Use a template that does, or write it into `content`.",
                    where, self.num_turns_without_reasoning,
                )  # fmt: skip

    def _count_context(self, num_new: int, turns: list[Turn], where: str) -> None:
        if num_new == 0:
            return
        drift = next(turn.drift for turn in turns if turn.drift is not None)
        self.num_context_turns += num_new
        if _is_told(self.num_context_turns, num_new):
            logger.warning(
                "%s: %s It is context there, not learned (%d such turns so far).",
                where,
                drift.reason,
                self.num_context_turns,
            )

    def _without_reasoning(self, text: str, turn: Turn) -> list[Span]:
        """Take the reasoning's text out of a turn, given as ``reasoning_content`` or between think tags."""
        start, end = turn.span
        reasoning = turn.message.get("reasoning_content") or turn.message.get("thinking")
        if isinstance(reasoning, str) and reasoning.strip():
            found = text.find(reasoning.strip(), start, end)
            holes = [(found, found + len(reasoning.strip()))] if found >= 0 else []
        else:
            holes = [match.span(1) for match in _THINK_BLOCK.finditer(text, start, end)]
        spans = []
        for hole_start, hole_end in [*holes, (end, end)]:
            if start < hole_start:
                spans.append((start, hole_start))
            start = hole_end
        return spans


def _is_told(count: int, num_new: int = 1) -> bool:
    """Tell whether a count has just passed 1 or a power of ten."""
    return count == num_new or len(str(count)) > len(str(count - num_new))


def _name_of_call(call: Any) -> str | None:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _token_range(encoding: Encoding, span: Span, num_chars: int) -> tuple[int, int]:
    """Return the range of tokens that cover a character of ``span``, straddling ones included."""
    start, end = span
    first = first_token_of(encoding, start, end)
    following = first_token_of(encoding, end, num_chars)
    covered = encoding.token_to_chars(following) if following < len(encoding) else None
    if covered is not None and covered[0] < end:
        following += 1
    return first, following
