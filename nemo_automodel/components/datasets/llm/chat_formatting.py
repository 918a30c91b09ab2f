"""From a conversation to tokens: what the chat template writes for the assistant is learned, nothing else is.

Which characters those are is asked of the template itself. A template with ``{% generation %}`` blocks says so. For any
other, each assistant turn is rendered twice: everything before it, with the generation prompt, as a server would send
it, and the same with the turn. What the second adds is the turn, and the first must be the unchanged beginning of the
whole conversation, or training would teach something that serving never shows.

Role headers, the generation prompt and the empty think block some templates put before an answer are not learned; the
token that ends the turn is, also where a template's blocks leave it out. White space after it is not. Text is
tokenised once, without special tokens, since the template writes them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from nemo_automodel.components.datasets.llm.formatting import Encoded, eos_token_id, first_token_of, require_fast
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINK_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


class Conversation(NamedTuple):
    """Messages as chat templates take them, and the tools offered."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class _Turn(NamedTuple):
    message: Message
    span: Span


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
        self._tokenizer, self._template = tokenizer, template
        self._answer_only, self._mask_history, self._mask_reasoning = answer_only, mask_history, mask_reasoning
        self._eos_id = eos_token_id(tokenizer)
        self._special_tokens = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)

    def encode(self, items: Sequence[Conversation], where: Sequence[str]) -> list[Encoded]:
        """Render and tokenise conversations; ``where`` names each for messages.

        Raises:
            UserError: no assistant turn, the template refuses a conversation, or it rewrites earlier turns so that
                training and serving would differ.
        """
        rendered = [self._learned_spans(item, place) for item, place in zip(items, where, strict=True)]
        texts = [text for text, _ in rendered]
        batch = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        encoded = []
        for row, (text, spans) in enumerate(rendered):
            ids = batch["input_ids"][row]
            learned = [_token_range(batch, row, span, len(text)) for span in spans]
            if spans[-1][1] >= len(text.rstrip()) and not text.rstrip().endswith(self._special_tokens):
                ids = [*ids, self._eos_id]  # the template ends a turn with nothing a server could stop at
                learned[-1] = (learned[-1][0], len(ids))
            if not self._answer_only:
                learned = [(0, len(ids))]
            encoded.append(Encoded(ids, [(start, end) for start, end in learned if start < end]))
        return encoded

    def _learned_spans(self, item: Conversation, where: str) -> tuple[str, list[Span]]:
        """Return the rendered text and the character ranges that are learned, in order."""
        text = self._render(item.messages, item, where)
        if not any(message["role"] == "assistant" for message in item.messages):
            raise UserError(f"{where}: the conversation has no assistant turn, so there is nothing to learn.")
        find = self._turns_by_blocks if _GENERATION_BLOCK.search(self._template) else self._turns_by_prefixes
        turns = [turn for turn in find(text, item, where) if turn.message.get("train") is not False]
        if self._mask_history:
            turns = turns[-1:]
        if not turns:
            raise UserError(f"{where}: no assistant turn is to be learned (`train: false` on all of them).")
        spans = []
        for turn in turns:
            spans += self._without_reasoning(text, turn) if self._mask_reasoning else [turn.span]
        if not spans:
            raise UserError(f"{where}: the assistant's turns hold nothing but reasoning, which is masked.")
        return text, spans

    def _turns_by_blocks(self, text: str, item: Conversation, where: str) -> list[_Turn]:
        """Ask the template's own ``{% generation %}`` blocks."""
        render: Any = render_jinja_template  # its annotation leaves out the second result
        rendered, blocks = render(
            [item.messages],
            tools=item.tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        assert rendered[0] == text
        messages = [message for message in item.messages if message["role"] == "assistant"]
        spans = [self._tidied(text, start, end) for start, end in blocks[0] if start < end]
        if len(spans) == len(messages):
            return [_Turn(message, span) for message, span in zip(messages, spans, strict=True)]
        if not spans or self._mask_history or any("train" in message for message in messages):
            raise UserError(
                f"{where}: the chat template's generation blocks mark {len(spans)} parts, but the conversation has "
                f"{len(messages)} assistant turns. Mend the template, or use one without generation blocks."
            )
        return [_Turn({}, span) for span in spans]

    def _turns_by_prefixes(self, text: str, item: Conversation, where: str) -> list[_Turn]:
        """Render each assistant turn without and with it, and prove that what precedes it is unchanged."""
        turns: list[_Turn] = []
        for i, message in enumerate(item.messages):
            if message["role"] != "assistant":
                continue
            before = self._render(item.messages[:i], item, where, for_generation=True)
            if not text.startswith(before):
                raise UserError(
                    f"{where}: the chat template writes the {i} messages before assistant turn {len(turns) + 1} "
                    "differently once the conversation goes on, so serving would not show what was trained. Use a "
                    "template that only appends, or cut the conversation there."
                )
            is_last = i + 1 == len(item.messages)
            after = text if is_last else self._render(item.messages[: i + 1], item, where)
            end = len(after) if text.startswith(after) else self._find_turn_end(text, len(before), where)
            turns.append(_Turn(message, self._tidied(text, len(before), end)))
        return turns

    def _find_turn_end(self, text: str, start: int, where: str) -> int:
        """Find the end of a turn that the template writes differently when it is the last one (Qwen3's think block)."""
        end_of_turn = self._probe[1]
        found = text.find(end_of_turn, start) if end_of_turn else -1
        if found < 0:
            raise UserError(
                f"{where}: the chat template writes an assistant turn differently once the conversation goes on, and "
                "nothing marks where it ends. Use a template that only appends."
            )
        return found + len(end_of_turn)

    def _tidied(self, text: str, start: int, end: int) -> Span:
        """Move a turn's start behind what the template always puts first, and its end behind the end-of-turn token."""
        lead, end_of_turn = self._probe
        if lead.strip() and text.startswith(lead, start):
            start += len(lead)
        if end_of_turn and not text[start:end].rstrip().endswith(end_of_turn) and text.startswith(end_of_turn, end):
            end += len(end_of_turn)
        stripped = text[start:end].rstrip()
        if stripped.endswith(self._special_tokens):
            end = start + len(stripped)
        return start, end

    @cached_property
    def _probe(self) -> tuple[str, str]:
        """Return what the template writes between generation prompt and answer, and the end of a turn if it is a token.

        The first is empty for most templates; Qwen3's writes an empty think block there.
        """
        answer = "probe answer"
        item = Conversation([{"role": "user", "content": "probe"}, {"role": "assistant", "content": answer}])
        try:
            before = self._render(item.messages[:1], item, "probe", for_generation=True)
            text = self._render(item.messages, item, "probe")
        except UserError:
            return "", ""  # a template for other roles: nothing to learn from this exchange
        if answer not in text or not text.startswith(before):
            return "", ""
        lead, _, tail = text[len(before) :].partition(answer)
        end_of_turn = tail.rstrip()
        return lead, end_of_turn if end_of_turn.endswith(self._special_tokens) else ""

    def _without_reasoning(self, text: str, turn: _Turn) -> list[Span]:
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

    def _render(self, messages: list[Message], item: Conversation, where: str, for_generation: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=item.tools,  # type: ignore[arg-type]
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=for_generation,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{where}: the chat template refuses the conversation: {reason}") from error


def _token_range(batch: Any, row: int, span: Span, num_chars: int) -> tuple[int, int]:
    """Return the range of tokens that cover a character of ``span``, straddling ones included."""
    start, end = span
    first = first_token_of(batch, row, start, end)
    following = first_token_of(batch, row, end, num_chars)
    if following < len(batch["input_ids"][row]) and batch.token_to_chars(row, following).start < end:
        following += 1
    return first, following
